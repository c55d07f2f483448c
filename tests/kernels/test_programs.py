"""Programs that keep only the ops: exported, traced, ahead-of-time compiled. The ops check what kernels rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental._config import patch

from amflow_kernels import am_flow, am_flow_matmul, ops
from amflow_kernels import testing as tt
from tests.kernels.conformance import Subject
from tests.kernels.op_calls import FLOW_OPTIONS, NO_PAIR, ODD_STRIDES, USES, call_op, clip_and_features, op_inputs


@pytest.mark.parametrize("strides", ODD_STRIDES)
@pytest.mark.parametrize("name", USES)
def test_ops_take_tensors_of_any_strides(name: str, strides: str, subject: Subject) -> None:
    """Exported and traced programs call them with whatever they are given."""
    if name.startswith("matmul") and not subject.matmul:
        pytest.skip("this implementation has no motion operator")
    contiguous, odd = op_inputs(), op_inputs()
    for argument in USES[name]:
        odd[argument] = ODD_STRIDES[strides](contiguous[argument])
        contiguous[argument] = odd[argument].clone(memory_format=torch.contiguous_format)
    for found, expected in zip(call_op(name, odd, subject.name), call_op(name, contiguous, subject.name), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


BAD_OP_INPUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "one frame": ("flow", {"q": torch.zeros(1, 1, 2, 5, 6), "k": torch.zeros(1, 1, 2, 7, 6)}, r"q: expected more"),
    "integers": ("flow", {"q": torch.zeros(1, 3, 2, 5, 6, dtype=torch.int32)}, r"q: expected float32.*got torch.int32"),
    "another D": ("flow", {"k": torch.zeros(1, 3, 2, 7, 5)}, r"k: expected the shape of q.*got \(1, 3, 2, 7, 5\)"),
    "another T": ("matmul", {"k": torch.zeros(1, 4, 2, 7, 6)}, r"k: expected the shape of q.*got \(1, 4, 2, 7, 6\)"),
    "half features": ("matmul", {"x": torch.zeros(1, 2, 2, 7, 4, dtype=torch.float16)}, r"x: expected float32"),
    "other features": ("matmul", {"x": torch.zeros(1, 2, 2, 5, 4)}, r"x: expected features of the keys"),
    "dflow of other pairs": ("flow backward", {"dflow": torch.zeros(1, 3, 2, 7)}, r"dflow: expected the shape"),
    "half dflow": ("flow backward", {"dflow": torch.zeros(1, 2, 2, 7).half()}, r"dflow: expected the dtype of"),
    "dy of other queries": ("matmul backward", {"dy": torch.zeros(1, 2, 2, 7, 4)}, r"dy: expected the shape"),
    "double dy": ("matmul backward", {"dy": torch.zeros(1, 2, 2, 5, 4).double()}, r"dy: expected the dtype of the"),
}  # fmt: skip


@pytest.mark.subjects("cpu")  # the checks come before any implementation
@pytest.mark.parametrize("name", BAD_OP_INPUTS)
def test_ops_make_the_checks_themselves(name: str, impl: str) -> None:
    """Programs that skip the public functions get their errors."""
    op, changes, message = BAD_OP_INPUTS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call_op(op, op_inputs() | changes, impl)


def test_the_backward_takes_only_what_the_forward_saved(impl: str) -> None:
    q, k, _ = clip_and_features()
    dflow, saved = torch.zeros(1, 2, 2, 7), torch.zeros(5)
    with pytest.raises(ValueError, match=r"saved: expected what the forward returned.*got torch.float32 \(5,\)"):
        ops.am_flow_backward(dflow, q, k, *NO_PAIR, *FLOW_OPTIONS, [True, True, False, False], impl, saved)


# ---------------------------------------------------------------------------------------------------- programs


class FlowAndProduct(torch.nn.Module):
    """All that a program without Python keeps of this library: the two ops."""

    def forward(self, q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return am_flow(q, k, scale=0.3), am_flow_matmul(q, k, x, scale=0.3, softmax=True)


def exported() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.export.export(FlowAndProduct(), clip_and_features()).module()


def traced() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.jit.trace(FlowAndProduct(), clip_and_features())


PROGRAMS = {"exported": exported, "traced": traced}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_read_tensors_of_other_strides_than_their_example(program: str) -> None:
    run, inputs = PROGRAMS[program](), clip_and_features()
    for strides in ("transposed", "every second element", "expanded last dimension", "negated view"):
        odd = [ODD_STRIDES[strides](x) for x in inputs]
        expected = FlowAndProduct()(*(x.clone(memory_format=torch.contiguous_format) for x in odd))
        for x, y in zip(run(*odd), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_have_gradients(program: str) -> None:
    """Those of the functions, though their example needed none."""
    run, inputs = PROGRAMS[program](), [x.requires_grad_() for x in clip_and_features()]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator) for y in FlowAndProduct()(*inputs)]
    found, expected = (torch.autograd.grad(f(*inputs), inputs, weights) for f in (run, FlowAndProduct()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_refuses_what_the_public_functions_refuse() -> None:
    """torch.jit.trace keeps no check but that of the ops."""
    run, (q, k, x) = traced(), clip_and_features()
    for inputs, message in (
        ((q.int(), k.int(), x), "q: expected float32"),
        ((q, k[..., :5], x), "k: expected the shape of q"),
        ((q[:, :1], k[:, :1], x), "q: expected more frames"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*inputs)


@pytest.mark.slow
def test_an_ahead_of_time_compiled_program_reads_any_strides(tmp_path: Path) -> None:
    """AOTInductor, which calls the ops with the memory that it was given."""
    program = torch.export.export(FlowAndProduct(), clip_and_features())
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    run, inputs = torch._inductor.aoti_load_package(file), clip_and_features()
    for make in (lambda x: x, ODD_STRIDES["transposed"], ODD_STRIDES["every second element"]):
        odd = [make(x) for x in inputs]
        for x, y in zip(run(*odd), FlowAndProduct()(*inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.subjects("reference", "cpu")
def test_an_exported_program_serves_other_shapes(impl: str) -> None:
    """torch.export keeps the op as one node."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return am_flow(q, k, head_reduction="mean", center=True, impl=impl) * 2

    q, k = tt.make_qk(2, 3, (2,), 5, 7, 6)
    # From 3 on, since PyTorch specialises sizes of 1, here of T - 1, unless it is told not to, as below.
    B, T, Nq, Nk = (torch.export.Dim(name, min=3 if name == "T" else 2) for name in ("B", "T", "Nq", "Nk"))
    program = torch.export.export(Model(), (q, k), dynamic_shapes=({0: B, 1: T, 3: Nq}, {0: B, 1: T, 3: Nk}))
    assert [n.target for n in program.graph.nodes].count(torch.ops.amflow.am_flow.default) == 1
    for B, T, Nq, Nk in ((5, 9, 7, 11), (2, 3, 6, 9), (5, 6, 17, 19), (2, 7, 33, 21)):
        q, k = tt.make_qk(B, T, (2,), Nq, Nk, 6)
        assert torch.equal(program.module()(q, k), Model()(q, k))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_clips_of_two_frames(strict: bool) -> None:
    """PyTorch's option for sizes of 1, which a slice q[:, 1:] needs as much as a flow does."""
    T = torch.export.Dim("T", min=2)
    with patch(backed_size_oblivious=True):
        program = torch.export.export(
            FlowAndProduct(), clip_and_features(4), dynamic_shapes=({1: T}, {1: T}, {1: T - 1}), strict=strict
        )
    for frames in (2, 3, 7):
        inputs = clip_and_features(frames)
        for x, y in zip(program.module()(*inputs), FlowAndProduct()(*inputs), strict=True):
            assert torch.equal(x, y)

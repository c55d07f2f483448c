"""The GPU suite's own logic, as far as it can be tried without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from amflow_kernels.impl.triton import configs
from benchmarks import gpu_suite

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter"),
]


def test_problems() -> None:
    """No problem twice, every dtype alike, and every choice of kernels among them."""
    problems = gpu_suite.problems()
    assert len({str(problem) for problem in problems}) == len(problems)
    counts = {
        dtype: sum(p.dtype == dtype for p in problems) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert len(set(counts.values())) == 1
    for name in ("lag", "temperature", "scale", "head_reduction"):
        assert any(name in problem.options for problem in problems)
    of_cuda = [p for p in problems if p.impl == "cuda"]
    assert max(max(p.tokens) for p in of_cuda) == 600
    assert max(p.D for p in of_cuda) == 128
    h100 = configs.Device(90, 232448, 132)
    strips = [configs.strip(p.tokens[1], p.D, p.dtype, h100) for p in problems if p.impl == "triton"]
    assert None in strips
    for kind in ("REST", "PARTIAL"):
        assert {bool(getattr(strip, kind)) for strip in strips if strip} == {False, True}
    assert {(s.ROW_TILES, s.BLOCK_N, s.KEY_TILES > 1) for s in strips if s} >= {
        (1, 64, False),
        (1, 256, False),
        (2, 32, True),
        (1, 64, True),
    }


@pytest.mark.parametrize(
    "problem",
    [
        gpu_suite.Problem((17, 17), 16, dtype=torch.float32),
        gpu_suite.Problem((33, 33), 16, dtype=torch.float16, pair=True, layout="offset"),
        gpu_suite.Problem((2, 2), 8, dtype=torch.float32, options={"head_reduction": "mean_map"}),
    ],
    ids=str,
)
def test_verdict(problem: gpu_suite.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right result passes, and a wrong one is told."""
    assert gpu_suite.verdict(problem, "cpu") is None
    name = "am_flow_pair" if problem.pair else "am_flow"
    right = getattr(gpu_suite, name)
    monkeypatch.setattr(gpu_suite, name, lambda *frames, **options: right(*frames, **options) * (1 + 1e-4))
    assert "budget" in str(gpu_suite.verdict(problem, "cpu"))


def test_drop_in() -> None:
    """What the suite asks of the drop-in holds on the CPU."""
    assert gpu_suite.drop_in("cpu") == {"failed": {}}


def test_time_table() -> None:
    """Ratios are of the peer's time over ours, and a peer that did not fit leaves a gap."""
    row = {"shape": "1x2x3x4x5", "direction": "forward", "bytes": 2_000_000, "bound": 1e-4}
    rows = [
        {**row, "provider": "am_flow bf16", "median": 2e-4},
        {**row, "provider": "SDPA bf16", "median": 3e-4},
        {"shape": "1x2x3x4x5", "direction": "forward", "provider": "eager fp32"},
    ]
    assert gpu_suite.time_table(rows, "forward").rows == [["1x2x3x4x5", "200", "50%", "1.50x", "", "2.0"]]

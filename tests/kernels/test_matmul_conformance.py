"""The rules that every implementation of the motion operator keeps, each once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair
from amflow_kernels import testing as tt
from amflow_kernels.problem import MatmulProblem, Problem
from tests.kernels import conformance
from tests.kernels.conformance import BF16, FP16, FP32, OPERATORS, MatmulCase, Subject

pytestmark = pytest.mark.operator  # rules for implementations that have the motion operator

DTYPES = (FP32, BF16, FP16)
all_operators = pytest.mark.parametrize("operator", list(OPERATORS))


def options_of(operator: str, temperature: float = 0.7) -> dict[str, Any]:
    transpose, softmax = OPERATORS[operator]
    options: dict[str, Any] = {"transpose": transpose, "softmax": softmax}
    return {**options, "temperature": temperature} if softmax else options


def grads_of(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients for a fixed dy that is the same for every batch item, pair and group."""
    return torch.autograd.grad(y, inputs, tt.make_dflow(y.shape[-2:]).to(y.dtype).expand(y.shape))


# ---------------------------------------------------------------------------------------------------- values


def test_forward_is_within_its_budget(subject: Subject, matmul_case: MatmulCase) -> None:
    conformance.check_product(matmul_case, subject.name)


def test_gradients_are_within_their_budget(subject: Subject, matmul_case: MatmulCase) -> None:
    conformance.check_product_gradients(matmul_case, subject.name)


@all_operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(17, 17), (70, 197)], ids=str)
def test_equal_frames_give_exactly_zero_and_no_gradient(
    tokens: tuple[int, int], dtype: torch.dtype, operator: str, impl: str
) -> None:
    """M is exactly 0 and P is 1 / Nk, up to the rounding of a sum; dq and dk are exactly 0."""
    q, k = tt.make_qk(1, 4, (2,), *tokens, 40, dtype=dtype, frame_step=0)
    options = options_of(operator)
    x = tt.make_features(q, k, 5, lag=2, transpose=options["transpose"])
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    y = am_flow_matmul(*inputs, lag=2, impl=impl, **options)
    dq, dk, dx = grads_of(y, inputs)
    assert torch.count_nonzero(dq) == torch.count_nonzero(dk) == 0
    if options["softmax"]:
        rows = x.detach().double().sum(-2, keepdim=True) / tokens[1]
        assert torch.equal(y, y[..., :1, :].expand_as(y))
        torch.testing.assert_close(y.detach().double(), rows.expand_as(y), rtol=3e-7, atol=3e-7)
    else:
        assert torch.count_nonzero(y) == torch.count_nonzero(dx) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(33, 70), (257, 257)], ids=str)
def test_ones_give_the_flow(tokens: tuple[int, int], dtype: torch.dtype, impl: str) -> None:
    """P^T 1 is the flow, P 1 is 1, and M adds up to the same by rows and by columns."""
    Nq, Nk = tokens
    q, k = tt.make_qk(1, 4, (3,), Nq, Nk, 64, dtype=dtype)
    queries, keys = torch.ones(1, 3, 3, Nq, 1), torch.ones(1, 3, 3, Nk, 1)
    flow = am_flow_matmul(q, k, queries, transpose=True, softmax=True, temperature=0.5, impl=impl).squeeze(-1)
    tt.assert_flow(flow, tt.oracle_flow(Problem(q, k, temperature=0.5, center=True)), Nq, temperature=0.5)
    same = am_flow(q, k, temperature=0.5, impl=impl)
    torch.testing.assert_close(flow, same, rtol=0, atol=2 * tt.flow_budget(same.max().item(), 0.5))
    ones = am_flow_matmul(q, k, keys, softmax=True, impl=impl)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=5e-7)
    by_query, by_key = (am_flow_matmul(q, k, x, transpose=t, impl=impl) for x, t in ((keys, False), (queries, True)))
    torch.testing.assert_close(by_query.sum(-2), by_key.sum(-2), rtol=1e-5, atol=0)


@pytest.mark.subjects("cpu", "neon", "neon_bf16", "triton")  # the reference sums in another order
@pytest.mark.parametrize("operator", ["P", "P^T"])
def test_features_equal_for_all_keys_have_no_gradient(operator: str, impl: str) -> None:
    """The rows of P sum to 1, so dq and dk are exactly 0."""
    q, k = (t.requires_grad_() for t in tt.make_qk(1, 3, (2,), 33, 70, 24))
    transpose, _ = OPERATORS[operator]
    x = tt.make_features(q, k, 3, lag=1, transpose=transpose)
    if not transpose:
        x = x[..., :1, :].expand_as(x)
    y = am_flow_matmul(q, k, x, impl=impl, **options_of(operator))
    dy = torch.randn(3).expand_as(y) if transpose else torch.randn(y.shape)
    for grad in torch.autograd.grad(y, (q, k), dy):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("operator", ["M", "M^T"])
def test_an_infinite_feature_stays_in_its_column(operator: str, impl: str) -> None:
    q, k = tt.make_qk(1, 2, (1,), 5, 7, 6)
    transpose, _ = OPERATORS[operator]
    x = tt.make_features(q, k, 3, lag=1, transpose=transpose)
    x[..., -1, 1] = math.inf
    y = am_flow_matmul(q, k, x, transpose=transpose, impl=impl)
    torch.testing.assert_close(y, am_flow_matmul(q, k, x, transpose=transpose, impl="reference"))
    assert y[..., 1].isinf().any()
    assert y[..., [0, 2]].isfinite().all()


# ---------------------------------------------------------------------------------------------------- NaN, infinities


@all_operators
@pytest.mark.parametrize("kind", conformance.BAD_ROWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [(5, 70), (70, 150)], ids=str)
def test_a_bad_map_row_makes_nan_of_exactly_its_results(
    tokens: tuple[int, int], dtype: torch.dtype, kind: str, operator: str, impl: str
) -> None:
    """Its own row, or transposed every row of its pair."""
    b, t, h, lag = 1, 2, 1, 2
    q, k = tt.make_qk(2, 5, (2,), *tokens, 8, dtype=dtype)
    options = {**options_of(operator), "lag": lag, "impl": impl}
    x = tt.make_features(q, k, 3, lag=lag, transpose=options["transpose"])
    clean = am_flow_matmul(q, k, x, **options)
    conformance.make_bad_row(kind, q[b, t, h], k[b, t, h])
    rows = slice(None) if options["transpose"] or kind == "NaN in k" else 3  # such a key is in all rows of the map
    expected, touched = torch.zeros_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
    for pair in (t - lag, t):
        expected[b, pair, h, rows] = True
        touched[b, pair, h] = kind != "NaN in q"  # the other kinds change the logits of other rows too
    y = am_flow_matmul(q, k, x, **options)
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(y[~(expected | touched)], clean[~(expected | touched)])


@all_operators
@pytest.mark.parametrize("kind", conformance.BAD_ROWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_bad_map_row_makes_nan_of_the_gradients_that_it_moves(
    kind: str, dtype: torch.dtype, operator: str, impl: str
) -> None:
    """Those of its query, and of all keys, in its own frame and in those that it is paired with; of no others."""
    q, k = tt.make_qk(1, 5, (2,), 20, 33, 8, dtype=dtype)
    options = options_of(operator)
    x = tt.make_features(q, k, 3, lag=1, transpose=options["transpose"])

    def gradients() -> tuple[Tensor, ...]:
        inputs = tuple(t.detach().requires_grad_() for t in (q, k))
        return grads_of(am_flow_matmul(*inputs, x, impl=impl, **options), inputs)

    clean = gradients()
    conformance.make_bad_row(kind, q[0, 2, 1], k[0, 2, 1])
    conformance.check_bad_gradients(kind, gradients(), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["P", "P^T"])
@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_hold_at_the_lowest_temperature(seed: int, operator: str, dtype: torch.dtype, impl: str) -> None:
    """Weights of 1e-28 meet exponentials of 1e27: their product with the rest must not underflow, however small dy.

    A dy that is 2^-40 times as large gives exactly such gradients, but for numbers below the normal ones.
    """
    row = {name: values[0] for name, values in conformance.MATMUL_FACTORS.items()}
    row |= {"tokens": (8, 9), "C": 3, "D": 16, "logits": "cut", "temperature": 1 / 64, "dtype": dtype, "seed": seed}
    case = MatmulCase(**row, operator=operator)
    conformance.check_product_gradients(case, impl)
    if dtype == FP32:
        problem = case.problem()
        dy = case.incoming(problem.product_shape)
        large, small = (conformance.gradients(problem, [True] * 3, dy * unit, impl) for unit in (1, 2.0**-40))
        for one, other in zip(large, small, strict=True):
            torch.testing.assert_close(other * 2.0**40, one, rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("temperature", conformance.FACTORS["temperature"])
@pytest.mark.parametrize("logits", conformance.FACTORS["logits"])
@pytest.mark.parametrize("operator", ["P", "P^T"])
@pytest.mark.subjects("reference", "cpu")  # the tables of the others, which are slower, have these pairs
def test_budgets_hold_for_every_kind_of_map_at_every_temperature(
    operator: str, logits: str, temperature: float, impl: str
) -> None:
    row = {name: values[0] for name, values in conformance.MATMUL_FACTORS.items()}
    row |= {"tokens": (40, 70), "C": 5, "D": 64, "logits": logits, "temperature": temperature}
    case = MatmulCase(**row, operator=operator)
    conformance.check_product(case, impl)
    conformance.check_product_gradients(case, impl)


@all_operators
def test_a_logit_of_minus_infinity_weighs_nothing(operator: str, impl: str) -> None:
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 8)
    options = options_of(operator)
    x = tt.make_features(q, k, 3, lag=1, transpose=options["transpose"])
    finite = MatmulProblem(q.clone(), k.clone(), x=x, **options)
    q[0, 1, 0, :, 0] = -q[0, 1, 0, :, 0].abs() - 0.1
    k[0, 1, 0, [0, 2, 69], 0] = math.inf
    problem = MatmulProblem(q, k, x=x, **options)
    exact = tt.oracle_matmul(problem)
    assert exact.isfinite().all()
    tt.assert_matmul(tt.run(problem, impl), exact, tt.matmul_budget(finite))


# ---------------------------------------------------------------------------------------------------- autograd


@all_operators
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_clips_or_no_pairs_give_an_empty_product(shape: tuple[int, int], operator: str, impl: str) -> None:
    B, P = shape
    transpose, _ = OPERATORS[operator]
    q, k = torch.zeros(B, P, 2, 5, 4, requires_grad=True), torch.zeros(B, P, 2, 6, 4, requires_grad=True)
    x = torch.zeros(B, P, 2, 5 if transpose else 6, 3, requires_grad=True)
    y = am_flow_matmul_pair(q, k, q, k, x, impl=impl, **options_of(operator))
    assert y.shape == (B, P, 2, 6 if transpose else 5, 3)
    grads = torch.autograd.grad(y.sum(), (q, k, x))
    assert [g.shape for g in grads] == [q.shape, k.shape, x.shape]
    if P:
        assert am_flow_matmul(q, k, x[:, 1:], impl=impl, **options_of(operator)).shape[:2] == (B, P - 1)


@all_operators
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (1, 2)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(
    needed: tuple[int, ...], operator: str, impl: str
) -> None:
    q, k = tt.make_qk(1, 4, (1,), 17, 19, 8)
    frames = (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
    options = options_of(operator)
    inputs = [*frames, tt.make_features(*frames[:2], 5, lag=0, transpose=options["transpose"])]
    grads: list[list[Tensor | None]] = []
    for wanted in (range(5), needed):
        asked = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        am_flow_matmul_pair(*asked, impl=impl, **options).square().sum().backward()
        grads.append([t.grad for t in asked])
    for i, (every, some) in enumerate(zip(*grads, strict=True)):
        assert (some is not None) == (i in needed)
        assert some is None or torch.equal(some, every)


def test_nothing_is_saved_without_grad_and_the_inputs_with_it(impl: str) -> None:
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    x = tt.make_features(q, k, 3, lag=1)
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        assert am_flow_matmul(q, k, x, impl=impl).grad_fn is None
        assert not saved
        assert am_flow_matmul(q, k, x.clone().requires_grad_(), impl=impl).requires_grad
    assert [s.shape for s in saved] == [q.shape, k.shape, x.shape]


@pytest.mark.parametrize("operator", ["M"])
def test_second_order_gradients_raise(operator: str, impl: str) -> None:
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    inputs = tuple(t.requires_grad_() for t in (q, k, tt.make_features(q, k, 3, lag=1)))
    y = am_flow_matmul(*inputs, impl=impl, **options_of(operator))
    dx = torch.autograd.grad(y.square().sum(), inputs[2], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first-order gradients only; a second-order gradient was requested"):
        torch.autograd.grad(dx.sum(), inputs[0])


@all_operators
def test_autocast_changes_no_bit(operator: str, impl: str) -> None:
    """It casts neither inputs nor results, forward or backward."""
    q, k = tt.make_qk(1, 3, (2,), 30, 50, 16)
    options = options_of(operator)
    x = tt.make_features(q, k, 3, lag=1, transpose=options["transpose"])
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            y = am_flow_matmul(*inputs, impl=impl, **options)
            results.append((y, *grads_of(y, inputs)))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == FP32
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", ["M", "P"])
def test_every_two_values_of_any_two_factors_meet_in_a_case(kind: str) -> None:
    for subject in conformance.SUBJECTS.values():
        if not subject.matmul or subject.all_rows is not None:
            continue
        factors = {**conformance.MATMUL_FACTORS, **subject.matmul_factors, "dtype": list(subject.dtypes)}
        rows = [vars(case) for case in conformance.matmul_cases(subject) if case.operator.startswith(kind)]
        for a, b in itertools.combinations(factors, 2):
            seen = {(row[a], row[b]) for row in rows}
            for x, y in itertools.product(factors[a], factors[b]):
                allowed = subject.takes_row({a: x, b: y}, subject.most_matmul_work)
                assert (x, y) in seen or not allowed, f"{subject}: {a}={x} never meets {b}={y}"

"""The logic of the GPU suite, as far as it runs without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from amflow_kernels.impl.triton import configs
from benchmarks.gpu import checks, times

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter"),
]


def test_no_case_is_there_twice_and_all_dtypes_have_the_same_number() -> None:
    cases = checks.cases()
    assert len({str(case) for case in cases}) == len(cases)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert len({sum(case.dtype == dtype for case in cases) for dtype in dtypes}) == 1


def test_cases_cover_every_option_and_the_limits_of_the_cuda_kernels() -> None:
    cases = checks.cases()
    assert {name for case in cases for name in case.options} == {"lag", "temperature", "scale", "head_reduction"}
    assert any(case.lse for case in cases)
    assert any(case.pair for case in cases)
    for_cuda = [case for case in cases if case.impl == "cuda"]
    assert max(max(case.tokens) for case in for_cuda) == 600
    assert max(case.D for case in for_cuda) == 128


def test_cases_cover_every_way_in_which_the_triton_forward_is_launched() -> None:
    h100 = configs.Device(90, 232448, 132)
    cases = [case for case in checks.cases() if case.impl == "triton"]
    strips = [configs.strip(case.tokens[1], case.D, case.dtype, h100) for case in cases]
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
    "case",
    [
        checks.Case((17, 17), 16, dtype=torch.float32),
        checks.Case((33, 33), 16, dtype=torch.float16, pair=True, layout="offset"),
        pytest.param(
            checks.Case((2, 2), 8, dtype=torch.float32, options={"head_reduction": "mean_map"}), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_correct_result_passes_and_a_wrong_one_fails(case: checks.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.failure(case, "cpu") is None
    run = checks.tt.run
    monkeypatch.setattr(checks.tt, "run", lambda problem, impl: run(problem, impl) * (1 + 1e-4))
    assert "budget" in str(checks.failure(case, "cpu"))


def test_given_log_sum_exps_are_those_of_the_logits() -> None:
    problem = checks.Case((5, 7), 4, dtype=torch.float32, lse=True).problem("cpu")
    assert problem.lse is not None
    expected = torch.logsumexp(problem.logit_scale * (problem.q @ problem.k.mT), -1)
    torch.testing.assert_close(problem.lse, expected)


def test_the_drop_in_check_passes_on_a_cpu() -> None:
    assert checks.drop_in("cpu") == {"failed": {}}


def test_ratios_are_the_time_of_the_peer_over_ours_and_missing_peers_leave_gaps() -> None:
    row = {"shape": "1x2x3x4x5", "direction": "forward", "bytes": 2_000_000, "bound": 1e-4}
    rows = [
        {**row, "provider": "am_flow bf16", "median": 2e-4},
        {**row, "provider": "SDPA bf16", "median": 3e-4},
        {"shape": "1x2x3x4x5", "direction": "forward", "provider": "eager fp32"},
    ]
    assert times.time_table(rows, "forward").rows == [["1x2x3x4x5", "200", "50%", "1.50x", "", "2.0"]]

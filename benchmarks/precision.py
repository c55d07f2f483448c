"""Measures what float32, the centred form and 16-bit inputs mean for AM flow; prints docs/precision.md.

python -m benchmarks.precision --write
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from amflow_models.cli.offline import clip_path, dinov2_vit_small, read_frames
from torch import Tensor

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.problem import Problem
from benchmarks.result_files import RESULTS, Row, add_write, dumps
from benchmarks.tables import Table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "precision.md"
RESULT = RESULTS / "precision.json"
CLIPS = (("bikes", 224, 8), ("bikes", 518, 3), ("carphone_pristine", 224, 8))  # clip, pixels, frames
STEPS = (1.0, 0.2, 1e-2, 1e-3, 1e-4)  # standard deviations by which synthetic frames differ


def eager_in(dtype: torch.dtype, q: Tensor, k: Tensor) -> Tensor:
    """The formula as a model in `dtype` would compute it."""
    q, k = q.to(dtype), k.to(dtype)
    A = torch.softmax(q.shape[-1] ** -0.5 * (q @ k.mT), dim=-1)
    return torch.softmax((A[:, :-1] - A[:, 1:]).abs(), dim=-1).sum(-2)


def relative(error: Tensor, signal: Tensor) -> float:
    """L2 norm of the error over that of the signal."""
    return (error.norm() / signal.norm()).item()


def clip_row(clip: str, size: int, frames: int) -> Row:
    """One row: the worst block of DINOv2 ViT-S/14 for each error, the median block for the signal."""
    vit = dinov2_vit_small(size)
    with torch.no_grad(), record_qk(vit) as qk:
        vit(read_frames(clip_path(clip), frames, 2, size))
    blocks = [block_errors(q.unsqueeze(0), k.unsqueeze(0)) for q, k in qk.values()]
    signals = sorted(block.pop("signal") for block in blocks)
    worst = {name: max(block[name] for block in blocks) for name in blocks[0]}
    return {"clip": clip, "pixels": size, "signal": signals[len(signals) // 2], **worst}


def block_errors(q: Tensor, k: Tensor) -> dict[str, float]:
    """Relative errors in one block, and the signal: the standard deviation of the flow over tokens."""
    exact = am_flow(q.double(), k.double(), center=True)
    q16, k16 = q.bfloat16(), k.bfloat16()
    exact16 = am_flow(q16.double(), k16.double(), center=True)
    errors = {
        "am_flow, center=True": am_flow(q, k, center=True) - exact,
        "am_flow": am_flow(q, k) - 1 - exact,
        "eager float32": eager_in(torch.float32, q, k) - 1 - exact,
        "am_flow of bfloat16 q, k": am_flow(q16, k16, center=True) - exact16,
        "rounding q, k to bfloat16": exact16 - exact,
        "eager bfloat16": eager_in(torch.bfloat16, q, k).double() - 1 - exact,
    }
    signals = {"am_flow of bfloat16 q, k": exact16}
    rows = {name: relative(error.double(), signals.get(name, exact)) for name, error in errors.items()}
    return {"signal": exact.std(-1).mean().item(), **rows}


def step_row(step: float) -> Row:
    """One row of synthetic frames, float32, 257 tokens: errors of the centred flow and of the gradient."""
    problem = Problem(*tt.make_qk(1, 4, (2,), 257, 257, 64, frame_step=step, logit_std=2.0))
    exact = tt.oracle_flow(replace(problem, center=True))
    dflow = tt.make_dflow(exact.shape)
    oracle = tt.oracle_grads(problem, dflow)
    q, k = problem.q.requires_grad_(), problem.k.requires_grad_()
    grads = torch.autograd.grad(am_flow(q, k), (q, k), dflow)
    with torch.no_grad():
        return {
            "step": step,
            "signal": exact.std(-1).mean().item(),
            "am_flow, center=True": relative(am_flow(q, k, center=True) - exact, exact),
            "am_flow": relative(am_flow(q, k).double() - 1 - exact, exact),
            "eager float32": relative(eager_in(torch.float32, q, k).double() - 1 - exact, exact),
            "gradient": max(relative(g.double() - o, o) for g, o in zip(grads, oracle, strict=True)),
        }


def table(title: str, rows: list[Row]) -> Table:
    """Errors with two digits, steps as they are."""

    def cell(name: str, value: float | str | int) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:g}" if name == "step" else f"{value:.1e}"

    return Table(title, list(rows[0]), [[cell(name, row[name]) for name in row] for row in rows], [])


def page(results: dict[str, Any]) -> str:
    """docs/precision.md from the data."""
    return f"""# Precision

Written by `python -m benchmarks.precision` with torch {results["torch"]} and the CPU kernels. Errors are relative
to the signal: the L2 norm of the error divided by that of flow - 1. Both are taken against float64 on the same q and
k, and each figure is that of the worst of 12 blocks.

## AM flow is 1 plus a tiny change

Attention hardly changes from one frame to the next, and the flow of a token is 1 plus that change. In the median
block of DINOv2 ViT-S/14, the standard deviation of the flow over tokens (the column *signal*) is a few 1e-3 here.
Numbers near 1 are spaced by 6e-8 in float32 and by 4e-3 or 8e-3 in bfloat16. Hence:

- **The result is float32, whatever the input, under any autocast.** Computed in bfloat16, more than half of the
  signal is wrong: see *eager bfloat16*.
- **`center=True` gives flow - 1 (in general flow - Nq / Nk) without cancellation**, by e = expm1(M / temperature) and
  sums of deviations ([the maths](maths.md)). Subtracting 1 afterwards loses up to a digit and a half; the stiller the
  clip, the more.
- **bfloat16 q and k are fine as inputs**: *am_flow of bfloat16 q, k* is the error for the given inputs. The next column
  shows how rounding the model's q and k to bfloat16 changes the flow. This comes from the model's arithmetic, and no
  kernel can undo it.
- **Gradients of 16-bit q and k on a GPU** multiply gradients of the logits that are rounded to bfloat16, or for float16
  to TF32. Those of a query sum to 0 over the keys, so that what all keys have in common cancels in dq; in the first
  block of DINOv2 it is several times what tells the keys apart. Rounded, they would no longer sum to 0, and bfloat16 dq
  would miss its budget there (`tests/kernels/test_real_clip.py`). So dq has a second product, with what rounding
  leaves, and so has dk of few tokens.
- **Gradients of bfloat16 q and k on a CPU with bfloat16 dot products** are made from rounded gradients of the logits,
  too. There dq has a correction instead of the second product: what rounding takes from the sum of a query in a block
  of keys, times the mean of these keys. With fewer than 32 queries, keys or columns, too few errors average out, and
  the products are those of float32.

{table("Real clips, DINOv2 ViT-S/14", results["clips"]).markdown()}

## The stiller the clip, the harder

Synthetic float32 frames that differ by *step* standard deviations, 257 tokens. The gradient's error grows as well:
where A[t] and A[t+1] agree to within rounding, the sign of their difference is noise in any finite precision, and so
is their share of the gradient.

{table("Frames that differ little", results["steps"]).markdown()}

## Error budgets

`amflow_kernels/testing.py` states the budgets, and the tests hold every implementation to them, for flat and peaked
maps, one-hot rows and equal rows, at every temperature from 1/64:

- The flow: 5e-7 times the largest value of the flow (at least 1), divided by the temperature if that is below 1, for
  logits of standard deviation up to 6. A low temperature amplifies every error of the maps. Rounding errors of the
  logits usually average out over the queries. Where all queries of a frame are equal they add up, and where frames are
  unrelated and the temperature is low a value can depend on one query: `logit_error` bounds their share there, and for
  larger logits.
- The centred flow: 1e-5 relative at a step of 0.2, and 1e-3 at a step of 1e-3.
- Gradients: 2e-5 relative plus the share of ties; or, where the terms of a gradient cancel to less than a fortieth,
  four units of float32 rounding of the terms.

The reference in eager PyTorch centres in the same way.
"""


def main() -> None:
    """Measures and prints the page; with ``--write``, writes it and its data."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_write(parser, RESULT, PAGE)
    write = parser.parse_args().write
    clips, steps = [clip_row(*clip) for clip in CLIPS], [step_row(step) for step in STEPS]
    results = {"torch": torch.__version__, "clips": clips, "steps": steps}
    if write:
        RESULT.write_text(dumps(results))
        PAGE.write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()

"""One call of the library: its tensors, its options, and every check of both.

`Problem` is a call of `am_flow` or `am_flow_pair`, `MatmulProblem` one of `am_flow_matmul` or `am_flow_matmul_pair`.
Their constructors make the checks, so that those hold in the public functions and again inside the ops, which exported
and compiled programs call directly. Implementations, testing helpers and native kernels take a problem whole: this is
the only list of the options.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

HeadReduction = Literal["none", "mean", "mean_map"]
HEAD_REDUCTIONS = get_args(HeadReduction)
MAX_HEAD_DIM = 256
MAX_FEATURES = 256
MIN_TEMPERATURE = 1 / 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


class FlowOptions(TypedDict, total=False):
    """The options of `am_flow` but for `scale`, `lse` and `impl`, for functions that pass them on."""

    lag: int
    temperature: float
    head_reduction: HeadReduction
    center: bool
    out_dtype: torch.dtype | None


@dataclass(eq=False)  # not frozen: then setting the fields would take as long as checking them
class MapPairs:
    """Pairs of attention maps, the input of both operators. Its fields are not to be changed.

    Attributes:
        q: queries, (B, T, *G, Nq, D), G = (heads,) or (heads, windows). In pair form those of the first frames.
        k: keys, (B, T, *G, Nk, D).
        q_b, k_b: queries and keys of the second frames, of the same shapes: pair form, in which T counts pairs.
            None: a clip, whose frames t and t + lag are a pair.
        scale: factor on the logits; None means D ** -0.5.
        lag: distance of the two frames of a pair in a clip, at least 1. Ignored in pair form.
        temperature: divides the change before the second softmax, at least 1/64.
        logit_scale: `scale` as a number.
        shift: the second map of pair t is that of frame t + shift: lag, or 0 in pair form.

    Raises:
        TypeError, ValueError: a tensor or an option is not as described; the message names it.
    """

    q: Tensor
    k: Tensor
    _: KW_ONLY
    q_b: Tensor | None = None
    k_b: Tensor | None = None
    scale: float | None = None
    lag: int = 1
    temperature: float = 1.0
    logit_scale: float = field(init=False)
    shift: int = field(init=False)

    def __post_init__(self) -> None:
        if self.pair:
            self._check_pair_form()
        else:
            self._check_clip()
        if self.scale is not None:
            _check_number("scale", self.scale, self.result_dtype)
        _check_number("temperature", self.temperature, torch.float64)  # it divides: infinity would do
        if self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                "temperature: expected at least 1/64 (below it the second softmax overflows), "
                f"got {float(self.temperature)}"
            )
        self.logit_scale = self.D**-0.5 if self.scale is None else float(self.scale)
        self.shift = 0 if self.pair else self.lag

    def _check_clip(self) -> None:
        check_frames(self.q, self.k, "q", "k")
        if not isinstance(self.lag, int) or isinstance(self.lag, bool):
            raise TypeError(f"lag: expected an int, got {type(self.lag).__name__}")
        if self.lag < 1:
            raise ValueError(f"lag: expected at least 1, got {self.lag}")
        if self.lag >= self.q.shape[1]:
            raise ValueError(f"q: expected more frames (T) than lag = {self.lag}, got T = {self.T}")

    def _check_pair_form(self) -> None:
        check_frames(self.q, self.k, "q_a", "k_a")
        check_frames(self.q_b, self.k_b, "q_b", "k_b")
        for name, value, other_name, other in (("q_b", self.q_b, "q_a", self.q), ("k_b", self.k_b, "k_a", self.k)):
            assert value is not None  # `check_frames` has refused it
            check_same(name, value, other_name, other)
            if value.shape != other.shape:
                raise ValueError(
                    f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}"
                )

    @property
    def pair(self) -> bool:
        """Whether the two maps of each pair are given explicitly, by two sets of frames."""
        return self.q_b is not None or self.k_b is not None

    @property
    def frames(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, q_b, k_b."""
        return self.q, self.k, self.q_b, self.k_b

    @property
    def B(self) -> int:  # noqa: N802
        """Clips."""
        return self.q.shape[0]

    @property
    def T(self) -> int:  # noqa: N802
        """Frames of a clip, or pairs in pair form."""
        return self.q.shape[1]

    @property
    def P(self) -> int:  # noqa: N802
        """Pairs of frames of a clip."""
        return self.T - self.shift

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def Nq(self) -> int:  # noqa: N802
        """Queries of a map."""
        return self.q.shape[-2]

    @property
    def Nk(self) -> int:  # noqa: N802
        """Keys of a map."""
        return self.k.shape[-2]

    @property
    def D(self) -> int:  # noqa: N802
        """Head dimension."""
        return self.q.shape[-1]

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the computation and of the result: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Problem(MapPairs):
    """A call of `am_flow`, or in pair form of `am_flow_pair`.

    Attributes besides those of `MapPairs`:
        head_reduction: "none", "mean" (mean of the heads' flows) or "mean_map" (flow of the head-averaged maps).
        center: the result is flow - Nq / Nk.
        out_dtype: what the public functions convert the result to; None: nothing. Implementations ignore it.
        lse, lse_b: the rows' log-sum-exps of the maps of (q, k) and of (q_b, k_b), float32 (B, T, *G, Nq), or None.
        reduction: `head_reduction` as the native kernels number it.
        flow_shape: (B, P, *G, Nk), or (B, P, *G[1:], Nk) with a head reduction.
    """

    _: KW_ONLY
    head_reduction: str = "none"
    center: bool = False
    out_dtype: torch.dtype | None = None
    lse: Tensor | None = None
    lse_b: Tensor | None = None
    reduction: int = field(init=False)
    flow_shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_reduction not in HEAD_REDUCTIONS:
            raise ValueError(f"head_reduction: expected one of {HEAD_REDUCTIONS}, got {self.head_reduction!r}")
        _check_bool("center", self.center)
        if self.out_dtype is not None:
            _check_out_dtype(self.out_dtype, self.center)
        if self.lse is not None:
            names = ("lse_a", "q_a") if self.pair else ("lse", "q")
            _check_lse(self.lse, self.q, *names)
        if self.lse_b is not None and self.q_b is not None:
            _check_lse(self.lse_b, self.q_b, "lse_b", "q_b")
        self.reduction = HEAD_REDUCTIONS.index(self.head_reduction)
        B, T, *groups, _, _ = self.q.shape
        self.flow_shape = (B, T - self.shift, *(groups if self.head_reduction == "none" else groups[1:]), self.Nk)


@dataclass(eq=False)
class MatmulProblem(MapPairs):
    """A call of `am_flow_matmul`, or in pair form of `am_flow_matmul_pair`.

    Attributes besides those of `MapPairs`:
        x: features of the keys, (B, P, *G, Nk, C), or transposed of the queries, (B, P, *G, Nq, C); C from 1 to 256;
            float32 or the dtype of q.
        transpose: multiply by the transpose of the operator.
        softmax: the operator is P, the softmax of M / temperature, instead of M.
        product_shape: (B, P, *G, Nq, C), or transposed (B, P, *G, Nk, C).
    """

    _: KW_ONLY
    x: Tensor
    transpose: bool = False
    softmax: bool = False
    product_shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bool("transpose", self.transpose)
        _check_bool("softmax", self.softmax)
        if self.temperature != 1 and not self.softmax:
            raise ValueError(
                f"temperature: expected 1 without softmax=True (M has none), got {float(self.temperature)}"
            )
        self._check_features()
        self.product_shape = (*self.x.shape[:-2], self.Nk if self.transpose else self.Nq, self.C)

    def _check_features(self) -> None:
        x, q = self.x, self.q
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        check_dense("x", x)
        if x.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"x: expected float32 or the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"x: expected the device of q, {q.device}, got {x.device}")
        side, tokens = ("queries", self.Nq) if self.transpose else ("keys", self.Nk)
        rows = (self.B, self.P, *q.shape[2:-2], tokens)
        if x.dim() != q.dim() or x.shape[:-1] != rows:
            raise ValueError(
                f"x: expected features of the {side} of every pair, ({', '.join(map(str, rows))}, C), "
                f"got {tuple(x.shape)}"
            )
        if not 1 <= x.shape[-1] <= MAX_FEATURES:
            raise ValueError(f"x: expected from 1 to {MAX_FEATURES} features (the last dimension), got {x.shape[-1]}")
        if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
            raise ValueError(
                f"x: expected a contiguous last dimension, got strides {tuple(x.stride())}; call .contiguous() on it"
            )

    @property
    def C(self) -> int:  # noqa: N802
        """Features of a token."""
        return self.x.shape[-1]


def check_options(scale: float | None = None, **options: Unpack[FlowOptions]) -> None:
    """Raises unless `am_flow` takes these options, for callers that have no frames yet.

    Raises:
        TypeError, ValueError: as `Problem`.
    """
    lag = options.get("lag", 1)
    frames = torch.empty(0, lag + 1 if isinstance(lag, int) and lag > 0 else 2, 1, 1, 1, dtype=torch.float64)
    Problem(frames, frames, scale=scale, **options)


def clips_of(name: str, images: Tensor | None, num_frames: int | None, *, dims: tuple[int, int] = (4, 5)) -> Any:
    """A tensor of images, (B * T, ...), as one of clips, (B, T, ...): a view. Without `num_frames`, as it is.

    Args:
        name: of the argument, for messages.
        images: the tensor; what is none is left to the checks of a problem.
        num_frames: T.
        dims: dimensions that the tensor may have, without and with windows.

    Raises:
        TypeError, ValueError: `num_frames` is no whole number of at least 1, or the images are not B * T.
    """
    if num_frames is None or not isinstance(images, Tensor):
        return images
    if not isinstance(num_frames, int) or isinstance(num_frames, bool):
        raise TypeError(f"num_frames: expected None or an int, got {type(num_frames).__name__}")
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    check_dense(name, images)
    if images.dim() not in dims:
        raise ValueError(
            f"{name}: expected {dims[0]} dimensions with num_frames, (B * T, heads, ...), or {dims[1]}, "
            f"(B * T, heads, windows, ...), got {images.dim()}: {tuple(images.shape)}"
        )
    if images.shape[0] % num_frames:
        raise ValueError(
            f"{name}: expected a multiple of num_frames = {num_frames} images (dimension 0), got {images.shape[0]}: "
            f"{tuple(images.shape)}"
        )
    # torch 2.11 can't trace the method `unflatten` where a TorchFunctionMode is active (a recorder, a default device).
    return torch.unflatten(images, 0, (images.shape[0] // num_frames, num_frames))


def check_dense(name: str, value: Tensor) -> None:
    """Raises unless a tensor is one block of strided memory: nested, sparse and mkldnn tensors are not."""
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"the layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor with strides, got {kind}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless two tensors have one dtype and one device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def check_frames(q: Tensor | None, k: Tensor | None, q_name: str, k_name: str) -> None:
    """Raises unless q and k, (B, T, *G, N, D), can be queries and keys of the same frames."""
    _check_tokens(q_name, q)
    _check_tokens(k_name, k)
    assert q is not None  # for mypy
    assert k is not None
    check_same(k_name, k, q_name, q)
    q_shape, k_shape = q.shape, k.shape
    if len(q_shape) != len(k_shape):
        raise ValueError(
            f"{k_name}: expected {len(q_shape)} dimensions as {q_name}, got {len(k_shape)}: {tuple(k_shape)}"
        )
    if q_shape[:-2] != k_shape[:-2] or q_shape[-1] != k_shape[-1]:
        raise ValueError(
            f"{k_name}: expected the shape of {q_name} but for the tokens (dimension -2), "
            f"{tuple(q_shape)}, got {tuple(k_shape)}"
        )


def _check_tokens(name: str, value: Tensor | None) -> None:
    """Raises unless `value` can be queries or keys."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    shape = value.shape  # read once: each time PyTorch makes a new tuple
    if len(shape) not in (5, 6):
        raise ValueError(
            f"{name}: expected (B, T, heads, N, D) or (B, T, heads, windows, N, D), "
            f"got {len(shape)} dimensions: {tuple(shape)}{_cure_of_folded(name, value)}"
        )
    N, D = shape[-2], shape[-1]
    if shape[2] == 0 or shape[-3] == 0:
        raise ValueError(f"{name}: expected at least one head and window, got shape {tuple(shape)}")
    if N == 0:
        raise ValueError(f"{name}: expected at least one token (dimension -2), got shape {tuple(shape)}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: expected a head dimension (the last) from 1 to {MAX_HEAD_DIM}, got {D}")
    if D > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {tuple(value.stride())}; "
            "call .contiguous() on it"
        )


def _cure_of_folded(name: str, value: Tensor) -> str:
    """What to do if the frames are folded into the batch, which a tensor of four dimensions may be a sign of."""
    if value.dim() != 4:
        return ""
    cures = f"pass num_frames=T, or {name}.unflatten(0, (B, T))"
    if name not in ("q", "k"):
        cures = f"pass {name}.unflatten(0, (B, P))"  # pairs have no num_frames
    return f"; if it is (B * T, heads, N, D), frames folded into the batch, {cures}"


def _check_lse(lse: Tensor, q: Tensor, name: str, q_name: str) -> None:
    if not isinstance(lse, Tensor):
        raise TypeError(f"{name}: expected None or a torch.Tensor, got {type(lse).__name__}")
    check_dense(name, lse)
    if lse.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {lse.dtype}")
    if lse.device != q.device:
        raise ValueError(f"{name}: expected the device of {q_name}, {q.device}, got {lse.device}")
    if lse.shape != q.shape[:-1]:
        raise ValueError(
            f"{name}: expected one number for each row of {q_name}, without padding, {tuple(q.shape[:-1])}, "
            f"got {tuple(lse.shape)}"
        )


def _check_out_dtype(out_dtype: torch.dtype, center: bool) -> None:
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype: expected None or a torch.dtype, got {type(out_dtype).__name__}")
    if out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype: expected float32, bfloat16, float16 or float64, got {out_dtype}")
    if out_dtype.itemsize < 4 and not center:
        raise ValueError(
            f"out_dtype: expected float32 or float64 without center=True, got {out_dtype}: the flow is Nq / Nk plus a "
            "signal of 1e-4 to 1e-2, which 16 bits round away; centred, the signal keeps its relative precision"
        )


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _check_number(name: str, value: float, dtype: torch.dtype) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -_LARGEST[dtype] <= value <= _LARGEST[dtype]:  # math.isfinite does not trace when the number is symbolic
        overflow = f", which {dtype} can't hold" if abs(value) < float("inf") else ""
        raise ValueError(f"{name}: expected a finite number, got {value}{overflow}")

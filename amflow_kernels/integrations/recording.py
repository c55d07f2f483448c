"""Recording the AM flow, or q and k, of a model's attention layers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from amflow_kernels.api import am_flow
from amflow_kernels.attention import attention, autocast
from amflow_kernels.dispatch import Impl, check_impl
from amflow_kernels.integrations.block_finder import unwrap
from amflow_kernels.integrations.grids import PatchGrid, Place, find_grids, told_grid
from amflow_kernels.integrations.layers import Layer, Layers, check_recordable, choose_layers, parts_around, switch_of
from amflow_kernels.integrations.reading import (
    OnAttention,
    hidden_from_checkpoints,
    reading_attention,
    without_fused_layer,
)
from amflow_kernels.integrations.wrapping import Around, wrapped_forwards
from amflow_kernels.problem import FlowOptions, Problem, check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlockFlow", "record_am_flow", "record_qk"]

NOT_RUN = (
    "the model did not run in the `with` block and its thread, or it ran without these layers; where it stops early, "
    "choose layers"
)
Windows = Literal["batch"]


class RecordOptions(FlowOptions, total=False):
    """The options of `am_flow`, but for its scale, which is the model's own."""

    impl: Impl | None


OPTIONS = tuple(RecordOptions.__annotations__)


@dataclass(frozen=True)
class BlockFlow:
    """AM flow of one attention layer, of the tokens that enter it.

    Attributes:
        flow: (B, T - lag, heads, [windows,] Nk), float32 or `out_dtype`, in the order of the layer's keys; without the
            heads dimension if heads are reduced, and with that of windows if there are several.
        grid: flow of the image tokens, (B, T - lag, heads, height, width), where the grid is known, else None.
        prefix: flow of the class token and registers, (B, T - lag, heads, prefix tokens), where the grid is known.
        windows: number of windows that the layer's attention runs in. Each window's flow sums to its number of queries,
            and flows of different windows can't be compared: no token attends to another window.
    """

    flow: Tensor
    grid: Any  # Tensor | None: the presets, and models that tell it, always have it
    prefix: Any
    windows: int


class FlowRecorder:
    """Computes and keeps the flow of each layer while a model runs.

    Args:
        num_frames: T; the batch of images is B clips of T frames.
        replace_attention: compute the attention's output together with its flow, where it has no windows.
        windows: "batch" if windows are folded into the batch, image-major; else None.
        options: options of `am_flow`, but for the scale, which is the model's own.

    Attributes:
        flows: {layer's name: `BlockFlow`}.

    Raises:
        TypeError, ValueError: `num_frames`, `windows` or an option is not as described.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        replace_attention: bool = False,
        windows: Windows | None = None,
        **options: Unpack[RecordOptions],
    ) -> None:
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"record_am_flow() got an unexpected keyword argument {name!r}")
        impl = options.get("impl")
        of_flow: Any = {name: value for name, value in options.items() if name != "impl"}
        check_options(**of_flow)
        check_impl(impl, None)
        if not isinstance(num_frames, int) or isinstance(num_frames, bool):
            raise TypeError(f"num_frames: expected an int, got {type(num_frames).__name__}")
        lag = options.get("lag", 1)
        if num_frames <= lag:
            raise ValueError(f"num_frames: expected more than lag = {lag}, got {num_frames}")
        if windows not in (None, "batch"):
            raise ValueError(f"windows: expected None or 'batch', got {windows!r}")
        self.num_frames = num_frames
        self.replace_attention = replace_attention
        self.windows = windows
        self.options, self.lag, self.impl = options, lag, impl
        self.flows: dict[Any, BlockFlow] = {}
        self.input: tuple[int, ...] | None = None  # shape of what the model is given, while it runs
        self.ran: set[Any] = set()  # keys of the layers that ran in this forward of the model

    def observing(self, layer: str) -> Around:
        """A wrapper that notes the shape of what a part of the model is given; the outermost one counts.

        Args:
            layer: name of a layer, for messages.
        """

        def observe(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outermost = self.input is None
            if outermost:
                self.ran = set()
                self.input = _shape_of_input(args, kwargs)
                if self.input is not None and len(self.input) == 5:
                    shape, self.input = self.input, None
                    raise RuntimeError(
                        f"{layer}: the model was given {shape}, a batch of videos. AM flow compares the attention maps "
                        "of single frames: record a model of images, given (B * T, channels, height, width), such as "
                        "one inside of this model; attention over space and time jointly has no such maps"
                    )
            try:
                return forward(*args, **kwargs)
            finally:
                if outermost:
                    self.input = None

        return observe

    def record(self, name: Any, label: str, q: Tensor, k: Tensor, v: Tensor, place: Place | None) -> Tensor | None:
        """Records the flow of a layer.

        Args:
            name, label: its key in `flows`, and its name for messages.
            q, k, v: of its attention call, (B * T, heads, [windows,] N, D).
            place: puts flow on the grid, or None.

        Returns:
            The attention's output, (B * T, heads, N, D), if it is to be replaced, else None.
        """
        if self.input is not None and name in self.ran:
            raise RuntimeError(
                f"{label}: runs several times in one forward of the model; which q and k to take is unclear"
            )
        self.ran.add(name)
        folded = self._windows_in_batch(label, q)
        images = len(q) // folded
        if images % self.num_frames:
            raise ValueError(
                f"num_frames: expected a divisor of the {images} images, got {self.num_frames} (in {label})"
            )
        q, k, v = autocast(q, k, v)
        replaced = self.replace_attention and q.dim() == 4 and folded == 1
        windows = folded if q.dim() == 4 else q.shape[2]
        q_frames, k_frames, v_frames = (self._in_clips(x, folded) for x in (q, k, v))
        out = lse = None
        if replaced:
            # Recomputation runs the model's own attention call, which saves the same tensors as this one.
            out, lse = attention(Problem(q_frames, k_frames, lag=self.lag), v_frames, self.impl)
            out = out.flatten(0, 1)
        with hidden_from_checkpoints():
            flow = am_flow(q_frames, k_frames, lse=lse, **self.options)
        grid, prefix = (None, None) if place is None else place(label, flow, windows)
        self.flows[name] = BlockFlow(flow, grid, prefix, windows)
        return out

    def _windows_in_batch(self, label: str, q: Tensor) -> int:
        """Number of windows of each image that are folded into the batch."""
        shape = self.input
        if self.windows == "batch":
            if shape is None or len(q) % shape[0]:
                given = "an unknown number of" if shape is None else str(shape[0])
                raise RuntimeError(
                    f"{label}: expected windows of {given} images in the batch, got q {tuple(q.shape)}; "
                    "windows='batch' needs a forward of the model itself"
                )
            return len(q) // shape[0]
        # Tokens may be given as (images, N, C) or as (N, images, C).
        if shape is not None and len(q) not in shape[: 2 if len(shape) == 3 else 1]:
            raise RuntimeError(
                f"{label}: expected q and k of the {shape[0]} images that the model was given, got q {tuple(q.shape)}. "
                "If windows of an image are folded into the batch, image by image, pass windows='batch'; if clips are "
                "folded inside of the model, record the model of images inside of it"
            )
        return 1

    def _in_clips(self, x: Tensor, folded: int) -> Tensor:
        """(B * T * folded windows, heads, ...) as (B, T, heads, [windows,] ...)."""
        # torch 2.11 can't trace the method `unflatten` where another TorchFunctionMode is active.
        if folded > 1:
            x = torch.unflatten(x, 0, (-1, folded)).transpose(1, 2)
        elif x.dim() == 5 and x.shape[2] == 1:
            x = x.squeeze(2)
        x = torch.unflatten(x, 0, (-1, self.num_frames))
        return x if x.stride(-1) == 1 else x.contiguous()


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    layers: Layers = None,
    grid: Any = None,
    windows: Windows | None = None,
    replace_attention: bool = False,
    **options: Unpack[RecordOptions],
) -> Iterator[dict[str, BlockFlow]]:
    """Records the AM flow of a model's attention layers while it runs inside the ``with`` block.

    For any model of images that calls ``scaled_dot_product_attention`` or has `nn.MultiheadAttention`:

        with record_am_flow(model, num_frames=T) as flows:
            out = model(frames)         # (B * T, 3, height, width), the frames of a clip side by side
        flows["blocks.11.attn"].flow    # (B, T - 1, heads, N), differentiable in the model's parameters
        flows["blocks.11.attn"].grid    # (B, T - 1, heads, height, width), where the model tells its grid

    The flows are those of the q and k that enter the attention: after q/k norm, rotary embedding and pooling. Attention
    stays fused, and not a bit of the model's output changes, with one exception: in eval mode PyTorch runs
    `nn.MultiheadAttention` and `nn.TransformerEncoder` in a fused inference kernel, in which nothing can be read. While
    recorded they take the way of training instead, and the output may differ in the last digits.

    It works in compiled models (they are compiled again for the first recording), with `fully_shard`, and in
    `DistributedDataParallel`, `AveragedModel` and other wrappers. Under activation checkpointing q and k are kept, and
    the recomputation in the backward records nothing, wherever it runs; with the reentrant variant flows take no
    gradient, since its forward runs without one. Compile checkpointed blocks, and don't checkpoint compiled ones, whose
    backward would have to run inside the ``with`` block; for ``fullgraph=True`` set
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint``.

    Recorders may overlap and end in any order. Each records every forward of its own thread, so several threads can
    record one model; in other threads it runs as the bare model. Compiled code can't tell threads apart: there, run and
    record one at a time. A copy that is made of the model, by `copy.deepcopy` or by saving and loading it, has its own
    weights and is not recorded.

    Args:
        model: a model of images, wrapped or not. A batch that it folds its tokens into must hold whole images, unless
            `windows` says otherwise.
        num_frames: T; the batch of images is B clips of T frames.
        layers: names of layers, as in ``model.named_modules()`` without wrappers such as ``_orig_mod.``; or a pattern
            ("blocks.1*.attn") or a predicate ``(name, module) -> bool`` for the names of attention layers. None means
            all attention layers whose attention has more than one query (heads that pool all tokens have one).
        grid: where tokens are on the image: (prefix tokens, (height, width)) if rows of patches follow the prefix; or
            ``(name, flow, windows) -> (grid, prefix)``; None takes what the model tells, as ViTs of timm, transformers,
            torchvision, open_clip and the DINO repositories do, and Hiera.
        windows: "batch" if the attention's batch holds the windows of the first image, then those of the second, and so
            on. A second group dimension, (images, heads, windows, N, D), is always taken for windows.
        replace_attention: run `am_flow_attention` instead of the model's attention call, where it has no windows. On a
            GPU the flow can then reuse the attention's log-sum-exps.
        options: lag, temperature, head_reduction, center, out_dtype and impl of `am_flow`. They are checked at once.

    Yields:
        A dict {layer's name: `BlockFlow`} that the forward fills. A second forward replaces its values.

    Raises:
        TypeError: the model has no attention layer or can't be recorded, or an argument is unknown or of a wrong type.
        ValueError: `layers` chooses none, an option is out of range, or the images are not whole clips.
        RuntimeError: the model is given videos; a layer adds a mask or bias to its logits, uses a scale other than
            D ** -0.5, calls the attention more than once or not at all, runs several times in one forward, or sees
            other things than all tokens of one image; or (at the end of the ``with`` block) a layer did not run in its
            thread.

    However the ``with`` block ends, the model is left as it was.
    """
    check_recordable(model)
    recorder = FlowRecorder(num_frames, replace_attention=replace_attention, windows=windows, **options)
    root = unwrap(model)
    chosen = choose_layers(root, layers)
    places: Mapping[str, Place] = {}
    if grid is not None:
        places = dict.fromkeys(chosen, told_grid(grid))
    elif windows is None:
        places = find_grids(root, chosen)
    with recording_flows(root, chosen, recorder, places, skip_pooling=layers is None and windows is None):
        yield recorder.flows


@contextmanager
def record_qk(model: nn.Module, *, layers: Layers = None) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Records q and k of a model's attention layers while it runs inside the ``with`` block.

    They are the tensors that enter the attention: after q/k norm and rotary embedding, before the scale. Attention
    stays fused. For the model's output, wrappers, checkpointing, copies and threads see `record_am_flow`:

        with record_qk(vit) as qk:
            vit(frames)                                  # (B * T, 3, height, width)
        for q, k in qk.values():                         # each (B * T, heads, N, D)
            flow = am_flow(q.unflatten(0, (B, T)), k.unflatten(0, (B, T)))  # (B, T - 1, heads, N)

    Args:
        model, layers: as in `record_am_flow`.

    Yields:
        A dict {layer's name: (q, k)} that the forward fills. Shapes are (images, heads, N, D), or (images, heads,
        windows, N, D). A second forward replaces its values.

    Raises:
        TypeError, ValueError, RuntimeError: as `record_am_flow`.
    """
    check_recordable(model)
    root = unwrap(model)
    with recording_qk(root, choose_layers(root, layers), skip_pooling=layers is None) as qk:
        yield qk


@contextmanager
def recording_flows(
    root: nn.Module,
    layers: Mapping[Any, Layer],
    recorder: FlowRecorder,
    places: Mapping[Any, Place],
    *,
    skip_pooling: bool = False,
) -> Iterator[None]:
    """Fills ``recorder.flows`` while a model runs.

    Args:
        root: the model, without wrappers.
        layers: the layers to record, by their keys in ``recorder.flows``.
        places: what puts the flow of a layer on the grid, by the same keys.
        skip_pooling: leave out layers whose attention has one query.
    """
    pooling: dict[Any, str] = {}

    def recording(key: Any, layer: Layer) -> OnAttention:
        def record(q: Tensor, k: Tensor, v: Tensor, keep: str) -> Tensor | None:
            q, k, v = _heads_first(layer, q, k, v)
            if skip_pooling and _is_pooling(q, k):
                pooling[key] = layer.name
                return None
            if recorder.replace_attention and keep:
                raise RuntimeError(f"{layer.name}: {keep}, which attention computed together with its flow leaves out")
            return recorder.record(key, layer.name, q, k, v, places.get(key))

        return record

    watched = {id(place): place for place in places.values() if isinstance(place, PatchGrid)}
    watchers = [(grid.watched, grid.observe) for grid in watched.values()]
    observing = recorder.observing(next(iter(layers.values())).name)
    names = [layer.name for layer in layers.values()]
    parts = [part for part, inside in parts_around(root, names).values() if part is root or len(inside) > 1]
    observers = [(part, observing) for part in parts]
    with wrapped_forwards([*_readers(root, layers, recording), *watchers, *observers]):
        yield
    _check_complete("AM flow of", layers, recorder.flows, pooling)


@contextmanager
def recording_qk(
    root: nn.Module, layers: Mapping[Any, Layer], *, skip_pooling: bool = False
) -> Iterator[dict[Any, tuple[Tensor, Tensor]]]:
    """Yields a dict that q and k of a model's layers fill while it runs; arguments as in `recording_flows`."""
    qk: dict[Any, tuple[Tensor, Tensor]] = {}
    pooling: dict[Any, str] = {}

    def recording(key: Any, layer: Layer) -> OnAttention:
        def record(q: Tensor, k: Tensor, v: Tensor, keep: str) -> None:
            q, k, v = _heads_first(layer, q, k, v)
            if skip_pooling and _is_pooling(q, k):
                pooling[key] = layer.name
            else:
                qk[key] = q, k

        return record

    with wrapped_forwards(_readers(root, layers, recording)):
        yield qk
    _check_complete("q and k seen in", layers, qk, pooling)


def no_call(layer: Layer) -> str:
    """The message for a layer that runs without an attention call."""
    return (
        f"{layer.name}: q and k are read where they enter scaled_dot_product_attention or nn.MultiheadAttention, which "
        f"this layer does not call; {switch_of(layer.module)}"
    )


def _readers(
    root: nn.Module, layers: Mapping[Any, Layer], recording: Callable[[Any, Layer], OnAttention]
) -> list[tuple[nn.Module, Around]]:
    """Wrappers with which ``recording(key, layer)`` sees the attention call of each layer."""
    readers = [
        (layer.module, reading_attention(layer.name, recording(key, layer), no_call(layer)))
        for key, layer in layers.items()
    ]
    modules = {layer.module for layer in layers.values()}
    return readers + [
        (part, without_fused_layer(name, part))
        for name, part in root.named_modules()
        if isinstance(part, nn.TransformerEncoderLayer) and modules.intersection(part.children())
    ]


def _is_pooling(q: Tensor, k: Tensor) -> bool:
    """Whether the attention pools all tokens: one query, several keys, no windows."""
    return q.dim() == 4 and q.shape[-2] == 1 and k.shape[-2] > 1


def _check_complete(
    what: str, layers: Mapping[Any, Layer], seen: Mapping[Any, Any], pooling: Mapping[Any, str]
) -> None:
    """Raises RuntimeError unless every layer was seen or is a pooling one, and some were seen."""
    missing = [layer.name for key, layer in layers.items() if key not in seen and key not in pooling]
    if missing:
        raise RuntimeError(f"no {what} {', '.join(missing)}: {NOT_RUN}")
    if not seen:
        raise RuntimeError(
            f"no {what} {', '.join(pooling.values())}: each pools all tokens by one query; choose them by `layers`"
        )


def _heads_first(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (images, heads, [windows,] N, D).

    Raises:
        RuntimeError: their shapes are of another kind.
    """
    if q.dim() not in (4, 5):
        raise RuntimeError(
            f"{layer.name}: expected q of shape (images, heads, N, D) or (images, heads, windows, N, D), "
            f"got {tuple(q.shape)}"
        )
    if q.shape[-1] > 256:
        raise RuntimeError(f"{layer.name}: has a head dimension of {q.shape[-1]}; AM flow is computed up to 256")
    if q.dim() == 4:
        return q, k, v
    heads = getattr(layer.module, "num_heads", getattr(layer.module, "heads", None))
    if q.shape[1] == heads:
        return q, k, v
    if q.shape[2] == heads:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    raise RuntimeError(
        f"{layer.name}: expected heads and windows, of which the layer's `num_heads` tells the heads, got q "
        f"{tuple(q.shape)} and {heads} heads"
    )


def _shape_of_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of the first batch of floating-point numbers among arguments, or in lists and dicts of them."""
    for argument in (*args, *kwargs.values()):
        values = argument.values() if isinstance(argument, dict) else argument
        for x in values if isinstance(argument, (dict, list, tuple)) else (argument,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1:
                return tuple(x.shape)
    return None

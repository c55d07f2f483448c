"""Trained parameters in a file: adapters and head, without the frozen backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from amflow_models.blocks import AdaptedBlock, AdapterOptions
from amflow_models.files import written_whole

_KEY, _ABOUT = "adapters", "classifier"  # the file's metadata, and the key in it that is no option of adapters
WRAPPERS = ("_orig_mod.", "module.")  # prefixes that torch.compile and DistributedDataParallel put before names


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require a gradient, by their names in the model without wrappers.

    Sharded parameters are gathered, so all processes must call this.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    state = {unwrapped_name(name): _gathered(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if not state:
        raise ValueError(f"model: expected one with parameters that train, found none in {type(model).__name__}")
    return state


def save_trained(
    model: nn.Module,
    path: str | Path,
    state: dict[str, torch.Tensor] | None = None,
    *,
    about: dict[str, Any] | None = None,
) -> None:
    """Writes the trainable parameters of a model and the options of its adapters to a safetensors file.

    The file is written whole or not at all.

    Args:
        model: the model.
        path: the file.
        state: the result of `trained_state`; None calls it.
        about: what else the file shall say, for `read_about`: values that JSON can hold.

    Raises:
        ValueError: no parameter of the model requires a gradient.
    """
    state = trained_state(model) if state is None else state
    described = _options(model) | ({} if about is None else {_ABOUT: about})
    with written_whole(Path(path)) as part:
        # All under one key: safetensors writes several in any order, and equal models should make equal files.
        save_file(state, part, metadata={_KEY: json.dumps(described)})


def read_described(path: str | Path) -> Any:
    """What `save_trained` was given as `about`; None if nothing was.

    Raises:
        ValueError: the file can't be read.
    """
    with _opened(path) as file:
        return _metadata(path, file).get(_ABOUT)


def _metadata(path: str | Path, file: Any) -> dict[str, Any]:
    """The options of adapters, and what else `save_trained` wrote."""
    text = (file.metadata() or {}).get(_KEY, "{}")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {_KEY!r} can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object as its metadata {_KEY!r}, got {type(content).__name__}")
    return content


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error})") from error


def load_trained(model: nn.Module, path: str | Path, *, head: bool = True) -> None:
    """Reads a file of `save_trained` into a model that was built with the same options.

    Options that did not exist yet when the file was written have their defaults.

    Args:
        model: the model.
        path: the file.
        head: read the parameters of the model's `head`, too; otherwise it keeps its own, which may have another shape.

    Raises:
        ValueError: the file can't be read, or does not fit the model: all missing and unexpected names, different
            shapes, different options and options that this version does not know are listed. The model is unchanged
            then.
    """
    own = {unwrapped_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    with _opened(path) as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
        options = _metadata(path, file)
    options.pop(_ABOUT, None)
    if not head:
        own = {name: p for name, p in own.items() if not name.startswith("head.")}
        loaded = {name: x for name, x in loaded.items() if not name.startswith("head.")}
    expected = _options(model)
    # A file without metadata is not of `save_trained`, and one without options is of a model without adapters.
    saved = {**_saved(AdapterOptions(2)), "num_frames": None, **options} if options else {}
    problems = {
        "missing": sorted(own.keys() - loaded.keys()),
        "unexpected": sorted(loaded.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(loaded[name].shape)}, expected {tuple(own[name].shape)}"
            for name in sorted(own.keys() & loaded.keys())
            if loaded[name].shape != own[name].shape
        ],
        "of other options": [
            f"{name} {saved.get(name)!r}, expected {value!r}"
            for name, value in expected.items()
            if saved and saved.get(name) != value
        ],
        "of unknown options": sorted(options.keys() - {field.name for field in fields(AdapterOptions)}),
    }
    if any(problems.values()):
        message = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{path}: does not hold what trains in this {type(model).__name__}. {message}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(loaded[name])


def _gathered(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).contiguous()


def unwrapped_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _options(model: nn.Module) -> dict[str, Any]:
    """The adapter options that results depend on besides the parameters and their names."""
    options = next((block.options for block in model.modules() if isinstance(block, AdaptedBlock)), None)
    return {} if options is None else _saved(options)


def _saved(options: AdapterOptions) -> dict[str, Any]:
    """The options as they are in a file."""
    saved = asdict(options) | {"activation": options.activation.__name__}
    del saved["impl"]
    return saved

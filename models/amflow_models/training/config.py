"""What a run is: YAML, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from amflow_models.blocks import AdapterOptions
from amflow_models.errors import check_known, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Blocks = str | list[int]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Start(_Section):
    """Where a second stage begins: what was trained with AM flow in fewer blocks.

    Attributes:
        trained: a run (its newest checkpoint), a checkpoint, or its `model.safetensors`.
        blocks: the placement it was trained with.
    """

    trained: Path
    blocks: Blocks


class Model(_Section):
    """A `VideoClassifier`: `backbone`, `weights`, `img_size` as for `create_backbone`, the rest as for `add_adapters`.

    Attributes:
        depth: how many of the backbone's first blocks are used; None is all.
        pool: how the backbone makes one vector of its tokens: their mean or the class token; None is its own way.
    """

    backbone: str
    weights: str | None = "hub"
    img_size: PositiveInt | None = None
    depth: PositiveInt | None = None
    pool: Literal["avg", "token"] | None = None
    blocks: Blocks = "all"
    form: str = AdapterOptions.form
    bottleneck: PositiveInt = AdapterOptions.bottleneck
    unit: str = AdapterOptions.unit
    pooled: bool = AdapterOptions.pooled
    centred: bool = AdapterOptions.centred
    gate: str = AdapterOptions.gate
    align: bool = AdapterOptions.align
    start: Start | None = None

    @model_validator(mode="after")
    def _adapters(self) -> Model:
        """Knows their names before a backbone is downloaded."""
        AdapterOptions(2, self.form, unit=self.unit, gate=self.gate, align=self.align)
        return self


class Data(_Section):
    """Where the videos are, and what is taken from each.

    Attributes:
        kind: of list, see `amflow_models.data.read_list`.
        train, validation, test: list files; a folder for "smarthome", whose `split` tells the three apart.
        root: folder that all relative paths start from; None: those in a list start from the list's own folder.
        classes, labels, split: as for `read_list`, where the kind has them.
        num_classes: how many.
        frames: T, of a clip.
        sampling: "uniform" (one frame of each of T equal parts of the video) or "dense" (one in `stride`).
        scale: share of a frame's area that a random crop has, from and to.
        augment: RandAugment, besides random crops and flips.
        flip: mirror clips at random; None: unless class names speak of left and right.
        workers: processes that load, per process that trains.
        strict: stop at the first video that can't be read, in place of leaving it out (`--strict`).
    """

    kind: str
    train: Path
    validation: Path | None = None
    test: Path | None = None
    root: Path | None = None
    classes: Path | None = None
    labels: Path | None = None
    split: str | None = None
    num_classes: PositiveInt
    frames: int = Field(ge=2)
    sampling: Literal["uniform", "dense"] = "dense"
    stride: PositiveInt = 2
    scale: tuple[float, float] = (0.08, 1.0)
    augment: bool = True
    flip: bool | None = None
    workers: int = Field(default=8, ge=0)
    strict: bool = False


class Training(_Section):
    """AdamW at a rate that rises linearly for `warmup_epochs` and then falls to 0 as half a cosine.

    Attributes:
        batch: clips of a step, over all processes.
        accumulate: how many parts of a step's batch go through the model one after the other.
        clip_grad: the norm that gradients are clipped to; None does not clip.
        precision: "bf16" is autocast; AM flow stays float32 either way.
        ema: decay of an exponential moving average of what trains; None keeps none.
        recompute: store the blocks' inputs only, and run them again in the backward pass.
        compile: torch.compile of each block.
        parallel: over processes: "ddp", or "fsdp2", which shards the frozen backbone, too.
        save_every: steps between checkpoints, besides one at the end of each epoch; None is the latter alone.
        keep: how many checkpoints stay.
    """

    epochs: PositiveInt = 30
    warmup_epochs: float = Field(default=2.5, ge=0)
    batch: PositiveInt = 64
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 3e-4
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = 1.0
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    ema: float | None = Field(default=None, gt=0, lt=1)
    recompute: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    save_every: PositiveInt | None = None
    keep: PositiveInt = 2


class Evaluation(_Section):
    """Testing on several views of a video, whose probabilities are averaged.

    Attributes:
        clips: in time.
        crops: 1 (the centre) or 3 (along the longer side).
        batch: videos loaded at a time, over all processes; as many clips go through the model at a time.
    """

    clips: PositiveInt = 1
    crops: Literal[1, 3] = 1
    batch: PositiveInt = 16


class Config(_Section):
    """A run. `output` is where it writes; `seed` decides about everything random."""

    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: Model
    data: Data
    training: Training = Training()
    evaluation: Evaluation = Evaluation()


def load_config(name: str | Path, changes: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
        name: a YAML file, or the name of one that comes with the package.
        changes: ``"section.key=value"``, values in YAML.

    Raises:
        ValueError: no such file or name, not YAML, an unknown key (the nearest known one is named), a value out of
            range. All problems are listed.
    """
    path = Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        if path.suffix or path.parent != Path():
            raise ValueError(f"config: there is no file {path}")
        check_known("config", str(name), known)
        path = CONFIGS / f"{name}.yaml"
    try:
        content: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: can't be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(content).__name__}")
    for change in changes:
        _change(content, change)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        told = "\n".join(f"  {_told(dict(problem))}" for problem in error.errors())
        raise ValueError(f"{path}:\n{told}") from None


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ValueError(f"expected section.key=value, got {change!r}")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise ValueError(f"{key}: {section} is no section")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{change}: the value can't be read as YAML: {error}") from error


def _told(problem: dict[str, Any]) -> str:
    place = [part for part in problem["loc"] if isinstance(part, str)]
    name = ".".join(map(str, problem["loc"])) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{name}: there is no such key{nearest(place[-1], _keys(place[:-1]))}"
    value = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return f"{name}: {problem['msg']}{value}"


def _keys(place: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for name in place:
        kind: Any = section.model_fields[name].annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(part for part in get_args(kind) if isinstance(part, type) and issubclass(part, BaseModel))
        section = kind
    return list(section.model_fields)

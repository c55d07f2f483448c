"""The config of a run: YAML, validated before anything else happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from amflow_models.blocks import AdapterOptions
from amflow_models.data.formats import read_classes
from amflow_models.suggestions import check_known, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Blocks = str | list[int]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Start(_Section):
    """The start of a run: a trained model, perhaps with AM flow in fewer blocks (a second stage) or of other classes.

    Attributes:
        trained: a run (its newest checkpoint), a checkpoint, or its `model.safetensors`.
        blocks: the placement that it was trained with; None: that of `model.blocks`.
        head: "trained" takes its head, too; "new" starts with a new one, as for other classes.
    """

    trained: Path
    blocks: Blocks | None = None
    head: Literal["trained", "new"] = "trained"


class Model(_Section):
    """A `VideoClassifier`.

    Attributes:
        backbone: timm's name of a vision transformer or Hiera, as for `create_backbone`.
        weights: the backbone's weights: "hub", "offline", a file, or None for random ones, as for `create_backbone`.
        img_size: side of the input in pixels; None uses the backbone's own.
        depth: number of blocks that are used, from the first; None uses all.
        pool: the backbone's vector for an image: "avg", the mean of its tokens, or "token", the class token; None keeps
            the backbone's own choice.
        blocks: the blocks with AM flow and a temporal unit: "all", "first_last", "third_stage", "none", or a list of
            numbers; the other blocks have ordinary adapters.
        form: "serial", "parallel" or "scaled_parallel" adapters.
        bottleneck: channels of the adapters' bottleneck.
        unit: temporal unit of the adapters with AM flow, as for `add_adapters`.
        pooled: whether the unit sees the mean over tokens instead of each token.
        centred: whether the mean over time is subtracted before the unit.
        gate: source of the weights of tokens in the unit: "am_flow", or another one of `add_adapters`.
        align: align frames before AM flow is computed, for moving cameras.
        dropout: share of the head's inputs that are set to 0 in training.
        drop_path: stochastic depth: probability that a clip leaves out the last block's adapter in training; that of
            the other blocks rises linearly to it.
        start: the trained model that the run starts from, if there is one.
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
    dropout: float = Field(default=0.0, ge=0, lt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    start: Start | None = None

    @model_validator(mode="after")
    def _adapters(self) -> Model:
        """Checks the names before a backbone is downloaded."""
        words: Any = {"form": self.form, "unit": self.unit, "gate": self.gate}
        AdapterOptions(2, **words, align=self.align)
        return self


class Data(_Section):
    """The videos and the sampling of clips.

    Attributes:
        kind: format of the lists, see `amflow_models.data.read_list`.
        train, validation, test: list files; for "smarthome" and "hmdb51" a folder, and the parts are those of the
            protocol `split`; for "tar" as for `read_list`.
        root: folder that all relative paths start from; None: paths in a list start from the list's own folder.
        classes, labels, split, template, start_index: as for `read_list`, where the kind takes them.
        num_classes: number of classes; it may be left out where `classes` names them.
        multi_label: videos may have several labels: several lines of a list, or "0,3" in one. The loss is the binary
            cross-entropy, probabilities are sigmoids, and the score is the mean average precision.
        missing: what to do with videos of a list that do not exist: "error" stops before the first step, "skip" leaves
            them out, and says how many.
        subset: the lists hold a part of a data set, for a try: the training list may lack classes.
        frames: T, frames of a clip.
        sampling: "uniform" (one frame of each of T equal parts of the video) or "dense" (every `stride`-th frame).
        stride: distance in frames, for dense sampling.
        scale: least and largest share of a frame's area that a random crop has.
        augment: RandAugment, besides random crops and flips.
        flip: mirror clips at random; None mirrors unless class names speak of left and right.
        random_erasing: probability that a box of a clip, the same in all frames, is filled with noise (timm's
            RandomErasing, "pixel").
        repeats: augmented clips of each video that an epoch has (timm's RepeatAugSampler). An epoch keeps its length,
            so it sees one in `repeats` of the videos.
        workers: loader processes per training process.
        strict: stop at the first video that can't be read instead of leaving it out (`--strict`).
    """

    kind: str
    train: Path
    validation: Path | None = None
    test: Path | None = None
    root: Path | None = None
    classes: Path | None = None
    labels: Path | None = None
    split: str | None = None
    template: str | None = None
    start_index: int | None = None
    num_classes: PositiveInt
    multi_label: bool = False
    missing: Literal["error", "skip"] = "error"
    subset: bool = False
    frames: int = Field(ge=2)
    sampling: Literal["uniform", "dense"] = "dense"
    stride: PositiveInt = 2
    scale: tuple[float, float] = (0.08, 1.0)
    augment: bool = True
    flip: bool | None = None
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    repeats: PositiveInt = 1
    workers: int = Field(default=8, ge=0)
    strict: bool = False

    @model_validator(mode="before")
    @classmethod
    def _count_classes(cls, content: Any) -> Any:
        """The number of classes is that of their names, if it is not there."""
        if not isinstance(content, dict) or "num_classes" in content or not isinstance(content.get("classes"), str):
            return content
        return {**content, "num_classes": len(read_classes(Path(content.get("root") or "") / content["classes"]))}


class Training(_Section):
    """AdamW with a learning rate that rises linearly for `warmup_epochs` and then falls to 0 as half a cosine.

    Attributes:
        epochs, warmup_epochs: length of the run and of the rise, in passes over the training list.
        batch: clips per step, over all processes.
        accumulate: number of parts that a step's batch is divided into, to save memory.
        lr, weight_decay, betas: of AdamW; `lr` is the peak.
        base_batch: the batch that `lr` is meant for: the peak is `lr` times `batch` / `base_batch`. None: `lr` itself.
        clip_grad: norm that gradients are clipped to; None does not clip.
        skip_not_finite: number of steps that a run may leave out because their loss or gradients are not finite; the
            next one stops it.
        label_smoothing: of the cross-entropy.
        mixup, cutmix: alpha of mixup and of cutmix; 0 switches it off. Two neighbouring clips of a batch are mixed with
            each other, all frames alike (timm's Mixup).
        mixup_prob: probability that two clips are mixed at all.
        mixup_switch_prob: where both are on, the probability of cutmix instead of mixup.
        balance: for classes of unequal size: "loss" weights each class inversely to its number of training videos,
            "sampler" draws videos in that way, with repetition; None leaves them as they are.
        precision: "fp32", "bf16", "fp16" (autocast; fp16 with a gradient scaler and only on a GPU), or "auto": bf16 on
            GPUs and on CPUs with AVX512_BF16 or AMX, else fp32. AM flow is float32 in any case.
        ema: decay of an exponential moving average of the trainable parameters, which is saved and validated as well;
            None keeps no average.
        recompute: store only the inputs of blocks and recompute the blocks in the backward pass.
        compile: compile each block with torch.compile.
        parallel: with several processes: "ddp", or "fsdp2", which also shards the frozen backbone.
        validate_every: epochs between validations; the last epoch is always validated.
        best: score of the validation whose best checkpoint is kept besides the newest, of the average if there is one:
            "top1", "top5", "mean_class", "loss", or with several labels "map" or "loss"; None: "top1" or "map".
        save_every: steps between checkpoints, besides the one at the end of each epoch; None saves only the latter.
        keep: number of the newest checkpoints to keep.
        wandb: project at Weights & Biases that the run is logged to besides; needs the package wandb.
    """

    epochs: PositiveInt = 30
    warmup_epochs: float = Field(default=2.5, ge=0)
    batch: PositiveInt = 64
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 3e-4
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    base_batch: PositiveInt | None = None
    clip_grad: PositiveFloat | None = 1.0
    skip_not_finite: int = Field(default=0, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    balance: Literal["loss", "sampler"] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: float | None = Field(default=None, gt=0, lt=1)
    recompute: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    validate_every: PositiveInt = 1
    best: Literal["top1", "top5", "mean_class", "map", "loss"] | None = None
    save_every: PositiveInt | None = None
    keep: PositiveInt = 2
    wandb: str | None = None


class Evaluation(_Section):
    """Testing on several views of a video, whose probabilities are averaged.

    Attributes:
        clips: number of clips in time.
        crops: 1 (the centre) or 3 (along the longer side).
        batch: the most clips that the model takes at a time, over all processes, and that are loaded together: whole
            videos, at least one for each process. A loader process has two such batches in memory.
    """

    clips: PositiveInt = 1
    crops: Literal[1, 3] = 1
    batch: PositiveInt = 16


class Config(_Section):
    """A run.

    Attributes:
        output: the folder that it writes to.
        seed: determines everything random.
    """

    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: Model
    data: Data
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _labels(self) -> Config:
        """Checks what depends on the number of labels of a video."""
        several, best = self.data.multi_label, self.training.best
        if best not in (None, "loss") and (best == "map") != several:
            expected = "'map' or 'loss' with" if several else "'top1', 'top5', 'mean_class' or 'loss' without"
            raise ValueError(f"training.best: expected {expected} data.multi_label, got {best!r}")
        if several and self.training.balance is not None:
            raise ValueError(f"training.balance: expected null with data.multi_label, got {self.training.balance!r}")
        return self


def load_config(name: str | Path, changes: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
        name: a YAML file, or the name of one that comes with the package.
        changes: changes to the file, ``"section.key=value"``, with values in YAML.

    Raises:
        ValueError: there is no such file or name, it is not YAML, a key is unknown (the nearest known one is named), or
            a value is out of range. All problems are listed.
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
    return parse_config(content, path)


def change_config(config: Config, changes: Sequence[str], source: Path) -> Config:
    """A config with changes.

    Args:
        config: the config.
        changes: as for `load_config`.
        source: the file that the config is from, for messages.

    Raises:
        ValueError: a key is unknown or a value is out of range. All problems are listed.
    """
    content = config.model_dump(mode="json")
    for change in changes:
        _change(content, change)
    return parse_config(content, source)


def parse_config(content: Any, source: Path) -> Config:
    """The config that keys and values describe; keys that are not there have their defaults.

    Args:
        content: sections, keys and values.
        source: the file that they are from, for messages.

    Raises:
        ValueError: a key is unknown or a value is out of range. All problems are listed.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        message = "\n".join(f"  {_describe(dict(problem))}" for problem in error.errors())
        raise ValueError(f"{source}:\n{message}") from None


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


def _describe(problem: dict[str, Any]) -> str:
    """A line about one of pydantic's errors."""
    keys = [part for part in problem["loc"] if isinstance(part, str)]
    name = ".".join(map(str, problem["loc"])) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{name}: there is no such key{nearest(keys[-1], _known_keys(keys[:-1]))}"
    value = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return f"{name}: {problem['msg']}{value}"


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the section at a path of sections."""
    section: type[BaseModel] = Config
    for name in path:
        kind: Any = section.model_fields[name].annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(part for part in get_args(kind) if isinstance(part, type) and issubclass(part, BaseModel))
        section = kind
    return list(section.model_fields)

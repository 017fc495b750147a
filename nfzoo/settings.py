"""What a recipe consists of: a frozen, validated tree of numbers and short strings. No Keras here."""

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Frozen):
    """Where images come from: `name` is "digits", "fake", a tfds name, a folder of images by class, or an .npz file."""

    name: str = "digits"
    data_dir: str | None = None
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    image_size: int | None = Field(None, gt=0)
    limit: int | None = Field(None, gt=0)


class RandAugment(_Frozen):
    """`layers` operations per image, each drawn anew; magnitude 10 is the end of the paper's ranges."""

    layers: int = Field(2, gt=0)
    magnitude: float = Field(10.0, ge=0)


class Augment(_Frozen):
    """What happens to training images, in this order; see `nfzoo.augment`.

    Attributes:
        crop_padding: random crop of an image with so many zeros around it. flip: left and right, at random.
        mixup, cutmix: alpha of the Beta distribution of the weights, 0 for none; with both, each mixes half a batch.
        rand_augment: see `RandAugment`.
        random_erasing: probability that a box of an image becomes noise.
        on_validation: crop and flip the validation split too.
    """

    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    rand_augment: RandAugment | None = None
    random_erasing: float = Field(0.0, ge=0, le=1)
    on_validation: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images have parts in several labels."""
        return bool(self.mixup or self.cutmix)


class Group(_Frozen):
    """Variables that learn in a way of their own: factors on the optimizer's learning rate and weight decay.

    `pattern` is a regular expression on the end of a variable's path, as in `Clip.exclude`.
    """

    pattern: str
    learning_rate: float = Field(1.0, ge=0)
    weight_decay: float = Field(1.0, ge=0)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"Expected a regular expression, which this is not: {error}") from None
        return value


# Gains (of weight standardization, of branches), biases, and scales and offsets of normalization: all vectors and
# scalars of the zoo. The decay of the NFNet authors spares the same.
NO_DECAY = Group(pattern="gain|bias|gamma|beta", weight_decay=0.0)


# What each optimizer has of its own.
OPTIMIZER_FIELDS = {
    "adam": ("beta_1", "beta_2", "epsilon"),
    "sgd": ("momentum", "nesterov"),
    "momentum_sgd": ("momentum", "nesterov"),
    "rmsprop": ("rho", "momentum", "epsilon"),
}


class Optimizer(_Frozen):
    """The fields of another optimizer than `name` are not used.

    Attributes:
        name: "momentum_sgd" is that of the papers, see `nfzoo.optimizers.MomentumSGD`; "sgd" is Keras', which has
            neither weight decay nor groups here.
        learning_rate: the largest of the schedule. per_256: it is for 256 examples per update, and grows with them.
        weight_decay, groups: the first group that matches a variable changes its learning rate and its decay.
        accumulate: batches whose gradients are averaged for one update.
        rho: of RMSprop.
    """

    name: Literal["adam", "sgd", "momentum_sgd", "rmsprop"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    per_256: bool = False
    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.999, ge=0, lt=1)
    rho: float = Field(0.9, ge=0, lt=1)
    epsilon: float = Field(1e-7, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(0.0, ge=0)
    groups: tuple[Group, ...] = ()
    accumulate: int = Field(1, gt=0)

    @field_validator("weight_decay", "groups")
    @classmethod
    def _not_of_keras_sgd(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("name") == "sgd":
            raise ValueError("Expected none with name=sgd; name=momentum_sgd has it")
        return value


class Schedule(_Frozen):
    """How the learning rate moves, in epochs since all layers learn; see `nfzoo.schedules`.

    Attributes:
        warmup_epochs: at the start, linearly from 0. The cosine begins after it; other schedules count it in.
        milestones, factor: of "step": at each milestone the rate is multiplied by the factor.
        start, every: of "halving": after `start` epochs the rate is halved every so many.
        final: of "cosine": the learning rate at the end.
    """

    name: Literal["constant", "step", "cosine", "halving"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0)
    milestones: tuple[float, ...] = ()
    factor: float = Field(0.1, gt=0)
    start: float = Field(0.0, ge=0)
    every: float = Field(5.0, gt=0)
    final: float = Field(0.0, ge=0)

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or min(value, default=1) <= 0:
            raise ValueError("Expected epochs in ascending order, above 0")
        return value


class Ema(_Frozen):
    """A moving average of the weights, by which a run is judged; with `warmup`, of few steps at the start."""

    momentum: float = Field(0.9999, ge=0, lt=1)
    warmup: bool = True


class Clip(_Frozen):
    """Adaptive gradient clipping; the fields of `nfzoo.AGC`."""

    clip_factor: float = Field(0.01, gt=0)
    eps: float = Field(1e-3, gt=0)
    exclude: tuple[str, ...] = ("head/kernel",)
    vector_units: Literal["tensor", "element"] = "tensor"


def suggest(batch_size: int) -> float:
    """Suggest a clip factor for AGC: 0.01 from 1024 examples per update on, twice that for each halving, up to 0.16.

    The paper scans {0.01, 0.02, 0.04, 0.08, 0.16} at batch sizes 256 to 4096 and shows it in figures without numbers:
    larger batches need smaller factors; it recommends 0.01 for 1024 to 4096. What is between, and everything below
    256, is our interpolation and not a measurement.

    Args:
        batch_size: examples per update.

    Example:
        >>> [suggest(n) for n in (4096, 1024, 512, 128, 64, 8)]
        [0.01, 0.01, 0.02, 0.08, 0.16, 0.16]

    References: NFNet paper (arXiv 2102.06171), section 4 and figure 2.
    """
    if batch_size < 1:
        raise ValueError(f"Expected a batch size above 0. Received: {batch_size}")
    grid = (0.01, 0.02, 0.04, 0.08, 0.16)
    return grid[min(max(round(math.log2(1024 / batch_size)), 0), len(grid) - 1)]


class Recipe(_Frozen):
    """One way to train.

    Attributes:
        build: overrides of `nfzoo.build` by pattern of the model's name; all that match apply, in order. Dropout and
            stochastic depth are among them.
        agc: settings, a clip factor, or "suggest" for `suggest` of the examples per update.
        ema: settings, a momentum, or None.
        label_smoothing: of the loss.
        seed: decides initialisation, splits, order, augmentation and dropout.
        seeds: the seeds that a scan repeats each setting with.
        deterministic: prefer operations that give the same result twice to faster ones.
        frozen_epochs: epochs at the start that train a new classifier alone, on the weights of `build`; then all layers
            learn, with a fresh optimizer. frozen_learning_rate: of the first part; None for the optimizer's.
    """

    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    batch_size: int = Field(128, gt=0)
    agc: Clip | None = None  # below what "suggest" looks at: fields are validated in order
    ema: Ema | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    epochs: int = Field(10, gt=0)
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    build: dict[str, dict[str, Any]] = {}
    seed: int = Field(0, ge=0)
    seeds: tuple[int, ...] = (0,)
    deterministic: bool = True
    frozen_epochs: int = Field(0, ge=0)
    frozen_learning_rate: float | None = Field(None, gt=0)
    schedule: Schedule = Schedule()

    @property
    def examples_per_update(self) -> int:
        """How many examples an update of the weights sees."""
        return self.batch_size * self.optimizer.accumulate

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the schedule."""
        scale = self.examples_per_update / 256 if self.optimizer.per_256 else 1
        return self.optimizer.learning_rate * scale

    @property
    def one_hot(self) -> bool:
        """Whether labels are one-hot vectors: mixed labels need them, and so does smoothing."""
        return self.augment.mixes or self.label_smoothing > 0

    @field_validator("frozen_epochs")
    @classmethod
    def _within_the_run(cls, value: int, info: ValidationInfo) -> int:
        if value > (epochs := info.data.get("epochs", value)):
            raise ValueError(f"Expected at most epochs={epochs}")
        return value

    @field_validator("agc", "ema", mode="before")
    @classmethod
    def _by_number(cls, value: Any, info: ValidationInfo) -> Any:
        # `agc=0.02`, `agc=suggest` and `agc=none` read better on a command line than a table.
        if value == "suggest" and info.field_name == "agc" and {"batch_size", "optimizer"} <= info.data.keys():
            value = suggest(info.data["batch_size"] * info.data["optimizer"].accumulate)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {{"agc": "clip_factor", "ema": "momentum"}[info.field_name]: value}
        return value

    @property
    def first_drop(self) -> float | None:
        """The epoch after which a stepwise schedule first lowers the rate, infinite for never; None for the others."""
        if self.schedule.name == "halving":
            return self.schedule.start + self.schedule.every
        return min(self.schedule.milestones, default=math.inf) if self.schedule.name == "step" else None

    @field_validator("schedule")
    @classmethod
    def _fits_the_run(cls, value: Schedule, info: ValidationInfo) -> Schedule:
        epochs = info.data.get("epochs", math.inf) - info.data.get("frozen_epochs", 0)
        if value.warmup_epochs and value.warmup_epochs >= epochs:
            raise ValueError(f"Expected warmup_epochs below the {epochs} epochs of the run; lower it as well")
        return value

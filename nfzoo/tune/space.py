"""What a scan tries: axes through the settings of a recipe, and the trials that lie on them. No Keras here."""

import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nfzoo import recipes
from nfzoo.settings import OPTIMIZER_FIELDS

LEARNING_RATE = "optimizer.learning_rate"
EPOCHS = "epochs"
# What paths are called in the names of folders and in the columns of tables; any other is called by its last word.
SHORT = {LEARNING_RATE: "lr", "agc.clip_factor": "clip", "optimizer.weight_decay": "wd"}
COLUMNS = {EPOCHS: "max_epochs"}  # "epochs" tells how many were trained
METRICS = ("status", "val_accuracy", "epochs", "seconds")
Value = bool | int | float | str | None


class Range(BaseModel):
    """A range of positive numbers, even on a logarithmic scale.

    Example:
        >>> Range.parse("1e-4..1e-1").spaced(4)
        (0.0001, 0.001, 0.01, 0.1)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    low: float = Field(gt=0)
    high: float

    @model_validator(mode="after")
    def _upwards(self):
        if not self.low < self.high:
            raise ValueError(f"Expected a range from low to high. Received: {self.low:g}..{self.high:g}")
        return self

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Read "LOW..HIGH"."""
        try:
            low, high = map(float, text.split(".."))
            return cls(low=low, high=high)
        except ValueError:  # pydantic's is one, too
            message = f"Expected LOW..HIGH, two positive numbers. Received: {text!r}; write e.g. 1e-4..1e-1"
            raise ValueError(message) from None

    def spaced(self, points: int) -> tuple[float, ...]:
        """So many numbers from low to high with one ratio between neighbours."""
        return tuple(rounded(v) for v in np.geomspace(self.low, self.high, points))


def rounded(value: float) -> float:
    """Four digits: what a folder is called, what a command line says, and what was trained are one number."""
    return float(f"{value:.4g}")


def text_of(value: Value) -> str:
    """A value as names of folders and command lines have it.

    Example:
        >>> text_of(0.001), text_of(0.123456789), text_of(None), text_of("cosine")
        ('0.001', '0.123456789', 'none', 'cosine')
    """
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "none" if value is None else str(value)


class Setting(NamedTuple):
    """A model and what of its recipe differs: (path, value) pairs."""

    model: str
    values: tuple[tuple[str, Value], ...]


class Trial(NamedTuple):
    """One run of a setting, with a seed."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return trial_name(self.setting.model, dict(self.setting.values), self.seed)

    def recipe(self, base: recipes.Recipe) -> recipes.Recipe:
        """What the trial trains by."""
        return recipes.override(base, {**dict(self.setting.values), "seed": self.seed})


def trial_name(model: str, values: dict[str, Value], seed: int) -> str:
    """Folder of a trial.

    Example:
        >>> trial_name("bn_efficientnet_b0", {"optimizer.learning_rate": 0.001, "agc.clip_factor": 0.02}, 868)
        'bn_efficientnet_b0-lr0.001-clip0.02-seed868'
    """
    parts = [
        SHORT.get(path, path.rpartition(".")[2]) + text_of(value).replace("/", "_") for path, value in values.items()
    ]
    return "-".join([model, *parts, f"seed{seed}"])


class Spec(BaseModel):
    """A whole scan, as data that travels to workers.

    Attributes:
        axes: path of a recipe -> its values, or a range of which the search takes what it wants.
        seeds: every setting is repeated with each.
        search: "grid" walks all combinations; the others are keras-tuner's, one search per model, all of one size.
        trials: settings that "random" and "bayesian" try per model.
        parallel: results that a search may not know yet when it proposes a setting. What is proposed depends on
            this number, never on which worker was fast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    models: tuple[str, ...] = Field(min_length=1)
    axes: dict[str, Range | tuple[Value, ...]]
    seeds: tuple[int, ...] = Field(min_length=1)
    recipe: recipes.Recipe
    overrides: dict[str, Any] = {}
    search: Literal["grid", "random", "bayesian", "hyperband"] = "grid"
    trials: int | None = Field(None, gt=0)
    parallel: int = Field(1, gt=0)

    def columns(self) -> dict[str, str]:
        """Path of every axis -> column of the table; of two axes with one last word, both have their paths."""
        paths = [*self.axes, EPOCHS] if self.search == "hyperband" else list(self.axes)
        last = {path: COLUMNS.get(path, path.rpartition(".")[2]) for path in paths}
        taken = [*last.values(), "model", "seed", *METRICS]
        return {path: word if taken.count(word) == 1 else path for path, word in last.items()}

    def check(self) -> None:
        """Refuse what no trial could run with, before anything is made.

        Raises:
            ValueError: with the setting that does not fit.
        """
        for path in ("seed", "seeds"):
            if path in self.axes:
                raise ValueError(
                    f"Expected axes of settings. Received: {path!r}; name the seeds by --seeds, they repeat"
                )
        used = self.axes.get("optimizer.name", (self.recipe.optimizer.name,))
        for path in self.axes:
            having = [name for name, own in OPTIMIZER_FIELDS.items() if path.removeprefix("optimizer.") in own]
            if path.startswith("optimizer.") and having and not set(having) & set(used):
                raise ValueError(
                    f"Expected axes that the optimizer has. Received: {path!r} with {', '.join(used)}; "
                    f"--set optimizer.name=… takes those that have it: {', '.join(having)}"
                )
        if self.search == "hyperband" and EPOCHS in self.axes:
            raise ValueError(f"Expected axes beside {EPOCHS!r}, which hyperband decides. Received: both")
        if self.trials is not None and self.search in ("grid", "hyperband"):
            raise ValueError(f"Expected no number of trials: {self.search} decides. Received: {self.trials}")
        if not self.recipe.data.validation_fraction:
            raise ValueError(
                "Expected validation images, by which settings are compared. Received: data.validation_fraction=0"
            )
        # What lies within a range must do, too, where its ends are whole numbers by chance.
        within = lambda a: a.low * (a.high / a.low) ** 0.382  # noqa: E731
        ends = [(a.low, within(a), a.high) if isinstance(a, Range) else a for a in self.axes.values()]
        if not all(ends):
            raise ValueError(f"Expected values for each axis. Received: {self.axes}")
        changes = {EPOCHS: 1} if self.search == "hyperband" else {}
        for values in itertools.product(*ends):
            for seed in self.seeds:
                recipes.override(self.recipe, {**changes, **dict(zip(self.axes, values, strict=True)), "seed": seed})
        labels = [SHORT.get(path, path.rpartition(".")[2]) for path in self.axes]
        if len(set(labels)) < len(labels):
            raise ValueError(f"Expected axes that differ in their last words. Received: {', '.join(self.axes)}")


def spec(
    models, axes: dict[str, Any], recipe: recipes.Recipe, *, seeds=None, overrides=None, search="grid", trials=None,
    points=5, parallel=1,
) -> Spec:  # fmt: skip
    """Make and check the description of a scan; the arguments are those of `nfzoo.tune.scan`."""
    known = ("grid", "random", "bayesian", "hyperband")
    if search not in known:
        raise ValueError(f"Expected a search, one of {', '.join(known)}. Received: {search!r}")
    for path, values in axes.items():
        if isinstance(values, Range):
            axes = {**axes, path: values.spaced(points) if search == "grid" else values}
        else:
            axes = {**axes, path: tuple(dict.fromkeys(values))}
    if trials is None and search in ("random", "bayesian"):
        trials = 10
    try:
        made = Spec(
            models=tuple(dict.fromkeys(models)), axes=axes, seeds=tuple(dict.fromkeys(seeds or recipe.seeds)),
            recipe=recipe, overrides=overrides or {}, search=search, trials=trials, parallel=parallel,
        )  # fmt: skip
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}. Received: {e['input']!r}" for e in error.errors()]
        raise ValueError("Expected a possible scan. " + "; ".join(lines)) from None
    made.check()
    return made

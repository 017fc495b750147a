"""Optimizers of the references: momentum without the learning rate inside, groups of variables, clipping at the update.

Whatever is done to a gradient here is done in `update_step`, which Keras calls once per variable and update: after the
loss scale is taken out, after the sum over replicas, after gradients are accumulated. There lies the right place.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import ops

from nfzoo.agc import AGC, Axes, clip, matches


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer that updates, behind those that scale the loss or clip."""
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def updating(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Those that update: one, or the several of a `MultiOptimizer`, of which each has variables of its own."""
    inner = innermost(optimizer)
    return [part for one in inner.optimizers for part in updating(one)] if hasattr(inner, "optimizers") else [inner]


def clipping_of(model: keras.Model) -> tuple[AGC, dict[str, Axes | None]]:
    """How a model's gradients are clipped: settings, and units by path. Without AGC, its defaults and no units."""
    if getattr(model, "agc", None) is not None:
        return model.agc, model._agc_units
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None:
        if isinstance(optimizer, AdaptiveGradientClipping):
            return optimizer.agc, optimizer.units
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return AGC(), {}


@contextlib.contextmanager
def clipped_updates(optimizer: keras.optimizers.Optimizer, agc: AGC, units: dict[str, Axes | None]) -> Iterator[None]:
    """While this lasts, every update of the optimizer clips its gradient first.

    The limit is taken from the weights as the update finds them: optimizers of Keras' own with `weight_decay` have
    decayed them by then, those of this module have not.

    Args:
        optimizer: any of Keras', built or not, wrapped or not.
        agc: clip factor and floor.
        units: path of a variable -> the axes of its units, None to leave it as it is; see `AGC.units`.
    """
    # Replicas are traced side by side and meet in one update: the first clips for all.
    parts = [part for part in updating(optimizer) if "update_step" not in vars(part)]
    for part in parts:
        # The instance's attribute shadows the method, past Keras' tracking.
        object.__setattr__(part, "update_step", functools.partial(_clipped_step, part, part.update_step, agc, units))
    try:
        yield
    finally:
        for part in parts:
            object.__delattr__(part, "update_step")


def _clipped_step(optimizer, update, agc: AGC, units: dict[str, Axes | None], gradient, variable, learning_rate):
    path = optimizer._trainable_variables[optimizer._get_variable_index(variable)].path
    if path not in units:
        raise ValueError(f"Expected the variables the clipping was made for. Received also: {path}; make it anew")
    if units[path] is not None:
        gradient, _ = clip(gradient, variable, units[path], agc.clip_factor, agc.eps)
    return update(gradient, variable, learning_rate)


@keras.saving.register_keras_serializable(package="nfzoo")
class AdaptiveGradientClipping(keras.optimizers.Optimizer):
    """Adaptive gradient clipping around any Keras optimizer, for any Keras model on any backend.

    The gradient that is clipped is the one that updates: unscaled, summed over replicas, accumulated. An `NFModel`
    does the same by `compile(agc=...)`.

    Args:
        inner_optimizer: what updates.
        model: the built model that is trained; its layers tell what a unit of each variable is.
        agc: factor, floor and exclusions; the default excludes "head/kernel", which other models call otherwise.
        units: in place of a model, as `AGC.units` returns them; a saved optimizer keeps them.

    Raises:
        ValueError: if AGC does not know the units of a variable, a pattern of `agc.exclude` matches none, or the
            inner optimizer scales the loss or clips like this one.

    Example:
        >>> x = keras.Input((4,))
        >>> model = keras.Model(x, keras.layers.Dense(3, name="head")(x))
        >>> optimizer = AdaptiveGradientClipping(keras.optimizers.Adam(1e-3), model, AGC(0.01))
        >>> model.compile(optimizer, "mean_squared_error")
        >>> optimizer.units
        {'head/kernel': None, 'head/bias': (0,)}

    References: NFNet paper (arXiv 2102.06171), section 4, equation 3.
    """

    def __init__(
        self, inner_optimizer: keras.optimizers.Optimizer, model: keras.Model | None = None, agc: AGC | None = None,
        *, units: dict[str, Sequence[int] | None] | None = None, name: str | None = None,
    ):  # fmt: skip
        if (model is None) == (units is None):
            raise ValueError(f"Expected a model or units, one of the two. Received: model={model}, units={units}")
        if model is not None and not model.built:
            raise ValueError("Expected a built model, whose variables are there. Received: one that is not; build it")
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer | AdaptiveGradientClipping):
            raise ValueError(
                f"Expected an optimizer that updates. Received: a {type(self.inner_optimizer).__name__}; clip once; "
                "scale the loss around it, as compile does under mixed_float16"
            )
        self.agc = agc or AGC()
        found = self.agc.units(model) if units is None else units
        self._units = _Plain({path: None if axes is None else tuple(axes) for path, axes in found.items()})

    @property
    def units(self) -> dict[str, Axes | None]:
        """Path of each variable -> the axes of its units, None where it is not clipped."""
        return dict(self._units.content)

    def build(self, variables) -> None:
        if not self.built:
            self._units = _Plain(_renamed(self._units.content, [v.path for v in variables]))
            self.inner_optimizer.build(variables)
            super().build(variables)

    def apply(self, grads, trainable_variables=None) -> None:
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        with clipped_updates(self.inner_optimizer, self.agc, self._units.content):
            self.inner_optimizer.apply(grads, trainable_variables)

    # The rest is the inner optimizer's, as in keras.optimizers.LossScaleOptimizer.
    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if "inner_optimizer" in vars(self):  # Keras sets it at first, too
            self.inner_optimizer.loss_scale_factor = value

    @property
    def _model_variables_moving_average(self):  # keras.callbacks.SwapEMAWeights asks for it
        return self.inner_optimizer._model_variables_moving_average

    def exclude_from_weight_decay(self, *args, **kwargs) -> None:
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict:
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "agc": self.agc.get_config(),
            "units": {path: axes if axes is None else list(axes) for path, axes in self._units.content.items()},
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, agc=AGC.from_config(config["agc"]), units=config["units"], name=config["name"])


def _renamed(units: dict, paths: list[str]) -> dict:
    """Units by the paths that variables have now: Keras loads a Sequential model under another name than it had."""
    other = not units.keys() >= set(paths)  # else they are the same, in whatever order
    return dict(zip(paths, units.values(), strict=True)) if other and _alike(list(units), paths) else units


def _alike(before: list[str], paths: list[str]) -> bool:
    """Whether paths name the same variables, those of a model that may have had another name."""
    ends = lambda path: path.split("/")[-2:]  # noqa: E731
    return len(before) == len(paths) and all(ends(a) == ends(b) for a, b in zip(before, paths, strict=True))


class _Plain:
    """Holds a dict that Keras' tracking must not turn into one of its own, whose keys may hold no "/"."""

    def __init__(self, content: dict):
        self.content = content


@dataclass(frozen=True)
class Group:
    """Variables that learn in a way of their own.

    Attributes:
        pattern: regular expression on the end of a variable's path, as in `AGC.exclude`.
        learning_rate, weight_decay: factors on what the optimizer has.
    """

    pattern: str
    learning_rate: float = 1.0
    weight_decay: float = 1.0


class Grouped:
    """Mixed into a Keras optimizer: ordered groups of variables, and a moving average whose decay warms up.

    Saved and restored with the optimizer, which Keras' own `exclude_from_weight_decay` is not. Weight decay is Keras'
    decoupled one: w <- w - learning rate * weight_decay * w, by the group's factors.

    Args:
        groups: `Group`s or dicts of their fields; the first whose pattern matches a variable is the variable's.
        ema_warmup: with use_ema, the decay of step t (from 0) is min(ema_momentum, (1 + t) / (10 + t)), and the
            average sets out from the initial weights; a step that only accumulates gradients leaves it alone.
        args, kwargs: the optimizer's own.

    Raises:
        ValueError: at build, for a pattern that matches no variable.

    Example:
        >>> decay_kernels_only = [{"pattern": "bias|gain|gamma|beta", "weight_decay": 0.0}]
        >>> optimizer = Adam(1e-3, weight_decay=0.01, groups=decay_kernels_only)
        >>> keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)).groups.content
        [Group(pattern='bias|gain|gamma|beta', learning_rate=1.0, weight_decay=0.0)]
    """

    def __init__(self, *args, groups: Sequence[Group | dict] = (), ema_warmup: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups = _Plain([group if isinstance(group, Group) else Group(**group) for group in groups])
        self.ema_warmup, self._paths = ema_warmup, _Plain([])

    def build(self, variables) -> None:
        if self.built:
            return
        paths = [v.path for v in variables]
        # A saved optimizer goes by the names that variables had.
        self._paths = self._paths if _alike(self._paths.content, paths) else _Plain(paths)
        self._group_of = _Plain([self._group(path) for path in self._paths.content])
        patterns = [group.pattern for group in self.groups.content]
        if unused := [p for p in patterns if not any(matches(p, path) for path in self._paths.content)]:
            raise ValueError(
                "Expected each pattern of the optimizer's groups to match a variable that learns. Received: "
                f"{unused}, which match none. The paths end with {paths[-3:]}"
            )
        super().build(variables)
        if self.use_ema and self.ema_warmup:
            for average, variable in zip(self._model_variables_moving_average, variables, strict=True):
                average.assign(ops.copy(variable))  # JAX would have them share one buffer

    def _group(self, path: str) -> Group:
        return next((g for g in self.groups.content if matches(g.pattern, path)), Group(""))

    def update_step(self, gradient, variable, learning_rate) -> None:
        group = self._group_of.content[self._get_variable_index(variable)]
        rate = learning_rate * group.learning_rate
        decay = (self.weight_decay or 0.0) * group.weight_decay
        if decay and self._use_weight_decay(variable):
            gradient = self._decayed(gradient, variable, rate, decay)
        super().update_step(gradient, variable, rate)

    def _decayed(self, gradient, variable, rate, decay: float):
        self.assign_sub(variable, ops.convert_to_tensor(variable) * ops.cast(rate * decay, variable.dtype))
        return gradient

    def _apply_weight_decay(self, variables) -> None:
        """Nothing: `update_step` does it, by groups."""

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        step = ops.cast(self.iterations, "float32")
        if self.ema_warmup:
            decay = ops.minimum(self.ema_momentum, (1 + step) / (10 + step))
        else:  # Keras' own: the average sets out from the weights of the first step
            decay = ops.where(step == 0, 0.0, self.ema_momentum)
        if every := self.gradient_accumulation_steps:
            decay = ops.where((self._iterations + 1) % every == 0, decay, 1.0)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            if average is not None:
                weight = ops.cast(decay, average.dtype)
                average.assign(weight * average + (1 - weight) * variable)

    def get_config(self) -> dict:
        groups = [asdict(group) for group in self.groups.content]
        return {**super().get_config(), "groups": groups, "ema_warmup": self.ema_warmup, "paths": self._paths.content}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        config = dict(config)
        paths = config.pop("paths", [])
        made = super().from_config(config, custom_objects)
        made._paths = _Plain(paths)
        return made


class _Momentum(keras.optimizers.Optimizer):
    """Momentum of gradients, not of steps."""

    def __init__(
        self, learning_rate: Any = 0.01, momentum: float = 0.9, nesterov: bool = True,
        weight_decay: float | None = None, name: str = "momentum_sgd", **kwargs,
    ):  # fmt: skip
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected 0 <= momentum < 1. Received: {momentum}")
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.momentum, self.nesterov = momentum, nesterov

    def build(self, variables) -> None:
        if not self.built:
            super().build(variables)
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate) -> None:
        kept = self.momentums[self._get_variable_index(variable)]
        gradient, rate = ops.cast(gradient, variable.dtype), ops.cast(learning_rate, variable.dtype)
        velocity = self.momentum * ops.convert_to_tensor(kept) + gradient
        self.assign(kept, velocity)
        self.assign_sub(variable, rate * (gradient + self.momentum * velocity if self.nesterov else velocity))

    def get_config(self) -> dict:
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}


@keras.saving.register_keras_serializable(package="nfzoo")
class MomentumSGD(Grouped, _Momentum):
    """Stochastic gradient descent as the NFNet authors run it: coupled weight decay, the learning rate outside.

        g <- g + weight_decay * w;   m <- momentum * m + g;   w <- w - learning_rate * (g + momentum * m)

    (w <- w - learning_rate * m without Nesterov). Keras' SGD keeps the learning rate inside its velocity, which is the
    same only while the rate is constant; and its weight decay is not part of the gradient.

    Args:
        learning_rate: a number, a schedule or a function; default 0.01.
        momentum, nesterov: as above; default 0.9, True.
        weight_decay: added to the gradient, after clipping.
        groups, ema_warmup: see `Grouped`.
        kwargs: of `keras.optimizers.Optimizer`.

    Example:
        >>> optimizer = MomentumSGD(0.1, weight_decay=2e-5, groups=[Group(".*/(bias|gain)", weight_decay=0)])
        >>> optimizer.get_config()["groups"]
        [{'pattern': '.*/(bias|gain)', 'learning_rate': 1.0, 'weight_decay': 0}]

    References: the optimizer of DeepMind's NFNets, which is also PyTorch's SGD.
    """

    def _decayed(self, gradient, variable, rate, decay: float):
        return gradient + ops.convert_to_tensor(variable) * decay


@keras.saving.register_keras_serializable(package="nfzoo")
class SGD(Grouped, keras.optimizers.SGD):
    """Keras' SGD, with groups of variables; see `Grouped`, and `MomentumSGD` for what differs.

    Example:
        >>> SGD(0.1, momentum=0.9).nesterov
        False
    """


@keras.saving.register_keras_serializable(package="nfzoo")
class Adam(Grouped, keras.optimizers.Adam):
    """Keras' Adam (AdamW with `weight_decay`), with groups of variables; see `Grouped`.

    Example:
        >>> Adam(1e-3, weight_decay=0.05, groups=[{"pattern": ".*/bias", "weight_decay": 0}]).groups.content
        [Group(pattern='.*/bias', learning_rate=1.0, weight_decay=0)]
    """


@keras.saving.register_keras_serializable(package="nfzoo")
class RMSprop(Grouped, keras.optimizers.RMSprop):
    """Keras' RMSprop, with groups of variables; see `Grouped`.

    Example:
        >>> RMSprop(0.016, momentum=0.9, ema_warmup=True).ema_warmup
        True
    """

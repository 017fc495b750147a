"""`NFModel`: a functional Keras model whose training step can clip gradients adaptively."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator

import keras

from nfzoo import agc as clipping
from nfzoo import layers
from nfzoo.backend import Step
from nfzoo.optimizers import AdaptiveGradientClipping, clipped_updates

# Keras walks the graph of a model recursively, one frame per layer: the CIFAR ResNet of 1202 layers is deeper than
# Python's default of 1000 allows, when it is built and when it is loaded.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))


@keras.saving.register_keras_serializable(package="nfzoo")
class NFModel(Step, keras.Model):
    """A functional `keras.Model`; `compile(agc=AGC(...))` adds adaptive gradient clipping to `fit`.

    Everything else is Keras': saving, cloning, export, `trainable`, mixed precision. What is clipped is the gradient
    that updates: without the loss scale, summed over replicas, accumulated.

    Example:
        >>> import nfzoo
        >>> model = nfzoo.build("nf_test_efficientnet", classes=10)
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile("sgd", loss, agc=nfzoo.AGC(0.01))
        >>> model.agc.clip_factor
        0.01
    """

    # A class attribute, not set in __init__: a functional subclass must leave the constructor untouched to load.
    agc: clipping.AGC | None = None
    clipped_share: keras.metrics.Mean | None = None
    _evaluates = False

    def __init_subclass__(cls, **kwargs) -> None:
        """A subclass' own training step clips, too: within it the optimizer's updates do, at most once."""
        super().__init_subclass__(**kwargs)
        if "train_step" in vars(cls):
            cls.train_step = _clipping(cls.train_step)

    def compile(self, *args, agc: clipping.AGC | None = None, **kwargs) -> None:
        """Configure training as `keras.Model.compile`, with `agc` for adaptive gradient clipping (None: off).

        Raises:
            ValueError: if AGC does not know the units of a variable, or if an exclude pattern matches nothing.
        """
        if agc is not None and not isinstance(agc, clipping.AGC):
            raise TypeError(f"Expected agc to be an nfzoo.AGC or None. Received: agc={agc!r}")
        super().compile(*args, **kwargs)
        if agc is not None and _clips(self.optimizer):
            raise ValueError("Expected agc, or an AdaptiveGradientClipping optimizer. Received: both; clip once")
        self.agc = agc
        self._agc_units = None if agc is None else agc.units(self)
        share = keras.metrics.Mean("agc_clipped") if agc is not None and agc.log_clipped else None
        object.__setattr__(self, "clipped_share", share)  # Keras would keep track of that of an earlier compile, too

    @property
    def metrics(self) -> list[keras.Metric]:
        """Keras' own, and in training with an AGC that logs, the mean share of units that it clips."""
        kept = self.clipped_share is None or self._evaluates
        return super().metrics if kept else [*super().metrics, self.clipped_share]

    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As `keras.Model.test_on_batch`."""
        with self._evaluating():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without metrics of training: Keras takes those of the model only where a step tells all of them."""
        object.__setattr__(self, "_evaluates", True)
        try:
            yield
        finally:
            object.__setattr__(self, "_evaluates", False)

    def agc_axes(self) -> list:
        """Unit axes of the trainable variables, in their order, as decided when the model was compiled."""
        missing = [v.path for v in self.trainable_variables if v.path not in self._agc_units]
        if missing:
            raise ValueError(
                f"Expected the variables the model was compiled with. Received also: {missing}; compile again"
            )
        return [self._agc_units[v.path] for v in self.trainable_variables]

    def clipping(self) -> contextlib.AbstractContextManager:
        """While this lasts, updates of the optimizer clip their gradients, if the model was compiled so."""
        if self.agc is None:
            return contextlib.nullcontext()
        self.agc_axes()
        return clipped_updates(self.optimizer, self.agc, self._agc_units)

    def save(self, filepath, *args, **kwargs) -> None:
        """As `keras.Model.save`; a legacy .h5 file has no place for AGC, which is said."""
        if self.agc is not None and str(filepath).endswith((".h5", ".hdf5")):
            warnings.warn(f"{filepath} loads without agc: write a .keras file, or compile again", stacklevel=2)
        super().save(filepath, *args, **kwargs)

    def summary(self, *args, print_fn=None, **kwargs) -> None:
        """Print as `keras.Model.summary`, and the rates of stochastic depth, for which its table has no column."""
        super().summary(*args, print_fn=print_fn, **kwargs)
        rates = [layer.rate for layer in self.layers if isinstance(layer, layers.StochasticDepth)]
        if rates:
            (print_fn or print)(f" Stochastic depth: {len(rates)} layers, rates {rates[0]:.4g} to {rates[-1]:.4g}")

    @property
    def pyramid_outputs(self) -> dict:
        """The maps of a model built with `features_only=True`, by name, as KerasHub's detectors ask for them."""
        if not isinstance(self.output, dict):
            raise AttributeError("Expected a model built with features_only=True. Received: one with a single output")
        return self.output

    @property
    def feature_info(self) -> dict[str, dict[str, int]]:
        """Stride and channels of each of the `pyramid_outputs`.

        Example:
            >>> import nfzoo
            >>> nfzoo.build("nf_test_resnet", features_only=True, out_indices=[2]).feature_info
            {'P3': {'stride': 8, 'channels': 128}}
        """
        return {key: {"stride": 2 ** int(key[1:]), "channels": x.shape[-1]} for key, x in self.pyramid_outputs.items()}

    # Keras restores `compile` arguments of a subclass with its own `compile` only through this pair.
    def get_compile_config(self) -> dict:
        config = super().get_compile_config()
        return {**config, "agc": keras.saving.serialize_keras_object(self.agc)} if config and self.agc else config

    def compile_from_config(self, config: dict) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


# Keras' legacy .h5 files name a class without its package.
keras.saving.get_custom_objects().setdefault("NFModel", NFModel)


def _clipping(step: Callable) -> Callable:
    @functools.wraps(step)
    def clipping_step(self, *args, **kwargs):
        with self.clipping():
            return step(self, *args, **kwargs)

    return clipping_step


def _clips(optimizer: keras.optimizers.Optimizer | None) -> bool:
    while optimizer is not None:
        if isinstance(optimizer, AdaptiveGradientClipping):
            return True
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return False

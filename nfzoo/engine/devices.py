"""One run on several devices, of one machine or of many: what its batches are shared by."""

import contextlib
from dataclasses import dataclass

import keras

from nfzoo import backend, recipes


@dataclass(frozen=True)
class Devices:
    """Where a run computes.

    Attributes:
        mirrored: on all devices of this machine, each with a part of every batch.
        coordinator: HOST:PORT of process 0, for a run of several processes (JAX only), all devices of which take part.
        processes, process_id: how many they are, and which this one is.
    """

    mirrored: bool = False
    coordinator: str | None = None
    processes: int = 1
    process_id: int = 0

    def __post_init__(self):
        if self.processes > 1 and self.coordinator is None:
            raise ValueError(f"Expected coordinator=HOST:PORT for processes={self.processes}. Received: none")
        if not 0 <= self.process_id < self.processes:
            raise ValueError(f"Expected 0 <= process_id < {self.processes}. Received: {self.process_id}")
        if self.coordinator is not None and keras.config.backend() != "jax":
            raise ValueError(
                "Expected the JAX backend for several processes: Keras' fit fails under TensorFlow's "
                "MultiWorkerMirroredStrategy (keras-team/keras#20585). "
                f"Received: {keras.config.backend()!r}; set KERAS_BACKEND=jax"
            )

    def check(self, recipe: recipes.Recipe) -> None:
        """Refuse what the backend cannot do on several devices.

        Raises:
            ValueError: for accumulated gradients on TensorFlow.
        """
        if self.mirrored and recipe.optimizer.accumulate > 1 and keras.config.backend() == "tensorflow":
            raise ValueError(
                "Expected optimizer.accumulate=1 under --strategy mirrored: Keras accumulates no gradients under "
                f"TensorFlow's MirroredStrategy. Received: {recipe.optimizer.accumulate}; set KERAS_BACKEND=jax, or "
                "take larger batches"
            )

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's folder and speaks."""
        return self.process_id == 0

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of every batch this process reads: see `nfzoo.data.Batches`."""
        return self.process_id, self.processes

    @property
    def multiple(self) -> int:
        """What the sizes of all batches are multiples of; known within `scope`."""
        return backend.device_count() if self.mirrored or self.coordinator else 1

    @contextlib.contextmanager
    def scope(self):
        """Make and train a model on these devices while this lasts."""
        if self.coordinator is not None:
            keras.distribution.initialize(self.coordinator, self.processes, self.process_id)
        if not (self.mirrored or self.coordinator):
            yield
            return
        with backend.data_parallel():
            yield

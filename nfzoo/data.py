"""Images in memory, and batches that are a pure function of (seed, epoch, step).

Sets that fit in memory are NumPy arrays behind a `keras.utils.PyDataset`: a resumed run sees the batches it would have
seen, and nothing here needs TensorFlow unless a tensorflow-datasets name is asked for.
"""

import functools
import math
import pathlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import keras
import numpy as np

from nfzoo import sources
from nfzoo.augment import augment as augmented
from nfzoo.files import atomic
from nfzoo.recipes import Augment, Data, Recipe
from nfzoo.sources import Split

# Channel constants of x / 255 that the literature uses; any other set's are computed from its training images.
CONSTANTS = {
    "cifar100": ((0.5070751592, 0.4865488733, 0.4409178433), (0.2673342859, 0.2564384629, 0.2761504713)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class Images:
    """A data set in memory; mean and std are per channel, of x / 255; `name` outlives a copy as .npz."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def load(data: Data, seed: int = 0) -> Images:
    """Read a data set and split validation images off the training images.

    Args:
        data: what to read, see `nfzoo.recipes.Data`.
        seed: of the training/validation split.

    Raises:
        ValueError: an empty set, images of several sizes, a set that does not fit in memory.
        FileNotFoundError: a set that is not there, with how to get it.
        OSError: an image that cannot be read, with its path.

    Example:
        >>> images = load(Data(name="digits"))
        >>> len(images.train), len(images.validation), len(images.test), images.train.images.shape[1:]
        (1150, 287, 360, (32, 32, 3))
    """
    whole = _whole(data)
    order = np.random.default_rng([seed, 1]).permutation(len(whole.train))
    held_out = round(len(order) * data.validation_fraction)
    train, validation = order[held_out:][: data.limit], order[:held_out][: data.limit]
    return replace(whole, train=whole.train.take(train), validation=whole.train.take(validation))


def _whole(data: Data) -> Images:
    """All that a set has, no validation images split off yet."""
    train, test, classes, facts = sources.read(data)
    if not facts:
        mean, std = CONSTANTS.get(data.name) or _constants(train.images)
        facts = {"mean": mean, "std": std, "name": data.name}
    return Images(train, train.take(slice(0)), test, classes, **facts)


def _constants(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # In chunks: the whole set as float64 would take eight times its memory.
    total = square = 0.0
    for start in range(0, len(images), 256):
        chunk = images[start : start + 256] / 255.0
        total, square = total + chunk.sum((0, 1, 2)), square + (chunk**2).sum((0, 1, 2))
    n = images[..., 0].size
    mean = total / n
    std = np.sqrt(np.maximum(square / n - mean**2, 0)) + 1e-8
    return tuple(mean.tolist()), tuple(std.tolist())


def save(data: Data, path: str | pathlib.Path) -> pathlib.Path:
    """Write a data set as plain arrays that `Data(name="FILE.npz")` reads anywhere, without TensorFlow.

    Its name and its channel constants go with it: those of the literature are known by the name of the set.

    Raises:
        ValueError: for another ending than .npz, and as `load`.

    Example:
        >>> import tempfile
        >>> path = save(Data(name="fake"), pathlib.Path(tempfile.mkdtemp()) / "fake.npz")
        >>> load(Data(name=str(path))).name
        'fake'
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"Expected a path that ends with .npz. Received: {path}")
    whole = _whole(data)
    splits = {"train": whole.train, "test": whole.test}
    arrays = {f"{name}_{field}": getattr(s, field) for name, s in splits.items() for field in ("images", "labels")}
    facts = {key: np.array(getattr(whole, key)) for key in ("classes", *sources.FACTS)}
    with atomic(path) as partial:
        np.savez_compressed(partial, **arrays, **facts)
    return path


class Batches(keras.utils.PyDataset):
    """Standardized batches of a split: images (b, height, width, 3) float32, labels (b,) int32 or (b, classes) float32.

    While one is trained on, a thread makes the next: not every backend looks ahead by itself.

    Args:
        split: what to read.
        batch_size: of all but the last batch, which may be smaller.
        mean, std: per channel, of x / 255.
        seed: with the epoch and the step it decides order and augmentation.
        shuffle: new order every epoch.
        augment: see `nfzoo.augment`; None for none.
        epoch: the epoch of the batches. In `fit`, pass an `EpochClock` to set it, and shuffle=False.
        classes: give labels as one-hot vectors of so many; mixing needs it.
        shard: (i, n) for process i of n: images i, i + n, … of every batch. Each process makes the whole batch, so that
            together they see what one alone would; only a last batch that n does not divide loses its end.
        multiple: cut the last batch to a multiple of this, so that devices have equal parts.

    Raises:
        ValueError: for mixing without classes, or a batch that does not divide among the processes.

    Example:
        >>> images = load(Data(name="fake"))
        >>> x, y = Batches(images.train, 32, images.mean, images.std)[0]
        >>> x.shape, y.shape
        ((32, 32, 32, 3), (32,))
    """

    def __init__(
        self, split: Split, batch_size: int, mean, std, *, seed: int = 0, shuffle: bool = False,
        augment: Augment | None = None, epoch: int = 0, classes: int | None = None, shard: tuple[int, int] = (0, 1),
        multiple: int = 1,
    ):  # fmt: skip
        super().__init__()
        if augment is not None and augment.mixes and classes is None:
            raise ValueError("Expected classes for mixup and cutmix, whose labels are vectors. Received: None")
        self.multiple = math.lcm(multiple, shard[1])
        if not 0 <= shard[0] < shard[1] or batch_size % self.multiple:
            raise ValueError(
                f"Expected shard=(i, n) with i < n, and a batch size that {self.multiple} divides. "
                f"Received: {shard}, batch size {batch_size}"
            )
        self.split, self.batch_size, self.seed, self.shuffle = split, batch_size, seed, shuffle
        self.augment, self.epoch, self.classes, self.shard = augment, epoch, classes, shard
        self.window: tuple[int, int | None] = (0, None)  # the steps of an epoch that are left to do
        self._ahead: tuple[tuple[int, int], Future] | None = None  # epoch and step of the batch that is being made
        # (x / 255 - mean) / std, as one multiplication and one addition
        self.scale = (1 / (255 * np.asarray(std))).astype(np.float32)
        self.offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return len(range(whole + (rest >= self.multiple))[slice(*self.window)])

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        wanted, (place, made) = (self.epoch, step + self.window[0]), self._ahead or (None, None)
        batch = made.result() if place == wanted else self._made(*wanted)
        in_order = step == 0 or place == wanted  # Keras' own shuffling asks for steps at random
        following = (self.epoch, wanted[1] + 1)
        ahead = in_order and step + 1 < len(self)
        self._ahead = (following, _maker().submit(self._made, *following)) if ahead else None
        return batch

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ahead": None}

    def _made(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = slice(step * self.batch_size, (step + 1) * self.batch_size)
        batch = self.split.take(_order(self.seed, epoch, len(self.split))[chosen] if self.shuffle else chosen)
        images, labels = batch.images, batch.labels
        if self.classes is not None:
            labels = np.eye(self.classes, dtype=np.float32)[labels]
        if self.augment is not None:
            images, labels = augmented(images, labels, self.augment, (self.seed, epoch, step))
        process, processes = self.shard
        mine = slice(process, len(labels) // self.multiple * self.multiple, processes)
        return images[mine] * self.scale + self.offset, labels[mine]

    def on_epoch_end(self) -> None:
        self.epoch += 1


class EpochClock(keras.callbacks.Callback):
    """Tell batches which epoch `fit` is in. Keras also ends an "epoch" when it first looks at the data, so that the
    count of `on_epoch_end` alone would depend on whether the model was built before.
    """

    def __init__(self, *batches: Batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._set(epoch)

    def on_test_begin(self, logs=None) -> None:
        self._set(self.epoch + 1)  # at the end of an epoch, validation images are augmented as of the next

    def _set(self, epoch: int) -> None:
        self.epoch = epoch
        for batches in self.batches:
            batches.epoch = epoch


@functools.cache
def _maker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "nfzoo-batches")


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 3]).permutation(n)


def pipeline(images: Images, recipe: Recipe, shard: tuple[int, int] = (0, 1), multiple: int = 1) -> dict[str, Batches]:
    """The three streams of a run: train (shuffled, augmented), validation, test; labels one-hot in all if in one.

    Args:
        images: a data set.
        recipe: its batch size, seed and augmentation.
        shard, multiple: see `Batches`.

    Example:
        >>> from nfzoo import recipes
        >>> recipe = recipes.override(recipes.get("demo"), {"data.name": "fake", "batch_size": 16})
        >>> streams = pipeline(load(recipe.data), recipe)
        >>> sorted(streams), streams["train"][0][0].shape
        (['test', 'train', 'validation'], (16, 32, 32, 3))
    """
    common = {"batch_size": recipe.batch_size, "mean": images.mean, "std": images.std, "seed": recipe.seed}
    common |= {"classes": len(images.classes) if recipe.one_hot else None, "shard": shard, "multiple": multiple}
    whole = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": None, "random_erasing": 0.0}  # to judge by
    on_validation = recipe.augment.model_copy(update=whole) if recipe.augment.on_validation else None
    return {
        "train": Batches(images.train, shuffle=True, augment=recipe.augment, **common),
        "validation": Batches(images.validation, augment=on_validation, **common),
        "test": Batches(images.test, **common),
    }


def subset(split: Split, n: int, seed: int = 0) -> Split:
    """A random part of a split, e.g. the fixed probe of signal propagation; all of it where it has no more images.

    Example:
        >>> len(subset(Split(np.zeros((10, 8, 8, 3), np.uint8), np.arange(10)), 4))
        4
    """
    return split.take(np.random.default_rng([seed, 4]).permutation(len(split))[:n])

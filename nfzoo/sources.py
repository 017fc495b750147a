"""Where images come from: scikit-learn's digits, noise, .npz files, folders, tensorflow-datasets. No Keras here."""

import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nfzoo.recipes import Data

FACTS = ("mean", "std", "name")  # what an .npz file may tell of the set it was made from
_RESIZE = "Resize them: --image-size 160 of nfzoo data and spp, --set data.image_size=160 of train and scan"
MAX_BYTES = 8 * 2**30
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Split:
    """Images (n, height, width, 3) uint8 in [0, 255] and labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index) -> "Split":
        return Split(self.images[index], self.labels[index])


def read(data: Data) -> tuple[Split, Split, tuple[str, ...], dict]:
    """Read a whole set and check what every source can get wrong.

    Returns:
        Training images, test images, names of the classes, and `FACTS` if the source tells them.

    Raises:
        ValueError, FileNotFoundError, OSError: see `nfzoo.data.load`.

    Example:
        >>> train, test, classes, facts = read(Data(name="fake"))
        >>> len(train), classes, facts
        (256, ('dark', 'dim', 'light', 'bright'), {})
    """
    path, facts = pathlib.Path(data.name), {}
    if data.name == "digits":
        train, test, classes = _digits(data.image_size or 32)
    elif data.name == "fake":
        train, test, classes = _fake(data.image_size or 32)
    elif path.suffix == ".npz":
        train, test, classes, facts = _npz(path, data.image_size)
    elif path.is_dir():
        train, test, classes = _folder(path, data.image_size)
    else:
        train, test, classes = _tfds(data)
    if len(train) == 0 or len(test) == 0:
        raise ValueError(
            f"Expected training and test images. Received: {data.name!r} with {len(train)} and {len(test)}"
        )
    _check_size(test.images[0], train.images[0], data.name)
    for split in (train, test):
        if not 0 <= split.labels.min() <= split.labels.max() < len(classes):
            raise ValueError(f"Expected labels of {len(classes)} classes. Received: {data.name!r} with others")
    return train, test, classes, facts


def _check_size(image: np.ndarray, first: np.ndarray, source: str) -> None:
    if image.shape != first.shape:
        raise ValueError(
            f"Expected images of one size. Received: {source} with {first.shape[:2]} and {image.shape[:2]}. {_RESIZE}."
        )


def _digits(size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """The 1,797 real 8x8 scans of scikit-learn (UCI optical digits), enlarged."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images = np.stack([_resize((scan * 255 / 16).astype(np.uint8), size) for scan in scans.images])
    x, xt, y, yt = train_test_split(
        images, scans.target.astype(np.int32), test_size=0.2, random_state=0, stratify=scans.target
    )
    return Split(x, y), Split(xt, yt), tuple(map(str, range(10)))


def _fake(size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Noise whose brightness tells the class: quick to make and learnable, for tests and dry runs."""
    rng = np.random.default_rng(0)

    def split(n):
        labels = rng.integers(0, 4, n).astype(np.int32)
        noise = rng.integers(0, 64, (n, size, size, 3))
        return Split((noise + 48 * labels[:, None, None, None]).astype(np.uint8), labels)

    return split(256), split(64), ("dark", "dim", "light", "bright")


def _npz(path: pathlib.Path, size: int | None) -> tuple[Split, Split, tuple[str, ...], dict]:
    """Arrays written by `nfzoo.data.save`, of old without `FACTS`; object arrays (pickles) are refused."""
    if not path.exists():
        raise FileNotFoundError(f"Expected a file. Received: {path}. Write it with: nfzoo data NAME --to {path}")
    wanted = ("train_images", "train_labels", "test_images", "test_labels", "classes")
    try:
        # Opened here, because NumPy leaves a file open that turns out to be cut.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        raise ValueError(
            f"Expected an .npz file of plain arrays. Received: {path}, which fails with: {error}"
        ) from None
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(f"Expected the arrays {', '.join(wanted)}. Received: {path} without {', '.join(missing)}")
    found = []
    for images, labels in ((arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in ("train", "test")):
        labels = labels[:, 0] if labels.shape[1:] == (1,) else labels  # a column, as keras.datasets has them
        if images.shape[3:] != (3,) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"Expected uint8 images (n, height, width, 3) and n labels. Received: {path} with "
                f"{images.dtype} {images.shape} and labels {labels.shape}"
            )
        found.append(Split(images, labels.astype(np.int32)))
    train, test = found
    facts = {key: arrays[key] for key in FACTS if key in arrays}
    if facts:
        if [facts[key].shape if key in facts else None for key in FACTS] != [(3,), (3,), ()] or min(facts["std"]) <= 0:
            raise ValueError(f"Expected mean and std > 0 of three channels, and a name. Received: {path} with {facts}")
        facts = {"mean": tuple(facts["mean"].tolist()), "std": tuple(facts["std"].tolist()), "name": str(facts["name"])}
    if size:
        train, test = (Split(_stack(split.images, size, str(path)), split.labels) for split in (train, test))
    return train, test, tuple(map(str, arrays["classes"])), facts


def _folder(root: pathlib.Path, size: int | None) -> tuple[Split, Split, tuple[str, ...]]:
    """root/<class>/*.png, or root/train/<class>/… beside root/test or root/val; else a fifth of a class is held out.

    Validation images are split off the training images in either case: of test/ and val/, the first alone is read.
    """
    train = root / "train" if (root / "train").is_dir() else root
    test = next(
        (root / n for n in ("test", "val", "valid", "validation") if train != root and (root / n).is_dir()), None
    )
    classes = _subfolders(train)
    if test is not None and (others := sorted(set(_subfolders(test)) - set(classes))):
        raise ValueError(f"Expected the classes of {train} in {test}. Received: {', '.join(others)} there alone")

    def read(folder, shuffled=False):
        files = [
            (p, label)
            for label, name in enumerate(classes)
            for p in sorted((folder / name).glob("*"))
            if p.suffix.lower() in SUFFIXES
        ]
        if not files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"Expected images ({kinds}) in folders named by class. Received: {folder}, which has none")
        if shuffled:  # what standardizes over a batch, in inference too, shall not meet one class alone
            files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
        return Split(_stack((_open(p) for p, _ in files), size, str(folder)), np.array([y for _, y in files], np.int32))

    split = read(train)
    if empty := [name for number, name in enumerate(classes) if number not in split.labels]:
        raise ValueError(
            f"Expected images in the folder of every class of {train}, not deeper. Received: none in {', '.join(empty)}"
        )
    if test is not None:
        return split, read(test, shuffled=True), classes
    order = np.random.default_rng(0).permutation(len(split))
    held = np.zeros(len(split), bool)
    for number in range(len(classes)):
        own = order[split.labels[order] == number]
        held[own[: round(len(own) / 5)]] = True
    held[order[0]] |= not held.any()
    return split.take(order[~held[order]]), split.take(order[held[order]]), classes


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _open(path: pathlib.Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would cut off what is above 255
                raise ValueError("it has more than 8 bits a channel; save it with 8")
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise OSError(f"Expected an image. Received: {path}, which cannot be read: {error}") from None


def _resize(image: np.ndarray, size: int | None) -> np.ndarray:
    """Shorter side to `size` if there is one, then the centre square; grey becomes three equal channels."""
    from PIL import Image

    picture = Image.fromarray(image.squeeze()).convert("RGB")
    if size is None:
        return np.asarray(picture)
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _stack(images: Iterable[np.ndarray], size: int | None, source: str) -> np.ndarray:
    stacked, total = [], 0
    for image in images:
        image = _resize(image, size) if size or image.shape[-1] != 3 else image
        _check_size(image, stacked[0] if stacked else image, source)
        total += image.nbytes
        if total > MAX_BYTES:
            raise ValueError(
                f"Expected images that fit in {MAX_BYTES >> 30} GiB of memory. Received: {source}, which does not. "
                f"{_RESIZE}."
            )
        stacked.append(image)
    return np.stack(stacked) if stacked else np.zeros((0, 1, 1, 3), np.uint8)


def _tfds(data: Data) -> tuple[Split, Split, tuple[str, ...]]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Expected tensorflow-datasets to read {data.name!r}. Received: {error}. Where TensorFlow is installed, "
            "write the set as arrays (nfzoo data NAME --to FILE.npz) and pass --data FILE.npz."
        ) from None

    known = "digits, fake, a folder of images by class, an .npz file, or a tensorflow-datasets name"
    try:
        builder = tfds.builder(data.name, data_dir=data.data_dir)
    except Exception as error:
        raise FileNotFoundError(
            f"Expected a data set: {known}. Received: {data.name!r}. {_first_line(error)}"
        ) from None
    keys = builder.info.supervised_keys or ()
    kinds = [builder.info.features[key] if isinstance(key, str) else key for key in keys]
    wanted = (tfds.features.Image, tfds.features.ClassLabel)
    if len(kinds) != 2 or not all(map(isinstance, kinds, wanted)) or kinds[0].np_dtype != np.uint8:
        raise ValueError(
            f"Expected 8-bit images with one class each. Received: {data.name!r}, whose examples are "
            f"{' and '.join(map(repr, kinds)) or 'not labelled'}"
        )
    splits = builder.info.splits
    if "train" not in splits:
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise FileNotFoundError(
                f"Expected {data.name!r} prepared under {builder.data_dir}. It is not, and it cannot be downloaded: "
                f"{_first_line(error)}. Say where it is with --data-dir or TFDS_DATA_DIR, or use --data digits."
            ) from None
        splits = builder.info.splits

    def read(split):
        labels = []

        def images() -> Iterator[np.ndarray]:
            for image, label in tfds.as_numpy(builder.as_dataset(split=split, as_supervised=True)):
                labels.append(label)
                yield image

        return Split(_stack(images(), data.image_size, data.name), np.array(labels, np.int32))

    for held_out in (name for name in ("test", "validation") if name in splits):
        test = read(held_out)
        if not len(test) or test.labels.max() >= 0:  # -1 where the labels are a contest's secret
            return read("train"), test, tuple(kinds[1].names)
    raise ValueError(
        f"Expected a test or validation split with labels. Received: {data.name!r} with {', '.join(splits)}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"

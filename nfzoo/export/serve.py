"""Try an artefact as its user would: load it, look at its signature, show it an image."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nfzoo.export import card as cards
from nfzoo.export import runtimes


@dataclass(frozen=True)
class Served:
    """What an artefact is and says.

    Attributes:
        signature: {"inputs": {name: {"shape", "dtype"}}, "outputs": …}.
        card: what it says of itself; empty if nfzoo did not write it.
        top: (class, probability) of the likeliest classes, for each image.
        milliseconds: median time of one image.
    """

    signature: dict
    card: dict
    top: list[list[tuple[str, float]]]
    milliseconds: float | None

    @property
    def note(self) -> str | None:
        """What was taken for granted because the card does not tell it."""
        if not self.top or "input" in self.card:
            return None
        return (
            "The artefact does not say what images it takes; it was given pixels in [0, 255]. If it takes others, "
            "export it with mean= and std=, or preprocess=True."
        )


def serve_check(path: str | pathlib.Path, images: list[str | pathlib.Path] = (), top: int = 5) -> Served:
    """Load an artefact with its own runtime and classify image files with it.

    Images are resized to the input of the artefact and standardized as its card says, unless it does that itself.

    Args:
        path: a SavedModel's folder, a .tflite, .onnx or .keras file.
        images: files.
        top: how many classes to tell.

    Raises:
        ValueError: what is no artefact, or an input that is no image.
        OSError: an image that cannot be read.

    Example:
        >>> import nfzoo, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "nf.onnx"
        >>> _ = nfzoo.export.export("nf_test_resnet", path)
        >>> serve_check(path).card["model"]
        'nf_test_resnet'
    """
    run, signature = runtimes.load(path)
    card = cards.read(path)
    if not images:
        return Served(signature, card, [], None)
    ((_, given),) = signature["inputs"].items()
    if len(given["shape"]) != 4:
        raise ValueError(f"Expected an artefact that takes images. Received: {path}, which takes {given['shape']}")
    x = np.stack([read_image(image, given["shape"][1:]) for image in images])
    x = standardized(x, card.get("input", {})).astype("float32")
    logits = np.concatenate([run(one[None]) for one in x])
    names = card.get("classes") or [str(n) for n in range(logits.shape[-1])]
    best = [[(names[n], float(row[n])) for n in np.argsort(-row)[:top]] for row in _probabilities(logits)]
    return Served(signature, card, best, 1000 * runtimes.timed(run, x[:1]))


def read_image(path: str | pathlib.Path, shape: Sequence[int | None]) -> np.ndarray:
    """An image file, resized to (height, width, channels), pixels in [0, 255]; 224 x 224 where a size is open."""
    from PIL import Image, UnidentifiedImageError

    height, width, channels = (side or default for side, default in zip(shape, (224, 224, 3), strict=True))
    try:
        with Image.open(path) as image:
            image = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(image, "float32").reshape(height, width, channels)
    except UnidentifiedImageError:
        raise OSError(f"Expected an image. Received: {path}, which cannot be read as one") from None


def standardized(x: np.ndarray, known: dict) -> np.ndarray:
    """Pixels as a model takes them whose card has `known` as its input."""
    if known.get("of") != "x / 255":  # pixels are what it takes
        return x
    return (x / 255 - np.asarray(known["mean"])) / np.asarray(known["std"])


def _probabilities(outputs: np.ndarray) -> np.ndarray:
    if outputs.shape[-1] == 1:  # of two classes; what is within [0, 1] has its sigmoid behind it
        return outputs if np.all((outputs >= 0) & (outputs <= 1)) else 1 / (1 + np.exp(-outputs))
    if np.all(outputs >= 0) and np.allclose(outputs.sum(-1), 1, atol=1e-3):
        return outputs
    odds = np.exp(outputs - outputs.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)

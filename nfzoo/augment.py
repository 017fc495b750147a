"""Augmentation of a batch in memory, as a pure function of (seed, epoch, step): NumPy, and Pillow for RandAugment.

Not Keras' layers, after measuring them (128 images of 32 px, two cores). RandAugment(num_ops=4) takes 0.5 s with
TensorFlow and 3.1 s with JAX, more than the training step it feeds; it chooses the same operations for the whole batch,
and turns images by up to 360 degrees where the paper turns them by 30. CutMix weighs labels by a box that is not the
pixels it pastes. All draw from variables, which live on the accelerator, and under `keras.distribution` on every
process. What is here takes 0.04 s for all of NFNet's recipe, and gives the same batch with any backend, in any thread.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from nfzoo.recipes import Augment, RandAugment


def augment(images: np.ndarray, labels: np.ndarray, settings: Augment, key: Sequence[int]):
    """Augment a batch: crop and flip, mix, RandAugment, erase, in the order of the NFNet paper.

    Args:
        images: (n, height, width, channels) uint8.
        labels: (n,) numbers, or (n, classes) one-hot, which mixing needs.
        settings: see `nfzoo.recipes.Augment`.
        key: what decides every draw: (seed, epoch, step).

    Returns:
        Images, uint8 or float32 in [0, 255], and labels.

    Example:
        >>> images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.eye(4, dtype=np.float32)
        >>> mixed, weights = augment(images, labels, Augment(mixup=0.2, cutmix=1.0), key=(0, 0, 0))
        >>> mixed.shape, weights.sum(1).tolist()
        ((4, 8, 8, 3), [1.0, 1.0, 1.0, 1.0])

    References: NFNet paper (arXiv 2102.06171), appendix A.
    """
    crop, mixing, operations, erasing = (np.random.default_rng([*key, stream]) for stream in (2, 5, 6, 7))
    images = crop_and_flip(images, settings, crop)
    if settings.mixes:
        images, labels = mix(images, labels, settings, mixing)
    if settings.rand_augment:
        images = rand_augment(images, settings.rand_augment, operations)
    if settings.random_erasing:
        images = erase(images, settings.random_erasing, erasing)
    return images, labels


def crop_and_flip(images: np.ndarray, settings: Augment, rng: np.random.Generator) -> np.ndarray:
    """Crop at random from a zero-padded batch and flip left and right.

    Example:
        >>> images = np.arange(8).reshape(1, 2, 4, 1)
        >>> crop_and_flip(images, Augment(crop_padding=1), np.random.default_rng(0)).shape
        (1, 2, 4, 1)
    """
    n, height, width = images.shape[:3]
    pad = settings.crop_padding
    top, left = rng.integers(0, 2 * pad + 1, (2, n))
    flip = rng.random(n) < (0.5 if settings.flip else 0.0)
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    cropped = np.empty_like(images)
    for i in range(n):  # slices: an index of all pixels at once takes several times as long
        crop = padded[i, top[i] : top[i] + height, left[i] : left[i] + width]
        cropped[i] = crop[:, ::-1] if flip[i] else crop
    return cropped


def mix(images: np.ndarray, labels: np.ndarray, settings: Augment, rng: np.random.Generator):
    """Mix each image and its label with those of a partner; with both kinds, each has a half of the batch to itself."""
    kinds = [(kind, alpha) for kind, alpha in ((mixup, settings.mixup), (cutmix, settings.cutmix)) if alpha]
    mixed = [
        kind(images[part], labels[part], rng.beta(alpha, alpha, len(part)), rng)
        for (kind, alpha), part in zip(kinds, np.array_split(np.arange(len(images)), len(kinds)), strict=True)
    ]
    images, labels = zip(*mixed, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def mixup(images: np.ndarray, labels: np.ndarray, weights: np.ndarray, rng: np.random.Generator):
    """Mix images linearly, each with a partner drawn from the batch.

    Args:
        images, labels: a batch, labels one-hot.
        weights: (n,) what each image keeps of itself.
        rng: draws the partners.

    Example:
        >>> images, labels = np.stack([np.zeros((1, 1, 1)), np.ones((1, 1, 1))]), np.eye(2, dtype=np.float32)
        >>> x, y = mixup(images, labels, np.array([0.75, 0.75]), np.random.default_rng(3))
        >>> x.ravel().tolist(), y.tolist()
        ([0.25, 0.75], [[0.75, 0.25], [0.25, 0.75]])

    References: Zhang et al. 2018, arXiv 1710.09412.
    """
    partners, weights = rng.permutation(len(images)), weights.astype(np.float32)
    w = weights[:, None, None, None]
    return w * images + (1 - w) * images[partners], _blend(labels, weights, partners)


def cutmix(images: np.ndarray, labels: np.ndarray, weights: np.ndarray, rng: np.random.Generator):
    """Paste a box of a partner into each image; labels are weighted by the pixels that are left.

    Args:
        images, labels: a batch, labels one-hot.
        weights: (n,) what each image keeps of itself, if its box is not cut at the border.
        rng: draws the partners and the middles of the boxes.

    Example:
        >>> images, labels = np.zeros((2, 8, 8, 3)), np.eye(2, dtype=np.float32)
        >>> images[1] = 1
        >>> x, y = cutmix(images, labels, np.array([0.5, 0.5]), np.random.default_rng(3))
        >>> np.allclose(x.mean((1, 2, 3)), y[:, 1])  # a label's share is that of the pixels
        True

    References: Yun et al. 2019, arXiv 1905.04899.
    """
    n, height, width = images.shape[:3]
    partners, side = rng.permutation(n), np.sqrt(1 - weights)
    rows, columns = (_span(rng.random(n) * size, side * size, size) for size in (height, width))
    box = rows[:, :, None] & columns[:, None, :]
    kept = 1 - box.mean((1, 2), dtype=np.float32)
    return np.where(box[..., None], images[partners], images), _blend(labels, kept, partners)


def _blend(labels: np.ndarray, weights: np.ndarray, partners: np.ndarray) -> np.ndarray:
    return weights[:, None] * labels + (1 - weights[:, None]) * labels[partners]


def _span(middle: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` pixels in a row each span covers, (n, size)."""
    pixels = np.arange(size)
    start, end = np.round(middle - length / 2)[:, None], np.round(middle + length / 2)[:, None]
    return (pixels >= start) & (pixels < end)


def erase(images: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Put noise into a box of some images: 2 to 33 % of the area before the border cuts it, aspect 0.3 to 1 / 0.3.

    Args:
        images: a batch.
        probability: of an image to get a box.
        rng: decides.

    Example:
        >>> images = np.zeros((1000, 8, 8, 3), np.uint8)
        >>> erased = erase(images, 0.25, np.random.default_rng(0))
        >>> bool(0.2 < erased.any((1, 2, 3)).mean() < 0.3)
        True

    References: Zhong et al. 2020, arXiv 1708.04896.
    """
    n, height, width, channels = images.shape
    area, aspect = rng.uniform(0.02, 0.33, n), np.exp(rng.uniform(np.log(0.3), -np.log(0.3), n))
    rows = _span(rng.random(n) * height, np.sqrt(area * aspect) * height, height)
    columns = _span(rng.random(n) * width, np.sqrt(area / aspect) * width, width)
    chosen = (rng.random(n) < probability)[:, None, None] & rows[:, :, None] & columns[:, None, :]
    erased = images.copy()
    erased[chosen] = rng.integers(0, 256, (np.count_nonzero(chosen), channels))
    return erased


# ---------------------------------------------------------------- RandAugment
_GREY = (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=_GREY)


def _enhance(kind) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(max(0.0, 1 + 0.9 * strength))


# The paper's operations with AutoAugment's ranges. Strength is magnitude / 10 with a random sign; where the original
# code does less at a larger magnitude (posterize, solarize), this does more, as timm's "increasing" form.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, strength: image,
    "auto_contrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "rotate": lambda image, strength: image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY),
    "solarize": lambda image, strength: ImageOps.solarize(image, max(0, 256 - round(256 * abs(strength)))),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, strength: ImageOps.posterize(image, max(1, 8 - round(4 * abs(strength)))),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength: _affine(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    "translate_y": lambda image, strength: _affine(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
}


def rand_augment(images: np.ndarray, settings: RandAugment, rng: np.random.Generator) -> np.ndarray:
    """Apply `layers` operations to each image, every one of them drawn for it from `OPERATIONS`.

    Args:
        images: a batch of three channels; what is not uint8 is rounded.
        settings: how many operations, and how strong.
        rng: decides.

    References: Cubuk et al. 2019, arXiv 1909.13719.
    """
    operations = list(OPERATIONS.values())
    chosen = rng.integers(0, len(operations), (len(images), settings.layers))
    strengths = rng.choice([-1, 1], chosen.shape) * settings.magnitude / 10
    result = np.rint(images).astype(np.uint8) if images.dtype != np.uint8 else images.copy()
    for i, image in enumerate(map(Image.fromarray, result.copy())):
        for which, strength in zip(chosen[i], strengths[i], strict=True):
            image = operations[which](image, float(strength))
        result[i] = image
    return result

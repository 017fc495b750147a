"""Augmentation: what it does to pixels and labels, and that it is a function of (seed, epoch, step) alone."""

import concurrent.futures
import time

import keras
import numpy as np
import pytest
from PIL import Image

from nfzoo import augment, recipes
from nfzoo.recipes import Augment, RandAugment

FULL = Augment(
    crop_padding=4,
    flip=True,
    mixup=0.2,
    cutmix=1.0,
    rand_augment=RandAugment(layers=2, magnitude=9),
    random_erasing=0.5,
)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (16, 12, 10, 3)).astype(np.uint8), np.eye(5, dtype=np.float32)[rng.integers(0, 5, 16)]


def test_crop_and_flip_equal_a_loop():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (16, 6, 8, 3)).astype(np.uint8)
    got = augment.crop_and_flip(images, Augment(crop_padding=2, flip=True), np.random.default_rng(5))
    draws = np.random.default_rng(5)
    top, left = draws.integers(0, 5, (2, 16))
    flip = draws.random(16) < 0.5
    assert 0 < flip.sum() < 16
    for i, image in enumerate(images):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        crop = padded[top[i] : top[i] + 6, left[i] : left[i] + 8]
        np.testing.assert_array_equal(got[i], crop[:, ::-1] if flip[i] else crop)


def test_no_augmentation_is_the_identity():
    images = np.random.default_rng(0).integers(0, 255, (4, 5, 5, 3)).astype(np.uint8)
    np.testing.assert_array_equal(augment.crop_and_flip(images, Augment(), np.random.default_rng(0)), images)


def test_the_same_key_gives_the_same_batch_whatever_was_called_before(batch):
    first = augment.augment(*batch, FULL, (1, 2, 3))
    keras.utils.set_random_seed(5)
    augment.augment(*batch, FULL, (1, 2, 4))
    for a, b in zip(first, augment.augment(*batch, FULL, (1, 2, 3)), strict=True):
        np.testing.assert_array_equal(a, b)
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 4)):
        assert not np.array_equal(augment.augment(*batch, FULL, key)[0], first[0])


@pytest.mark.parametrize(
    "only",
    [{"mixup": 0.2}, {"cutmix": 1.0}, {"random_erasing": 1.0}, {"rand_augment": {"layers": 3, "magnitude": 9}}],
)
def test_each_kind_depends_on_the_step(batch, only):
    a, b = (augment.augment(*batch, Augment(**only), (0, 0, step))[0] for step in (0, 1))
    assert not np.array_equal(a, b) and not np.array_equal(a, batch[0])
    assert a.shape == batch[0].shape and 0 <= a.min() and a.max() <= 255


def test_crops_are_the_same_with_and_without_the_rest(batch):
    alone = augment.augment(*batch, Augment(crop_padding=4, flip=True), (3, 1, 2))[0]
    images = augment.augment(*batch, FULL.model_copy(update={"rand_augment": None, "mixup": 0.0}), (3, 1, 2))[0]
    assert 0.3 < (images == alone).mean() < 1  # boxes of others and of noise


def test_it_leaves_its_input_alone_and_may_be_called_from_threads(batch):
    before = [part.copy() for part in batch]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: augment.augment(*batch, FULL, (0, 0, step)), [0, 1, 2, 3] * 3))
    for step in range(4):
        assert all(np.array_equal(found[step][0], found[step + 4 * n][0]) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(batch, before, strict=True))


@pytest.mark.parametrize("settings", [Augment(mixup=0.2), Augment(cutmix=1.0), Augment(mixup=0.2, cutmix=1.0)])
@pytest.mark.parametrize("n", [1, 2, 15])
def test_weights_of_labels_sum_to_one(batch, settings, n):
    keras.config.set_dtype_policy("mixed_float16")  # that of a run must not reach labels and images
    images, labels = augment.augment(batch[0][:n], batch[1][:n], settings, (0, 0, 0))
    assert len(images) == len(labels) == n and labels.dtype == np.float32
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    assert labels.min() >= 0


class _Neighbours:
    """A generator whose partners are the neighbours, and whose boxes lie in the middle."""

    def permutation(self, n):
        return np.roll(np.arange(n), 1)

    def random(self, n):
        return np.full(n, 0.5)


def test_mixup_is_that_of_keras(batch):
    """Keras' layer, given the same weights and partners, is the reference."""
    weights = np.random.default_rng(1).random(16).astype(np.float32)
    images, labels = augment.mixup(*batch, weights, _Neighbours())
    layer = keras.layers.MixUp(seed=0, dtype="float32")
    drawn = {"mix_weight": weights, "permutation_order": np.roll(np.arange(16), 1)}
    np.testing.assert_allclose(images, layer.transform_images(batch[0], drawn), atol=1e-3)
    np.testing.assert_allclose(labels, layer.transform_labels(batch[1], drawn), atol=1e-6)


def test_cutmix_weighs_labels_by_the_pixels_it_pastes():
    """Between white and black images, the white that is left is the weight of the white label."""
    images = np.zeros((16, 12, 10, 3), np.uint8)
    images[::2] = 255
    labels = np.eye(2, dtype=np.float32)[np.arange(16) % 2]  # class 0 is white
    mixed, got = augment.cutmix(images, labels, np.linspace(0, 1, 16), np.random.default_rng(3))
    np.testing.assert_allclose(got[:, 0], mixed.mean((1, 2, 3)) / 255, atol=1e-6)
    assert len(np.unique(got[:, 0])) > 4
    boxes, kept = augment.cutmix(images, labels, np.full(16, 0.75), _Neighbours())  # half as high and wide
    expected = np.full((12, 10, 3), 255)
    expected[3:9, 2:8] = 0  # a span of 5 pixels around 5 ends on halves: rounded to 6, both ends to even
    np.testing.assert_array_equal(boxes[0], expected)
    assert kept[0, 0] == pytest.approx(1 - 36 / 120)


def test_both_kinds_of_mixing_have_half_a_batch_each():
    """Of black and white images, MixUp makes grey ones and CutMix does not."""
    images = np.zeros((64, 8, 8, 3), np.uint8)
    images[::2] = 255
    labels = np.eye(2, dtype=np.float32)[np.arange(64) % 2]
    mixed, _ = augment.augment(images, labels, Augment(mixup=1.0, cutmix=1.0), (0, 0, 0))
    grey = ((mixed > 0) & (mixed < 255)).any((1, 2, 3))
    assert grey[:32].sum() > 8 and not grey[32:].any()


def test_erasing_hits_as_many_images_as_its_probability_says():
    images = np.zeros((2000, 16, 16, 3), np.uint8)
    hit = (augment.erase(images, 0.25, np.random.default_rng(0)) > 0).any(3)
    assert 0.2 < hit.any((1, 2)).mean() < 0.3
    share = hit[hit.any((1, 2))].mean((1, 2))
    assert 0.05 < share.mean() < 0.2 and share.max() < 0.45  # 2 to 33 %, less what borders cut, rounded to pixels
    assert not (augment.erase(images[:50], 0.0, np.random.default_rng(0)) > 0).any()


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_do_more_at_a_larger_magnitude(name):
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)

    def change(strength):
        return np.abs(np.asarray(augment.OPERATIONS[name](image, strength), float) - np.asarray(image, float)).mean()

    assert augment.OPERATIONS[name](image, 1.5).size == image.size  # F3 to F6 take magnitude 15
    if name in ("auto_contrast", "equalize"):
        assert change(0.0) == change(1.0) > 0
    elif name == "identity":
        assert change(1.0) == 0
    else:
        for sign in (-1, 1):
            assert 0 == change(0.0) < change(0.3 * sign) < change(sign)


def test_rand_augment_draws_for_each_image():
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)), 64, axis=0).astype(np.uint8)
    result = augment.rand_augment(images, RandAugment(layers=1, magnitude=9), np.random.default_rng(0))
    assert 10 < len(np.unique(result.reshape(64, -1), axis=0)) <= 2 * len(augment.OPERATIONS)
    assert result.dtype == np.uint8


def test_a_whole_recipe_is_quick():
    """NFNet's, for 128 images of 32 px; Keras' layers take more than half a second."""
    images = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3)).astype(np.uint8)
    labels = np.eye(10, dtype=np.float32)[np.arange(128) % 10]

    def seconds(step):
        began = time.perf_counter()
        augment.augment(images, labels, recipes.get("nfnet").augment, (0, 0, step))
        return time.perf_counter() - began

    assert min(seconds(step) for step in range(5)) < 0.15

"""KerasHub's detector and segmenter on a network of the zoo, on real photos with boxes and masks."""

import csv
import io
import os
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import nfzoo

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
SIZE, BATCH = 128, 2
BOXES, CLASSES = 80, 201  # of COCO: kinds of objects, numbers of the masks


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip("keras_hub", minversion="0.32")


@pytest.fixture(scope="module")
def photos():
    """Images (b, s, s, 3) standardized, boxes (b, n, 4) yxyx with labels (b, n), -1 for none, and masks (b, s, s)."""
    path = pathlib.Path(os.environ.get("NFZOO_SHARED", ROOT.parent / "shared")) / "data" / "coco256.zip"
    if not path.exists():
        pytest.skip(f"no photos: {path} is not there (NFZOO_SHARED names another folder)")
    with zipfile.ZipFile(path) as file:
        rows = [r for r in csv.DictReader(io.StringIO(file.read("index.csv").decode())) if r["boxes"] and r["semantic"]]
        read = lambda name: Image.open(io.BytesIO(file.read(name)))  # noqa: E731
        square = lambda image, how: np.asarray(image.resize((SIZE, SIZE), how))  # noqa: E731
        images = [square(read(r["file"]).convert("RGB"), Image.Resampling.BILINEAR) for r in rows[:BATCH]]
        masks = [square(read(r["semantic"]), Image.Resampling.NEAREST) for r in rows[:BATCH]]
        boxes = [np.loadtxt(io.BytesIO(file.read(r["boxes"])), ndmin=2) for r in rows[:BATCH]]
    return (np.stack(images) / 127.5 - 1).astype("float32"), _padded(boxes), np.stack(masks).astype("int32")


def _padded(yolo: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows (class, centre x, centre y, width, height), in fractions of the image, as KerasHub takes them."""
    n = max(map(len, yolo))
    boxes, labels = np.full((len(yolo), n, 4), -1.0, "float32"), np.full((len(yolo), n), -1, "int32")
    for i, rows in enumerate(yolo):
        kind, x, y, width, height = rows.T
        boxes[i, : len(rows)] = np.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], 1) * SIZE
        labels[i, : len(rows)] = kind
    return {"boxes": boxes, "labels": labels}


def _learns(model, x, y) -> float:
    """Train one step; every kernel of the backbone gets a gradient. Return the loss."""
    kernels = [v for v in model.trainable_variables if "kernel" in v.path and "block" in v.path]
    before = [v.numpy() for v in kernels]
    (loss,) = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history["loss"]
    still = [v.path for v, b in zip(kernels, before, strict=True) if np.array_equal(v.numpy(), b)]
    assert len(kernels) >= 52 and not still
    return loss


def _loads(model, x, path) -> None:
    """KerasHub's tasks compile themselves when loaded, with an optimizer that takes no state: save a fresh one."""
    before = model(x)
    model.compile()
    model.save(path)
    after = keras.saving.load_model(path, compile=False)(x)
    for a, b in zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def _backbone():
    # With a gain of zero the branches, and so their kernels, would have no gradient in the first step.
    return nfzoo.build("nf_resnet50", features_only=True, input_shape=(SIZE, SIZE, 3), skip_gain=0.5)


def test_retinanet(keras_hub, photos, tmp_path):
    images, boxes, _ = photos
    pyramid = keras_hub.models.RetinaNetBackbone(
        image_encoder=_backbone(), min_level=3, max_level=7, use_p5=False, image_shape=(SIZE, SIZE, 3)
    )
    detector = keras_hub.models.RetinaNetObjectDetector(pyramid, num_classes=BOXES, bounding_box_format="yxyx")
    detector.compile("adam", box_loss="auto", classification_loss="auto")
    assert np.isfinite(_learns(detector, images, boxes))
    _loads(detector, images, tmp_path / "detector.keras")


def test_deeplab(keras_hub, photos, tmp_path):
    images, _, masks = photos
    encoder = keras_hub.models.DeepLabV3Backbone(
        image_encoder=_backbone(), low_level_feature_key="P2", spatial_pyramid_pooling_key="P5", upsampling_size=8,
        dilation_rates=[2, 4, 6], image_shape=(SIZE, SIZE, 3),
    )  # fmt: skip
    segmenter = keras_hub.models.DeepLabV3ImageSegmenter(encoder, num_classes=CLASSES)
    segmenter.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    assert segmenter.output_shape == (None, SIZE, SIZE, CLASSES)
    assert np.isfinite(_learns(segmenter, images, masks))
    _loads(segmenter, images, tmp_path / "segmenter.keras")

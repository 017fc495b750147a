"""Images in memory, and batches that are a pure function of seed, epoch and step."""

import copy
import pathlib
import pickle
import threading

import keras
import numpy as np
import pytest
from PIL import Image

from nfzoo import data, recipes, sources
from nfzoo.recipes import Augment, Data


@pytest.fixture(scope="module")
def digits():
    return data.load(Data(name="digits"), seed=3)


def test_digits_are_real_and_split_without_overlap(digits):
    sizes = [len(s) for s in (digits.train, digits.validation, digits.test)]
    assert sum(sizes) == 1797 and digits.train.images.dtype == np.uint8
    rows = np.concatenate([s.images.reshape(len(s), -1) for s in (digits.train, digits.validation)])
    again = data.load(Data(name="digits"), seed=4)
    other = np.concatenate([s.images.reshape(len(s), -1) for s in (again.train, again.validation)])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, other))  # another split of the same images
    assert not np.array_equal(again.train.labels, digits.train.labels)
    np.testing.assert_array_equal(again.test.images, digits.test.images)


def test_batches_standardize_with_the_constants_of_the_set(digits):
    batches = data.Batches(digits.train, len(digits.train), digits.mean, digits.std)
    x, y = batches[0]
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=0.02)
    np.testing.assert_array_equal(y, digits.train.labels)
    expected = (digits.train.images[:5] / 255 - np.array(digits.mean)) / np.array(digits.std)
    np.testing.assert_allclose(x[:5], expected, atol=1e-5)


def test_constants_of_cifar100():
    mean, std = data.CONSTANTS["cifar100"]
    assert mean == (0.5070751592, 0.4865488733, 0.4409178433)
    assert std == (0.2673342859, 0.2564384629, 0.2761504713)


def test_every_image_once_an_epoch_and_the_last_batch_kept(digits):
    batches = data.Batches(digits.train, 100, (0, 0, 0), (1, 1, 1), seed=1, shuffle=True)
    assert len(batches) == 12 and len(batches[11][1]) == 50
    seen = np.concatenate([batches[i][0] for i in range(12)])
    key = lambda a: sorted(map(bytes, np.round(a * 255).astype(np.uint8).reshape(len(a), -1)))  # noqa: E731
    assert key(seen) == key(digits.train.images / 255)


def test_a_batch_depends_on_seed_epoch_and_step_alone(digits):
    def make(**kwargs):
        options = {"seed": 1, "shuffle": True, "augment": Augment(crop_padding=4, flip=True), **kwargs}
        return data.Batches(digits.train, 64, digits.mean, digits.std, **options)

    batches = make()
    first = batches[5][0]
    batches[2], batches[7]
    np.testing.assert_array_equal(batches[5][0], first)
    batches.on_epoch_end()
    second = batches[5][0]
    assert not np.array_equal(second, first)
    np.testing.assert_array_equal(make(epoch=1)[5][0], second)
    assert not np.array_equal(make(seed=2)[5][0], first)


def test_fit_sees_the_epochs_in_order(digits):
    """Keras opens a new iterator at the end of an epoch; none of its batches may carry the wrong epoch."""
    seen = []

    class Watch(keras.Model):
        def call(self, x):
            return x[:, 0, 0, :1]

        def train_step(self, batch):
            return {"sum": keras.ops.sum(batch[0])}

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(logs["sum"]))

    split = digits.train.take(slice(0, 96))
    make = lambda epoch: data.Batches(split, 32, (0.3,) * 3, (0.4,) * 3, shuffle=True, seed=9, epoch=epoch)  # noqa: E731
    model = Watch()
    model.compile("sgd", "mse")
    batches = make(0)
    model.fit(batches, epochs=3, verbose=0, shuffle=False, callbacks=[data.EpochClock(batches), Keep()])
    expected = [make(epoch)[step][0].sum() for epoch in range(3) for step in range(3)]
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_pipeline_augments_validation_only_where_the_recipe_says_so(digits):
    for on_validation in (True, False):
        recipe = recipes.Recipe(augment=Augment(crop_padding=4, flip=True, on_validation=on_validation))
        streams = data.pipeline(digits, recipe)
        assert (streams["validation"].augment is not None) == on_validation
        assert streams["train"].augment is not None and streams["test"].augment is None


@pytest.mark.parametrize("augment", [None, Augment(crop_padding=2, flip=True, mixup=0.5, cutmix=1.0)])
def test_shards_together_are_the_whole_batch(digits, augment):
    """Process i of n has images i, i + n, …; the whole batches are those of one process, mixed labels and all."""
    split = digits.train.take(slice(0, 27))  # batches of 8, 8, 8 and 3

    def make(**options):
        common = {"seed": 1, "shuffle": True, "augment": augment, "classes": 10}
        return data.Batches(split, 8, digits.mean, digits.std, **common, **options)

    alone = make()
    for n, last in ((2, 2), (4, 0)):
        parts = [make(shard=(i, n)) for i in range(n)]
        assert [len(part) for part in parts] == [3 + bool(last)] * n
        for step in range(len(parts[0])):
            x, y = alone[step]
            cut = 8 if step < 3 else last
            for i, part in enumerate(parts):
                np.testing.assert_array_equal(part[step][0], x[:cut][i::n])
                np.testing.assert_array_equal(part[step][1], y[:cut][i::n])


def test_batches_that_cannot_be_divided(digits):
    for shard in ((2, 2), (-1, 2), (0, 3)):
        with pytest.raises(ValueError, match=r"that [23] divides\. Received: .*batch size 8"):
            data.Batches(digits.train, 8, digits.mean, digits.std, shard=shard)


def test_labels_are_one_hot_in_all_streams_where_the_recipe_mixes_or_smooths(digits):
    plain = data.pipeline(digits, recipes.Recipe(batch_size=16))
    for changes in ({"augment.mixup": 0.2}, {"augment.cutmix": 1.0}, {"label_smoothing": 0.1}):
        recipe = recipes.override(recipes.Recipe(batch_size=16), changes)
        streams = data.pipeline(digits, recipe, shard=(1, 2))
        for name in ("train", "validation", "test"):
            labels = streams[name][0][1]
            assert labels.shape == (8, 10) and labels.dtype == np.float32
            np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
            if name != "train":
                np.testing.assert_array_equal(labels.argmax(1), plain[name][0][1][1::2])
    assert plain["train"][0][1].dtype == np.int32


def test_mixing_needs_vectors(digits):
    with pytest.raises(ValueError, match="classes for mixup and cutmix"):
        data.Batches(digits.train, 8, digits.mean, digits.std, augment=Augment(mixup=0.2))


def test_a_run_sees_what_it_saw_before(digits):
    """Batches of the poster's augmentation, as the committed results were trained on."""
    batches = data.Batches(
        digits.train, 64, (0, 0, 0), (1 / 255,) * 3, seed=7, shuffle=True, augment=Augment(crop_padding=4, flip=True),
        epoch=3,
    )  # fmt: skip
    images, labels = batches[2]
    weights = np.arange(images[0].size).reshape(images[0].shape) % 97
    assert [int(labels.sum()), round(float((images * weights).sum()))] == [268, 530663478]


def test_arrays_round_trip(tmp_path, digits):
    path = data.save(Data(name="digits"), tmp_path / "digits.npz")
    again = data.load(Data(name=str(path)), seed=3)
    np.testing.assert_array_equal(again.train.images, digits.train.images)
    np.testing.assert_array_equal(again.test.labels, digits.test.labels)
    assert data.load(Data(name=str(path), image_size=8)).test.images.shape == (360, 8, 8, 3)
    assert (again.classes, again.name, again.mean) == (digits.classes, "digits", digits.mean)
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_keep_the_constants_of_their_set_whatever_the_file_is_called(tmp_path, monkeypatch):
    constants = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    monkeypatch.setitem(data.CONSTANTS, "fake", constants)
    path = data.save(Data(name="fake"), tmp_path / "a.npz")
    copy = data.save(Data(name=str(path)), tmp_path / "copy.npz")
    monkeypatch.delitem(data.CONSTANTS, "fake")
    computed = data.load(Data(name="fake"))
    for file in (path, copy):
        images = data.load(Data(name=str(file)))
        assert (images.mean, images.std) == constants and images.name == "fake"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(tmp_path / "old.npz", **{k: v for k, v in arrays.items() if k not in ("name", "mean", "std")})
    old = data.load(Data(name=str(tmp_path / "old.npz")))
    assert (old.mean, old.std) == (computed.mean, computed.std) and old.name.endswith("old.npz")
    np.savez(tmp_path / "bad.npz", **{**arrays, "std": np.zeros(3)})
    with pytest.raises(ValueError, match="std > 0"):
        data.load(Data(name=str(tmp_path / "bad.npz")))


def _write(folder: pathlib.Path, n: int, size=(10, 12), colour=0):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((*size, 3), colour + i, np.uint8)).save(folder / f"{i}.png")


def test_folder_of_images_by_class(tmp_path):
    for split in ("train", "val"):
        _write(tmp_path / split / "ants", 3, colour=0)
        _write(tmp_path / split / "bees", 4, colour=100)
    images = data.load(Data(name=str(tmp_path), image_size=8, validation_fraction=0.0))
    assert images.classes == ("ants", "bees") and images.train.images.shape == (7, 8, 8, 3)
    bright = images.train.images.mean((1, 2, 3)) > 50
    np.testing.assert_array_equal(bright, images.train.labels == 1)


def test_folders_that_are_no_classes_are_said(tmp_path):
    for name in ("train/ants", "train/bees", "train/.ipynb_checkpoints", "val/ants", "val/bee"):
        _write(tmp_path / name, 3)
    with pytest.raises(ValueError, match="Received: bee there alone"):
        data.load(Data(name=str(tmp_path)))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "bees")
    assert data.load(Data(name=str(tmp_path))).classes == ("ants", "bees")
    _write(tmp_path / "train" / "deep" / "er", 3)
    with pytest.raises(ValueError, match="none in deep"):
        data.load(Data(name=str(tmp_path)))


def test_sixteen_bits_a_channel_are_refused(tmp_path):
    _write(tmp_path / "ants", 3)
    Image.fromarray(np.full((10, 12), 40_000, np.uint16)).save(tmp_path / "ants" / "deep.png")
    with pytest.raises(OSError, match="deep.png.*more than 8 bits"):
        data.load(Data(name=str(tmp_path)))


def test_validation_images_are_cropped_but_not_mixed():
    every = {"mixup": 0.5, "cutmix": 1.0, "rand_augment": {}, "random_erasing": 1.0, "on_validation": True}
    recipe = recipes.Recipe(data=Data(name="fake"), augment=Augment(crop_padding=2, **every))
    images = data.load(recipe.data)
    shifted, labels = data.pipeline(images, recipe)["validation"][0]
    assert set(np.unique(labels)) == {0.0, 1.0}
    cropped = recipe.model_copy(update={"augment": Augment(crop_padding=2, on_validation=True)})
    np.testing.assert_array_equal(shifted, data.pipeline(images, cropped)["validation"][0][0])


def test_folder_without_a_test_split_holds_a_fifth_out(tmp_path):
    _write(tmp_path / "ants", 10)
    _write(tmp_path / "bees", 10)
    images = data.load(Data(name=str(tmp_path), image_size=8))
    assert (len(images.train), len(images.validation), len(images.test)) == (13, 3, 4)


@pytest.mark.parametrize("each", [3, 8])
def test_a_fifth_of_each_class_is_held_out(tmp_path, each):
    for number in range(10):
        _write(tmp_path / f"class{number}", each)
    images = data.load(Data(name=str(tmp_path), validation_fraction=0))
    for split, count in ((images.test, round(each / 5)), (images.train, each - round(each / 5))):
        assert np.bincount(split.labels, minlength=10).tolist() == [count] * 10
    assert not np.all(np.diff(images.train.labels) >= 0)  # not in order


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_other_split(tmp_path, name):
    for split in ("train", name):
        _write(tmp_path / split / "ants", 3)
    images = data.load(Data(name=str(tmp_path), validation_fraction=0))
    assert (len(images.train), len(images.test)) == (3, 3)


def test_labels_of_an_array_file(tmp_path):
    """A column, as keras.datasets has them, is taken; one-hot vectors are not."""
    path = data.save(Data(name="fake", image_size=8), tmp_path / "fake.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "train_labels": arrays["train_labels"][:, None]})
    np.testing.assert_array_equal(sources.read(Data(name=str(path)))[0].labels, arrays["train_labels"])
    np.savez(path, **{**arrays, "train_labels": np.eye(4)[arrays["train_labels"]]})
    with pytest.raises(ValueError, match=r"n labels.*fake\.npz with .*labels \(256, 4\)"):
        data.load(Data(name=str(path)))
    np.savez(path, **{**arrays, "test_labels": arrays["test_labels"] - 1})
    with pytest.raises(ValueError, match="labels of 4 classes"):
        data.load(Data(name=str(path)))


def test_images_of_several_sizes_need_a_size(tmp_path):
    _write(tmp_path / "train" / "ants", 2, (10, 10))
    _write(tmp_path / "train" / "bees", 2, (10, 12))
    _write(tmp_path / "test" / "ants", 2, (10, 10))
    with pytest.raises(ValueError, match=r"image_size=160"):
        data.load(Data(name=str(tmp_path)))


def test_an_unreadable_image_is_named(tmp_path):
    _write(tmp_path / "ants", 3)
    (tmp_path / "ants" / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(OSError, match="broken.png"):
        data.load(Data(name=str(tmp_path), image_size=8))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_was_cut_is_named(tmp_path, suffix):
    (tmp_path / "ants").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for name in ("whole", "cut"):
        Image.fromarray(noise).save(tmp_path / "ants" / f"{name}.{suffix}")
    path = tmp_path / "ants" / f"cut.{suffix}"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=rf"Expected an image.*cut\.{suffix}.*truncated"):
        data.load(Data(name=str(tmp_path), image_size=8))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_an_array_file_that_was_cut_or_changed_is_named(tmp_path, damage):
    path = data.save(Data(name="fake", image_size=8), tmp_path / "fake.npz")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plain arrays\. Received: .*fake\.npz, which fails with"):
        data.load(Data(name=str(path)))


def test_an_empty_folder(tmp_path):
    (tmp_path / "ants").mkdir()
    with pytest.raises(ValueError, match="none"):
        data.load(Data(name=str(tmp_path)))


def test_unknown_names_say_what_is_accepted(tmp_path):
    with pytest.raises(FileNotFoundError, match="digits, fake.*no_such_set"):
        data.load(Data(name="no_such_set"))


def test_an_unprepared_set_says_how_to_get_it(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(self, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(FileNotFoundError, match=r"no network.*--data-dir"):
        data.load(Data(name="cifar100", data_dir=str(tmp_path)))


def _tfds_set(monkeypatch, folder, features, keys, examples, **more):
    """A tensorflow-datasets set made here, that `load` finds by any name; `more` are other splits' examples."""
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
            )

        def _split_generators(self, manager):
            return {split: enumerate(found) for split, found in {"train": examples, "test": examples, **more}.items()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Made(data_dir=str(folder))
    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: builder)


def test_grey_tfds_images_become_three_channels(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(4, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
    examples = [{"image": np.full((4, 6, 1), 50 * i, np.uint8), "label": i % 2} for i in range(4)]
    _tfds_set(monkeypatch, tmp_path, features, ("image", "label"), examples)
    images = data.load(Data(name="made", validation_fraction=0))
    assert images.train.images.shape == (4, 4, 6, 3) and images.classes == ("a", "b")
    np.testing.assert_array_equal(np.sort(images.train.images[:, 0, 0, 2]), [0, 50, 100, 150])


def test_a_test_split_without_labels_is_passed_over(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(names=["a", "b"])}
    examples = [{"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2} for i in range(4)]
    secret = [{**example, "label": -1} for example in examples]
    _tfds_set(monkeypatch, tmp_path / "a", features, ("image", "label"), examples, test=secret, validation=examples[:3])
    assert len(data.load(Data(name="made", validation_fraction=0)).test) == 3
    _tfds_set(monkeypatch, tmp_path / "b", features, ("image", "label"), examples, test=secret)
    with pytest.raises(ValueError, match="test or validation split with labels"):
        data.load(Data(name="made"))


def test_tfds_sets_that_are_not_images_by_class(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=2)
    for x, y, keys, named in [
        (image, tfds.features.Scalar(np.float32), ("x", "y"), "Scalar"),
        (tfds.features.Text(), label, ("x", "y"), "Text"),
        (tfds.features.Image(shape=(4, 4, 1), dtype=np.float32), label, ("x", "y"), "float32"),
        (image, {"deep": label}, ("x", {"deep": "y/deep"}), "deep"),
        (image, label, None, "not labelled"),
    ]:
        _tfds_set(monkeypatch, tmp_path, {"x": x, "y": y}, keys, [])
        with pytest.raises(ValueError, match=f"8-bit images with one class each.*'made'.*{named}"):
            data.load(Data(name="made"))


def test_training_and_test_images_of_different_sizes(tmp_path):
    _write(tmp_path / "train" / "ants", 2, (10, 10))
    _write(tmp_path / "test" / "ants", 2, (10, 12))
    with pytest.raises(ValueError, match=r"one size.*\(10, 10\) and \(10, 12\)"):
        data.load(Data(name=str(tmp_path)))


def test_damaged_and_pickled_arrays(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="plain arrays"):
        data.load(Data(name=str(path)))
    np.savez(path, train_images=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        data.load(Data(name=str(path)))
    np.savez(path, train_images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="without train_labels"):
        data.load(Data(name=str(path)))
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2])
    arrays = {f"{s}_{k}": v for s in ("train", "test") for k, v in (("images", images), ("labels", labels))}
    np.savez(path, **arrays, classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="labels of 2 classes"):
        data.load(Data(name=str(path)))
    with pytest.raises(FileNotFoundError, match="nfzoo data"):
        data.load(Data(name=str(tmp_path / "none.npz")))


def test_limit_keeps_a_subset():
    images = data.load(Data(name="digits", limit=100))
    assert len(images.train) == 100 and len(images.validation) == 100


def test_a_set_too_large_for_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    _write(tmp_path / "ants", 3)
    with pytest.raises(ValueError, match="memory"):
        data.load(Data(name=str(tmp_path), image_size=8))


def test_a_batch_of_a_test_folder_is_not_of_one_class(tmp_path):
    for part, n in (("train", 2), ("val", 32)):
        for colour, name in enumerate(("dark", "light")):
            _write(tmp_path / part / name, n, colour=100 * colour)
    test = data.load(recipes.Data(name=str(tmp_path), validation_fraction=0)).test
    assert 4 < test.labels[:16].sum() < 12
    assert ((test.images[:, 0, 0, 0] >= 100) == test.labels).all()
    again = data.load(recipes.Data(name=str(tmp_path), validation_fraction=0)).test
    assert (again.images == test.images).all()


def test_the_next_batch_is_made_while_one_is_used():
    """By another thread, and the batch it is: whatever epoch comes, wherever one starts, and in a copy."""
    images = data.load(Data(name="fake"))
    settings = {"seed": 3, "shuffle": True, "augment": Augment(crop_padding=2, flip=True)}

    def fresh(epoch, step):
        return data.Batches(images.train, 32, images.mean, images.std, epoch=epoch, **settings)[step]

    made, batches = threading.Event(), data.Batches(images.train, 32, images.mean, images.std, **settings)
    original = batches._made
    batches._made = lambda epoch, step: (made.set() if step == 1 else None) or original(epoch, step)
    batches[0]
    assert made.wait(10)  # nobody has asked for it
    del batches._made
    twin = pickle.loads(pickle.dumps(copy.copy(batches)))
    for epoch, step in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 5), (1, 6), (0, 3)):
        batches.epoch = twin.epoch = epoch
        for one, two, three in zip(batches[step], twin[step], fresh(epoch, step), strict=True):
            np.testing.assert_array_equal(one, three)
            np.testing.assert_array_equal(two, three)
    batches.window = (2, 5)
    np.testing.assert_array_equal(batches[0][0], fresh(0, 2)[0])
    np.testing.assert_array_equal(batches[1][0], fresh(0, 3)[0])
    assert len(batches) == 3

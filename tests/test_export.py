import json
import pathlib

import keras
import numpy as np
import pytest
from conftest import VARIANTS, slow_but
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image
from test_fold import scattered

import nfzoo
from nfzoo import engine, export, recipes
from nfzoo.export import card, formats, runtimes, source

RECIPE = recipes.override(recipes.get("demo"), {"data.name": "fake", "epochs": 1, "batch_size": 64, "data.limit": 64})
ENDINGS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx", "keras": ".keras"}
EACH = slow_but(["onnx"], ENDINGS)  # the others start TensorFlow in their processes, or before
FULL = ["nf_resnet50", "dm_nfnet_f0", "sn_efficientnet_b0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    engine.run("nf_test_efficientnet", RECIPE, folder, taps=None, console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("format", EACH)
def test_an_artefact_is_reloaded_by_its_runtime_alone_and_entered_into_the_manifest(run, tmp_path, format):
    to = tmp_path / "zoo" / f"nf{ENDINGS[format]}"
    entry = export.export(run, to)
    assert entry == json.loads((to.parent / "manifest.json").read_text())[to.name]
    assert entry["format"] == format and entry["largest_relative_difference"] < 1e-4
    assert entry["classes"] == ["dark", "dim", "light", "bright"] and entry["input"]["shape"] == [None, 32, 32, 3]
    assert entry["bytes"] > 10_000 and entry["latency_ms"] > 0 and entry["images_per_second"] > 0
    assert {p.name for p in to.parent.iterdir()} == {to.name, "manifest.json"}
    told = card.read(to)
    assert told["classes"] == entry["classes"] and told["input"] == entry["input"] and told["folded"]

    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype("float32")  # another batch size
    run_artefact, signature = runtimes.load(to)
    np.testing.assert_allclose(run_artefact(x), np.asarray(engine.load_run(run)(x)), atol=1e-5)
    ((_, given),) = signature["inputs"].items()
    assert given["shape"] == [None, 32, 32, 3] and "float" in given["dtype"]
    with pytest.raises(FileExistsError, match="exist"):
        export.export(run, to)


def test_an_artefact_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="difference"):
        export.export(run, tmp_path / "zoo" / "nf.onnx")
    assert not list((tmp_path / "zoo").iterdir())


def test_an_artefact_that_does_not_load_is_said(run, tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('cannot load')")
    monkeypatch.setattr(runtimes, "__file__", str(script))
    with pytest.raises(RuntimeError, match="cannot load"):
        export.export(run, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_entered_is_not_exported(run, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json, which is damaged"):
        export.export(run, tmp_path / "nf")
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_mistakes_are_said_before_anything_is_done(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="saved_model.*'tf'"):
        export.export(run, tmp_path / "x", "tf")
    with pytest.raises(ValueError, match=r"ends with \.onnx for onnx"):
        export.export(run, tmp_path / "x.tflite", "onnx")
    with pytest.raises(ValueError, match="with litert, or None. Received: 'int8' with onnx"):
        export.export(run, tmp_path / "x.onnx", quantize="int8")
    with pytest.raises(ValueError, match=r"\.onnx, .*or a folder. Received: x\.pt"):
        export.export(run, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"fold=True for a \.keras file.*a NFModel"):
        export.export(run, tmp_path / "x.keras", fold=False)
    with pytest.raises(ValueError, match="Expected images"):
        export.export(run, tmp_path / "x.onnx", images=np.zeros((0, 32, 32, 3)))
    with pytest.raises(ValueError, match="one output"):
        export.export(nfzoo.build("nf_test_resnet", features_only=True), tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        export.export(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="sn_test_efficientnet"):
        export.export("sn_test_efficentnet", tmp_path / "x")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"no onnx, onnxruntime; pip install '\.\[export\]'"):
        export.export(run, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class _ErfInv(keras.layers.Layer):
    """An operator that neither format has."""

    def call(self, x):
        import tensorflow as tf

        return tf.math.erfinv(keras.ops.tanh(x))


def test_what_another_export_entered_meanwhile_stays(tmp_path, monkeypatch):
    work = export._artefact

    def slow(*args):
        made = work(*args)
        (tmp_path / "manifest.json").write_text('{"other.onnx": {"format": "onnx"}}')
        return made

    monkeypatch.setattr(export, "_artefact", slow)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    export.export(model, tmp_path / "own.onnx")
    assert json.loads((tmp_path / "manifest.json").read_text()).keys() == {"other.onnx", "own.onnx"}


def test_a_damaged_artefact_is_said(tmp_path):
    for ending in (".onnx", ".keras"):
        (tmp_path / f"half{ending}").write_bytes(b"half of a file")
        with pytest.raises(ValueError, match=rf"whole. Received: .*half\{ending}, which its runtime does not load"):
            runtimes.load(tmp_path / f"half{ending}")
    with pytest.raises(ValueError, match=r"missing\.onnx, which does not exist"):
        runtimes.load(tmp_path / "missing.onnx")


def test_grey_images_are_exported(tmp_path):
    model = nfzoo.build("nf_test_resnet", input_shape=(32, 32, 1), classes=3)
    entry = export.export(model, tmp_path / "grey.onnx")
    assert entry["largest_relative_difference"] < 1e-4 and not entry.get("constant_outputs")


@pytest.mark.parametrize("kind", ["float64", "uint8"])
def test_images_are_taken_in_any_type(kind, tmp_path):
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 4)).astype(kind)
    model = nfzoo.build("nf_test_resnet", input_shape=(32, 32, 4), classes=3)  # other channels than a photograph
    assert export.export(model, tmp_path / "own.onnx", images=images)["largest_relative_difference"] < 1e-4
    with pytest.raises(ValueError, match=r"shape \(32, 32, 4\). Received: an array of shape \(3, 32, 32, 3\)"):
        export.export(model, tmp_path / "other.onnx", images=images[..., :3])
    with pytest.raises(ValueError, match="Expected images= beside a model of 4 channels"):
        export.export(model, tmp_path / "other.onnx")


def test_a_network_with_a_padded_pool_is_quantized(tmp_path):
    model = nfzoo.build("bn_test_resnet", input_shape=(32, 32, 3), classes=3)
    entry = export.export(model, tmp_path / "small.tflite", quantize="int8", examples=8)
    assert entry["largest_relative_difference"] < 0.2


def test_constant_outputs_are_said(tmp_path):
    entry = export.export("fixup_test_resnet", tmp_path / "fixup.onnx", examples=2)
    assert entry["constant_outputs"] and entry["largest_relative_difference"] == 0


@pytest.mark.parametrize("ending", [".tflite", ".onnx"])
def test_a_failure_names_the_operator(tmp_path, ending):
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.Flatten()(_ErfInv()(image)), name="own")
    with pytest.raises(ValueError, match="Expected operators that .* has. Received: a model with (Erfinv|ErfInv)"):
        export.export(model, tmp_path / f"own{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fold", [True, False])
def test_a_network_of_half_precision_is_served_in_float32(tmp_path, fold):
    """Its own outputs differ by a percent: what is compared is the float32 network of its weights."""
    wide = scattered("nf_test_resnet")
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = nfzoo.build("nf_test_resnet")
    half.set_weights(wide.get_weights())
    keras.config.set_dtype_policy("float32")
    assert export.export(half, tmp_path / "half.onnx", fold=fold)["largest_relative_difference"] < 1e-4
    x = np.random.default_rng(0).standard_normal((2, *wide.input_shape[1:])).astype("float32")
    expected, got = np.asarray(wide(x)), runtimes.load(tmp_path / "half.onnx")[0](x)
    assert abs(got - expected).max() < 1e-4 * abs(expected).max()


def test_preprocessing_can_be_part_of_it(run, tmp_path):
    to = tmp_path / "raw.onnx"
    entry = export.export(run, to, preprocess=True)
    assert entry["input"]["range"] == [0, 255]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("float32")
    known = entry["input"]
    x = (pixels / 255 - np.array(known["mean"])) / np.array(known["std"])
    expected = np.asarray(engine.load_run(run)(x.astype("float32")))
    np.testing.assert_allclose(runtimes.load(to)[0](pixels), expected, atol=1e-4)


def _photos(folder):
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(load_sample_image(f"{name}.jpg")).save(folder / name / "1.jpg")
    return folder


def test_a_model_of_ones_own_is_described(tmp_path):
    """Its card is as good as a run's: `serve-check` needs nothing else."""
    photos, mean, std = _photos(tmp_path / "photos"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    image = keras.Input((16, 16, 3))
    logits = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(image))
    own = keras.Model(image, logits, name="own")
    told = {"classes": ["temple", "flower"], "mean": mean, "std": std}
    for preprocess in (False, True):
        to = tmp_path / f"own{preprocess}.onnx"
        entry = export.export(own, to, preprocess=preprocess, images=photos, **told)
        assert entry["classes"] == told["classes"]
        (best,) = export.serve_check(to, [photos / "china" / "1.jpg"]).top
        pixels = np.asarray(Image.open(photos / "china" / "1.jpg").resize((16, 16), Image.Resampling.BILINEAR))
        z = np.asarray(own(((pixels / 255 - mean) / std)[None].astype("float32")))[0]
        expected = np.exp(z) / np.exp(z).sum()
        found = source.source_of(own, 1, photos, **told).images
        np.testing.assert_allclose(found[0], (pixels / 255 - mean) / std, atol=1e-5)
        assert dict(best) == pytest.approx(dict(zip(told["classes"], expected, strict=True)), abs=1e-5)


def test_what_describes_a_model_badly_is_refused(run, tmp_path):
    own = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)], name="own")
    to = tmp_path / "own.onnx"
    for match, given in {
        "2 different names of classes. Received: 1": {"classes": ["a", "a"]},
        "mean and std > 0": {"mean": (0.5,), "std": (0.0,)},
        r"mean and std > 0 of every channel. Received: mean=\[0.5\], std=\[\]": {"mean": (0.5,)},
        "of 3 channels. Received: 2": {"mean": (0.5, 0.5), "std": (1, 1)},
        "mean and std of own beside": {"images": _photos(tmp_path / "photos")},
        "folder of images.*nowhere": {"images": tmp_path / "nowhere", "mean": (0,), "std": (1 / 255,)},
    }.items():
        with pytest.raises(ValueError, match=match):
            export.export(own, to, **given)
    with pytest.raises(ValueError, match="whose own are known"):
        export.export(run, to, mean=(0.5,), std=(1,))
    with pytest.raises(ValueError, match="has them"):
        export.export(run, to, classes=["a", "b", "c", "d"])


@pytest.mark.slow
def test_images_of_a_folder_quantize(run, tmp_path):
    """Calibrated by black images the ranges are those of one input: the network is another."""
    black = tmp_path / "black"
    black.mkdir()
    Image.new("RGB", (32, 32)).save(black / "1.png")
    whole = engine.load_run(run)
    found = source.source_of(run, 64)
    expected = np.asarray(whole(found.images))
    costs = []
    for name, images in {"photos": _photos(tmp_path / "photos"), "black": black}.items():
        export.export(run, tmp_path / f"{name}.tflite", quantize="int8", images=images)
        costs.append(abs(runtimes.load(tmp_path / f"{name}.tflite")[0](found.images) - expected).mean())
    assert costs[0] < 0.5 * costs[1]


@pytest.mark.slow
def test_eight_bits(run, tmp_path):
    whole, small = tmp_path / "nf.tflite", tmp_path / "nf8.tflite"
    before, after = export.export(run, whole), export.export(run, small, quantize="int8")
    assert after["bytes"] < 0.75 * before["bytes"]  # the graph of a tiny network outweighs its weights
    assert 1e-4 < after["largest_relative_difference"] < 0.5  # it is quantized, and still the network
    assert 0.8 <= after["same_class"] <= 1 and after["quantized"] == "int8"


@pytest.mark.slow
def test_eight_bits_of_a_self_normalizing_network(tmp_path):
    """LiteRT's own SELU takes exp of large inputs: without care the range of that takes all eight bits."""
    images = np.load(pathlib.Path(__file__).parent / "data" / "cifar100_test.npz")
    known = source.source_of("sn_efficientnet_b0.cifar100", 1).card["input"]
    x = ((images["images"] / 255 - known["mean"]) / known["std"]).astype("float32")
    export.export("sn_efficientnet_b0.cifar100", tmp_path / "sn.tflite", quantize="int8", images=x)
    outputs = runtimes.load(tmp_path / "sn.tflite")[0](x)
    assert (outputs.argmax(-1) == images["labels"]).mean() > 0.25  # 0.30 in float32


@pytest.mark.slow
def test_a_model_by_name_and_one_of_keras(tmp_path):
    entry = export.export("fixup_test_resnet", tmp_path / "zeros.onnx")  # whose logits are zero
    assert entry["largest_relative_difference"] == 0
    entry = export.export("sn_test_efficientnet", tmp_path / "sn.onnx")
    assert entry["model"] == "sn_test_efficientnet" and entry["input"]["mean"][0] == pytest.approx(0.485)
    entry = export.export(keras.applications.MobileNetV2((32, 32, 3), weights=None, classes=4), tmp_path / "m.tflite")
    assert entry["model"].startswith("mobilenet") and "classes" not in entry
    with pytest.raises(ValueError, match="preprocess=True"):
        export.export(
            keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()]), tmp_path / "s", preprocess=True
        )
    with pytest.raises(ValueError, match="batch of images"):
        export.export(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), tmp_path / "s")


@pytest.mark.parametrize("format", [pytest.param(f, marks=[] if f == "onnx" else pytest.mark.slow) for f in ENDINGS])
def test_serve_check(run, tmp_path, format):
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "china.png")
    to = tmp_path / f"nf{ENDINGS[format]}"
    export.export(run, to)
    served = export.serve_check(to, [tmp_path / "china.png"], top=3)
    (best,) = served.top
    assert [len(best), served.card["model"]] == [3, "nf_test_efficientnet"]
    assert {name for name, _ in best} <= {"dark", "dim", "light", "bright"}
    assert 1 >= best[0][1] >= best[1][1] >= best[2][1] > 0
    pixels = np.asarray(Image.open(tmp_path / "china.png").resize((32, 32), Image.Resampling.BILINEAR))
    known = served.card["input"]
    x = ((pixels / 255 - known["mean"]) / known["std"])[None].astype("float32")
    logits = np.asarray(engine.load_run(run)(x))[0]
    assert best[0][0] == served.card["classes"][int(logits.argmax())]
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="Expected an image"):
        export.serve_check(to, [tmp_path / "text.png"])
    with pytest.raises(ValueError, match="Expected a SavedModel's folder"):
        export.serve_check(tmp_path / "nothing.onnx")
    assert served.note is None


def test_serve_check_says_what_it_does_not_know(tmp_path):
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "china.png")
    model = nfzoo.build("bn_test_resnet")
    notes = []
    for name, stated in (("unknown", {}), ("known", {"mean": [0.5] * 3, "std": [0.5] * 3})):
        export.export(model, tmp_path / f"{name}.onnx", **stated)
        notes.append(export.serve_check(tmp_path / f"{name}.onnx", [tmp_path / "china.png"]).note)
    assert "pixels in [0, 255]" in notes[0] and notes[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in nfzoo.list_models(tests=True) if "_test_" in n])
def test_every_network_in_every_format(name, tmp_path):
    """Reloaded in this process, for the sake of time."""
    found = source.source_of(scattered(name), 3)
    expected = found.model.predict(found.images, verbose=0)
    for format in ("saved_model", "litert", "onnx"):
        path = tmp_path / f"{name}{ENDINGS[format]}"
        formats.write(format, found.model, path, fold=True)
        outputs = runtimes.load(path)[0](found.images)
        assert abs(outputs - expected).max() < 1e-4 * abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_in_every_format(name, tmp_path):
    for ending in (".tflite", ".onnx", ""):
        assert export.export(name, tmp_path / f"{name}{ending}", examples=2)["largest_relative_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "nf"])
def test_model_export_of_every_variant(variant, tmp_path):
    import tensorflow as tf

    model = nfzoo.build(f"{variant}_test_efficientnet")
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(served.serve(x).numpy(), np.asarray(model(x)), atol=1e-5)


def test_a_half_precision_network_with_another_in_it(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        body = nfzoo.build("sn_test_efficientnet", include_top=False)
        image = keras.Input(body.input_shape[1:])
        net = keras.Model(image, keras.layers.Dense(4, dtype="float32")(body(image)))
    finally:
        keras.config.set_dtype_policy("float32")
    assert export.export(net, tmp_path / "net.onnx")["largest_relative_difference"] < 1e-4


def test_exported_weights_load_by_their_tag(tmp_path, monkeypatch):
    monkeypatch.setenv("NFZOO_HOME", str(tmp_path))
    net = nfzoo.build("bn_test_resnet", classes=3)
    export.export(
        net, tmp_path / "bn_test_resnet.mine.safetensors", images=np.zeros((1, *net.input_shape[1:]), "float32")
    )
    again = nfzoo.build("bn_test_resnet.mine")
    assert all(map(np.array_equal, again.get_weights(), net.get_weights()))
    export.export("EfficientNetB0", tmp_path / "bn_efficientnet_b0.mine.safetensors")
    entry = json.loads((tmp_path / "manifest.json").read_text())["bn_efficientnet_b0.mine"]
    assert entry["build"] == {"dialect": "keras"} and entry["model"] == "bn_efficientnet_b0"
    with pytest.raises(ValueError, match="TAG none of timm"):
        export.export(net, tmp_path / "bn_test_resnet.timm.safetensors")
    with pytest.raises(ValueError, match="preprocess=False with weights"):
        export.export(net, tmp_path / "bn_test_resnet.raw.safetensors", preprocess=True)


def test_images_that_are_given_take_the_place_of_a_runs(run):
    shape = engine.load_run(run).input_shape[1:]
    found = source.source_of(run, 2, images=np.ones((3, *shape)))
    assert found.images.shape == (2, *shape) and found.images.dtype == "float32"

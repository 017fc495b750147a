"""Weights of other implementations: what is read, what is refused, what is written, tensor by tensor."""

import json
import time

import h5py
import keras
import numpy as np
import pytest
import reference
from conftest import built, same, slow_but

import nfzoo
from nfzoo import registry
from nfzoo.convert import driver, keras_applications, published, timm

SMALL = {"depths": (1, 2), "widths": (32, 64)}
ROUND_TRIPS = {
    "test_nfnet": {},
    "eca_nfnet_l0": {"depths": (1, 1), "widths": (256, 256)},
    "dm_nfnet_f0": {"depths": (1, 1), "widths": (256, 256)},
    "nf_resnet50": SMALL,
    "nf_ecaresnet50": SMALL,
    "nf_regnet_b1": {"depths": (1, 2), "widths": (32, 64)},
    "bn_test_resnet": {},
    "resnet18": SMALL,
    "resnetv2_50": SMALL,
    "resnet50_gn": SMALL,
    "seresnext50d_32x4d": {**SMALL, "widths": (64, 128)},
    "bn_test_efficientnet": {},
}


# ---------------------------------------------------------------- names and shapes of timm
NAMES = sorted(path.stem for path in (reference.FOLDER / "timm").glob("*.json"))
SOONER = (
    "nf_resnet50",
    "nf_regnet_b1",
    "efficientnet_b0",
    "eca_nfnet_l0",
)  # the rest with the slow tests


@pytest.mark.parametrize("name", slow_but(SOONER, NAMES))
def test_names_and_shapes_are_those_of_timm(name):
    golden = json.loads((reference.FOLDER / "timm" / f"{name}.json").read_text())
    dialect = "keras" if name.startswith("tf_") else "timm"
    model = registry.undrawn(name, classes=golden["classes"], dialect=dialect, input_shape=(64, 64, 3))
    with keras.StatelessScope():
        written = {key: list(value.shape) for key, value in driver.as_tensors(model, name=name).items()}
    assert written == dict(golden["tensors"])
    counts = {"dm_nfnet_f0": 233, "nf_resnet50": 161, "nf_regnet_b1": 280, "eca_nfnet_l0": 185, "efficientnet_b0": 360}
    assert len(written) == counts.get(name, len(written))


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_through_timm(name, tmp_path):
    options = {"dialect": "timm", **ROUND_TRIPS[name]}
    model = built(name, classes=7, **options)
    path = nfzoo.convert.save(model, tmp_path / "model.safetensors", name=name, **options)
    again = nfzoo.convert.load(name, "timm", path, input_shape=(64, 64, 3), **options)
    assert same(model, again) and again.output_shape == (None, 7)
    assert list(tmp_path.iterdir()) == [path]


def test_only_timm_is_written(tiny_timm, tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors.*model\.pth"):
        nfzoo.convert.save(tiny_timm[0], tmp_path / "model.pth")
    with pytest.raises(ValueError, match="target that nfzoo writes: timm.*'deepmind'"):
        nfzoo.convert.save(tiny_timm[0], tmp_path / "model.safetensors", target="deepmind")
    with pytest.raises(ValueError, match="architecture that timm has.*sn_test_ffnn"):
        nfzoo.convert.save(nfzoo.build("sn_test_ffnn"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="architecture that timm has.*eun_test_resnet"):
        nfzoo.convert.save(nfzoo.build("eun_test_resnet"), tmp_path / "model.safetensors")


# ---------------------------------------------------------------- what the driver refuses
def test_what_does_not_fit_is_listed_and_nothing_is_written(tiny_timm):
    model, tensors = tiny_timm
    rename = timm.rule(nfzoo.names.parse("test_nfnet"), nfzoo.names.parse("test_nfnet").spec)
    before = model.get_weights()
    wrong = {key: value * 0 for key, value in tensors.items()} | {"stem.conv2.bias": np.zeros(5), "extra": np.ones(1)}
    del wrong["stem.conv1.weight"]
    expected = (
        r"without stem\.conv1\.weight \(for stem_conv1/kernel\); with unknown extra; "
        r"of other shapes stem\.conv2\.bias \(5,\) for stem_conv2/bias \(32,\)"
    )
    with pytest.raises(ValueError, match=expected):
        nfzoo.weights.fill(model, wrong, "tensors", rename, timm.to_keras)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    with pytest.raises(ValueError, match=expected):
        nfzoo.convert.load("test_nfnet", "timm", wrong)
    headless = {key: value for key, value in tensors.items() if not key.endswith("fc.bias")}
    assert len(headless) == len(tensors) - 1
    with pytest.raises(ValueError, match=r"with head\.fc\.weight but without head\.fc\.bias"):
        nfzoo.convert.load("test_nfnet", "timm", headless)
    with pytest.raises(ValueError, match=r"with unknown a0, a1, a2, a3, a4, a5 and 2 more\."):
        nfzoo.convert.load("test_nfnet", "timm", tensors | {f"a{n}": np.ones(1) for n in range(8)})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("stem.conv2.weight", lambda v: v.swapaxes(0, 1)),  # would fit as the kernel of a depthwise convolution
        ("head.fc.weight", lambda v: v.T),
        ("stem.conv2.gain", lambda v: v.reshape(2, 16)),
        ("stages.0.0.attn_last.fc1.weight", lambda v: v[..., None]),
    ],
)
def test_a_tensor_of_as_many_numbers_but_another_shape_is_refused(tiny_timm, key, change):
    changed = change(tiny_timm[1][key])
    with pytest.raises(ValueError, match="of other shapes") as error:
        nfzoo.convert.load("test_nfnet", "timm", tiny_timm[1] | {key: changed})
    assert f"{key} {changed.shape} for " in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test_nfnet", "jax"), r"source to be one of timm, deepmind, keras\. Received: 'jax'"),
        (("test_nfnets", "timm"), "Did you mean test_nfnet"),
        (("sn_test_ffnn", "timm"), "architecture that timm has"),
        (("test_nfnet", "keras"), "architecture of keras_applications"),
        (("nf_test_resnet", "keras"), "architecture of keras.applications"),
        (("bn_test_resnet", "keras"), "variable that keras.applications knows.*se_reduce"),
        (("bn_resnet50", "deepmind"), "architecture of DeepMind's nfnets: nf nfnet, .*fixup resnet.*bn_resnet50"),
        (("nf_ecaresnet50", "deepmind"), "variable that DeepMind's networks have.*eca_conv"),
        (("rescale_resnet50", "timm"), "architecture that timm has"),
    ],
)  # fmt: skip
def test_what_a_source_lacks(arguments, message):
    with pytest.raises(ValueError, match=message):
        nfzoo.convert.load(*arguments, {}, input_shape=(64, 64, 3))


def test_a_dialect_that_the_source_does_not_speak():
    with pytest.raises(ValueError, match="dialect of timm: timm.*'deepmind'"):
        nfzoo.convert.load("test_nfnet", "timm", {}, dialect="deepmind")


# ---------------------------------------------------------------- classes and tops
def test_the_number_of_classes_is_the_file_s(tiny_timm):
    model, tensors = tiny_timm
    assert nfzoo.convert.load("test_nfnet", "timm", tensors, classes=None).output_shape == (None, 3)
    with pytest.raises(ValueError, match=r"head\.fc\.bias \(3,\) for head/bias \(5,\).*nfzoo\.set_head"):
        nfzoo.convert.load("test_nfnet", "timm", tensors, classes=5)
    headless = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    backbone = nfzoo.convert.load("test_nfnet", "timm", headless)
    assert backbone.output_shape == (None, 192) and len(backbone.weights) == len(model.weights) - 2
    with pytest.raises(ValueError, match="without head.fc.weight .for head/kernel., head.fc.bias"):
        nfzoo.convert.load("test_nfnet", "timm", headless, include_top=True)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"include_top": False}, 2),
        ({"features_only": True}, 5),
        ({"features_only": True, "out_indices": (1, 2)}, None),
    ],
)
def test_a_model_without_its_top_leaves_the_top_of_the_file_and_nothing_else(tiny_timm, options, left):
    model, tensors = tiny_timm
    backbone = nfzoo.convert.load("test_nfnet", "timm", tensors, **options)
    stored = {v.path: v for v in model.weights}
    assert all(np.array_equal(v, stored[v.path]) for v in backbone.weights)
    assert left is None or len(backbone.weights) == len(model.weights) - left
    with pytest.raises(ValueError, match="with unknown stages.9.0.conv1.weight"):
        nfzoo.convert.load("test_nfnet", "timm", tensors | {"stages.9.0.conv1.weight": np.ones(1)}, **options)


# ---------------------------------------------------------------- keras.applications
@pytest.fixture(scope="module", params=[5, None], ids=["top", "notop"])
def application(request):
    """keras.applications' EfficientNetB0 of random weights, with five classes or without its top."""
    options = {"include_top": False} if request.param is None else {"classes": request.param}
    theirs, rng = keras.applications.EfficientNetB0(weights=None, **options), np.random.default_rng(0)
    for variable in theirs.weights:
        if not variable.path.startswith("normalization"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return theirs, keras_applications.read(theirs, None), request.param


def _write_legacy(theirs, path, root=""):
    """As Keras 2 did: a group per layer, its attribute names the arrays, depthwise kernels have a name of their own."""
    with h5py.File(path, "w") as file:
        group = file.require_group(root) if root else file
        group.attrs["layer_names"] = [layer.name.encode() for layer in theirs.layers]
        for layer in theirs.layers:
            part, weights = group.create_group(layer.name), {}
            for v in layer.weights:
                leaf = "depthwise_kernel" if "DepthwiseConv" in type(layer).__name__ else v.name
                weights[f"{layer.name}/{leaf}:0"] = np.asarray(v)
            part.attrs["weight_names"] = [key.encode() for key in weights]
            for key, value in weights.items():
                part.create_dataset(key, data=value)


FORMS = ["live", "mapping", "legacy", "legacy model", "weights.h5", "keras"]


@pytest.mark.parametrize("form", slow_but(["mapping", "legacy", "keras"], FORMS))
def test_every_form_of_keras_weights(application, form, tmp_path):
    theirs, tensors, classes = application
    path = tmp_path / {"weights.h5": "a.weights.h5", "keras": "a.keras"}.get(form, "a.h5")
    write = {
        "legacy": lambda: _write_legacy(theirs, path),
        "legacy model": lambda: _write_legacy(theirs, path, "model_weights"),
        "weights.h5": lambda: theirs.save_weights(path),
        "keras": lambda: theirs.save(path),
    }.get(form)
    if write:
        write()
    weights = {"live": theirs, "mapping": tensors}.get(form, path)
    ours = nfzoo.convert.load("EfficientNetB0", "keras", weights, input_shape=(64, 64, 3))
    assert ours.output_shape == (None, classes or 1280)
    assert len(ours.weights) == len(theirs.weights) - 3  # the normalization of the input
    for variable in ours.weights:
        name = {"stem_conv1/kernel": "stem_conv/kernel", "head/bias": "predictions/bias"}.get(variable.path)
        name = name or {"stage2_block1_conv2/kernel": "block2a_dwconv/kernel"}.get(variable.path)
        assert name is None or np.array_equal(variable, tensors[name])


def test_a_keras_file_of_another_size_is_refused(application, tmp_path):
    path = tmp_path / "a.weights.h5"
    application[0].save_weights(path)
    with pytest.raises(ValueError, match=r"a\.weights\.h5"):
        nfzoo.convert.load("EfficientNetB1", "keras", path)


# ---------------------------------------------------------------- cost
@pytest.mark.slow
def test_seventy_million_parameters_take_less_than_twenty_seconds():
    golden = reference.read("timm/dm_nfnet_f0")
    tensors = reference.weights(golden) | {"head.fc.weight": np.zeros((1000, 3072)), "head.fc.bias": np.zeros(1000)}
    began = time.perf_counter()
    model = nfzoo.convert.load("dm_nfnet_f0", "timm", tensors)
    assert time.perf_counter() - began < 20
    assert model.count_params() > 7e7


def test_another_normalization_of_the_input_is_said(application):
    _, tensors, _ = application
    other = tensors | {"normalization/mean": np.array([0.3, 0.4, 0.5]), "normalization/variance": np.full(3, 0.05)}
    with pytest.raises(ValueError, match="ImageNet.*0.3"):
        nfzoo.convert.load("EfficientNetB0", "keras", other)


def test_a_classifier_of_another_name_is_the_classifier():
    base = keras.applications.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_shape=(64, 64, 3))
    theirs = keras.Model(base.input, keras.layers.Dense(3, name="my_classes")(base.output))
    ours = nfzoo.convert.load("EfficientNetB0", "keras", theirs, input_shape=(64, 64, 3))
    x = np.random.default_rng(0).uniform(0, 1, (1, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(np.asarray(ours(x)), np.asarray(theirs(255 * x)), atol=1e-5)


# ---------------------------------------------------------------- what timm would compute otherwise
@pytest.mark.parametrize(
    ("name", "options"), [("nf_test_nfnet", {"dialect": "deepmind"}), ("nf_resnet26", {"dialect": "deepmind"})]
)
def test_another_reading_is_not_written_for_timm(name, options, tmp_path):
    """timm would refuse such a file, or load it and compute something else."""
    model = nfzoo.build(name, classes=3, input_shape=(64, 64, 3), **options)
    with pytest.raises(ValueError, match='dialect="timm"'):
        nfzoo.convert.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_timm_does_not_have_is_not_written(tmp_path):
    for name in ("sn_test_efficientnet", "none_test_resnet"):
        with pytest.raises(ValueError, match="timm has"):
            nfzoo.convert.save(nfzoo.build(name), tmp_path / "model.safetensors")


def test_a_tensor_with_and_without_a_prefix_is_refused():
    tensors = driver.as_tensors(nfzoo.build("nf_test_nfnet", classes=3), "timm")
    tensors["module.head.fc.bias"] = tensors["head.fc.bias"]
    with pytest.raises(ValueError, match="twice"):
        nfzoo.convert.load("test_nfnet", "timm", tensors)


@pytest.mark.parametrize("source", ["timm", "deepmind", "keras"])
def test_a_file_that_is_not_there(source, tmp_path):
    name = {"timm": "test_nfnet", "deepmind": "nfnet_f0", "keras": "EfficientNetB0"}[source]
    with pytest.raises(FileNotFoundError, match=f"weights of {source}.*nothing.npz"):
        nfzoo.convert.load(name, source, tmp_path / "nothing.npz")


def test_weights_of_another_implementation_name_the_converter(tmp_path):
    model = nfzoo.build("test_nfnet", dialect="timm", input_shape=(64, 64, 3), classes=3)
    path = nfzoo.convert.save(model, tmp_path / "timm.safetensors")
    with pytest.raises(ValueError, match="nfzoo.convert.load"):
        nfzoo.build("test_nfnet", weights=path, input_shape=(64, 64, 3), classes=3)


def test_a_tag_in_a_name_is_a_published_one_or_one_of_the_manifest(monkeypatch):
    from nfzoo.convert import published

    asked = []
    monkeypatch.setattr(published, "load", lambda *args, **kwargs: asked.append(args))
    nfzoo.build("nf_resnet50.ra2_in1k", classes=10)
    assert asked == [("nf_resnet50", "timm")]
    with pytest.raises(FileNotFoundError, match="my_run"):
        nfzoo.build("nf_test_nfnet.my_run")
    with pytest.raises(ValueError, match="a tag in the name, or weights"):
        nfzoo.build("nf_test_nfnet.my_run", weights="other")


@pytest.mark.parametrize("name", ["nf_test_efficientnet", "bn_resnet20_cifar"])
def test_networks_that_timm_has_not_are_not_written(name, tmp_path):
    with pytest.raises(ValueError, match="architecture that timm has"):
        driver.save(nfzoo.build(name), tmp_path / "x.safetensors", name=name)
    assert not list(tmp_path.iterdir())


def test_a_converted_file_is_everybodys(tmp_path):
    path = driver.save(nfzoo.build("bn_test_resnet"), tmp_path / "x.safetensors")
    assert (
        path.stat().st_mode
        == nfzoo.weights.save(nfzoo.build("sn_test_ffnn"), tmp_path / "y.safetensors").stat().st_mode
    )


def test_a_dialect_that_the_source_has_not_is_said_before_the_download(monkeypatch):
    monkeypatch.setattr(published, "fetch", lambda *args: pytest.fail("downloads"))
    with pytest.raises(ValueError, match="Expected a dialect of deepmind"):
        nfzoo.build("nfnet_f0", weights="deepmind", dialect="timm")

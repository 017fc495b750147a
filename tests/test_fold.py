"""Folded models compute what they were folded from, of Keras' own layers alone."""

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo.fold import fold

NAMES = [name for name in nfzoo.list_models(tests=True) if "_test_" in name]


def _random(name, **options):
    """Every weight away from where it starts: zeros and ones hide what is lost."""
    keras.utils.set_random_seed(0)
    model, rng = nfzoo.build(name, **options), np.random.default_rng(0)
    for v in model.weights:
        if len(v.shape) < 2:
            v.assign(rng.uniform(0.5, 1.5, v.shape) if "count" not in v.path else 8.0)
        else:
            v.assign(rng.normal(0, 1 / np.sqrt(np.prod(v.shape[:-1])), v.shape))
    return model


def _outputs(model, x):
    return [np.asarray(y) for y in keras.tree.flatten(model(x))]


def _assert_same(model, plain, size=None):
    shape = model.input_shape[1:] if size is None else (size, size, 3)
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype("float32")
    for a, b in zip(_outputs(model, x), _outputs(plain, x), strict=True):
        assert abs(a - b).max() <= 1e-4 * abs(a).max()
        assert a.std() > 1e-3  # and is no constant


@pytest.mark.parametrize("name", NAMES)
def test_a_folded_model_computes_the_same(name):
    model = _random(name)
    plain = fold(model)
    _assert_same(model, plain)
    assert plain.fold_report.difference < 1e-4
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    again = fold(plain)
    assert [layer.name for layer in again.layers] == [layer.name for layer in plain.layers]
    for a, b in zip(plain.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = {v.path for v in plain.weights if v.path.endswith("kernel")}
    assert kernels == {v.path for v in model.weights if v.path.endswith("kernel")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf_test_resnet", {"dialect": "timm"}),
        ("nf_test_nfnet", {"dialect": "timm", "activation": "gelu"}),
        ("nf_test_resnet", {"features_only": True}),
        ("nf_test_efficientnet", {"include_preprocessing": True, "classifier_activation": "softmax"}),
        ("bn_test_resnet", {"include_top": False, "input_shape": (None, None, 3)}),
        ("sn_test_efficientnet", {"magnitude_preserving": False, "drop_path_rate": 0.2}),
    ],
)
def test_options_fold(name, options):
    model = _random(name, **options)
    plain = fold(model)
    _assert_same(model, plain, 64 if None in model.input_shape[1:] else None)
    assert type(plain.output) is type(model.output)


def test_a_normalizer_free_residual_network_is_nothing_but_convolutions():
    plain = fold(_random("nf_test_resnet"))
    kinds = {type(layer).__name__ for layer in plain.layers}
    assert not kinds & {"Rescaling", "BatchNormalization"} and not plain.fold_report.kept
    assert {"stage1_block1_branch", "stage1_block1_drop"} & set(plain.fold_report.gone)


def test_it_loads_where_nfzoo_is_not(tmp_path, fresh_process):
    model = _random("sn_test_efficientnet")
    plain = fold(model)
    plain.save(tmp_path / "plain.keras")
    x = np.random.default_rng(1).standard_normal((2, *model.input_shape[1:])).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = """
import json, sys
import numpy as np
sys.modules["nfzoo"] = None  # an import of it fails
import keras
model = keras.saving.load_model(sys.argv[1] + "/plain.keras")
print(json.dumps(np.asarray(model(np.load(sys.argv[1] + "/x.npy"))).tolist()))
"""
    np.testing.assert_allclose(fresh_process(code, tmp_path), np.asarray(model(x)), atol=1e-4)


def test_what_cannot_be_folded_is_told():
    assert fold(_random("eun_test_resnet")).fold_report.kept

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="functional or sequential"):
        fold(Own())

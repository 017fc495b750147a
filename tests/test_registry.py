import re

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo import names, registry


def test_names_round_trip_and_are_unique():
    table = names.table()
    assert all(str(names.parse(name)) == name for name in table)
    assert len(table) == sum(len(m.SPECS) * len(m.ADMITS) for m in names.FAMILIES.values())
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in table)


def test_aliases_lead_to_models():
    assert str(names.parse("efficientnet_b3")) == "bn_efficientnet_b3"
    assert str(names.parse("resnet50")) == "bn_resnet50" and str(names.parse("eunnet50")) == "eun_resnet50"
    assert str(names.parse("nfnet_f4+")) == "nf_nfnet_f4plus"
    assert not names.aliases().keys() & names.table().keys()


def test_timm_and_keras_names_resolve():
    timm = [
        *(f"dm_nfnet_f{i}" for i in range(7)), *(f"nfnet_f{i}" for i in range(8)), "nfnet_l0", "test_nfnet",
        *(f"eca_nfnet_l{i}" for i in range(4)), *(f"nf_regnet_b{i}" for i in range(6)),
        *(f"nf_{kind}resnet{n}" for kind in ("", "se", "eca") for n in (26, 50, 101)),
    ]  # fmt: skip
    assert len(timm) == 36 and {names.parse(name).variant for name in timm} == {"nf"}
    keras_names = [f"EfficientNetB{i}" for i in range(8)] + [
        f"ResNet{n}{v}" for n in (50, 101, 152) for v in ("", "V2")
    ]
    assert {dict(names.parse(name).overrides)["dialect"] for name in keras_names} == {"keras"}


def test_a_dialect_is_a_bundle_of_overrides_that_one_can_still_override():
    resolve = lambda name, **o: names.resolve_fields(names.parse(name), o)  # noqa: E731
    variant, spec = resolve("nf_nfnet_f0")
    assert (spec.padding, variant.activation, variant.gamma_in, variant.skip_gain) == (
        "same", "gelu_tanh", "activation", 0.0,
    )  # fmt: skip
    variant, spec = resolve("nf_nfnet_f0", dialect="timm")
    assert (spec.padding, variant.activation, variant.gamma_in, variant.skip_gain) == (
        "symmetric", "gelu", "kernel", None,
    )  # fmt: skip
    variant, spec = resolve("dm_nfnet_f0")
    assert (spec.padding, variant.activation, variant.gamma_in, variant.epsilon_mode) == (
        "same", "gelu", "activation", "add",
    )  # fmt: skip
    assert resolve("nf_nfnet_f0", dialect="timm", epsilon=1e-3)[0].epsilon == 1e-3
    assert resolve("nf_resnet50")[1].downsample == "stride"
    assert resolve("nf_resnet50", dialect="timm")[1].downsample == "avg_pool"
    assert resolve("bn_resnet50", dialect="keras")[1].stride_at == 1
    with pytest.raises(ValueError, match="timm.*'torch'"):
        resolve("nf_nfnet_f0", dialect="torch")


def test_list_models_filters_and_sorts_naturally():
    assert nfzoo.list_models("sn_*", family="efficientnet") == [f"sn_efficientnet_b{i}" for i in range(8)]
    assert nfzoo.list_models(variant="gn", family="regnet") == [f"gn_regnet_b{i}" for i in range(9)]
    assert set(nfzoo.list_models(variant="gn")) == {n for n in names.table() if n.startswith("gn_") and "test" not in n}
    assert not [name for name in nfzoo.list_models() if "test_" in name]
    assert nfzoo.list_models("sn_ffnn*") == ["sn_ffnn_10x100", "sn_ffnn_10x512"]


@pytest.mark.parametrize(("word", "known"), [("variant", "none, bn, gn, sn, nf"), ("family", "efficientnet, resnet")])
def test_unknown_variants_and_families_are_said(word, known):
    with pytest.raises(ValueError, match=f"one of {known}.*{word}='zz'"):
        nfzoo.list_models(**{word: "zz"})


def test_unknown_name_gives_close_matches():
    with pytest.raises(ValueError, match=r"'sn_eficientnet_b0'.*sn_efficientnet_b0.*list_models"):
        nfzoo.build("sn_eficientnet_b0")


def test_inadmissible_variant_gives_the_admissible_ones():
    with pytest.raises(ValueError, match=r"none, bn, sn.*'nf' in 'nf_ffnn_10x100'"):
        nfzoo.build("nf_ffnn_10x100")


@pytest.mark.parametrize("rate", [1.5, -1, 1, "0.5", float("nan")])
@pytest.mark.parametrize("keyword", ["dropout_rate", "drop_path_rate"])
def test_rates_are_probabilities(keyword, rate):
    for function in (nfzoo.build, lambda name, **overrides: registry.resolve(name, overrides)):
        with pytest.raises(ValueError, match=rf"{keyword} in \[0, 1\).*{keyword}={re.escape(repr(rate))}"):
            function("sn_test_efficientnet", **{keyword: rate})
    registry.resolve("sn_test_efficientnet", {keyword: None})
    assert nfzoo.build("sn_test_efficientnet", **{keyword: np.float32(0.5)}).count_params()


def test_a_plain_network_needs_a_fixed_size():
    with pytest.raises(ValueError, match=r"fixed size.*input_shape=\(None, None, 3\)"):
        nfzoo.build("sn_test_ffnn", input_shape=(None, None, 3))


def test_a_tag_where_none_is_read_is_told():
    with pytest.raises(ValueError, match=r"names weights as well; take 'sn_efficientnet_b0' here"):
        nfzoo.model_info("sn_efficientnet_b0.cifar100")


def test_registered_models(monkeypatch):
    monkeypatch.setattr(names, "USER_MODELS", {})
    monkeypatch.setattr(registry, "USER_MODELS", names.USER_MODELS)

    @nfzoo.register_model
    def mini(*, classes=10, **kwargs):
        return nfzoo.build("sn_test_efficientnet", classes=classes, **kwargs)

    assert "mini" in nfzoo.list_models()
    assert nfzoo.build("mini", classes=3).output_shape == (None, 3)
    info = nfzoo.model_info("mini", classes=3)
    assert info.parameters == nfzoo.build("mini", classes=3).count_params() and info.classes == 3
    with pytest.raises(ValueError, match="'mini'"):
        nfzoo.register_model(mini)
    nfzoo.register_model(mini, override=True)
    with pytest.raises(ValueError, match="'bn_efficientnet_b0'"):
        nfzoo.register_model(lambda: keras.Model(), name="bn_efficientnet_b0")


def test_registered_models_get_every_argument(monkeypatch):
    monkeypatch.setattr(names, "USER_MODELS", {})
    monkeypatch.setattr(registry, "USER_MODELS", names.USER_MODELS)

    @nfzoo.register_model(name="my.net")
    def mine(*, classes=10, input_shape=None, include_top=True, classifier_activation=None):
        asked = {"include_top": include_top, "classifier_activation": classifier_activation}
        return nfzoo.build("sn_test_efficientnet", classes=classes, input_shape=input_shape, **asked)

    assert nfzoo.build("my.net", include_top=False).output_shape == (None, 64)
    shares = np.asarray(nfzoo.build("my.net", classifier_activation="softmax")(np.ones((1, 32, 32, 3))))
    assert shares.sum() == pytest.approx(1)
    with pytest.raises(TypeError, match="include_preprocessing"):
        nfzoo.build("my.net", include_preprocessing=True)


def test_info_is_of_the_size_asked_for():
    small, large = (nfzoo.model_info("bn_test_resnet", **size) for size in ({}, {"size": 64, "test_size": 96}))
    assert (large.input_size, large.test_size) == (64, 96) and large.multiply_adds > 3 * small.multiply_adds
    assert nfzoo.model_info("bn_test_resnet", input_shape=(64, 64, 3)).multiply_adds == large.multiply_adds
    with pytest.raises(ValueError, match="known sides"):
        nfzoo.model_info("bn_test_resnet", input_shape=(None, None, 3))


def test_ffnn_width_and_depth_are_overrides():
    model = nfzoo.build("bn_ffnn_10x100", width=24, depth=3)
    assert [layer.units for layer in model.layers if isinstance(layer, keras.layers.Dense)] == [24, 24, 100]


def test_constants_of_every_channel():
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1)).astype("float32")
    grey = {"mean": (0.5,), "std": (0.25,)}
    net = nfzoo.build("sn_test_efficientnet", input_shape=(32, 32, 1), include_preprocessing=grey)
    np.testing.assert_allclose(net.get_layer("preprocess")(image), (image / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    for wrong in (True, {"mean": (0.5,)}, {"mean": (0.5, 0.5, 0.5), "std": (1, 1, 1)}):
        with pytest.raises(ValueError, match="of every channel"):
            nfzoo.build("sn_test_efficientnet", input_shape=(32, 32, 1), include_preprocessing=wrong)


def test_information_on_weights_is_that_of_their_network():
    info = nfzoo.model_info("bn_efficientnet_b0", weights="cifar100")
    assert (info.input_size, info.classes) == (32, 100) and info.parameters < nfzoo.model_info(info.name).parameters
    assert nfzoo.model_info("bn_test_resnet", classes=7).classes == 7


def test_what_is_counted_is_never_drawn(monkeypatch):
    def draw(*args, **kwargs):
        raise MemoryError("drawn")

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", draw)
    with pytest.raises(MemoryError, match="drawn"):
        nfzoo.build("bn_test_resnet")
    assert registry.measure("bn_test_resnet") == registry._manifest()["bn_test_resnet"]
    with keras.StatelessScope():
        keras.Variable("zeros", (1,))  # the end of a scope draws all that was registered before it


def test_a_network_without_its_top_has_no_classes():
    assert nfzoo.model_info("nf_test_resnet", include_top=False).classes is None
    assert nfzoo.model_info("nf_test_resnet", features_only=True).classes is None

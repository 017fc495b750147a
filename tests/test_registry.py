import re

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo import registry


def test_names_round_trip_and_are_unique():
    table = registry.names()
    assert all(str(registry.parse(name)) == name for name in table)
    assert len(table) == sum(len(m.SPECS) * len(m.ADMITS) for m in registry.FAMILIES.values())
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in table)


def test_aliases_lead_to_models():
    assert str(registry.parse("efficientnet_b3")) == "bn_efficientnet_b3"
    assert not registry.aliases().keys() & registry.names().keys()


def test_list_models_filters_and_sorts_naturally():
    assert nfzoo.list_models("sn_*", family="efficientnet") == [f"sn_efficientnet_b{i}" for i in range(8)]
    assert nfzoo.list_models(variant="gn") == [f"gn_efficientnet_b{i}" for i in range(8)]
    assert not [name for name in nfzoo.list_models() if "test_" in name]
    assert nfzoo.list_models("sn_ffnn*") == ["sn_ffnn_10x100", "sn_ffnn_10x512"]


@pytest.mark.parametrize(("word", "known"), [("variant", "none, bn, gn, sn, nf"), ("family", "efficientnet, ffnn")])
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


def test_registered_models(monkeypatch):
    monkeypatch.setattr(registry, "_USER_MODELS", {})

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


def test_ffnn_width_and_depth_are_overrides():
    model = nfzoo.build("bn_ffnn_10x100", width=24, depth=3)
    assert [layer.units for layer in model.layers if isinstance(layer, keras.layers.Dense)] == [24, 24, 100]

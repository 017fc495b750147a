"""Which branch is dropped how often, by the rule of each dialect, and that `summary` tells."""

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo.layers import StochasticDepth
from nfzoo.numerics import drop_path_rates

# Rule and whether survivors are rescaled. timm's EfficientNets count as Keras' do.
CASES = [
    ("bn_test_resnet", "timm", "timm", True), ("bn_test_resnet", "keras", "keras", True),
    ("nf_test_resnet", "deepmind", "deepmind", False), ("nf_test_resnet", "timm", "timm", True),
    ("nf_test_nfnet", "deepmind", "deepmind", False), ("nf_test_nfnet", "timm", "timm", True),
    ("nf_test_regnet", "deepmind", "deepmind", False), ("nf_test_regnet", "timm", "timm", True),
    ("bn_test_efficientnet", "keras", "keras", True), ("bn_test_efficientnet", "timm", "keras", True),
]  # fmt: skip


def _rates(model) -> dict[str, float]:
    """Block -> rate, 0 where nothing is dropped."""
    layers = {layer.name: layer for layer in model.layers}
    blocks = [name.removesuffix("_branch") for name in layers if name.endswith("_branch")]
    return {block: getattr(layers.get(f"{block}_drop"), "rate", 0.0) for block in blocks}


@pytest.mark.parametrize(("name", "dialect", "rule", "rescale"), CASES)
def test_rates_follow_the_rule_of_the_dialect(name, dialect, rule, rescale):
    with keras.StatelessScope():
        model = nfzoo.build(name, dialect=dialect, drop_path_rate=0.3, input_shape=(64, 64, 3))
    rates = _rates(model)
    expected = drop_path_rates(0.3, len(rates), rule)
    if "efficientnet" in name:  # a block without a skip cannot be dropped
        merges = {layer.name.removesuffix("_out") for layer in model.layers if isinstance(layer, nfzoo.layers.Merge)}
        expected = [rate if block in merges else 0.0 for block, rate in zip(rates, expected, strict=True)]
    np.testing.assert_allclose(list(rates.values()), expected)
    assert max(expected) > 0
    assert {x.rescale for x in model.layers if isinstance(x, StochasticDepth)} == {rescale}


@pytest.mark.parametrize(("dialect", "last"), [("timm", 0.25), ("deepmind", 0.25 * 11 / 12)])
def test_rates_of_nfnet_f0(dialect, last):
    with keras.StatelessScope():
        rates = list(_rates(nfzoo.build("nf_nfnet_f0", dialect=dialect, drop_path_rate=0.25)).values())
    assert len(rates) == 12 and rates[0] == 0 and rates[1:3] == pytest.approx([last / 11, 2 * last / 11])
    assert rates[-1] == pytest.approx(last)


def test_rates_survive_saving_and_show_in_the_summary(tmp_path, capsys):
    model = nfzoo.build("nf_test_nfnet", drop_path_rate=0.3, input_shape=(32, 32, 3))
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert list(_rates(model).values()) == pytest.approx([0, 0.1, 0.2, 0.3])
    lines = []
    model.summary(print_fn=lines.append)
    assert "Total params" in lines[0] and lines[1:] == [" Stochastic depth: 3 layers, rates 0.1 to 0.3"]
    model.summary()
    assert "rates 0.1 to 0.3" in capsys.readouterr().out


def test_no_stochastic_depth_no_line():
    lines = []
    nfzoo.build("nf_test_nfnet", input_shape=(32, 32, 3)).summary(print_fn=lines.append)
    assert not any("Stochastic" in line for line in lines)

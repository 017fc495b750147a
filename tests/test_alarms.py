"""Alarms: silent on healthy networks, the right word on each disease; judged on tables, and on real networks."""

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import crossentropy
from keras import layers

import nfzoo
from nfzoo import spp
from nfzoo.alarms import THRESHOLDS, alarms


def _log(values, kind="activation", place="block", step=0, names="block{}", **columns):
    """One measurement: a row per value of the variance; other statistics as given, or without a mean."""
    rows = [
        {"kind": kind, "place": place, "layer": names.format(i), "depth": i, "step": step, "epoch": step // 10,
         "acsm": 0.0, "acv": v, "second_moment": v}
        for i, v in enumerate(values)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    for name, column in columns.items():
        table[name] = column
    if "acsm" in columns:
        table["second_moment"] = table.acsm + table.acv
    return table


def _kinds(log):
    return [alarm.kind for alarm in alarms(log)]


def _only(log):
    found = alarms(log)
    assert len(found) == 1, found
    return found[0]


# Average channel variance (and squared mean) by block as published: facts of the NF-ResNet paper's plots.
HEALTHY = {
    "BN V2, BN-ReLU-Conv": [1.48, 2.16, 2.86, 1.39, 2.07, 2.76, 3.44, 1.38, 2.06, 2.74, 3.44, 4.13, 4.82, 1.37, 2.05],
    "BN V2, ReLU-BN-Conv": [4, 6, 8, 4, 6, 8, 10, 4, 6, 8, 10, 12, 14, 4, 6, 8],
    "NF, alpha 1": [2.02, 3.0, 4.02, 1.97, 2.9, 3.82, 4.75, 1.86, 5.86, 1.6, 2.26, 2.88],
    "NF-ResNet-600": [2.05, 11.2, 26.3, 51.3, 1.98, 24.2, 46.6, 37.4, 21.0],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_published_profiles_are_healthy(name):
    mean = np.linspace(0.25, 2.14, len(HEALTHY[name]))
    assert alarms(_log(HEALTHY[name], acsm=mean)) == []


def test_the_published_mean_shift_is_told():
    """NF with plain He convolutions and unscaled ReLU: squared means of 22 to 93 over variances of 3.4 to 19.5."""
    alarm = _only(_log([1, 3.4, 5.1, 6.8, 19.5, 11.6], acsm=[2.2, 22, 40, 60, 93, 80]))
    assert (alarm.kind, alarm.severity, alarm.layer, alarm.step) == ("mean shift", "warning", "block1", 0)
    assert alarm.value == pytest.approx(22 / 3.4) and "4 other layers" in alarm.sentence


def test_a_mean_that_the_stem_made_is_not_the_blocks():
    assert alarms(_log([0.8] * 6, acsm=4.4)) == []  # max-pooling of rectified noise, passed on by identities


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_bounds_are_where_the_table_says(factor):
    for kind, beyond in (("explosion", factor > 1), ("collapse", factor < 1)):
        bound = THRESHOLDS[kind].bound * factor
        assert _kinds(_log([1, 2, 2 * bound if kind == "collapse" else bound])) == ([kind] if beyond else []), kind
    shifted = _log([1, 1], acsm=[0.1, THRESHOLDS["mean shift"].bound * factor])
    assert _kinds(shifted) == (["mean shift"] if factor > 1 else [])
    gradients = _log([THRESHOLDS["vanishing gradients"].bound * factor, 1], kind="gradient")
    assert _kinds(gradients) == (["vanishing gradients"] if factor < 1 else [])


def test_growth_since_the_start_is_an_explosion_too():
    alarm = _only(pd.concat([_log([1, 2, 4]), _log([1e6, 2e6, 4e6], step=30)]))
    assert (alarm.kind, alarm.layer, alarm.step, alarm.epoch) == ("explosion", "block0", 30, 3)
    assert "its own at the start" in alarm.sentence and "step 30 (epoch 3)" in alarm.sentence


def test_growth_into_the_range_of_the_start_is_recovery():
    """Zero padding leaves the last blocks of an NF-EfficientNet next to nothing; training gives it back."""
    start = _log([1, 1e-2, 1e-6, 4e-6])
    assert alarms(pd.concat([start, _log([0.9, 0.3, 0.06, 0.05], step=30)])) == []
    alarm = _only(pd.concat([start, _log([0.9, 0.3, 0.06, 1.1], step=30)]))
    assert (alarm.kind, alarm.layer, alarm.step) == ("explosion", "block3", 30)


def test_the_first_layer_and_step_are_named():
    log = pd.concat([_log([1, 1, 1, 1]), _log([1, 1, 1e-9, 1e-9], step=5), _log([1, 1e-9, 1e-9, 1e-9], step=9)])
    alarm = _only(log)
    assert (alarm.kind, alarm.layer, alarm.step) == ("collapse", "block2", 5)
    assert alarm.value == pytest.approx(1e-9) and alarm.threshold == THRESHOLDS["collapse"].bound


def test_the_stream_is_judged_where_there_is_one():
    """A branch, a gate or a classifier may be tiny; the stream may not."""
    stream = _log([1, 1, 1])
    aside = _log([1e-20, 1e-12], place="branch", names="branch{}")
    assert alarms(pd.concat([stream, aside])) == []
    plain = _log([1, 1, 1e-20], place="preactivation")
    assert alarms(plain) == []  # the last layer is the classifier, which may start at zero
    assert _kinds(_log([1, 1e-20, 1], place="preactivation")) == ["collapse"]


def test_branches_may_be_zero_at_initialisation_only():
    branch = {"place": "branch", "names": "branch{}"}
    start = pd.concat([_log([1, 1, 1]), _log([0, 0, 0], **branch)])
    assert alarms(start) == []
    healthy = pd.concat([start, _log([1, 1, 1], step=10), _log([1e-6, 1e-6, 1e-6], step=10, **branch)])
    assert alarms(healthy) == []
    dead = pd.concat([start, _log([1, 1, 1], step=10), _log([1e-6, 0, 1e-6], step=10, **branch)])
    assert (_only(dead).kind, _only(dead).layer, _only(dead).step) == ("dead block", "branch1", 10)


def test_a_constant_output_is_dead_though_it_is_not_zero():
    alarm = _only(_log([1, 1, 1e-13], acsm=[0.1, 0.1, 1.0]))
    assert alarm.kind == "dead block" and "constant" in alarm.sentence


def test_gradients_that_a_zero_classifier_stops_do_not_vanish():
    assert alarms(pd.concat([_log([1, 1, 1]), _log([0, 0, 0], kind="gradient")])) == []
    assert _kinds(_log([0, 1, 1], kind="gradient")) == ["vanishing gradients"]


def test_nan_origin_of_activations_is_the_first_in_depth():
    nan = [1, np.nan, np.nan]
    log = pd.concat([_log([1, 1, 1]), _log([1, 1, 1], step=10), _log(nan, step=20), _log([np.nan] * 3, step=30)])
    alarm = _only(log)
    assert (alarm.kind, alarm.layer, alarm.step, alarm.severity) == ("NaN origin", "block1", 20, "alarm")
    assert "between step 10 and 20" in alarm.sentence


def test_nan_origin_of_gradients_is_the_last_in_depth():
    finite = pd.concat([_log([1, 1, 1]), _log([1, 1, 1], kind="gradient")])
    broken = pd.concat([_log([1, 1, 1], step=7), _log([np.nan, np.nan, 1], kind="gradient", step=7)])
    alarm = _only(pd.concat([finite, broken]))
    assert (alarm.layer, alarm.step) == ("block1", 7) and "gradient of block1" in alarm.sentence


def test_live_records_know_the_very_step():
    log = pd.concat([_log([1, 1, 1]), _log([1, np.nan, np.nan], step=100, source="live", first_bad=[-1, 63, 62])])
    alarm = _only(log)
    assert (alarm.layer, alarm.step) == ("block2", 62) and "at step 62" in alarm.sentence


def test_infinity_is_not_finite_either():
    assert _kinds(_log([1, 1, np.inf])) == ["NaN origin"]


def test_statistics_that_were_not_asked_for_are_not_missing():
    log = pd.concat([_log([1, 1]), _log([1, 1], kind="weight", place="layer", names="w{}")])
    log.loc[log.kind == "weight", ["acsm", "acv"]] = np.nan
    assert alarms(log.assign(mean=np.nan)) == []
    assert alarms(_log([1, 1e-30]).drop(columns=["acsm", "acv", "second_moment"]).assign(kurtosis=3.0)) == []
    assert alarms(pd.DataFrame()) == []


def test_alarms_of_a_longer_log_repeat_those_of_its_beginning():
    """What was told once is told in the same words again, so that a callback can print each sentence once."""
    rng = np.random.default_rng(0)
    for seed in range(8):
        steps = [
            pd.concat([
                _log(10 ** rng.uniform(-2 - seed, 2 + seed, 5), step=step, acsm=10 ** rng.uniform(-3, 3, 5)),
                _log(10 ** rng.uniform(-9, 0, 5), kind="gradient", step=step),
            ])
            for step in range(0, 40, 10)
        ]  # fmt: skip
        before = []
        for count in range(1, len(steps) + 1):
            now = [alarm.sentence for alarm in alarms(pd.concat(steps[:count]))]
            assert set(before) <= set(now)
            before = now
        assert before or seed < 3


# ---------------------------------------------------------------- real networks
def _snapshot(model, shape=(32, 32, 3), taps="blocks", **options):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, *shape)).astype("float32"), rng.integers(0, 10, 16)
    return spp.snapshot(model, x, y, crossentropy(), taps=taps, **options)


@pytest.mark.parametrize("name", ["bn_test_resnet", "skipinit_test_resnet"])
def test_healthy_networks(name):
    assert alarms(_snapshot(nfzoo.build(name, classes=10, input_shape=(32, 32, 3)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("row", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("variant", ["bn", "gn", "sn", "nf", "fixup", "skipinit", "rescale", "eun"])
def test_healthy_networks_in_every_layer(variant, row):
    model = nfzoo.build(f"{variant}_{row}", classes=10, input_shape=(32, 32, 3))
    assert alarms(_snapshot(model, taps="layers", statistics="all")) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bn", "gn", "sn", "nf", "fixup", "skipinit", "rescale", "eun"])
def test_healthy_networks_of_fifty_layers(variant):
    model = nfzoo.build(f"{variant}_resnet50", classes=10, input_shape=(64, 64, 3))
    assert alarms(_snapshot(model, (64, 64, 3))) == []


@pytest.mark.slow
def test_no_normalization_in_fifty_layers():
    model = nfzoo.build("none_resnet50", classes=10, input_shape=(64, 64, 3))
    assert _kinds(_snapshot(model, (64, 64, 3))) == ["explosion", "mean shift"]


@pytest.mark.slow
def test_efficientnet_without_normalization_collapses():
    found = alarms(_snapshot(nfzoo.build("none_efficientnet_b0", classes=10, input_shape=(32, 32, 3))))
    assert [alarm.kind for alarm in found] == ["collapse", "vanishing gradients"]


def _chain(depth, block, width=32):
    x = inputs = keras.Input((width,))
    for i in range(depth):
        x = block(x, i)
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


@pytest.mark.slow
def test_a_plain_sum_of_many_blocks_explodes():
    he = keras.initializers.HeNormal

    def block(x, i):
        y = layers.Dense(32, kernel_initializer=he(seed=i), name=f"dense{i}")(layers.ReLU(name=f"relu{i}")(x))
        return layers.Add(name=f"sum{i}")([x, y])

    found = alarms(_snapshot(_chain(200, block), (32,), what=("activations",)))
    assert found[-1].kind == "explosion" and found[-1].layer < "sum3"  # doubles per block: 2^14 > 1e4
    assert found[0].kind == "NaN origin"  # beyond 2^127


def test_sigmoids_make_gradients_vanish():
    model = _chain(20, lambda x, i: layers.Dense(32, "sigmoid", name=f"dense{i}")(x))
    found = {alarm.kind: alarm for alarm in alarms(_snapshot(model, (32,)))}
    assert "explosion" not in found and "collapse" not in found
    assert 0 < found["vanishing gradients"].value < 1e-8


def test_dead_rectifiers():
    def block(x, i):
        bias = keras.initializers.Constant(-100.0 if i == 2 else 0.0)
        return layers.Dense(32, "relu", bias_initializer=bias, name=f"dense{i}")(x)

    found = {alarm.kind: alarm for alarm in alarms(_snapshot(_chain(4, block), (32,)))}
    assert found["dead block"].layer == "dense2" and "zero" in found["dead block"].sentence


def test_an_injected_nan_is_found_where_it_was_put():
    model = _chain(6, lambda x, i: layers.Dense(32, "tanh", name=f"dense{i}")(x))
    before = _snapshot(model, (32,)).assign(step=0, epoch=0)
    kernel = model.get_layer("dense3").kernel
    value = np.array(kernel)
    value[0, 0] = np.nan
    kernel.assign(value)
    alarm = _only(pd.concat([before, _snapshot(model, (32,)).assign(step=12, epoch=1)]))
    assert (alarm.kind, alarm.layer, alarm.step) == ("NaN origin", "dense3", 12)
    assert "between step 0 and 12" in alarm.sentence


def test_a_layer_called_out_is_no_block():
    """Only the stream of blocks would be judged otherwise, which is the classifier here."""
    x = np.random.default_rng(0).standard_normal((16, 8)).astype("float32")
    small = keras.initializers.RandomNormal(stddev=1e-4)
    hidden = [layers.Dense(8, kernel_initializer=small) for _ in range(6)]
    net = keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(3, name="class_out")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    log = spp.snapshot(net, x, np.zeros(16, int), loss=loss)
    assert set(log.place[log.kind == "activation"]) == {"preactivation"} and "collapse" in {
        alarm.kind for alarm in alarms(log)
    }

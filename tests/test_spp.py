"""Signal propagation: the statistics, the probe that touches nothing, the log."""

import copy
import json

import keras
import numpy as np
import pytest
from conftest import VARIANTS, crossentropy

import nfzoo
from nfzoo import backend, spp


def test_constant_channels_have_a_mean_and_no_variance():
    x = np.broadcast_to(np.array([1.0, -2.0, 3.0], "float32"), (4, 5, 5, 3))
    got = {k: float(v) for k, v in spp.statistics(x).items()}
    assert got == pytest.approx({"acsm": 14 / 3, "acv": 0.0, "second_moment": 14 / 3})


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (7, 3)])
def test_statistics_equal_numpy(shape):
    x = np.random.default_rng(0).normal(0.5, 2, shape).astype("float32")
    got = {k: float(v) for k, v in spp.statistics(x).items()}
    channels = x.reshape(-1, shape[-1]).astype("float64")
    expected = {
        "acsm": np.mean([c.mean() ** 2 for c in channels.T]),
        "acv": np.mean([np.mean((c - c.mean()) ** 2) for c in channels.T]),
        "second_moment": np.mean(channels**2),
    }
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_posters_reading_takes_dense_tensors_as_one_vector():
    x = np.random.default_rng(0).normal(0.5, 2, (7, 3)).astype("float32")
    flat = spp.statistics(x, None, "poster", flat=True)
    assert float(flat["acsm"]) == pytest.approx(np.mean(x**2), rel=1e-5)
    assert float(flat["acv"]) == pytest.approx(x.var(), rel=1e-5)
    assert float(spp.statistics(x)["acsm"]) != pytest.approx(float(flat["acsm"]), rel=0.1)
    maps = np.random.default_rng(0).normal(0.5, 2, (2, 4, 4, 3)).astype("float32")
    assert {k: float(v) for k, v in spp.statistics(maps, None, "poster").items()} == pytest.approx(
        {k: float(v) for k, v in spp.statistics(maps).items()}
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_those_of_the_training_mode(variant, images):
    model = nfzoo.build(f"{variant}_test_efficientnet", dropout_rate=0.0)
    rows = spp.snapshot(model, images[0], what=("activations",)).set_index("layer")
    for name in ("stem_conv1", "stage2_block2_branch", "stage2_block2_out", "top_act"):
        tensor = keras.Model(model.input, model.get_layer(name).output)(images[0], training=True)
        tensor = np.asarray(tensor, "float64")
        assert rows.acv[name] == pytest.approx(tensor.var((0, 1, 2)).mean(), rel=1e-3)
        assert rows.acsm[name] == pytest.approx((tensor.mean((0, 1, 2)) ** 2).mean(), rel=1e-3, abs=1e-8)


def test_weights_raw_and_effective(images):
    model = nfzoo.build("nf_test_efficientnet")
    layer = model.get_layer("stage2_block1_conv2")  # depthwise 5x5
    layer.gain.assign(np.full(layer.gain.shape, 1.5))
    rows = spp.snapshot(model, images[0], what=("weights",)).set_index(["kind", "layer"])
    raw, effective = (rows.loc[(kind, "stage2_block1_conv2/kernel")] for kind in ("weight", "effective_weight"))
    kernel = layer.kernel.numpy()[..., 0]
    assert raw.acv == pytest.approx(kernel.var((0, 1)).mean(), rel=1e-5)
    assert raw.acsm == pytest.approx((kernel.mean((0, 1)) ** 2).mean(), rel=1e-5)
    assert effective.acv == pytest.approx(1.5**2 / 25, rel=1e-3) and effective.acsm < 1e-12
    assert ("effective_weight", "head/kernel") not in rows.index


def test_the_posters_weights_are_kernels_and_the_scales_of_norms(images):
    """What PyTorch names "weight", each as one vector; not the gain of weight standardization, nor a bias."""
    model = nfzoo.build("bn_test_ffnn", size=32)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0.5, 2, variable.shape))
    rows = spp.snapshot(model, *images, crossentropy(), definition="poster").set_index(["kind", "layer"])
    wanted = {v.path: v.numpy() for v in model.trainable_variables if v.name in ("kernel", "gamma")}
    for kind in ("weight", "weight_gradient"):
        assert set(rows.loc[kind].index) == wanted.keys()
    assert "hidden_norm1/gamma" in wanted
    for path, x in wanted.items():
        assert rows.acsm["weight", path] == pytest.approx(np.mean(x**2), rel=1e-5)
        assert rows.acv["weight", path] == pytest.approx(x.var(), rel=1e-5)
    assert not any("gamma" in path for path in spp.snapshot(model, images[0]).layer)
    nf = spp.snapshot(nfzoo.build("nf_test_efficientnet"), images[0], definition="poster")
    assert not any("gain" in path for path in nf.layer)


def test_gradients_of_a_linear_layer_are_the_analytic_ones():
    """Mean squared error of one dense layer: dL/dout = 2 (out - y) / (batch * units)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 5)).astype("float32"), rng.standard_normal((16, 3)).astype("float32")
    image = keras.Input((5,))
    model = keras.Model(image, keras.layers.Dense(3, name="dense")(image))
    rows = spp.snapshot(model, x, y, keras.losses.MeanSquaredError(), taps="layers").set_index(["kind", "layer"])
    out = np.asarray(model(x), "float64")
    at_output = 2 * (out - y) / out.size
    assert rows.second_moment["gradient", "dense"] == pytest.approx(np.mean(at_output**2), rel=1e-4)
    at_kernel = x.T.astype("float64") @ at_output
    assert rows.second_moment["weight_gradient", "dense/kernel"] == pytest.approx(np.mean(at_kernel**2), rel=1e-4)


def test_gradients_at_taps_equal_finite_differences():
    """In float64, through residual blocks and squeeze-excite: shift one block's output, watch the loss."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    model = nfzoo.build("none_test_efficientnet", dropout_rate=0.0)  # SiLU: smooth, unlike SELU
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 32, 32, 3)), np.array([1, 2])
    name = "stage2_block2_out"
    head = keras.Model(model.get_layer(name).output, model.output)
    value = np.asarray(keras.Model(model.input, model.get_layer(name).output)(x))
    got = backend.signals(model, [name], crossentropy(), lambda *signals: signals[2][name])(x, y)
    got = keras.ops.convert_to_numpy(got)
    step = 1e-5
    for i in rng.choice(value.size, 40, replace=False):
        shift = np.zeros(value.size)
        shift[i] = step
        up, down = (float(crossentropy()(y, head(value + s * shift.reshape(value.shape)))) for s in (1, -1))
        assert got.flat[i] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("variant", ["bn", "nf"])
def test_probing_touches_nothing(variant, images):
    """A probe in training mode would move BN's statistics and the dropout stream; the next step must not notice it."""

    def train(probe):
        keras.utils.set_random_seed(1)
        model = nfzoo.build(f"{variant}_test_efficientnet", dropout_rate=0.5, repeats=(1, 1, 2))
        model.compile(keras.optimizers.Adam(1e-2), crossentropy(), agc=nfzoo.AGC())
        callbacks = [nfzoo.SignalPropagation(*images, every=1)] if probe else []
        model.fit(*images, epochs=3, batch_size=4, verbose=0, callbacks=callbacks)
        return [np.array(v) for v in model.variables + model.optimizer.variables]

    for a, b in zip(train(False), train(True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_callback_records_at_init_and_every_epoch_and_writes_lines(images, tmp_path):
    model = nfzoo.build("nf_test_efficientnet")
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(*images, log_dir=tmp_path)
    model.fit(*images, epochs=2, batch_size=4, verbose=0, callbacks=[probe])
    table = spp.read(tmp_path)
    assert table[["step", "epoch"]].drop_duplicates().to_numpy().tolist() == [[0, 0], [2, 1], [4, 2]]
    assert set(table.kind) == set(spp.KINDS)
    assert table[table.place == "branch"].layer.nunique() == 6
    assert len(table) == len(probe.table()) == len((tmp_path / "spp.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3, 6]), (lambda s: s in (1, 5), [0, 1, 5]), (10, [0])])
def test_schedules(every, steps, images):
    model = nfzoo.build("sn_test_ffnn", size=32)
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(*images, every=every)
    model.fit(*images, epochs=3, batch_size=4, verbose=0, callbacks=[probe])
    assert probe.table().step.unique().tolist() == steps


def test_without_labels_there_are_no_gradients(images):
    model = nfzoo.build("sn_test_efficientnet")
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(images[0])
    model.fit(*images, verbose=0, callbacks=[probe])
    assert set(probe.table().kind) == {"activation", "weight"}


def test_mixed_precision_statistics_are_float32_and_unscaled(images):
    keras.utils.set_random_seed(0)
    full = spp.snapshot(nfzoo.build("sn_test_efficientnet", dropout_rate=0.0), *images, crossentropy(), taps="blocks")
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    half = spp.snapshot(nfzoo.build("sn_test_efficientnet", dropout_rate=0.0), *images, crossentropy(), taps="blocks")
    for kind in ("activation", "gradient"):
        a, b = (t[t.kind == kind].second_moment.to_numpy() for t in (full, half))
        np.testing.assert_allclose(b, a, rtol=0.1)


def test_any_keras_model_by_layers():
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=5)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    rows = spp.snapshot(model, x, np.array([0, 1]), "sparse_categorical_crossentropy", taps="*conv*")
    assert {"activation", "gradient", "weight", "weight_gradient"} == set(rows.kind)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"taps": "nothing*"}, "taps='nothing"), ({"taps": ["stem_conv9"]}, "stem_conv9"), ({"what": ("noise",)}, "noise"),
     ({"definition": "median"}, "median")],
)  # fmt: skip
def test_bad_options(options, match, images):
    with pytest.raises(ValueError, match=match):
        spp.snapshot(nfzoo.build("sn_test_efficientnet"), images[0], **options)


def test_subclassed_models_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="functional.*Own"):
        spp.snapshot(Own(), np.zeros((1, 2), "float32"), taps="layers")


def test_bad_schedule():
    with pytest.raises(ValueError, match="every=0"):
        nfzoo.SignalPropagation(np.zeros((1, 2)), every=0)


def test_deep_copy_for_the_tuner(images):
    """keras-tuner copies callbacks before every trial."""
    model = nfzoo.build("sn_test_efficientnet")
    model.compile("sgd", crossentropy())
    copied = copy.deepcopy(nfzoo.SignalPropagation(*images, log_dir="never_written"))
    copied.log = None
    model.fit(*images, verbose=0, callbacks=[copied])
    assert len(copied.table())


def test_a_log_cut_in_the_middle_is_read(tmp_path):
    log = spp.SignalLog(tmp_path / "spp.jsonl")
    log.append([{"step": i, "layer": "a", "acv": 1.0} for i in range(3)])
    whole = log.path.read_text()
    for cut in range(len(whole)):
        log.path.write_text(whole[:cut])
        # A line counts once it is whole, with or without its line end.
        assert len(log.read()) == (cut + 1) // len(whole.splitlines(True)[0])
    log.path.write_text(whole[:-5])
    log.append([{"step": 9, "layer": "b"}])
    assert [r["step"] for r in log.read()] == [0, 1, 9]


def test_what_is_not_finite_is_null_in_the_log_and_nan_in_the_table(tmp_path):
    log = spp.SignalLog(tmp_path / "spp.jsonl")
    log.append([{"step": 0, "acv": np.nan, "acsm": 1.0}, {"step": 1, "acv": -np.inf, "acsm": np.inf}])
    log.rewind(1)
    strict = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    assert strict == [{"step": 0, "acv": None, "acsm": 1.0}, {"step": 1, "acv": None, "acsm": None}]
    table = spp.read(tmp_path)
    assert table.acv.dtype == table.acsm.dtype == float and table.acv.isna().all()
    assert table.acsm.isna().tolist() == [False, True]


def test_rewind_keeps_what_came_before(tmp_path):
    log = spp.SignalLog(tmp_path / "spp.jsonl")
    log.append([{"step": i} for i in range(6)])
    log.rewind(3)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_second_start_from_nothing_does_not_repeat_step_0(images, tmp_path):
    for _ in range(2):
        model = nfzoo.build("sn_test_ffnn", size=32)
        model.compile("sgd", crossentropy())
        model.fit(*images, verbose=0, callbacks=[nfzoo.SignalPropagation(*images, log_dir=tmp_path)])
    assert not spp.read(tmp_path).duplicated(["step", "kind", "layer"]).any()


def test_a_log_without_a_whole_line(tmp_path):
    (tmp_path / "spp.jsonl").write_text('{"step": 0, "ki')
    with pytest.raises(ValueError, match="no line is whole"):
        spp.read(tmp_path)


def test_missing_log():
    with pytest.raises(FileNotFoundError, match="spp.jsonl"):
        spp.read("no/such/folder")

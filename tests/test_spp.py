"""Signal propagation: the statistics, the probe that touches nothing, the log."""

import copy
import json

import keras
import numpy as np
import pytest
from conftest import VARIANTS, crossentropy, slow_but

import nfzoo
from nfzoo import backend, spp


@pytest.mark.parametrize("variant", slow_but(("bn", "nf"), VARIANTS))
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
    loss = lambda x, y, outputs: crossentropy()(y, outputs)  # noqa: E731
    got = backend.signals(model, {name: model.get_layer(name)}, loss, lambda *signals: signals[2][name])(x, y)
    got = keras.ops.convert_to_numpy(got)
    step = 1e-5
    for i in rng.choice(value.size, 40, replace=False):
        shift = np.zeros(value.size)
        shift[i] = step
        up, down = (float(crossentropy()(y, head(value + s * shift.reshape(value.shape)))) for s in (1, -1))
        assert got.flat[i] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", slow_but(["bn_test_ffnn"], ["bn_test_ffnn", "bn_test_resnet", "nf_test_efficientnet"]))
def test_probing_touches_nothing(name, images):
    """A probe in training mode would move BN's statistics and the dropout stream; the next step must not notice it."""

    def train(probe):
        keras.utils.set_random_seed(1)
        model = nfzoo.build(name, size=32, dropout_rate=0.5)
        model.compile(keras.optimizers.Adam(1e-2), crossentropy(), agc=nfzoo.AGC())
        callbacks = [nfzoo.SignalPropagation(*images, every=1)] if probe else []
        model.fit(*images, epochs=3, batch_size=4, verbose=0, callbacks=callbacks)
        return [np.array(v) for v in model.variables + model.optimizer.variables]

    for a, b in zip(train(False), train(True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_probe_is_traced_once(images, monkeypatch):
    """The first step makes the metrics of `compile`, after the first probe; tracing takes longer than measuring."""
    traced, reduce = [], spp.reduction.Reduction.__call__
    monkeypatch.setattr(spp.reduction.Reduction, "__call__", lambda *args: traced.append(1) or reduce(*args))
    model = nfzoo.build("bn_test_ffnn", input_shape=(32, 32, 3))
    model.compile("sgd", crossentropy(), metrics=["accuracy"])
    probe = nfzoo.SignalPropagation(*images)
    model.fit(*images, epochs=2, batch_size=4, verbose=0, callbacks=[probe])
    assert len(probe.table()[["step", "epoch"]].drop_duplicates()) == 3 and len(traced) == 1


def test_callback_records_at_init_and_every_epoch_and_writes_lines(images, tmp_path):
    model = nfzoo.build("nf_test_efficientnet")
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(*images, log_dir=tmp_path)
    model.fit(*images, epochs=2, batch_size=4, verbose=0, callbacks=[probe])
    table = spp.read(tmp_path)
    assert table[["step", "epoch"]].drop_duplicates().to_numpy().tolist() == [[0, 0], [2, 1], [4, 2]]
    assert set(table.kind) == set(spp.KINDS) - {"parameter"}
    assert table[table.place == "branch"].layer.nunique() == 6
    assert len(table) == len(probe.table()) == len((tmp_path / "spp.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3, 6]), (lambda s: s in (1, 5), [0, 1, 5]), (10, [0])])
def test_schedules(every, steps, images):
    model = nfzoo.build("sn_test_ffnn", size=32)
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(*images, every=every)
    model.fit(*images, epochs=3, batch_size=4, verbose=0, callbacks=[probe])
    assert probe.table().step.unique().tolist() == steps


def test_steps_that_end_together_miss_no_schedule(images):
    x, y = np.repeat(images[0], 2, 0), np.repeat(images[1], 2, 0)
    model = nfzoo.build("sn_test_ffnn", input_shape=(32, 32, 3))
    model.compile("sgd", crossentropy(), steps_per_execution=3)
    probe = nfzoo.SignalPropagation(x[:4], y[:4], every=4, what=("activations",))
    model.fit(x, y, batch_size=2, epochs=1, verbose=0, callbacks=[probe])  # 8 steps, seen after 3, 6 and 8
    assert probe.table().step.unique().tolist() == [0, 6, 8]


def test_without_labels_there_are_no_gradients(images):
    model = nfzoo.build("sn_test_efficientnet")
    model.compile("sgd", crossentropy())
    probe = nfzoo.SignalPropagation(images[0])
    model.fit(*images, verbose=0, callbacks=[probe])
    assert set(probe.table().kind) == {"activation", "weight"}


@pytest.mark.slow
def test_mixed_precision_statistics_are_float32_and_unscaled(images):
    keras.utils.set_random_seed(0)
    full = spp.snapshot(nfzoo.build("sn_test_efficientnet", dropout_rate=0.0), *images, crossentropy(), taps="blocks")
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    half = spp.snapshot(nfzoo.build("sn_test_efficientnet", dropout_rate=0.0), *images, crossentropy(), taps="blocks")
    for kind in ("activation", "gradient"):
        a, b = (t[t.kind == kind].second_moment.to_numpy() for t in (full, half))
        np.testing.assert_allclose(b, a, rtol=0.1)


@pytest.mark.slow
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


def test_a_model_without_a_graph_must_be_built():
    with pytest.raises(ValueError, match="built.*call it"):
        spp.snapshot(keras.Sequential([keras.layers.Dense(2)]), np.zeros((1, 2), "float32"))


# ---------------------------------------------------------------- any model
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 4)).astype("float32"), RNG.standard_normal((6, 2)).astype("float32")


class Own(keras.Model):
    """A subclassed model: no graph to cut."""

    def __init__(self):
        super().__init__(name="own")
        self.first, self.second = keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")

    def call(self, x):
        return self.second(self.first(x))


def _sequential():
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")]
    )


def _nested():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="first")], name="inner")
    x = keras.Input((4,))
    return keras.Model(x, keras.layers.Dense(2, name="second")(inner(x)))


@pytest.mark.parametrize(("make", "first"), [(_sequential, "first"), (_nested, "inner/first"), (Own, "first")])
def test_sequential_nested_and_subclassed_models(make, first):
    """Activations, and the analytic gradients of a linear network, whatever the model is made of."""
    model = make()
    model(X)
    rows = spp.snapshot(model, X, Y, "mse", taps="layers").set_index(["kind", "layer"])
    weights = {v.path.split("/", 1 if v.path.count("/") > 1 else 0)[-1]: np.array(v) for v in model.weights}
    kernels = [w for path, w in weights.items() if "kernel" in path]
    hidden = X @ kernels[0]
    at_output = 2 * (hidden @ kernels[1] - Y) / Y.size
    at_hidden = at_output @ kernels[1].T
    assert rows.second_moment["activation", first] == pytest.approx(np.mean(hidden**2), rel=1e-5)
    assert rows.second_moment["gradient", "second"] == pytest.approx(np.mean(at_output**2), rel=1e-5)
    assert rows.second_moment["gradient", first] == pytest.approx(np.mean(at_hidden**2), rel=1e-5)


def test_a_shared_layer_is_seen_at_every_call():
    shared = keras.layers.Dense(4, name="shared")
    x = keras.Input((4,))
    model = keras.Model(x, shared(shared(x)))
    rows = spp.snapshot(model, X, taps="layers", what=("activations",)).set_index("layer")
    kernel = np.array(shared.kernel)
    assert rows.index.tolist() == ["shared", "shared#2"]
    assert rows.second_moment["shared#2"] == pytest.approx(np.mean((X @ kernel @ kernel) ** 2), rel=1e-5)


def test_several_outputs_take_the_compiled_loss():
    x = keras.Input((4,))
    outputs = {"a": keras.layers.Dense(2, name="a")(x), "b": keras.layers.Dense(2, name="b")(x)}
    model = keras.Model(x, outputs)
    model.compile("sgd", {"a": "mse", "b": "mse"}, loss_weights={"a": 1.0, "b": 3.0})
    targets = {"a": Y, "b": Y}
    rows = spp.snapshot(model, X, targets, taps="layers").set_index(["kind", "layer"])
    gradient = 3 * 2 * (X @ np.array(model.get_layer("b").kernel) - Y) / Y.size
    assert rows.second_moment["gradient", "b"] == pytest.approx(np.mean(gradient**2), rel=1e-5)
    probe = nfzoo.SignalPropagation(X, targets, taps="layers")
    model.fit(X, targets, epochs=1, verbose=0, callbacks=[probe])
    assert probe.table().step.unique().tolist() == [0, 1]


def test_taps_by_class_name_and_function():
    model = nfzoo.build("bn_test_resnet")
    merges = spp.select_taps(model, nfzoo.layers.Merge)
    assert merges == [name for name in spp.select_taps(model, "layers") if name.endswith("_sum")]
    assert spp.select_taps(model, lambda layer: layer.name == "head") == ["head"]
    assert spp.select_taps(model, ["head", nfzoo.layers.Merge]) == [*merges, "head"]
    foreign = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=4)
    kinds = {type(foreign.get_layer(name)).__name__ for name in spp.select_taps(foreign)}
    assert kinds == {"Conv2D", "DepthwiseConv2D", "Dense", "ReLU", "Add"}
    assert all(isinstance(foreign.get_layer(name), keras.layers.Add) for name in spp.select_taps(foreign, "blocks"))
    assert spp.select_taps(model) == spp.select_taps(model, "blocks")


# ---------------------------------------------------------------- the table of statistics
def test_a_users_statistic_is_a_column(images, monkeypatch):
    monkeypatch.setitem(spp.STATS, "largest", None)  # and is taken out again

    @spp.statistic
    def largest(signal):
        return keras.ops.max(keras.ops.abs(signal.entries))

    rows = spp.snapshot(
        nfzoo.build("sn_test_ffnn"), images[0][:, :8, :8], statistics=["largest"], what=("activations",)
    )
    assert rows.largest.gt(0).all() and "acv" not in rows
    with pytest.raises(ValueError, match="acsm.*zz"):
        spp.snapshot(nfzoo.build("sn_test_ffnn"), images[0][:, :8, :8], statistics="zz")


def test_weight_gradients_tell_what_agc_would_clip(images):
    model = nfzoo.build("nf_test_resnet")
    model.compile("sgd", crossentropy(), agc=nfzoo.AGC(0.02))
    rows = spp.snapshot(model, *images, taps="blocks").set_index(["kind", "layer"]).loc["weight_gradient"]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = crossentropy()(images[1], model(images[0], training=True))
    gradients = dict(
        zip([v.path for v in model.trainable_variables], tape.gradient(loss, model.trainable_variables), strict=True)
    )
    for path in ("stem_conv1/kernel", "stage2_block1_conv2/kernel"):
        w, g = (np.array(t) for t in (next(v for v in model.weights if v.path == path), gradients[path]))
        units = lambda t: np.maximum(np.linalg.norm(t.reshape(-1, t.shape[-1]), axis=0), 0)  # noqa: E731
        clipped = units(g) > 0.02 * np.maximum(units(w), 1e-3)
        assert rows.agc_clipped[path] == pytest.approx(clipped.mean())
        assert rows.to_weight[path] == pytest.approx(np.linalg.norm(g) / np.linalg.norm(w), rel=1e-4)


def test_parameters_are_scales_statistics_and_learnable_scalars(images):
    model = nfzoo.build("nf_test_resnet")
    model.get_layer("stage1_block1_out").gain.assign(0.25)
    rows = spp.snapshot(model, images[0], what=("parameters",)).set_index("layer")
    assert rows.value["stage1_block1_out/gain"] == 0.25 and set(rows.kind) == {"parameter"}
    norms = spp.snapshot(nfzoo.build("bn_test_resnet"), images[0], what=("parameters",)).layer
    assert {path.rsplit("/")[-1] for path in norms} == {"gamma", "beta", "moving_mean", "moving_variance"}


def test_bad_schedule():
    with pytest.raises(ValueError, match="every=0"):
        nfzoo.SignalPropagation(np.zeros((1, 2)), every=0)


@pytest.mark.slow
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


# ---------------------------------------------------------------- what users' networks bring along
def _small(*more, frozen=False, **compiled):
    """Two convolutions on 8x8 images; `more` come before the classifier."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    for i, filters in enumerate((4, 6)):
        x = keras.layers.Conv2D(filters, 3, activation="relu", name=f"conv{i}", trainable=not (frozen and i == 0))(x)
    model = keras.Model(image, keras.layers.Dense(3, name="dense")(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("sgd", crossentropy(), **compiled)
    return model


SMALL = np.random.default_rng(3).standard_normal((8, 8, 8, 3)).astype("float32"), np.arange(8) % 3


def test_gradients_behind_frozen_layers_are_those_of_the_free_network():
    rows = [
        spp.snapshot(_small(frozen=frozen), *SMALL).query("kind == 'gradient'").set_index("layer").second_moment
        for frozen in (False, True)
    ]
    assert rows[0]["conv0"] > 0
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)


def test_several_outputs_in_a_first_fit():
    image = keras.Input((4,))
    hidden = keras.layers.Dense(5, name="hidden")(image)
    model = keras.Model(image, [keras.layers.Dense(3)(hidden), keras.layers.Dense(1)(hidden)])
    model.compile("sgd", [crossentropy(), "mse"])
    x, targets = SMALL[0][:, 0, 0, [0, 1, 2, 0]], [SMALL[1], np.ones((8, 1), "float32")]
    probe = spp.SignalPropagation(x, targets)
    model.fit(x, targets, verbose=0, callbacks=[probe])
    gradients = probe.table().query("kind == 'gradient'")
    assert set(gradients.step) == {0, 1} and (gradients.second_moment > 0).all()


def test_steps_are_batches_where_gradients_accumulate(tmp_path):
    model = _small()
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4), crossentropy())
    for _ in range(3):
        model.fit(*SMALL, batch_size=2, verbose=0, callbacks=[spp.SignalPropagation(*SMALL, log_dir=tmp_path)])
    assert sorted(set(spp.read(tmp_path).step)) == [0, 4, 8, 12]


def test_a_sequential_network_without_an_input_is_built_by_the_probe_batch():
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, name="dense")])
    model.compile("sgd", crossentropy())
    probe = spp.SignalPropagation(*SMALL)
    model.fit(*SMALL, verbose=0, callbacks=[probe])
    assert probe.table().query("kind == 'activation'").layer.tolist() == ["dense", "dense"]


def test_a_report_of_nothing_does_not_cost_the_training(tmp_path):
    said = []
    never = spp.SignalPropagation(source="live", every=100, report=tmp_path / "r.html", tell=said.append)
    history = _small().fit(*SMALL, verbose=0, callbacks=[never])
    assert history.history["loss"] and not (tmp_path / "r.html").exists()
    assert len(said) == 1 and "no step was due (every=100)" in said[0]


def test_a_tensor_that_never_came_by_is_no_nan():
    image = keras.Input((4, 3))
    x, *_ = keras.layers.LSTM(5, return_state=True, name="lstm")(image)
    model = keras.Model(image, keras.layers.Dense(3)(x))
    model.compile("sgd", crossentropy())
    said = []
    live = spp.SignalPropagation(source="live", taps="layers", tell=said.append)
    model.fit(SMALL[0][:, 0, :4], SMALL[1], verbose=0, callbacks=[live])
    assert said == [] and "lstm" not in set(live.table().layer)


@pytest.mark.parametrize(
    "options", [{"statistics": "foo"}, {"definition": "z"}, {"what": ["foo"]}, {"what": "activations"}]
)
def test_options_are_refused_when_made(options):
    with pytest.raises(ValueError, match=r"Expected .*(foo|'z'|'activations')"):
        spp.SignalPropagation(*SMALL, **options)


def test_a_used_callback_is_copied_and_starts_anew_with_another_network(tmp_path):
    probe = spp.SignalPropagation(*SMALL, tensorboard=tmp_path / "board")
    _small().fit(*SMALL, verbose=0, callbacks=[probe])
    first = probe.table()
    _small().fit(*SMALL, verbose=0, callbacks=[probe])
    assert len(probe.table()) == len(first)
    copy.deepcopy(probe.board).add(first.to_dict("records"), spp.edges())


def test_kurtosis_of_tiny_gradients():
    x = np.random.default_rng(0).standard_normal((4000, 2)).astype("float32")
    for scale in (1.0, 1e-15, 1e-17):
        assert float(spp.statistics(x * np.float32(scale), names=("kurtosis",))["kurtosis"]) == pytest.approx(
            3, rel=0.1
        )


def test_labels_without_a_loss_are_refused(images):
    model = nfzoo.build("nf_test_resnet", classes=4)
    with pytest.raises(ValueError, match="Expected a loss"):
        spp.snapshot(model, *images)
    assert "gradient" not in set(spp.snapshot(model, *images, what=("activations",)).kind)


class _Penalized(keras.layers.Layer):
    """Adds a loss of its own, and keeps state without being told to."""

    def __init__(self):
        super().__init__(name="penalized")
        self.norm, self.dropout = keras.layers.BatchNormalization(), keras.layers.Dropout(1e-6, seed=1)

    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return self.dropout(self.norm(x, training=True), training=True)


def test_losses_of_layers_are_part_of_the_gradient_and_no_state_moves():
    image = keras.Input((5,))
    model = keras.Model(image, keras.layers.Dense(3, name="b")(_Penalized()(keras.layers.Dense(4, name="a")(image))))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.random.default_rng(0).standard_normal((8, 5)).astype("float32"), np.ones((8, 3), "float32")
    before = [np.array(v) for v in model.variables]
    rows = spp.snapshot(model, x, y).set_index(["kind", "layer"])
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    live = spp.SignalPropagation(source="live")
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[live])
    seen = live.table().set_index(["kind", "layer"])
    for at in (("weight_gradient", "a/kernel"), ("gradient", "a"), ("weight_gradient", "b/kernel")):
        assert rows.second_moment[at] == pytest.approx(seen.second_moment[at], rel=1e-4), at


def _steps(*, callback, model, **options):
    model.compile("sgd", crossentropy())
    model.fit(*SMALL, batch_size=4, verbose=0, callbacks=[callback], **options)
    return callback.table().groupby("step").epoch.first().to_dict()


def test_a_second_fit_goes_on(tmp_path):
    for folder in (None, tmp_path / "log"):
        model, probe = _small(), spp.SignalPropagation(*SMALL, log_dir=folder)
        assert _steps(callback=probe, model=model, epochs=2) == {0: 0, 2: 1, 4: 2}
        again = _steps(callback=probe, model=model, epochs=4, initial_epoch=2)  # compiled anew
        assert again == {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}
    # The weights alone went on in another process.
    other = spp.SignalPropagation(*SMALL, log_dir=tmp_path / "log")
    assert list(_steps(callback=other, model=_small(), epochs=5, initial_epoch=4).items())[-2:] == [(8, 4), (10, 5)]


@pytest.mark.parametrize("last", [False, True])
def test_a_restored_run_goes_on_whichever_callback_comes_first(last, tmp_path):
    for epochs in (2, 4):
        model, probe = _small(), spp.SignalPropagation(*SMALL, log_dir=tmp_path / "log")
        kept = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        model.compile("sgd", crossentropy())
        callbacks = [kept, probe] if last else [probe, kept]
        model.fit(*SMALL, batch_size=4, epochs=epochs, verbose=0, callbacks=callbacks)
    assert probe.table().step.unique().tolist() == [0, 2, 4, 6, 8]


def test_labels_of_a_model_without_a_loss_are_refused_by_the_callback():
    class Own(keras.Model):
        def train_step(self, *_):
            return {}

    model = Own(*(lambda small: (small.inputs, small.outputs))(_small()))
    model.compile("sgd")
    with pytest.raises(ValueError, match="Expected a loss for the gradients"):
        model.fit(*SMALL, verbose=0, callbacks=[spp.SignalPropagation(*SMALL)])


class _Block(keras.layers.Layer):
    """A residual block as users write it: a layer that holds layers."""

    def __init__(self, name):
        super().__init__(name=name)
        self.z_first, self.a_second = (keras.layers.Conv2D(4, 3, padding="same", name=n) for n in ("z", "a"))

    def call(self, x):
        return x + self.a_second(keras.ops.relu(self.z_first(x)))


def test_layers_that_hold_layers_are_seen_in_their_place():
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem")(image)
    for i in range(2):
        x = _Block(f"block{i}")(x)
    model = keras.Model(image, keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x)))
    assert spp.select_taps(model) == ["stem", "block0", "block1", "head"]
    rows = spp.snapshot(model, *SMALL, crossentropy())
    weights = rows[rows.kind == "weight"].layer.tolist()
    assert weights == ["stem/kernel", *(f"block{i}/{n}/kernel" for i in (0, 1) for n in "za"), "head/kernel"]
    assert rows.groupby("kind").depth.apply(lambda depth: depth.is_monotonic_increasing and depth.is_unique).all()


def test_channels_that_come_first_are_refused():
    image = keras.Input((3, 8, 8))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D(data_format="channels_first", name="pool")(image))
    with pytest.raises(ValueError, match="channels come last.*pool"):
        spp.snapshot(model, np.ones((2, 3, 8, 8), "float32"))


def test_layers_that_give_whole_numbers_pass_unseen():
    x = keras.Input((4,))
    bins = keras.layers.Discretization(bin_boundaries=[0.0, 1.0], name="bins")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="dense")(keras.layers.Embedding(3, 5, name="table")(bins)))
    rows = spp.snapshot(model, X, np.ones((len(X), 4, 2)), "mse", taps="layers")
    assert set(rows[rows.kind == "activation"].layer) == {"table", "dense"}


def test_what_is_computed_twice_is_seen_once():
    with keras.RematScope(mode="full"):
        model = _small()
    assert model._remat_mode is not None
    probe, live = spp.SignalPropagation(*SMALL), spp.SignalPropagation(source="live")
    model.fit(*SMALL, verbose=0, callbacks=[probe, live])
    rows, plain = (table.set_index(["kind", "layer"]) for table in (spp.snapshot(_small(), *SMALL), probe.table()))
    kept = [("activation", "conv1"), ("gradient", "conv0"), ("weight_gradient", "conv0/kernel")]
    first = plain[plain.step == 0]
    np.testing.assert_allclose(first.second_moment[kept], rows.second_moment[kept], rtol=1e-5)
    assert live.table().set_index(["kind", "layer"]).second_moment[kept].notna().all()
    assert model._remat_mode is not None and model.get_layer("conv0")._remat_mode is not None


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_layers_are_seen(images):
    model = nfzoo.build("sn_test_ffnn", size=32)
    seen = set(spp.snapshot(model, images[0], taps="layers", what=("activations",)).layer)
    model.quantize("int8")
    assert set(spp.snapshot(model, images[0], taps="layers", what=("activations",)).layer) == seen
    assert not any({"call", "quantized_call"} & vars(layer).keys() for layer in model.layers)


def test_the_effective_kernel_of_lora_is_told_once(images):
    model = nfzoo.build("nf_test_resnet")
    layer = model.get_layer("stage1_block1_conv2")
    asked = {"what": ("weights",)}
    plain = spp.snapshot(model, images[0], **asked).set_index(["kind", "layer"])
    path = layer.kernel.path
    layer.enable_lora(2)  # its product starts at zero
    table = spp.snapshot(model, images[0], **asked)
    told = table[(table.kind == "effective_weight") & table.layer.str.startswith(layer.name)]
    assert told.layer.tolist() == [path]
    assert told.acv.item() == pytest.approx(plain.acv["effective_weight", path], rel=1e-4)

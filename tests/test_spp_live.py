"""Signal propagation of the training batches themselves, on whichever backend runs (see test_spp_backends)."""

import keras
import numpy as np
import pytest
from conftest import crossentropy, slow_but

import nfzoo
from nfzoo import spp

KEY = ["kind", "layer"]


def fit(model, x, y, batch_size=4, agc=None, optimizer=None, callbacks=(), **options):
    """Train with Adam, in order, and return the table of the last of the callbacks."""
    options = {"epochs": 1, "verbose": 0, "shuffle": False, **options}
    compiled = {"agc": agc} if agc else {}
    if not model.compiled:
        model.compile(optimizer or keras.optimizers.SGD(0.1), crossentropy(), **compiled)
    model.fit(x, y, batch_size=batch_size, callbacks=list(callbacks), **options)
    return callbacks[-1].table() if callbacks else None


@pytest.mark.parametrize(
    ("name", "agc"), [("nf_test_resnet", nfzoo.AGC(0.05)), pytest.param("bn_test_resnet", None, marks=pytest.mark.slow)]
)
def test_one_live_step_sees_what_a_probe_of_its_batch_sees(name, agc, images):
    """Two mechanisms, one truth: tensors within the training step, and a stateless pass before it."""
    numbers = ["acsm", "acv", "second_moment", "nonzero"]
    live = nfzoo.SignalPropagation(*images, source="live", statistics=numbers)
    table = fit(nfzoo.build(name, dropout_rate=0.0), *images, batch_size=8, agc=agc, callbacks=[live])
    assert table.source.isna().sum() == (table.step == 0).sum() and set(table.source.dropna()) == {"live"}
    before, during = (table[table.step == step].set_index(KEY) for step in (0, 1))
    assert set(before.index) == set(during.index)
    for kind, more in (("activation", []), ("gradient", []), ("weight_gradient", ["to_weight", "agc_clipped"])):
        columns = numbers + more
        a, b = (t.loc[kind][columns].astype(float) for t in (before, during))
        np.testing.assert_allclose(b.loc[a.index], a, rtol=1e-4, atol=1e-12)
    assert (during.first_bad == -1).all()


def test_all_statistics_of_live_signals_are_all_numbers():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="dense")])
    model.compile("sgd", "mean_squared_error")
    live = spp.SignalPropagation(source="live", taps="dense", statistics="all")
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0, callbacks=[live])
    columns = set(live.table())
    assert {name for name in spp.STATS if "histogram" not in name} <= columns and "histogram" not in columns


def test_live_means_over_the_epoch_equal_numpy():
    """One dense layer, three batches, the last one smaller: every step done by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((10, 5)).astype("float32"), rng.standard_normal((10, 3)).astype("float32")
    image = keras.Input((5,))
    model = keras.Model(image, keras.layers.Dense(3, name="dense")(image))
    weight, bias = np.array(keras.ops.convert_to_numpy(model.weights[0]), "float64"), np.zeros(3)
    model.compile(keras.optimizers.SGD(0.1), "mean_squared_error")
    live = spp.SignalPropagation(source="live", taps="dense", what=spp.WHAT[:3])
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0, callbacks=[live])

    expected = {"activation": [], "gradient": [], "weight": [], "weight_gradient": [], "update": []}
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        out = x[part] @ weight + bias
        at_out = 2 * (out - y[part]) / out.size
        at_weight, step = x[part].T @ at_out, 0.1
        new = weight - step * at_weight
        expected["activation"].append(out.var(0).mean())
        expected["gradient"].append(np.mean(at_out**2))
        expected["weight_gradient"].append(np.linalg.norm(at_weight) / np.linalg.norm(weight))
        expected["update"].append(np.linalg.norm(new - weight) / np.linalg.norm(new))
        weight, bias = new, bias - step * at_out.sum(0)
        expected["weight"].append(np.mean(weight**2))
    rows = live.table().set_index("kind")
    assert rows.acv["activation"] == pytest.approx(np.mean(expected["activation"]), rel=1e-5)
    assert rows.second_moment["gradient"] == pytest.approx(np.mean(expected["gradient"]), rel=1e-5)
    assert rows.to_weight["weight_gradient"] == pytest.approx(np.mean(expected["weight_gradient"]), rel=1e-5)
    assert rows.update_to_weight["weight"] == pytest.approx(np.mean(expected["update"]), rel=1e-4)
    assert rows.second_moment["weight"] == pytest.approx(np.mean(expected["weight"]), rel=1e-5)


def weights_after(name, images, callbacks, **options):
    keras.utils.set_random_seed(1)
    model = nfzoo.build(name, input_shape=(32, 32, 3), dropout_rate=0.5)
    # Not Adam: it would divide gradients that are zero but for rounding by their own size.
    fit(model, *images, optimizer=keras.optimizers.SGD(0.1, momentum=0.9), callbacks=callbacks, epochs=2, **options)
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables + model.optimizer.variables]


@pytest.mark.parametrize(
    "name",
    slow_but(["bn_test_ffnn"], ["bn_test_ffnn", "bn_test_resnet", "bn_test_efficientnet", "nf_test_efficientnet"]),
)
def test_training_is_the_same_with_eyes_on_it(name, images):
    """Equal but for rounding: operations are fused differently where their results are also read."""
    live = nfzoo.SignalPropagation(source="live", what=spp.WHAT)
    for a, b in zip(weights_after(name, images, []), weights_after(name, images, [live]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def live_table(images, every="epoch", **options):
    keras.utils.set_random_seed(1)
    live = nfzoo.SignalPropagation(source="live", every=every)
    return fit(nfzoo.build("nf_test_resnet"), *images, callbacks=[live], **options)


@pytest.mark.slow
def test_validation_in_between_does_not_count(images):
    plain = live_table(images, epochs=2)
    validated = live_table(images, epochs=2, validation_data=(100 + images[0], images[1]))
    assert plain.step.unique().tolist() == [2, 4]
    np.testing.assert_allclose(validated.acv, plain.acv, rtol=1e-3)


@pytest.mark.slow
def test_live_records_by_step_share_no_batches(images):
    """Records every step and one over all: the mean of the ones is the other."""
    each, whole = (live_table(images, every, batch_size=2) for every in (1, "epoch"))
    assert each.step.unique().tolist() == [1, 2, 3, 4] and whole.step.unique().tolist() == [4]
    for column in ("acv", "to_weight"):
        mean = each.groupby(KEY)[column].mean()
        np.testing.assert_allclose(whole.set_index(KEY)[column].loc[mean.index], mean, rtol=1e-3)


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_the_model_gets_its_own_step_back(images, tmp_path):
    model = nfzoo.build("nf_test_resnet")
    live = nfzoo.SignalPropagation(source="live", log_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(model, *images, callbacks=[live, Interrupt()])
    plain = len(model.metrics_variables)
    fit(model, *images, callbacks=[live])  # after an interruption too
    assert "train_step" not in vars(model) and len(model.metrics_variables) < plain
    path = tmp_path / "model.keras"
    model.save(path)
    assert keras.saving.load_model(path).count_params() == model.count_params()


def test_the_origin_of_a_nan_is_named(images):
    """Infinite weights at one place, set before the third step: that layer is the first to be not finite."""
    model = nfzoo.build("nf_test_resnet")

    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                layer = model.get_layer("stage2_block1_conv2")
                spp.callback.sync(model)
                layer.gain.assign(np.full(layer.gain.shape, np.inf))

    table = fit(model, *images, batch_size=2, callbacks=[Break(), spp.SignalPropagation(source="live", taps="layers")])
    seen = table[table.kind == "activation"].set_index("layer").sort_values("depth")
    first = seen[seen.first_bad == 3].index[0]
    assert first == "stage2_block1_conv2" and (seen.first_bad.loc[:first][:-1] != 3).all()
    assert np.isnan(seen.acv[first]) and seen.acv["stem_conv1"] > 0 or seen.first_bad["stem_conv1"] == 4


class OwnStep(keras.Model):
    def train_step(self, *args):
        return super().train_step(*args)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"statistics": ["histogram"]}, "histogram"), ({"source": "film"}, "film"), ({"source": "probe"}, "None")],
)
def test_what_live_cannot_do_is_said(options, match, images):
    with pytest.raises(ValueError, match=match):
        fit(nfzoo.build("sn_test_ffnn", size=32), *images,
            callbacks=[spp.SignalPropagation(**{"source": "live", **options})])  # fmt: skip


def test_a_model_with_a_step_of_its_own_is_refused(images):
    image = keras.Input((32, 32, 3))
    model = OwnStep(image, keras.layers.Dense(10)(keras.layers.Flatten()(image)))
    with pytest.raises(ValueError, match='OwnStep.*source="probe"'):
        fit(model, *images, callbacks=[spp.SignalPropagation(source="live")])


def test_shared_layers_count_all_their_calls():
    image = keras.Input((4,))
    dense = keras.layers.Dense(4, name="shared", use_bias=False)
    model = keras.Model(image, dense(dense(image)))
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    weight = np.array(keras.ops.convert_to_numpy(model.weights[0]))
    model.compile("sgd", "mean_squared_error")
    live = spp.SignalPropagation(source="live", taps="shared", what=("activations",))
    model.fit(x, x, batch_size=8, verbose=0, shuffle=False, callbacks=[live])
    calls = [(x @ weight).var(0).mean(), (x @ weight @ weight).var(0).mean()]
    assert live.table().acv.tolist() == pytest.approx([np.mean(calls)], rel=1e-5)


@pytest.mark.slow
def test_a_network_of_keras_applications(images):
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=10, alpha=0.35)
    model.compile("sgd", "sparse_categorical_crossentropy")
    live = spp.SignalPropagation(source="live", every=1, taps=keras.layers.Add)
    model.fit(*images, batch_size=4, verbose=0, callbacks=[live])
    table = live.table()
    assert table.step.unique().tolist() == [1, 2] and table[table.kind == "gradient"].acv.gt(0).all()


def test_a_step_that_xla_compiles(images):
    def rows(jit):
        keras.utils.set_random_seed(0)
        x = image = keras.Input((32, 32, 3))
        for filters in (4, 8):
            x = keras.layers.Conv2D(filters, 3, 2, activation="relu")(x)
        model = keras.Model(image, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
        model.compile("sgd", crossentropy(), jit_compile=jit)
        live = spp.SignalPropagation(source="live", every=1)
        model.fit(*images, batch_size=4, verbose=0, shuffle=False, callbacks=[live])
        return live.table().second_moment

    np.testing.assert_allclose(rows(True), rows(False), rtol=1e-4)


def test_a_probe_beside_live_signals(images):
    tables = []
    for order in (1, -1):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="dense")])
        model.compile("sgd", "mean_squared_error")
        x, y = np.ones((8, 5), "float32"), np.ones((8, 3), "float32")
        watching = [spp.SignalPropagation(source="live"), spp.SignalPropagation(x, y)]
        model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=watching[::order])
        tables += [callback.table().step.unique().tolist() for callback in watching]
        assert "train_step" not in vars(model)
    assert tables == [[2, 4], [0, 2, 4]] * 2
    with pytest.raises(ValueError, match="Expected one .*several"):
        model.fit(x, y, verbose=0, callbacks=[spp.SignalPropagation(source="live") for _ in range(2)])

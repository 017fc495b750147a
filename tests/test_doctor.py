"""The doctor finds what was put in on purpose, and does not find it where it is not."""

import keras
import numpy as np
import pytest
from keras import layers

import nfzoo
from nfzoo.doctor import Finding, examine

X = np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype("float32")
Y = (X.mean(axis=(1, 2, 3)) > 0).astype("int32")
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network(*middle, head=None):
    keras.utils.set_random_seed(1)
    image = keras.Input(X.shape[1:])
    x = layers.Conv2D(16, 3, padding="same", kernel_initializer="he_normal", name="stem")(image)
    for layer in middle:
        x = layer(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(2, name="head", kernel_initializer=head or "glorot_uniform")(x))


def _findings(network, learning_rate=0.05, steps=6, batch_size=8, **options) -> dict[str, Finding]:
    network.compile(keras.optimizers.SGD(learning_rate), LOGITS, **options)
    return {finding.check: finding for finding in examine(network, X, Y, steps=steps, batch_size=batch_size).findings}


def _depthwise(initializer, name="narrow"):
    return layers.DepthwiseConv2D(3, padding="same", depthwise_initializer=initializer, name=name)


def test_a_depthwise_layer_that_counts_all_channels_is_named():
    found = _findings(_network(_depthwise("lecun_normal")))["initialisation"]
    assert found.severity == "warning" and "narrow/kernel" in found.sentence and "16 in" in found.sentence
    assert "hides it" not in found.sentence and "height times width" in found.remedy
    with_norm = _findings(_network(_depthwise("lecun_normal"), layers.BatchNormalization()))["initialisation"]
    assert with_norm.severity == "note" and "Batch normalization hides it" in with_norm.sentence


def test_the_right_initialisation_and_a_zero_branch_are_let_pass():
    assert "initialisation" not in _findings(_network(_depthwise(keras.initializers.RandomNormal(stddev=1 / 3))))
    assert "initialisation" not in _findings(_network(_depthwise("zeros")))


def test_weights_that_multiply_the_variance_are_named_with_their_factor():
    wide = layers.Conv2D(16, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=3.0), name="wide")
    found = _findings(_network(wide))["initialisation"]
    gain = float(found.sentence.split("wide/kernel multiplies it by ")[1].split()[0])
    assert gain == pytest.approx(16 * 9, rel=0.3)  # fan-in times variance


@pytest.mark.parametrize("bad", [False, True])
def test_dead_units(bad):
    bias = keras.initializers.Constant(-50.0 if bad else 0.5)
    network = _network(layers.Conv2D(16, 1, bias_initializer=bias), layers.ReLU(name="relu"))
    findings = _findings(network, learning_rate=1e-3)
    assert ("dead units" in findings) == bad
    if bad:
        assert "100% of the channels of relu" in findings["dead units"].sentence


def test_a_loss_that_is_lost_and_one_that_does_not_fall():
    lost = _findings(_network(), learning_rate=1e30)
    assert lost["loss"].severity == "alarm" and "not finite from step" in lost["loss"].sentence
    still = _findings(_network(), learning_rate=0.0)
    assert "does not fall" in still["loss"].sentence and "very little" in still["updates"].sentence
    fine = _findings(_network(), steps=30)
    assert fine["loss"].severity == "good" and fine["updates"].severity == "good"
    assert "a lot" in _findings(_network(), learning_rate=50.0, steps=2)["updates"].sentence


def test_a_classifier_with_strong_opinions():
    head = keras.initializers.RandomNormal(stddev=30.0)
    sentences = [f.sentence for f in _examined(_network(head=head), 1e-6)]
    assert any("strong opinions" in sentence and "guessing: 0.693" in sentence for sentence in sentences)
    assert not any("strong opinions" in f.sentence for f in _examined(_network(head="zeros"), 1e-6))


def _examined(network, learning_rate):
    network.compile(keras.optimizers.SGD(learning_rate), LOGITS)
    return examine(network, X, Y, steps=2, batch_size=8).findings


def test_batch_statistics_and_moving_averages():
    slow, quick = (_network(layers.BatchNormalization(momentum=m)) for m in (0.999, 0.0))
    found = _findings(slow, learning_rate=0.2, steps=40, batch_size=4)
    assert "from 256 values" in found["batch statistics"].sentence  # 4 x 8 x 8
    assert found["batch statistics"].severity == "note"
    few = _findings(_network(layers.GlobalMaxPooling2D(keepdims=True), layers.BatchNormalization()), batch_size=4)
    assert few["batch statistics"].severity == "warning" and "from 4 values" in few["batch statistics"].sentence
    assert "moving averages" not in _findings(quick, learning_rate=0.01, steps=4)
    group = _findings(_network(layers.GroupNormalization(4)))
    assert group["batch statistics"].severity == "good" and "moving averages" not in group


def test_moving_averages_that_lag_behind():
    shift = layers.Conv2D(16, 1, bias_initializer=keras.initializers.Constant(30.0))
    found = _findings(_network(shift, layers.BatchNormalization(momentum=0.999)), learning_rate=0.01, steps=4)
    assert "hold 100%" in found["moving averages"].sentence and "momentum 0.999" in found["moving averages"].sentence


def test_a_residual_network_that_explodes():
    keras.utils.set_random_seed(0)
    x = image = keras.Input((64,))
    for i in range(16):
        branch = layers.Dense(64, kernel_initializer=keras.initializers.VarianceScaling(4.0), name=f"d{i}")(x)
        x = layers.Add(name=f"add{i}")([x, branch])
    network = keras.Model(image, layers.Dense(2)(x))
    network.compile(keras.optimizers.SGD(1e-9), LOGITS)
    x = np.random.default_rng(0).standard_normal((32, 64)).astype("float32")
    findings = examine(network, x, Y[:32], steps=2).findings
    assert findings[0].severity == "alarm" and "explosion" in {f.check for f in findings}
    growth = [f.sentence for f in findings if f.check == "depth" and "signal" in f.sentence][0]
    assert float(growth.split("a factor of ")[1].split()[0]) == pytest.approx(5, rel=0.15)  # 1 + 4 per block


@pytest.mark.slow
def test_clipping_is_told_of_models_that_clip():
    for factor, severity in ((1e-6, "warning"), (1e3, "note")):
        network = nfzoo.build("nf_test_resnet", classes=2, input_shape=(8, 8, 3), skip_gain=1.0)
        assert _findings(network, agc=nfzoo.AGC(factor), steps=2)["clipping"].severity == severity


@pytest.mark.slow
def test_the_model_is_left_as_it_was():
    network = nfzoo.build("bn_test_resnet", classes=2, input_shape=(8, 8, 3))
    network.compile(keras.optimizers.Adam(0.1), LOGITS)
    network.optimizer.build(network.trainable_variables)
    before = [np.array(v) for v in (*network.weights, *network.optimizer.variables)]
    examine(network, X, Y, steps=3)
    after = [np.array(v) for v in (*network.weights, *network.optimizer.variables)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="Expected a compiled model"):
        examine(_network(), X, Y)
    network = _network()
    network.compile("sgd", LOGITS)
    with pytest.raises(ValueError, match="as many labels as examples"):
        examine(network, X, Y[:3])


def test_networks_whose_graph_tells_little():
    open_ = keras.Sequential([
        keras.Input((None, None, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D(),
        layers.Dense(2),
    ])  # fmt: skip
    assert _findings(open_, steps=2)["batch statistics"].sentence == "1 layers normalize over the batch."

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.out = layers.Flatten(), layers.Dense(2)

        def call(self, x):
            return self.out(self.flat(x))

    own = Own()
    own(X[:1])
    assert "guessing" not in _findings(own, steps=2)["loss"].sentence


def test_frozen_normalizations_do_not_see_the_batch():
    network = _network(layers.BatchNormalization(trainable=False))
    assert _findings(network, steps=2)["batch statistics"].severity == "good"


def test_examples_that_are_not_finite_are_told():
    network = _network()
    network.compile("sgd", LOGITS)
    broken = X.copy()
    broken[[3, 7], 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="2 with NaN or infinity, first: 3"):
        examine(network, broken, Y)
    with pytest.raises(ValueError, match="one array of examples and one of labels"):
        examine(network, X, [Y, Y])


def test_a_trained_network_is_examined_from_where_it_is():
    network = _network()
    network.compile(keras.optimizers.SGD(0.05), LOGITS)
    network.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    diagnosis = examine(network, X, Y, steps=3, batch_size=8)
    assert diagnosis.log.step.unique().tolist() == [10, 13] and diagnosis.findings


def test_what_trained_is_judged_not_its_average():
    def sentence(**average):
        net = _network()
        net.compile(keras.optimizers.Adam(0.02, **average), LOGITS)
        result = {f.check: f for f in examine(net, X, Y, steps=20).findings}["loss"].sentence
        assert net.optimizer.use_ema == bool(average)
        return result

    assert sentence() == sentence(use_ema=True, ema_momentum=0.9999)


def test_excluded_units_and_those_of_a_wrapped_optimizer_are_told_as_they_are():
    nothing = nfzoo.AGC(1e-6, exclude=(".*",))
    found = _findings(nfzoo.NFModel(*(lambda net: (net.input, net.output))(_network())), agc=nothing)
    assert "clipping" not in found
    for factor, severity in ((1e6, "note"), (1e-6, "warning")):
        net = _network()
        agc = nfzoo.AGC(factor)
        net.compile(nfzoo.optimizers.AdaptiveGradientClipping(keras.optimizers.SGD(0.05), net, agc), LOGITS)
        report = examine(net, X, Y, steps=3)
        assert {f.check: f for f in report.findings}["clipping"].severity == severity
        rows = report.log[(report.log.kind == "weight_gradient") & (report.log.step > 0)].set_index("layer")
        assert rows.agc_clipped["head/kernel"] == 0 and rows.agc_clipped["stem/kernel"] == (factor < 1)


def test_what_regularizers_add_is_no_strong_opinion():
    heavy = layers.Conv2D(16, 1, kernel_regularizer=keras.regularizers.L2(1.0), name="heavy")
    network = _network(heavy)
    found = _findings(network)["loss"]
    assert float(sum(network.losses)) > 5 and found.severity == "good", found


def test_several_optimizers_and_steps_at_once():
    """An average is nobody's training: of each of several optimizers it is left out. Steps are judged one by one."""
    ends = []
    for several in (False, True):
        keras.utils.set_random_seed(0)
        model = nfzoo.build("sn_test_ffnn", dropout_rate=0.0)
        one = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.999)
        model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(one)) if several else one, LOGITS)
        x = np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype("float32")
        loss = next(
            f for f in examine(model, x, np.arange(32) % 10, steps=20, batch_size=32).findings if f.check == "loss"
        )
        ends.append(loss.sentence)
    assert ends[0] == ends[1]
    model.compile("sgd", LOGITS, steps_per_execution=2)
    with pytest.raises(ValueError, match="steps_per_execution=2"):
        examine(model, x, np.arange(32) % 10, steps=4, batch_size=8)

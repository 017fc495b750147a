"""Signal propagation where the machinery differs: JAX, replicas, half precision, several steps at once."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import crossentropy

import nfzoo
from nfzoo import spp

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tests", ["test_spp_live.py", "test_spp_stats.py"])
def test_the_same_tests_on_jax(tests):
    """Statistics against NumPy, live steps against probes: on the other backend, in a process of its own."""
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / tests)]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


_REPLICAS = """
import json
import numpy as np, tensorflow as tf
import keras, nfzoo
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)
x, y = rng.standard_normal((16, 32, 32, 3)).astype("float32"), np.arange(16) % 10

def rows(strategy, source):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = nfzoo.build("nf_test_resnet")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, agc=nfzoo.AGC(0.05))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    callback = nfzoo.SignalPropagation(x[:8], y[:8], source=source)
    model.fit(data.with_options(options), verbose=0, callbacks=[callback])
    table = callback.table()
    table = table[table.step > 0].set_index(["kind", "layer"])
    return {"|".join(key): row for key, row in table[["second_moment", "to_weight", "update_to_weight"]].iterrows()}

worst = {}
for source in ("probe", "live"):
    one = rows(tf.distribute.get_strategy(), source)
    two = rows(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), source)
    assert one.keys() == two.keys()
    worst[source] = max(float(np.nanmax(abs(one[k] - two[k]) / (abs(one[k]) + 1e-12))) for k in one)
print(json.dumps(worst))
"""


def test_two_replicas_see_what_one_sees(fresh_process):
    """The network ties no examples together, so the halves of a batch average to the whole."""
    worst = fresh_process(_REPLICAS)
    assert worst["probe"] < 1e-3 and worst["live"] < 1e-3, worst


def test_replicas_that_normalization_ties_together_are_watched(fresh_process):
    """They meet in the middle of a layer, which both are within then."""
    code = """
import json
import numpy as np
import keras, nfzoo
from nfzoo import backend
backend.split_cpu(2)
rng = np.random.default_rng(0)
x, y = rng.standard_normal((8, 16, 16, 3)).astype("float32"), np.arange(8) % 10
with backend.data_parallel():
    model = nfzoo.build("bn_test_ffnn", input_shape=(16, 16, 3))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
live = nfzoo.SignalPropagation(source="live")
model.fit(x, y, batch_size=8, verbose=0, callbacks=[live])
left = [layer.name for layer in model.layers if "call" in vars(layer)]
print(json.dumps([int(live.table().acv.notna().sum()), left]))
"""
    seen, left = fresh_process(code)
    assert seen > 5 and not left


def test_live_gradients_of_half_precision_are_unscaled(images):
    """The loss scale of 2^15 would make them a thousand million times larger in square."""

    def rows(policy):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        model = nfzoo.build("sn_test_efficientnet", dropout_rate=0.0)
        model.compile(keras.optimizers.SGD(1e-3), crossentropy())
        live = spp.SignalPropagation(source="live")
        model.fit(*images, batch_size=8, verbose=0, callbacks=[live])
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        return live.table().set_index(["kind", "layer"])

    full, half = rows("float32"), rows("mixed_float16")
    for kind in ("gradient", "weight_gradient"):
        np.testing.assert_allclose(
            half.second_moment[kind], full.second_moment[kind].loc[half.loc[kind].index], rtol=0.1
        )


def test_steps_that_the_loss_scale_discards_do_not_count():
    """Gradients overflow until the scale has halved often enough; the mean is that of the steps that trained."""
    keras.config.set_dtype_policy("mixed_float16")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 8)).astype("float32"), rng.standard_normal((64, 4)).astype("float32")
    image = keras.Input((8,))
    model = keras.Model(image, keras.layers.Dense(4, name="dense")(image))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=2.0**22)
    model.compile(optimizer, "mean_squared_error")
    live = spp.SignalPropagation(source="live", taps="dense")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[live])
    assert int(optimizer.inner_optimizer.iterations) < 16  # some were discarded
    rows = live.table().set_index("kind")
    assert np.isfinite(rows.second_moment["gradient"]) and rows.to_weight["weight_gradient"] < 100
    assert (rows.first_bad == -1).all()  # what the loss scale is there to meet is no accident


def test_live_with_several_steps_at_once(images):
    x, y = np.repeat(images[0], 2, 0), np.repeat(images[1], 2, 0)
    tables = []
    for together in (1, 4):
        keras.utils.set_random_seed(0)
        model = nfzoo.build("nf_test_resnet")
        model.compile("sgd", crossentropy(), steps_per_execution=together)
        live = nfzoo.SignalPropagation(source="live")
        model.fit(x, y, batch_size=2, verbose=0, shuffle=False, callbacks=[live])
        tables.append(live.table())
    assert [t.step.unique().tolist() for t in tables] == [[8], [8]]
    np.testing.assert_allclose(tables[1].second_moment, tables[0].second_moment, rtol=1e-4)


def test_memory_stays_flat_over_200_probes(fresh_process):
    code = """
import json, os, resource, sys, tempfile
import numpy as np, keras, nfzoo
rng = np.random.default_rng(0)
x, y = rng.standard_normal((4, 32, 32, 3)).astype("float32"), np.arange(4)
model = nfzoo.build("nf_test_resnet")
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
sizes = []
class Size(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
probe = nfzoo.SignalPropagation(x, y, every=1, statistics="all", taps="layers", log_dir=tempfile.mkdtemp())
model.fit(x, y, batch_size=4, epochs=240, verbose=0, callbacks=[probe, Size()])
print(json.dumps(sizes))
"""
    sizes = fresh_process(code)
    assert len(sizes) == 240
    growth = np.median(sizes[-20:]) - np.median(sizes[30:50])  # MiB, over 190 probes
    assert growth < 20, growth

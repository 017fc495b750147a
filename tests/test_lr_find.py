"""The learning rate range test finds a rate and leaves no trace."""

import keras
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from nfzoo import engine, plots, recipes, tune
from nfzoo.engine import training
from nfzoo.tune import lr_range

RECIPE = recipes.override(recipes.get("demo"), {"data.name": "digits", "data.limit": 64, "batch_size": 8})

# A network with all that could be forgotten: moving statistics, dropout, AGC, Adam's moments, iterations. It has been
# trained before, its metrics are half way through an epoch, and a failing step comes after good ones.
_TRACELESS = """
import json
import keras
import numpy as np
from nfzoo import recipes, tune
recipe = recipes.override(recipes.get("demo"), {"data.name": "digits", "data.limit": 64, "batch_size": 8})
net, batches = tune.prepare("bn_test_ffnn", recipe, {"dropout_rate": 0.3})
net.fit(batches, epochs=1, shuffle=False, verbose=0)
def state():
    every = (*net.variables, *net.optimizer.variables, *net.metrics_variables)
    return {f"{i} {v.path}": np.array(keras.ops.convert_to_numpy(v.value)) for i, v in enumerate(every)}
def differing():
    after = state()
    return [key for key in before if not np.array_equal(before[key], after[key])] + sorted(before.keys() ^ after.keys())
before = state()
found = tune.lr_find(net, batches, start=1e-5, end=1e3, steps=40)
answers = [differing()]
class Broken:
    def __iter__(self):
        yield batches[0]
        yield batches[1]
        yield batches[0][0][:, :5], batches[0][1]
try:
    tune.lr_find(net, Broken())
    answers.append("no error")
except Exception as error:
    answers.append([type(error).__name__] + differing())
net.evaluate(batches, verbose=0)
before = {key: value for key, value in before.items() if not key.endswith(("/total", "/count"))}
after = state()
answers.append([key for key in before if not np.array_equal(before[key], after[key])])
kinds = [sum(word in key for key in before) for word in ("moving_mean", "seed_generator", "iteration", "momentum")]
line = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
line.compile(keras.optimizers.SGD(0.01), "mse")
x = np.random.default_rng(0).standard_normal((64, 4)).astype("float32")
tenth = tune.lr_find(line, [(x, x.sum(1))], start=1e-4, end=10, steps=50).tenth
print(json.dumps([answers, kinds, found.diverged, len(found.table), tenth]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_nothing_is_left_of_it(backend, fresh_process):
    (swept, broken, later), kinds, diverged, steps, tenth = fresh_process(_TRACELESS, KERAS_BACKEND=backend)
    assert swept == [] and later == []
    assert len(broken) == 1 and broken[0] != "no error"
    assert all(kinds), kinds
    assert diverged and steps < 40 and 1e-3 < tenth < 1  # tenth: of a loss that falls for certain


def _line(optimizer=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).standard_normal((64, 4)).astype("float32")
    return model, [(x[i : i + 16], x[i : i + 16].sum(1)) for i in range(0, 64, 16)]


def _state(model):
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def test_the_rate_rises_by_one_ratio_and_the_loss_is_that_of_the_step():
    model, batches = _line()
    weights = model.get_weights()
    found = tune.lr_find(model, batches, start=1e-4, end=1e-2, steps=21)
    rates = found.table.learning_rate.to_numpy()
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-4), pytest.approx(1e-2), 21)
    assert rates[1:] / rates[:-1] == pytest.approx(10 ** (2 / 20))
    w, b = weights  # plain gradient descent
    for step, (rate, loss) in enumerate(zip(rates, found.table.loss, strict=True)):
        x, y = batches[step % 4]
        error = (x @ w + b)[:, 0] - y
        assert loss == pytest.approx((error**2).mean(), rel=1e-4)
        w, b = w - rate * 2 * x.T @ error[:, None] / 16, b - rate * 2 * error.mean()
    assert not found.diverged


def test_it_stops_where_the_loss_blows_up():
    model, batches = _line()
    before = _state(model)
    found = tune.lr_find(model, batches, start=1e-3, end=1e6, steps=90)
    # Gradient descent on a square diverges above 2 / (twice the largest eigenvalue of the inputs' second moments).
    limit = 1 / np.linalg.eigvalsh(np.mean([x.T @ x / 16 for x, _ in batches], 0)).max()
    assert found.diverged and found.tenth < limit < found.table.learning_rate.iloc[-1] < 100 * limit
    assert all(np.array_equal(a, b) for a, b in zip(before, _state(model), strict=True))


def test_an_error_leaves_no_trace():
    model, batches = _line(keras.optimizers.Adam(0.5))
    model.fit(*batches[0], verbose=0)
    before = _state(model)

    def broken():
        yield from batches
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        tune.lr_find(model, broken(), end=1e3)
    assert all(np.array_equal(a, b) for a, b in zip(before, _state(model), strict=True))
    assert int(model.optimizer.iterations) == 1 and float(model.optimizer.learning_rate) == 0.5


def test_loss_scale_is_put_back():
    model, batches = _line(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.25), dynamic_growth_steps=5))
    model.fit(*batches[0], verbose=0)
    before = _state(model)
    scale = float(model.optimizer.dynamic_scale)
    scales = []
    steps = ((scales.append(float(model.optimizer.dynamic_scale)), batch)[1] for batch in batches * 3)
    tune.lr_find(model, steps, end=1e-3)
    assert max(scales) > scale == float(model.optimizer.dynamic_scale)
    assert all(np.array_equal(a, b) for a, b in zip(before, _state(model), strict=True))
    assert float(model.optimizer.learning_rate) == 0.25


def test_a_model_that_was_never_called_is_built_and_left_as_it_would_start():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    _, batches = _line()
    tune.lr_find(model, batches, end=1e3)
    assert int(model.optimizer.iterations) == 0 and float(model.optimizer.learning_rate) == pytest.approx(1e-3)
    assert [np.unique(v).tolist() for v in model.layers[1].weights] == [[1.0], [0.0], [0.0], [1.0]]
    assert all(not np.any(v) for metric in model.metrics for v in metric.variables)


def test_batches_go_round_and_iterators_end_it():
    model, batches = _line()
    options = {"start": 1e-5, "end": 1e-4, "steps": 7}
    assert len(tune.lr_find(model, batches, **options).table) == 7
    assert len(tune.lr_find(model, iter(batches), **options).table) == 4

    class Indexed(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            assert 0 <= index < 4
            return batches[index]

    table = tune.lr_find(model, Indexed(), **options).table
    pd.testing.assert_frame_equal(table, tune.lr_find(model, batches, **options).table)


def test_every_round_has_an_order_of_its_own(monkeypatch):
    """As epochs of `fit` have: what is seen again in the same order is fitted by heart."""
    net, batches = tune.prepare("sn_test_ffnn", RECIPE)
    seen, step = [], type(net).train_on_batch
    monkeypatch.setattr(type(net), "train_on_batch", lambda *a, **k: seen.append(a[2].tolist()) or step(*a, **k))
    tune.lr_find(net, batches, start=1e-6, end=1e-5, steps=3 * len(batches))
    rounds = [sum(seen[i : i + len(batches)], []) for i in range(0, len(seen), len(batches))]
    assert rounds[0] != rounds[1] != rounds[2] and batches.epoch == 0


def test_mistakes_are_said():
    model, batches = _line()
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    twice, _ = _line()
    twice.compile("sgd", "mse", steps_per_execution=2)
    for words, arguments, options in (
        ("SGD with a schedule", (_line(keras.optimizers.SGD(schedule))[0], batches), {}),
        ("compiled", (keras.Sequential([keras.layers.Dense(1)]), batches), {}),
        ("none", (model, []), {}),
        ("start < end", (model, batches), {"start": 1.0, "end": 0.1}),
        ("steps_per_execution", (twice, batches), {}),
    ):
        with pytest.raises(ValueError, match=f"Expected.*{words}"):
            tune.lr_find(*arguments, **options)


def test_suggestions_are_the_steepest_descent_and_a_tenth_of_the_minimum():
    rates = np.geomspace(1e-4, 1, 41)
    falls = 2.0 - 1 / (1 + np.exp(-4 * np.log(rates / 1e-2))) + (rates > 0.3) * 10 * rates
    steepest, tenth = lr_range.suggestions(pd.DataFrame({"learning_rate": rates, "smoothed": falls}))
    assert steepest == pytest.approx(1e-2, rel=0.3) and tenth == pytest.approx(0.03, rel=0.2)
    flat = lr_range.suggestions(pd.DataFrame({"learning_rate": rates, "smoothed": 2.3 + 0.01 * np.sin(rates)}))
    assert np.isnan(flat).all()
    none = lr_range.suggestions(pd.DataFrame({"learning_rate": [1.0], "smoothed": [np.nan]}))
    assert np.isnan(none).all()


def test_the_picture_shows_the_suggestions(tmp_path):
    model, batches = _line()
    found = tune.lr_find(model, batches, start=1e-4, end=1e4, steps=60)
    figure = plots.range_test(found.table, {"steepest": found.steepest, "tenth": found.tenth})
    axes = figure.axes[0]
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [found.steepest, found.tenth]
    low, high = axes.get_ylim()
    assert low < found.table.smoothed.min() and high < 3 * found.table.smoothed[:10].max()
    assert plots.save(figure, tmp_path / "lr.png").stat().st_size > 5000


def test_it_starts_as_a_run_would(tmp_path, monkeypatch):
    """Same weights, same batches, same optimizer as of `engine.run`."""
    recipe, started = recipes.override(RECIPE, {"seed": 7}), []
    monkeypatch.setattr(training, "_fit", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(training, "_metrics", lambda *_: {"status": "diverged"})
    engine.run("sn_test_ffnn", recipe, tmp_path, taps=None, console=Console(quiet=True))
    (state, streams, *_), twin = started[0], started[0][0].net
    assert (state.epoch, state.step) == (0, 0)
    net, batches = tune.prepare("sn_test_ffnn", recipe)
    assert np.array_equal(batches[0][0], streams["train"][0][0]) and batches.shuffle
    assert isinstance(net.optimizer, keras.optimizers.Adam) and net.agc.clip_factor == RECIPE.agc.clip_factor
    assert all(np.array_equal(a, b) for a, b in zip(net.get_weights(), twin.get_weights(), strict=True))

"""Learning rates at every step, against the formulas in NumPy."""

import keras
import numpy as np
import pytest

from nfzoo import recipes, schedules

STEPS = 7  # an epoch


def _recipe(**changes):
    return recipes.override(
        recipes.get("demo"),
        {"epochs": 12, "optimizer.learning_rate": 0.4, **{k.replace("__", "."): v for k, v in changes.items()}},
    )


def _formula(recipe, t):
    """The learning rate of step t, by the text of the papers."""
    s, peak, n = recipe.schedule, recipe.optimizer.learning_rate, recipe.epochs * STEPS
    w = s.warmup_epochs * STEPS
    if s.name == "cosine":
        after = s.final + 0.5 * (peak - s.final) * (1 + np.cos(np.pi * (min(t, n) - w) / (n - w)))
        return peak * t / w if w and t <= w else after
    epoch = t / STEPS + 1e-9
    drops = {
        "constant": 1.0,
        "step": s.factor ** sum(epoch >= m for m in s.milestones),
        "halving": 0.5 ** max(0, np.floor((epoch - s.start) / s.every)),
    }
    return peak * drops[s.name] * (min(1, t / w) if w else 1)


@pytest.mark.parametrize("warmup", [0, 1, 2.5])
@pytest.mark.parametrize(
    "settings",
    [
        {"schedule__name": "constant"},
        {"schedule__name": "cosine"},
        {"schedule__name": "cosine", "schedule__final": 0.01},
        {"schedule__name": "step", "schedule__milestones": [2, 5, 11], "schedule__factor": 0.2},
        {"schedule__name": "halving", "schedule__start": 4, "schedule__every": 3},
        {"schedule__name": "halving", "schedule__every": 1},
    ],
)
def test_every_step_is_that_of_the_formula(settings, warmup):
    recipe = _recipe(**settings, schedule__warmup_epochs=warmup)
    rate = schedules.learning_rate(recipe, STEPS)
    expected = [_formula(recipe, t) for t in range(recipe.epochs * STEPS)]
    if isinstance(rate, float):
        assert set(expected) == {rate}
        return
    np.testing.assert_allclose([float(rate(t)) for t in range(len(expected))], expected, rtol=1e-5, atol=1e-7)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rate))
    np.testing.assert_allclose([float(copy(t)) for t in range(len(expected))], expected, rtol=1e-5, atol=1e-7)


def test_only_a_constant_rate_without_warmup_can_be_set():
    assert schedules.learning_rate(_recipe(), STEPS) == 0.4
    for changes in ({"schedule__warmup_epochs": 1}, {"schedule__name": "cosine"}):
        rate = schedules.learning_rate(_recipe(**changes), STEPS)
        assert isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    never = _recipe(schedule__name="step", schedule__milestones=[])
    assert schedules.learning_rate(never, STEPS) == 0.4


def test_the_end_of_the_cosine_is_that_of_the_part_in_which_all_layers_learn():
    rate = schedules.learning_rate(_recipe(schedule__name="cosine", frozen_epochs=4), STEPS)
    assert float(rate(8 * STEPS)) == pytest.approx(0, abs=1e-8) and float(rate(8 * STEPS - 1)) > 1e-5


def test_a_cosine_does_not_rise():
    with pytest.raises(ValueError, match="at most the learning rate 0.4.*Received: 0.5"):
        schedules.learning_rate(_recipe(schedule__name="cosine", schedule__final=0.5), STEPS)
    with pytest.raises(ValueError, match="steps > 0.*0"):
        schedules.WarmUp(0.1, 0)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_row_has_a_learning_rate(name):
    recipe = recipes.get(name)
    rate = schedules.learning_rate(recipe, STEPS)
    middle = recipe.schedule.warmup_epochs * STEPS
    assert (rate if isinstance(rate, float) else float(rate(middle))) == pytest.approx(recipe.peak_learning_rate)


def test_a_saved_model_goes_on_where_it_was(tmp_path, fresh_process):
    """The schedule is saved within the optimizer, and its step with it."""
    recipe = _recipe(schedule__name="step", schedule__milestones=[1], schedule__warmup_epochs=0.5)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(schedules.learning_rate(recipe, STEPS)), "mse")
    model.fit(np.ones((STEPS, 2)), np.ones((STEPS, 1)), batch_size=1, epochs=1, verbose=0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.04)
    model.save(tmp_path / "model.keras")
    code = """
import json, sys
import keras, nfzoo
optimizer = keras.saving.load_model(sys.argv[1]).optimizer
print(json.dumps([type(optimizer._learning_rate).__name__, float(optimizer.learning_rate)]))
"""
    assert fresh_process(code, tmp_path / "model.keras") == ["WarmUp", pytest.approx(0.04)]

"""Scans: every trial is a run; killed scans, diverged and exhausted trials lose nothing."""

import io
import itertools
import json
import pathlib
import re
import shlex

import keras
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from nfzoo import engine, plots, recipes, tune
from nfzoo.engine import learning
from nfzoo.tune import plan, progress, search, space, trials

RECIPE = recipes.override(
    recipes.get("demo"),
    {"data.name": "fake", "epochs": 1, "batch_size": 16, "data.limit": 32, "optimizer.name": "sgd", "agc": "none"},
)
LR = "optimizer.learning_rate"
GRID = {"models": ["none_test_ffnn"], "learning_rates": [1e9, 1e-2], "seeds": [0, 1]}
FACTS = ["model", "learning_rate", "seed", "status", "val_accuracy", "epochs"]


@pytest.fixture
def console():
    return Console(record=True, width=120, file=io.StringIO())


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    out = tmp_path_factory.mktemp("scan")
    return out, tune.scan(recipe=RECIPE, out=out, console=Console(quiet=True), **GRID)


@pytest.fixture
def pretended(monkeypatch):
    """Runs without training: accuracy is best at a learning rate of 0.01; `made` tells what was run, in order."""
    made = []

    def run(model, recipe, folder, **_):
        made.append(folder.name)
        rate = recipe.optimizer.learning_rate
        accuracy = max(0.0, 0.9 - 0.2 * abs(np.log10(rate) + 2) + 0.01 * recipe.seed + 0.001 * recipe.epochs)
        folder.mkdir(parents=True)
        metrics = {"status": "complete", "val_accuracy": accuracy, "epochs": recipe.epochs}
        (folder / "options.json").write_text(json.dumps(engine.options(model, recipe)))
        (folder / "metrics.json").write_text(json.dumps({**metrics, "seconds": 0.0}))
        return metrics

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(keras.utils, "clear_session", lambda: None)  # half a second each
    return made


def _search(out, search="grid", models=("sn_test_ffnn",), rates=None, recipe=RECIPE, **options):
    rates = rates or tune.Range.parse("1e-4..1e-1")
    return tune.scan(models, rates, recipe, out, search=search, console=Console(quiet=True), **options)


def test_every_cell_is_a_row_and_a_folder(scanned):
    out, results = scanned
    assert len(results) == 4 and not results.duplicated(["model", "learning_rate", "seed"]).any()
    for row in results.itertuples():
        folder = out / tune.trial_name(row.model, {LR: row.learning_rate}, row.seed)
        metrics = engine.read_metrics(folder)
        assert metrics["status"] == row.status and "test_accuracy" not in metrics  # a choice follows
        assert row.status == "diverged" or metrics["val_accuracy"] == row.val_accuracy
        assert engine.read_options(folder)["recipe"]["optimizer"]["learning_rate"] == row.learning_rate
    assert not list(out.rglob("*.keras"))
    pd.testing.assert_frame_equal(pd.read_csv(out / "scan.csv"), results, check_dtype=False)
    assert "images/s" in (out / "logs" / "none_test_ffnn-lr0.01-seed0.log").read_text()


def test_a_diverged_trial_is_a_result(scanned):
    _, results = scanned
    status = results.set_index("learning_rate").status
    assert set(status[1e9]) == {"diverged"} and set(status[1e-2]) == {"complete"}
    cells = tune.summary(results)
    assert cells[cells.learning_rate == 1e9].diverged.item() == 2
    assert tune.best(results).learning_rate == 1e-2


def test_the_best_setting_is_that_of_the_highest_mean_in_the_summary():
    """A trial that diverged at 60 % is none: tables, plots and the choice agree."""
    rows = [("a", 0.1, 0, "diverged", 0.6), ("a", 0.01, 0, "complete", 0.5)]
    results = pd.DataFrame(rows, columns=["model", "learning_rate", "seed", "status", "val_accuracy"])
    cells = tune.summary(results).set_index("learning_rate")["mean"]
    assert cells.to_dict() == {0.1: 0.0, 0.01: 0.5} and tune.best(results).learning_rate == cells.idxmax()


def test_summary_is_mean_and_deviation_over_seeds(scanned):
    _, results = scanned
    for cell in tune.summary(results).itertuples():
        trials = results[results.learning_rate == cell.learning_rate]
        values = trials.val_accuracy.where(trials.status == "complete", 0.0)
        assert cell.mean == pytest.approx(values.mean()) and cell.std == pytest.approx(values.std())


@pytest.mark.slow
def test_a_killed_scan_does_the_missing_trials_only(scanned, tmp_path, monkeypatch):
    _, expected = scanned
    trained, original = [], learning.new_model

    def new_model(resolved, *rest):
        trained.append(resolved["recipe"]["optimizer"]["learning_rate"])
        if trained.count(1e-2) == 1:
            raise KeyboardInterrupt
        return original(resolved, *rest)

    monkeypatch.setattr(learning, "new_model", new_model)
    grid = {**GRID, "seeds": [0], "recipe": RECIPE, "out": tmp_path, "console": Console(quiet=True)}
    with pytest.raises(KeyboardInterrupt):
        tune.scan(**grid)
    assert not (tmp_path / "scan.csv").exists()
    again = tune.scan(**grid)
    # A run that diverged is built once more, to name the first bad layer.
    assert [rate for rate, _ in itertools.groupby(trained)] == [1e9, 1e-2] and trained.count(1e-2) == 2
    pd.testing.assert_frame_equal(again[FACTS], expected[expected.seed == 0].reset_index(drop=True)[FACTS])


def test_a_run_killed_before_its_first_file_was_whole_goes_on(tmp_path, pretended):
    (tmp_path / "sn_test_ffnn-lr0.1-seed0").mkdir()
    (tmp_path / "sn_test_ffnn-lr0.1-seed0" / ".partial-options.json").write_text("{")
    spec = tune.spec(["sn_test_ffnn"], {LR: [0.1]}, RECIPE, seeds=[0])
    with pytest.raises(FileExistsError):  # of what is pretended: there is nothing but the folder left
        trials.run(plan.Plan(spec, tmp_path).trials[0], spec, tmp_path)
    assert not list((tmp_path / "sn_test_ffnn-lr0.1-seed0").iterdir())


def test_a_trial_that_cannot_run_stops_the_scan_with_its_own_words(tmp_path, console):
    recipe = recipes.override(RECIPE, {"data.name": "no_such_set"})
    with pytest.raises(FileNotFoundError, match="no_such_set"):
        tune.scan(["bn_test_ffnn"], [0.1], recipe, tmp_path, console=console)


class XlaRuntimeError(RuntimeError):
    """As JAX has it."""


def _tensorflow_error():
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[1024,1024]")


@pytest.mark.parametrize(
    "error", [MemoryError, _tensorflow_error, lambda: XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_a_trial_that_runs_out_of_memory_is_a_result(error, tmp_path, pretended, monkeypatch):
    succeed = engine.run

    def run(model, recipe, folder, **options):
        if recipe.optimizer.learning_rate == 0.1:
            folder.mkdir()
            (folder / "checkpoints").mkdir()
            raise error()
        return succeed(model, recipe, folder, **options)

    monkeypatch.setattr(engine, "run", run)
    results = _search(tmp_path, rates=[0.1, 0.01], seeds=[0])
    assert list(results.status) == ["out_of_memory", "complete"] and np.isnan(results.val_accuracy[0])
    assert engine.read_options(tmp_path / "sn_test_ffnn-lr0.1-seed0")["model"] == "sn_test_ffnn"
    assert not (tmp_path / "sn_test_ffnn-lr0.1-seed0" / "checkpoints").exists()
    assert tune.summary(results).out_of_memory.tolist() == [1, 0]
    assert len(_search(tmp_path, rates=[0.1, 0.01], seeds=[0])) == 2 and len(pretended) == 1


@pytest.mark.parametrize(("kills", "status"), [(2, "complete"), (3, "out_of_memory")])
def test_a_trial_that_the_system_kills_again_and_again_is_a_result(kills, status, tmp_path, pretended, monkeypatch):
    """Where the memory of the machine ends, nothing in Python hears of it."""
    name, succeed = "sn_test_ffnn-lr0.1-seed0", engine.run
    starts = tmp_path / "logs" / f"{name}.starts"

    def run(model, recipe, folder, **options):
        assert folder.name != name or starts.read_text() == "start\n" * (kills + 1)  # what a kill now would leave
        return succeed(model, recipe, folder, **options)

    monkeypatch.setattr(engine, "run", run)
    starts.parent.mkdir()
    starts.write_text("start\n" * kills)
    results = _search(tmp_path, rates=[0.1, 0.01], seeds=[0])
    assert list(results.status) == [status, "complete"] and not starts.exists()
    if kills == 3:
        assert "killed 3 times" in json.loads((tmp_path / name / "metrics.json").read_text())["error"]


def test_a_trial_that_is_not_compared_is_refused(tmp_path, console):
    recipe = recipes.override(RECIPE, {"data.name": "fake", "data.validation_fraction": 0.001, "epochs": 1})
    for _ in range(2):  # the second finds no result of the first
        with pytest.raises(ValueError, match="validation_fraction=0.001, which is no image"):
            tune.scan(["sn_test_ffnn"], [0.1], recipe, tmp_path, console=console)


@pytest.mark.parametrize("content", [b'{"status": "comp', b'{"status": "\xa0"}'])
def test_a_damaged_result_is_none(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    assert plan.result(tmp_path) is None


def test_a_full_disk_is_no_lack_of_memory():
    assert not trials.out_of_memory(OSError("RESOURCE_EXHAUSTED: No space left on device"))
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise RuntimeError("in a callback") from cause
    except RuntimeError as error:
        assert trials.out_of_memory(error)


def test_impossible_settings_are_refused_before_anything_is_made(tmp_path):
    wrong = {
        "learning_rate": {"rates": [0.1, -1]},
        "seeds": {"axes": {"seed": [1, 2]}},
        "grid decides": {"trials": 3},
        "one of grid": {"search": "genetic"},
        "hyperband decides": {"search": "hyperband", "axes": {"epochs": [1, 2]}},
        "validation": {"recipe": recipes.override(RECIPE, {"data.validation_fraction": 0})},
        "at least one worker": {"workers": 0},
        "possible scan. parallel": {"parallel": -1},
        "possible scan. models": {"models": []},
        "values for each axis": {"axes": {"epochs": []}},
        "no_such_path": {"axes": {"no_such_path": [1]}},
    }
    for words, options in wrong.items():
        with pytest.raises(ValueError, match=words):
            _search(tmp_path / "scan", **options)
    for text in ("1..2..3", "0..1", "2..1", "a..b"):
        with pytest.raises(ValueError, match="Expected"):
            tune.Range.parse(text)
    assert not (tmp_path / "scan").exists()


def test_a_grid_is_all_combinations_in_order(tmp_path, pretended):
    axes = {"agc.clip_factor": [0.02, 0.01], "augment.flip": [True, False]}
    results = _search(tmp_path, rates=tune.Range.parse("0.01..1"), points=3, axes=axes, seeds=[5], models=["a", "b"])
    expected = itertools.product(["a", "b"], [0.01, 0.1, 1.0], [0.02, 0.01], [True, False], [5])
    assert list(
        results[["model", "learning_rate", "clip_factor", "flip", "seed"]].itertuples(index=False, name=None)
    ) == [*expected]
    assert "b-lr0.1-clip0.02-flipTrue-seed5" in pretended


@pytest.mark.parametrize("search", ["random", pytest.param("bayesian", marks=pytest.mark.slow), "hyperband"])
def test_a_search_repeats_itself_whatever_kills_it(search, tmp_path, pretended):
    """Folders are all that is kept: without some of them the same trials are made again, those that are there stay."""
    recipe = recipes.override(RECIPE, {"epochs": 4})
    options = {"recipe": recipe, "seeds": [0, 1], "models": ["a", "b"]}
    options |= {"trials": 5} if search == "bayesian" else {}
    whole = _search(tmp_path / "whole", search, **options)
    half = len(whole) // 2
    for name in [*pretended[half:], pretended[1]]:
        (tmp_path / "whole" / name / "metrics.json").unlink()
        (tmp_path / "whole" / name / "options.json").unlink()
        (tmp_path / "whole" / name).rmdir()
    lost = [*pretended[half:], pretended[1]]
    del pretended[:]
    pd.testing.assert_frame_equal(_search(tmp_path / "whole", search, **options), whole)
    assert sorted(pretended) == sorted(lost)
    other = _search(tmp_path / "other", search, **{**options, "recipe": recipes.override(recipe, {"seed": 3})})
    assert not set(other.learning_rate) & set(whole.learning_rate)
    assert whole.groupby("model").size().nunique() == 1  # every model gets the same care


@pytest.mark.slow
def test_bayesian_search_looks_where_it_is_good(tmp_path, pretended):
    results = _search(tmp_path, "bayesian", trials=12, seeds=[0])
    first, last = results.learning_rate[:3], results.learning_rate[6:]
    assert (np.log10(last) + 2).abs().median() < (np.log10(first) + 2).abs().median()
    assert abs(np.log10(tune.best(results).learning_rate) + 2) < 0.2


def test_hyperband_gives_more_epochs_to_the_better_settings(tmp_path, pretended):
    results = _search(tmp_path, "hyperband", recipe=recipes.override(RECIPE, {"epochs": 9}), seeds=[0])
    assert set(results.max_epochs) == {1, 3, 9} and (results.max_epochs == results.epochs).all()
    rounds = [set(part.learning_rate) for _, part in results[:17].groupby("max_epochs")]
    assert rounds[1] & rounds[0]
    survivors = results[(results.max_epochs == 3) & results.learning_rate.isin(rounds[0])].learning_rate
    lost = rounds[0] - set(survivors)
    distance = lambda rates: np.abs(np.log10(list(rates)) + 2)  # noqa: E731
    assert len(survivors) and distance(survivors).max() <= distance(lost).min()


@pytest.mark.parametrize("search", ["bayesian", "hyperband"])
def test_what_is_proposed_depends_on_no_workers_speed(search, tmp_path):
    """With two settings at once, in whatever order their results arrive, the plan is the same."""
    recipe = recipes.override(RECIPE, {"epochs": 4})
    trials = 6 if search == "bayesian" else None
    axes = {LR: tune.Range.parse("1e-4..1")}
    spec = tune.spec(["a"], axes, recipe, seeds=[0], search=search, trials=trials, parallel=2)
    names = []
    for order in (0, -1):
        out = tmp_path / str(order)
        made = plan.Plan(spec, out)
        while not made.finished:
            waiting = [trial for trial in made.trials if trial.name not in made.results]
            assert len(waiting) <= 2 or made.complete or search == "hyperband"
            folder = out / waiting[order].name
            folder.mkdir(parents=True)
            accuracy = waiting[order].recipe(recipe).optimizer.learning_rate
            (folder / "metrics.json").write_text(json.dumps({"status": "complete", "val_accuracy": accuracy}))
            made.update()
        names.append([trial.name for trial in made.trials])
    assert names[0] == names[1] and len(names[0]) > 5


def test_two_processes_never_run_one_trial(tmp_path, pretended):
    spec = tune.spec(["sn_test_ffnn"], {LR: [0.1, 0.2]}, RECIPE, seeds=[0])
    first, second = plan.Plan(spec, tmp_path).trials
    assert not trials.busy(tmp_path, first.name)
    with trials.claim(tmp_path, first.name) as mine, trials.claim(tmp_path, first.name) as other:
        assert mine is not None and other is None
        assert trials.busy(tmp_path, first.name) and not trials.busy(tmp_path, second.name)
        trials.run(first, spec, tmp_path)
        trials.run(second, spec, tmp_path)
    assert pretended == [second.name]
    trials.run(first, spec, tmp_path)
    trials.run(first, spec, tmp_path)
    assert pretended == [second.name, first.name]


@pytest.mark.parametrize(
    ("row", "changes", "overrides"),
    [
        ("poster", {LR: 0.00123, "agc.clip_factor": 0.02}, {}),
        ("demo", {"agc": "none", "data.name": "fake", "epochs": 3}, {"alpha": 0.3}),
        ("demo", {"agc.exclude": ("head/*", "a b"), "data.data_dir": "/my data", "seed": 4}, {"activation": "selu"}),
        ("finetune", {"build": {"bn_*": {"momentum": 0.95}}, "batch_size": 7}, {"weights": "1"}),
    ],
)
def test_the_command_of_a_setting_trains_that_setting(row, changes, overrides, monkeypatch):
    """The command line itself is read, up to where training would begin."""
    from nfzoo.cli import runs

    recipe, asked = recipes.override(recipes.get(row), changes), {}
    monkeypatch.setattr(engine, "options", lambda *a: asked.update(what=a) or {"build": {}})
    words = shlex.split(tune.command("nf_test_efficientnet", recipe, overrides))
    assert words[:2] == ["nfzoo", "train"] and "\n" not in " ".join(words)
    runs.app([*words[1:], "--dry-run"], standalone_mode=False)
    assert asked["what"] == ("nf_test_efficientnet", recipe, overrides)


def test_the_best_command_is_that_of_the_best_mean(tmp_path, pretended):
    rates = {LR: [0.1, 0.01, 0.001], "agc.clip_factor": [0.02]}
    _, command = tune.scanned(["sn_test_ffnn"], rates, RECIPE, tmp_path, seeds=[3, 4], console=Console(quiet=True))
    assert "--lr 0.01 --seed 3" in command and "agc.clip_factor=0.02" in command
    assert tune.best(pd.read_csv(tmp_path / "scan.csv").assign(status="diverged")) is None


def test_progress_tells_what_runs_what_is_done_and_the_best(tmp_path, pretended, console):
    spec = tune.spec(["sn_test_ffnn"], {LR: [0.1, 0.01, 0.001]}, RECIPE, seeds=[0])
    made = plan.Plan(spec, tmp_path)
    shown = progress.Progress(made)
    for trial in made.trials[:2]:
        trials.run(trial, spec, tmp_path)
    made.update()
    with trials.claim(tmp_path, made.trials[2].name):
        console.print(shown.view())
    text = console.export_text()
    assert (
        "2/3 done" in text and re.search(r"\d:\d\d:\d\d left", text) and "best trial  sn_test_ffnn-lr0.01-seed0" in text
    )
    assert "running     sn_test_ffnn-lr0.001-seed0  epoch 0/1" in text
    lines = shown.lines()
    assert [line.split(":")[0] for line in lines] == [
        f"{i}/3 sn_test_ffnn-lr{r}-seed0" for i, r in ((1, 0.1), (2, 0.01))
    ]
    assert not shown.lines()


def test_a_terminal_shows_a_table_and_a_file_a_line_per_trial(tmp_path, pretended):
    texts = []
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100)
        tune.scan(["sn_test_ffnn"], [0.1, 0.01], RECIPE, tmp_path / str(terminal), seeds=[0], console=console)
        texts.append(file.getvalue())
    assert "best trial" in texts[0] and "2/2 done" in texts[0]
    assert texts[1].count("complete, validation") == 2 and "\x1b" not in texts[1]


def test_table_and_picture(scanned, tmp_path, console):
    _, results = scanned
    console.print(tune.table(results))
    text = console.export_text()
    assert "none_test_ffnn" in text and "(2 diverged)" in text and "±" in text
    figure = plots.scan(tune.summary(results))
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "validation accuracy, %" and len(axes.collections) == 1
    crosses = next(line for line in axes.lines if line.get_label() == "diverged trials")
    assert list(crosses.get_xdata()) == [1e9]
    assert plots.save(figure, tmp_path / "scan.png").stat().st_size > 5000


def test_a_search_over_several_ranges_has_a_table_of_the_best_and_points(tmp_path, pretended, console):
    axes = {"agc.clip_factor": tune.Range.parse("0.01..1")}
    results = _search(tmp_path, "random", trials=20, axes=axes, seeds=[0, 1], models=["a"])
    console.print(tune.table(results))
    best = tune.best(results)
    text = console.export_text()
    assert f"{best.learning_rate:g}" in text.split("\n")[5] and text.count("±") == 11
    axes = plots.scan(tune.summary(results)).axes[0]
    assert axes.lines[0].get_linestyle() == "None" and len(axes.lines[0].get_xdata()) == 20


@pytest.mark.slow
def test_scans_without_a_session_of_their_own_leave_random_state_to_the_runs(scanned):
    """A trial is what `engine.run` makes of its recipe alone, whatever was trained before it."""
    out, results = scanned
    row = results.iloc[-1]
    alone = pathlib.Path(str(out) + "-alone")
    recipe = recipes.override(RECIPE, {LR: row.learning_rate, "seed": int(row.seed)})
    metrics = engine.run(row.model, recipe, alone, taps=None, keep_model=False, console=Console(quiet=True))
    assert metrics["val_accuracy"] == row.val_accuracy
    keras.utils.clear_session()


def test_a_folder_of_another_recipe_is_refused(tmp_path, pretended):
    arguments = {"models": ["sn_test_ffnn"], "seeds": [0], "out": tmp_path, "console": Console(quiet=True)}
    tune.scan(learning_rates=[0.1], recipe=RECIPE, **arguments)
    assert len(tune.scan(learning_rates=[0.1, 0.01], recipe=RECIPE, **arguments)) == 2  # more of an axis may come
    moved = recipes.override(RECIPE, {"data.data_dir": "/moved"})
    assert len(tune.scan(learning_rates=[0.1, 0.01], recipe=moved, **arguments)) == 2 == len(pretended)
    with pytest.raises(ValueError, match="another recipe"):
        tune.scan(learning_rates=[0.1], recipe=recipes.override(RECIPE, {"epochs": 7}), **arguments)
    with pytest.raises(ValueError, match="another recipe"):
        tune.scan(learning_rates=[0.1], recipe=RECIPE, overrides={"size": 64}, **arguments)


def test_a_rate_that_is_no_axis_decides_whose_folder_it_is(tmp_path):
    """Nothing in the names of the trials would tell the rates apart."""

    def made(rate, axis="agc.clip_factor"):
        recipe = recipes.override(RECIPE, {LR: rate, "agc": 0.01})
        return space.spec(["sn_test_ffnn"], {axis: [0.01, 0.02]}, recipe)

    (tmp_path / "scan.json").write_text(made(0.1).model_dump_json())
    search._check_folder(tmp_path, made(0.1))
    with pytest.raises(ValueError, match="another recipe"):
        search._check_folder(tmp_path, made(0.0001))


def test_who_ends_on_purpose_was_not_killed(tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "a.starts"
    for expected in (0, 0, 0):
        with pytest.raises(KeyboardInterrupt), trials._killed_before(tmp_path, "a") as times:
            assert times == expected
            trials.withdraw()
            left = log.read_text()
            raise KeyboardInterrupt
        log.write_text(left)  # as after os._exit
    log.write_text("start\nstart\n")
    with trials._killed_before(tmp_path, "a") as times:
        assert times == 2
        trials.withdraw()
        assert log.read_text().split() == ["start", "start"]


def test_a_range_of_whole_numbers_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        space.spec(["sn_test_ffnn"], {"batch_size": space.Range(low=16, high=128)}, RECIPE, search="random")
    space.spec(["sn_test_ffnn"], {LR: space.Range(low=1e-3, high=1)}, RECIPE, search="random")


def test_an_axis_that_the_optimizer_has_not_is_refused():
    recipe = recipes.get("demo")  # Adam
    with pytest.raises(ValueError, match="'optimizer.momentum' with adam; .*: sgd, momentum_sgd, rmsprop$"):
        space.spec(["sn_test_ffnn"], {"optimizer.momentum": (0.8, 0.9)}, recipe)
    names = {"optimizer.name": ("adam", "momentum_sgd"), "optimizer.momentum": (0.8, 0.9)}
    assert space.spec(["sn_test_ffnn"], names, recipe).axes
    assert space.spec(["sn_test_ffnn"], {"optimizer.beta_1": (0.8, 0.9)}, recipe).axes

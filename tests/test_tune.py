"""Scans: every trial is a run; killed scans and diverged trials lose nothing."""

import io

import pandas as pd
import pytest
from rich.console import Console

from nfzoo import engine, plots, recipes, tune

RECIPE = recipes.override(
    recipes.get("demo"), {"data.name": "fake", "epochs": 1, "batch_size": 16, "data.limit": 64, "optimizer.name": "sgd"}
)
GRID = {"models": ["none_test_ffnn", "bn_test_ffnn"], "learning_rates": [1e9, 1e-2], "seeds": [0, 1]}


@pytest.fixture
def console():
    return Console(record=True, width=120, file=io.StringIO())


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    out = tmp_path_factory.mktemp("scan")
    recipe = recipes.override(RECIPE, {"agc": "none"})
    return out, tune.scan(recipe=recipe, out=out, console=Console(quiet=True), **GRID), recipe


def test_every_cell_is_a_row_and_a_folder(scanned):
    out, results, _ = scanned
    assert len(results) == 8 and not results.duplicated(["model", "learning_rate", "seed"]).any()
    for row in results.itertuples():
        folder = out / tune.trial_name(row.model, row.learning_rate, row.seed)
        assert engine.read_metrics(folder)["test_accuracy"] == row.test_accuracy
        assert engine.read_options(folder)["recipe"]["optimizer"]["learning_rate"] == row.learning_rate
        assert not list(folder.rglob("*.keras")) or row.status == "diverged"
    pd.testing.assert_frame_equal(pd.read_csv(out / "scan.csv"), results, check_dtype=False)


def test_a_diverged_trial_is_a_result(scanned):
    _, results, _ = scanned
    plain = results[results.model == "none_test_ffnn"].set_index("learning_rate").status
    assert set(plain[1e9]) == {"diverged"} and set(plain[1e-2]) == {"complete"}
    cells = tune.summary(results)
    assert cells[(cells.model == "none_test_ffnn") & (cells.learning_rate == 1e9)].diverged.item() == 2


def test_summary_is_mean_and_deviation_over_seeds(scanned):
    _, results, _ = scanned
    for cell in tune.summary(results).itertuples():
        rows = results[(results.model == cell.model) & (results.learning_rate == cell.learning_rate)].test_accuracy
        assert cell.mean == pytest.approx(rows.mean()) and cell.std == pytest.approx(rows.std())


@pytest.mark.slow
def test_a_killed_scan_does_the_missing_trials_only(scanned, tmp_path, monkeypatch, console):
    _, expected, recipe = scanned
    trained = []
    original = engine._new_model

    def new_model(resolved, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(resolved["model"])
        return original(resolved, *rest)

    monkeypatch.setattr(engine, "_new_model", new_model)
    grid = {**GRID, "seeds": [0]}
    with pytest.raises(KeyboardInterrupt):
        tune.scan(recipe=recipe, out=tmp_path, console=console, **grid)
    assert not (tmp_path / "scan.csv").exists()
    count = []
    monkeypatch.setattr(engine, "_new_model", lambda *a: count.append(1) or original(*a))
    again = tune.scan(recipe=recipe, out=tmp_path, console=console, **grid)
    assert len(count) == 4 - 3
    kept = ["model", "learning_rate", "seed", "status", "epochs"]
    expected = expected[expected.seed == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(again[kept], expected[kept])


def test_a_trial_that_cannot_run_stops_the_scan_with_its_own_words(tmp_path, console):
    recipe = recipes.override(RECIPE, {"data.name": "no_such_set"})
    with pytest.raises(FileNotFoundError, match="no_such_set"):
        tune.scan(["bn_test_ffnn"], [0.1], recipe, tmp_path, console=console)


def test_impossible_rates_are_refused_before_anything_is_made(tmp_path, console):
    with pytest.raises(ValueError, match="learning_rate"):
        tune.scan(["bn_test_ffnn"], [0.1, -1], RECIPE, tmp_path / "scan", console=console)
    assert not (tmp_path / "scan").exists()


def test_table_and_picture(scanned, tmp_path, console):
    _, results, _ = scanned
    console.print(tune.table(results))
    text = console.export_text()
    assert "none_test_ffnn" in text and "(2 diverged)" in text and "±" in text
    assert plots.save(plots.scan(tune.summary(results)), tmp_path / "scan.png").stat().st_size > 5000

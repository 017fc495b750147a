"""The experiments of training/: rows that resolve, measurements that are not taken twice, tables that count rightly."""

import json
import pathlib
import sys
from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
import typer
from rich.console import Console

import nfzoo
from nfzoo import engine, names, recipes

TRAINING = pathlib.Path(__file__).parents[1] / "training"
if not TRAINING.exists():
    pytest.skip("training/ is not installed", allow_module_level=True)
sys.path.insert(0, str(TRAINING))
import benchmark  # noqa: E402
import experiments  # noqa: E402
import gap  # noqa: E402
import profiles  # noqa: E402
import reproduce  # noqa: E402
import signals  # noqa: E402

CONTESTS = [contest.rows for contest in experiments.CONTESTS.values()]
ROWS = [row for table in (*experiments.TABLES.values(), *experiments.PROFILES.values(), *CONTESTS) for row in table]


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (gap, reproduce, signals):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_names_a_network_and_a_recipe(row):
    names.resolve_fields(names.parse(row.model), row.build)
    if isinstance(row, experiments.Row):
        recipe = recipes.override(recipes.get(row.recipe), row.changes)
        assert engine.options(row.model, recipe, row.build)["build"].items() >= row.build.items()


def test_published_lines_are_those_of_the_rows():
    """A change of a row or a recipe must not leave the old measurement under its name."""
    for table, rows in experiments.TABLES.items():
        path = TRAINING / "results" / f"{table}.csv"
        published = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["row"])
        for row in rows:
            recipe = recipes.override(recipes.get(row.recipe), row.changes)
            for line in published[published.row == row.name].itertuples():
                assert line.model == row.model and line.fingerprint == recipes.fingerprint(recipe), row.name
                assert json.loads(line.build) == engine.options(row.model, recipe, row.build)["build"]


def test_published_lines_of_contests_are_those_of_the_rows():
    published = reproduce.read(TRAINING / "results" / "gap.csv")
    for budget, contest in experiments.CONTESTS.items():
        for row in contest.rows:
            of_row = published[(published.budget == budget) & (published.row == row.name)]
            for line in of_row[of_row.learning_rate.isin(contest.rates)].itertuples():  # B's range began lower
                epochs = {"epochs": contest.trial_epochs} if line.stage == "trial" else {}
                changed = replace(row, changes={**row.changes, **epochs, gap.RATE: line.learning_rate})
                assert len(gap.lines(published[published.index == line.Index], changed, line.seed)) == 1, line


def _noise_profile(row, seed, size=32):
    rows = [("block", 0, 1.0), ("block", 1, 2.0 + seed), ("branch", 0, 1.1)]
    return pd.DataFrame(
        [{"step": 0, "epoch": 0, "kind": "activation", "place": p, "layer": f"l{d}", "depth": d, "acsm": v, "acv": v,
          "second_moment": 2 * v}
         for p, d, v in rows]
    )  # fmt: skip


def test_a_network_is_not_measured_twice(results, monkeypatch):
    row = experiments.Profile("tiny", "nf_test_resnet", {"alpha": 1.0}, size=32, batch=2, seeds=(0, 1))
    monkeypatch.setitem(signals.PROFILES, "tiny", [row])
    signals.measure_profiles("tiny", None, results, Console(quiet=True))
    first = signals.signals_of("tiny")
    assert len(pd.read_csv(results / "tiny.csv")) == 2 and set(first.seed) == {0, 1}
    assert {"block", "branch"} == set(first.place) and np.isfinite(first.acv).all()
    monkeypatch.setattr(signals, "profile", lambda *_: pytest.fail("measured again"))
    signals.measure_profiles("tiny", None, results, Console(quiet=True))
    pd.testing.assert_frame_equal(signals.signals_of("tiny"), first)


def test_signals_of_a_killed_measurement_are_replaced(results):
    for acv in (5.0, 7.0):
        signals.add_signals("tiny", "a", 0, _noise_profile(None, 0).assign(acv=acv))
        signals.add_signals("tiny", "b", 0, _noise_profile(None, 0))
    table = signals.signals_of("tiny")
    assert len(table) == 6 and set(table[table.row == "a"].acv) == {7.0}


def test_deviation_is_of_the_mean_over_draws():
    row = experiments.Profile(
        "tiny", "nf_test_resnet", variance={1: 2.0}, square={1: 4.0}, branch=(1.0, 1.1), mean=(0, 3.0)
    )
    log = pd.concat([_noise_profile(row, seed).assign(row="tiny", seed=seed) for seed in (0, 1)])
    table = signals.compare(row, log).set_index(["quantity", "block"])
    assert table.deviation[("variance", 1)] == pytest.approx(0.25)  # (2 + 3) / 2 against 2
    assert table.deviation[("square", 1)] == pytest.approx(0.25)
    assert table.deviation[("branch", "least")] == pytest.approx(0.1)
    assert table.deviation[("branch", "most")] == pytest.approx(0.0)
    assert table.deviation[("mean", "most")] == 0  # 2.5 keeps the bound of 3


def test_level_and_ratio_of_gradients():
    layers = [*(f"hidden_linear{n}" for n in range(1, 10)), "head"]
    lines = {"row": "a", "seed": 0, "epoch": 1, "layer": layers, "second_moment": 2.0 ** np.arange(10)}
    log = pd.DataFrame(lines).assign(kind="gradient")
    others = log.assign(kind="weight", second_moment=1e9)
    level = signals.levels(pd.concat([log, others])).iloc[0]
    assert (level.level, level.ratio, level.inner) == (pytest.approx(2**4.5), 512, 128)


@pytest.mark.slow
def test_a_run_is_collected_before_its_line_is_written(results, monkeypatch):
    row = experiments.Row(
        "tiny", "none_test_efficientnet", "demo", changes={"data.name": "fake", "epochs": 1}, seeds=(0,),
        signals={"taps": "layers"},
    )  # fmt: skip
    monkeypatch.setitem(reproduce.TABLES, "tiny", [row])

    def collect(row, seed, folder):
        assert not (results / "tiny.csv").exists()
        signals.add_signals("tiny", row.name, seed, signals.keep_poster_epochs(row, seed, folder))

    run = lambda: reproduce.run_missing("tiny", None, results / "runs", Console(quiet=True), collect=collect)  # noqa: E731
    assert run().status.tolist() == ["complete"]
    log = signals.signals_of("tiny")
    assert {"activation", "gradient", "weight"} == set(log.kind) and set(log.epoch) == {0, 1}
    both = signals.keep_activations(row, 0, reproduce.folder_of(results / "runs" / "tiny", row, 0))
    assert set(both.epoch) == {0, 1} and both.nonzero.between(0, 1).all() and both.layer.str.endswith("_out").all()
    monkeypatch.setattr(engine, "run", lambda *_, **__: pytest.fail("run again"))
    assert len(run()) == 1


@pytest.mark.parametrize("name", ["50, BN-ReLU-Conv", "50, ReLU-BN-Conv", "50, NF", "600, BN-ReLU-Conv", "600, NF"])
def test_published_profiles_are_within_the_tolerance(name):
    row = next(row for row in signals.PROFILES["resnetv2_profiles"] if row.name == name)
    table = signals.compare(row, signals.signals_of("resnetv2_profiles"))
    assert len(table) >= 9 and (table.deviation.abs() <= row.tolerance).all()


@pytest.mark.parametrize("name", signals.EXPERIMENTS)
def test_documented_tables_are_those_of_the_measurements(name, tmp_path, monkeypatch):
    measured = signals.signals_of(name)
    monkeypatch.setattr(signals, "RESULTS", tmp_path)
    documented = "".join(path.read_text() for path in (TRAINING.parent / "docs").glob("*.md"))
    assert signals.EXPERIMENTS[name].tables(measured) in documented


def test_cost_grows_linearly_with_the_batch():
    """As measured: twice the images take at most twice the time and memory, and a rest that does not grow."""
    table = pd.read_csv(TRAINING / "results" / "scaling.csv")
    assert set(table.axis) == {"batch", "resolution", "depth"} and set(table.variant) == {"bn", "nf", "sn"}
    for _, points in table[table.axis == "batch"].groupby("variant"):
        points = points.sort_values("value")
        doubled = points[["ms", "peak_mb"]].to_numpy()[1:] / points[["ms", "peak_mb"]].to_numpy()[:-1]
        assert (np.diff(points.value.to_numpy()) == points.value.to_numpy()[:-1]).all()
        assert doubled.max() < 2.3  # a tenth and more is what neighbours on the machine add


def test_the_share_of_a_branch_is_that_of_the_merge():
    """Measured in networks whose merges are known: half of the power each, and alpha times gain."""
    x, y = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype("float32"), np.arange(8) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for name, build, weight in (
        ("sn_test_efficientnet", {}, 0.5**0.5),
        ("nf_test_efficientnet", {"alpha": 0.4, "skip_gain": 0.5}, 0.2),
    ):
        net = nfzoo.build(name, **build)
        log = nfzoo.spp.snapshot(net, x, y, loss=loss, taps="blocks", what=("activations", "gradients"))
        shares = signals.branch_share(log.assign(row=name, epoch=0))
        np.testing.assert_allclose(shares.weight, weight, rtol=1e-4)
        for line in shares.itertuples():
            ends = [net.get_layer(f"{line.block}_{end}").output for end in ("branch", "out")]
            branch, out = (np.asarray(t) for t in keras.Model(net.input, ends)(x))
            assert line.share == pytest.approx(weight**2 * (branch**2).mean() / (out**2).mean(), rel=1e-3)


@pytest.fixture
def contest(monkeypatch):
    """Three candidates: two reach the semifinal, one the final, beside the one to beat."""
    rows = [
        experiments.Row(name, "sn_test_ffnn", "demo", {"data.name": "fake"}, {"activation": name})
        for name in ("relu", "selu", "tanh", "elu")
    ]
    options = {"semifinalists": 2, "finalists": 1, "seeds": (0, 1)}
    made = experiments.Contest(rows, rates=(0.001, 0.01), trial_epochs=1, **options)
    monkeypatch.setitem(experiments.CONTESTS, "tiny", made)
    return made


def _trained(row, seed, **columns):
    recipe = reproduce.recipe_of(row, seed, None)
    resolved = engine.options(row.model, recipe, row.build)
    return {
        "row": row.name, "model": row.model, "build": json.dumps(resolved["build"], sort_keys=True),
        "fingerprint": resolved["fingerprint"], "seed": seed, "learning_rate": recipe.optimizer.learning_rate,
        "status": "complete", "test_accuracy": None, "test_loss": None, **columns,
    }  # fmt: skip


def _leave(runs, row, seed, **changed):
    """The folder of a final, as its training leaves it."""
    folder = reproduce.folder_of(runs / "tiny", row, "final", f"{row.changes[gap.RATE]:g}", seed)
    folder.mkdir(parents=True, exist_ok=True)
    options = engine.options(row.model, reproduce.recipe_of(row, seed, None), row.build)
    kept = {key: options[key] for key in ("build", "fingerprint")}
    (folder / "options.json").write_text(json.dumps({**kept, **changed}))


def test_a_contest_is_decided_on_validation_and_tested_last(results, contest, monkeypatch):
    early = {("relu", 0.001): 0.2, ("relu", 0.01): 0.1, ("selu", 0.001): 0.3, ("selu", 0.01): 0.4}
    early |= {("tanh", 0.001): 0.45, ("tanh", 0.01): 0.9, ("elu", 0.001): 0.1, ("elu", 0.01): 0.3}
    late = {"relu": 0.5, "selu": 0.6, "tanh": 0.55}  # the best start is not the best end
    ran, read = [], []

    def train(budget, stage, row, seed, *_):
        rate = row.changes[gap.RATE]
        ran.append((stage, row.name, rate, seed))
        status = "diverged" if (stage, row.name, rate) == ("trial", "tanh", 0.01) else "complete"  # 0.9, and lost
        reached = early[row.name, rate] if stage == "trial" else late[row.name]
        _leave(results, row, seed)
        return {"budget": budget, "stage": stage, **_trained(row, seed, status=status, val_accuracy=reached)}

    def evaluate(folder, data_dir):
        assert len(ran) == 13 and data_dir == "here"
        read.append(folder.name)
        return {"accuracy": 0.7, "loss": 1.0}

    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    assert gap.markdown("tiny", reproduce.read(results / "gap.csv")).count("\n") == 1  # nothing yet
    gap.main("tiny", runs=results, rows="relu; selu")
    assert [run[1] for run in ran] == ["relu", "relu", "selu", "selu"] and not read  # the others come first
    gap.main("tiny", runs=results, data_dir="here")
    assert [run[0] for run in ran] == ["trial"] * 8 + ["final"] * 5
    assert ran[8:11] == [("final", *at, 0) for at in (("relu", 0.001), ("tanh", 0.001), ("selu", 0.01))]
    assert ran[11:] == [("final", *at, 1) for at in (("relu", 0.001), ("selu", 0.01))]
    table = pd.read_csv(results / "gap.csv")
    assert table[table.stage == "trial"].test_accuracy.isna().all()
    finals = table[(table.stage == "final") & (table.row != "tanh")]
    assert (finals.test_accuracy == 0.7).all() and len(read) == 4 and not any("tanh" in name for name in read)
    gap.main("tiny", runs=results)
    assert len(ran) == 13 and len(read) == 4  # nothing is run or read twice
    shown = gap.markdown("tiny", table)
    assert "| **selu** | 0.01 | 40.0 | 60.0 ± 0.0 | 70.0 ± 0.0 | +0.0, +0.0 |" in shown
    assert "| relu | 0.001 | 20.0 | 50.0 ± 0.0 | 70.0 ± 0.0 |  |" in shown
    assert "| tanh | 0.001 | 45.0 | 55.0 |  |  |" in shown and "| elu | 0.01 | 30.0 |  |  |  |" in shown
    without = [line for line in shown.splitlines() if not line.startswith(("| tanh", "| elu"))]
    assert gap.markdown("tiny", table, finalists=True) == "\n".join(without)
    # Before the last is tested nothing is told of the test, whoever is there already.
    for half in (table.drop(table.index[-1]), table.drop(table.index[8])):
        shown = gap.markdown("tiny", half)
        assert "70.0" not in shown and "**" not in shown and "diverged" not in shown and "nan" not in shown
    untested = table.assign(test_accuracy=None)
    assert "| selu | 0.01 | 40.0 | 60.0 ± 0.0 |  |  |" in gap.markdown("tiny", untested)


def test_what_validates_best_is_the_one_though_another_tests_better(results, contest, monkeypatch):
    monkeypatch.setitem(experiments.CONTESTS, "tiny", replace(contest, to_beat=2, semifinalists=2, finalists=2))
    reached = {"relu": 0.2, "selu": 0.3, "tanh": 0.4, "elu": 0.1}
    tests = {"relu": 0.60, "selu": 0.50, "tanh": 0.57, "elu": 0.70}

    def train(budget, stage, row, seed, *_):
        _leave(results, row, seed)
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=reached[row.name], epochs=1)}

    def evaluate(folder, **_):
        return {"accuracy": tests[folder.name.partition("-")[0]], "loss": 1.0}

    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    gap.main("tiny", runs=results)
    table = pd.read_csv(results / "gap.csv")
    shown = gap.markdown("tiny", table)
    assert "test less that of selu, seeds 0, 1 |" in shown
    assert "| **tanh** | 0.001 | 40.0 | 40.0 ± 0.0 | 57.0 ± 0.0 | +7.0, +7.0 |" in shown
    assert "| relu | 0.001 | 20.0 | 20.0 ± 0.0 | 60.0 ± 0.0 | +10.0, +10.0 |" in shown
    assert "| elu | 0.001 | 10.0 | 10.0 ± 0.0 | 70.0 ± 0.0 | +20.0, +20.0 |" in shown
    drawn = []
    monkeypatch.setattr(gap.plots, "save", lambda figure, path: drawn.append(figure) or path)
    gap.picture("tiny", table)
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["tanh", "selu", "relu", "elu"]
    assert [label.get_fontweight() for label in labels] == ["bold", "normal", "normal", "normal"]
    assert "grey: selu" in drawn[0].axes[1].get_xlabel() and len(drawn[0].axes[1].lines) == 1
    assert len(drawn[0].axes[1].lines[0].get_xdata()) == 8
    gap.picture("tiny", table.iloc[:-1])  # one final is missing: nothing is told of the others
    assert len(drawn[1].axes) == 1
    assert all(label.get_fontweight() == "normal" for label in drawn[1].axes[0].get_yticklabels())


def test_a_final_is_tested_where_it_was_trained_or_not_at_all(results, contest, monkeypatch, capsys):
    def train(budget, stage, row, seed, *_):
        if (row.name, seed) != ("relu", 1):  # of a checkout that is gone
            _leave(results, row, seed, **({"fingerprint": "another"} if row.name == "selu" else {}))
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=0.5)}

    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: pytest.fail("read before all are there"))
    with pytest.raises(gap.typer.BadParameter, match="Received: none; say with --runs"):
        gap.main("tiny", runs=results)
    _leave(results, replace(contest.rows[0], changes={**contest.rows[0].changes, gap.RATE: 0.001}), 1)
    with pytest.raises(gap.typer.BadParameter, match="trained selu, seed 0. Received: another"):
        gap.main("tiny", runs=results)
    capsys.readouterr()
    gap.main("tiny", runs=results, dry_run=True)
    assert capsys.readouterr().out.count("(its test is to be read)") == 4


def test_a_dry_run_tells_what_comes_after(results, contest, monkeypatch, capsys):
    def train(budget, stage, row, seed, *_):
        if stage == "final" and seed:
            raise KeyboardInterrupt
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=0.5)}

    def told():
        gap.main("tiny", runs=results, dry_run=True)
        return capsys.readouterr().out.splitlines()

    lines = told()
    assert len(lines) == 9 and all(line.endswith("(missing)") for line in lines[:8])
    assert lines[8] == "then 3 semifinals, then 2 finals with the other seeds, then the test split of the finalists"
    monkeypatch.setattr(gap, "train", train)
    with pytest.raises(KeyboardInterrupt):
        gap.main("tiny", runs=results)
    capsys.readouterr()
    lines = told()
    assert len(lines) == 3 and lines[2] == "then the test split of the finalists"


def test_a_final_that_another_table_holds_is_not_run_again(results, contest, monkeypatch):
    monkeypatch.setitem(experiments.CONTESTS, "tiny", replace(contest, known=("elsewhere",)))
    there = [
        replace(contest.rows[0], changes={**contest.rows[0].changes, gap.RATE: 0.001}),  # the same run as a final
        gap.trials(contest, contest.rows[1])[0],  # shorter: not the same
    ]
    for row in there:
        reproduce.add(results / "elsewhere.csv", _trained(row, 1, test_accuracy=0.7, test_loss=2.0))
    ran, read = [], []

    def train(budget, stage, row, seed, *_):
        ran.append((stage, row.name, seed))
        _leave(results, row, seed)
        best = row.changes[gap.RATE] == 0.001
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=0.4 if best else 0.1)}

    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(engine, "evaluate", lambda folder, **_: read.append(folder) or {"accuracy": 0.5, "loss": 1.0})
    gap.main("tiny", runs=results, rows="selu; tanh; elu; relu")
    runs = [("relu", 0), ("selu", 0), ("tanh", 0), ("selu", 1)]
    assert [run[1:] for run in ran if run[0] == "final"] == runs
    table = pd.read_csv(results / "gap.csv")
    mine = table[(table.stage == "final") & (table.row == "relu")].set_index("seed").test_accuracy
    assert dict(mine) == {0: 0.5, 1: 0.7} and len(read) == 3


def test_a_contest_is_drawn_as_far_as_it_is(results, contest, monkeypatch):
    monkeypatch.setattr(signals, "FIGURES", results)
    tried = [
        {"stage": "trial", **_trained(trial, 0, val_accuracy=0.1, epochs=1)}
        for row in contest.rows[:2] for trial in gap.trials(contest, row)
    ]  # fmt: skip
    drawn = gap.picture("tiny", pd.DataFrame(tried))
    assert drawn == results / "gap_tiny.png" and drawn.stat().st_size > 1000


def test_only_what_is_measured_is_drawn(results, contest, monkeypatch):
    monkeypatch.setattr(signals, "FIGURES", results)
    reproduce.add(results / "gap.csv", {"budget": "another", **_trained(contest.rows[0], 0)})
    with pytest.raises(typer.BadParameter, match="Expected runs of budget tiny.*nothing is measured"):
        gap.main("tiny", draw=True)
    # Mixed images have no training accuracy to compare with.
    mixed = [replace(row, changes={**row.changes, "augment.mixup": 0.2}) for row in contest.rows]
    for rows, pictures in ((mixed, ["gap_tiny.png"]), (contest.rows, ["gap_tiny.png", "gap_tiny_fit.png"])):
        made = replace(contest, rows=rows)
        monkeypatch.setitem(experiments.CONTESTS, "tiny", made)
        reached = {"epochs": 8, "recipe": "demo", "accuracy": 0.5, "val_accuracy": 0.4}
        runs = [_trained(gap.trials(made, rows[0])[0], 0, **reached), _trained(rows[1], 0, **reached)]
        pd.DataFrame(runs).assign(budget="tiny").to_csv(results / "gap.csv", index=False)
        for old in results.glob("*.png"):
            old.unlink()
        gap.main("tiny", draw=True)
        assert sorted(path.name for path in results.glob("*.png")) == pictures


def test_who_generalizes_is_drawn_of_whole_runs_of_the_budget(results, contest, monkeypatch):
    monkeypatch.setitem(experiments.CONTESTS, "tiny", replace(contest, known=("elsewhere",)))
    monkeypatch.setattr(signals, "FIGURES", results)
    whole = {"stage": "final", "recipe": "demo", "epochs": 8, "accuracy": 0.5, "val_accuracy": 0.4, "budget": "tiny"}
    small = replace(contest.rows[0], name="small", changes={**contest.rows[0].changes, gap.RATE: 0.01})
    lines = [
        _trained(contest.rows[0], 0, **whole),
        _trained(contest.rows[1], 0, **whole),
        _trained(contest.rows[2], 0, **{**whole, "epochs": 1}),  # a trial
        _trained(contest.rows[3], 1, **whole),  # another seed
        _trained(contest.rows[3], 0, **{**whole, "val_accuracy": 0.01}),  # learned nothing
    ]
    other = replace(small, name="relu")  # the same at another rate
    reproduce.add(results / "elsewhere.csv", _trained(other, 0, **whole))
    reproduce.add(results / "elsewhere.csv", lines[1])  # the same run
    drawn, draw = [], gap.pictures.generalization
    monkeypatch.setattr(gap.pictures, "generalization", lambda groups: drawn.append(groups) or draw(groups))
    made = gap.generalization("tiny", pd.DataFrame(lines))
    assert made == results / "gap_tiny_fit.png" and made.stat().st_size > 1000
    assert {name: list(runs.row) for name, runs in drawn[0].items()} == {
        "SELU": ["selu"],
        "SiLU": ["relu, lr 0.001", "relu, lr 0.01"],
    }
    assert [gap.group("bn_efficientnet_b0", {}), gap.group("sn_efficientnet_b0", {})] == ["BN, SiLU", "SELU"]
    assert gap.group("nf_efficientnet_b0", {}) == gap.group("sn_efficientnet_b0", {"activation": "silu"}) == "SiLU"


def test_lines_of_other_processes_stay(results):
    path, key = results / "t.csv", ["row", "seed"]
    reproduce.add(path, {"row": "a", "seed": 1}, key)
    before = reproduce.read(path)
    reproduce.add(path, {"row": "b", "seed": 1}, key)  # another process, meanwhile
    for _ in range(2):  # a line that is there is not written again
        assert list(reproduce.add(path, {"row": "c", "seed": 1}, key).row) == ["a", "b", "c"] and len(before) == 1


def test_a_final_that_diverged_is_a_result(results, contest, monkeypatch):
    def train(budget, stage, row, seed, *_):
        lost = stage == "final" and (row.name, seed) == ("selu", 1)
        status = "diverged" if lost else "complete"
        _leave(results, row, seed)
        return {"budget": budget, "stage": stage, **_trained(row, seed, status=status, val_accuracy=len(row.name) / 10)}

    read = []
    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(engine, "evaluate", lambda folder, **_: read.append(folder) or {"accuracy": 0.5, "loss": 1.0})
    gap.main("tiny", runs=results)
    assert len(read) == 3
    shown = gap.markdown("tiny", pd.read_csv(results / "gap.csv"))
    assert "| 40.0, 1 diverged | 50.0, 1 diverged | +0.0, – |" in shown


def test_a_trial_that_diverged_is_drawn_as_none(results, contest):
    trials = [trial for row in contest.rows for trial in gap.trials(contest, row)]
    lines = [
        {
            **_trained(trial, 0, val_accuracy=0.9 if lost else 0.4, status="diverged" if lost else "complete"),
            "epochs": 1,
        }
        for trial in trials
        for lost in [trial.name == "tanh"]
    ]
    axes = gap.pictures.contest(pd.DataFrame(lines), pd.DataFrame(lines).head(0), "relu").axes[0]
    places = {label.get_text(): place for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    assert places["tanh"] == max(places.values())
    finals = [
        {"row": "relu", "status": "complete", "val_accuracy": 0.3, "test_accuracy": 0.3, "learning_rate": 0.01},
        {"row": "selu", "status": "complete", "val_accuracy": 0.5, "test_accuracy": 0.5, "learning_rate": 0.01},
        {"row": "selu", "status": "diverged", "val_accuracy": 0.9, "test_accuracy": None, "learning_rate": 0.01},
    ]  # selu: a quarter right
    drawn = gap.pictures.contest(pd.DataFrame(lines), pd.DataFrame(finals), "relu").axes[0]
    assert [label.get_text() for label in drawn.get_yticklabels()][:2] == ["relu", "selu"]
    assert {x for line in axes.lines for x, y in zip(*line.get_data(), strict=True) if y == places["tanh"]} == {0.0}


def test_what_another_process_trains_is_left_to_it(results, contest, monkeypatch):
    """Two processes of one command: the second goes on with the next run, waits, and a line is written once."""
    ran, waited = [], []

    def trained(budget, stage, row, seed):
        _leave(results, row, seed)
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=0.5)}

    def train(budget, stage, row, seed, *_):
        ran.append(row.name)
        if row.name == "relu" and not waited:
            raise engine.Taken("elsewhere")
        return trained(budget, stage, row, seed)

    def sleep(seconds):
        """The other ends one of its two runs, and dies."""
        waited.append(len(ran))
        reproduce.add(results / "gap.csv", trained("tiny", "trial", gap.trials(contest, contest.rows[0])[0], 0))

    monkeypatch.setattr(gap, "train", train)
    monkeypatch.setattr(gap.time, "sleep", sleep)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: {"accuracy": 0.5, "loss": 1.0})
    gap.main("tiny", runs=results)
    assert ran[:9] == ["relu", "relu", "selu", "selu", "tanh", "tanh", "elu", "elu", "relu"] and waited == [8]
    assert reproduce.read(results / "gap.csv").stage.tolist() == ["trial"] * 8 + ["final"] * 5
    monkeypatch.setitem(reproduce.TABLES, "tiny", contest.rows[:2])

    def run(model, recipe, folder, overrides, **_):
        if overrides["activation"] == "relu":
            raise engine.Taken("elsewhere")
        raise MemoryError("reached")

    monkeypatch.setattr(engine, "run", run)
    with pytest.raises(MemoryError, match="reached"):
        reproduce.run_missing("tiny", None, results, Console(quiet=True), seeds=(0,))


def test_a_fingerprint_is_a_text(results):
    """Twelve hexadecimal digits that look like a number would be read as one, and their run be missing for ever."""
    row, line = experiments.Row("a", "sn_test_ffnn", "demo"), {"model": "m", "build": "{}", "seed": 0}
    for fingerprint in ("012345678901", "1234567e8901"):
        path = results / f"{fingerprint}.csv"
        for _ in range(2):
            table = reproduce.add(path, {"row": row.name, **line, "fingerprint": fingerprint, "commit": "123"})
        assert table.fingerprint.tolist() == [fingerprint] and reproduce.read(path).commit.tolist() == ["123"]


def test_a_run_that_diverged_is_said_in_a_table(monkeypatch, capsys):
    row = experiments.Row("a", "sn_test_ffnn", "demo", expected=1.0, tolerance=0.1)
    monkeypatch.setitem(reproduce.TABLES, "tiny", [row])
    lines = pd.DataFrame([_trained(row, 0, status="diverged", test_accuracy=0.01)])
    assert "| a | 1.0, 1 diverged | 0 |" in reproduce.markdown("tiny", lines)
    reproduce.report("tiny", lines, Console(width=200))
    assert "1.00, 1 diverged" in capsys.readouterr().out


def test_a_block_adds_something_or_nothing_at_every_epoch():
    """In a file of four digits a branch may look like its block for once."""
    parts = [
        {"row": "a", "epoch": epoch, "layer": f"{block}_{end}", "kind": kind, "place": place, "second_moment": moment}
        for epoch, same in ((0, False), (1, True))
        for block, plain in (("b1", False), ("b2", True))
        for kind in ("activation", "gradient")
        for end, place, moment in (("branch", "branch", 1.0), ("out", "block", 1.0 if same or plain else 2.0))
    ]
    shares = signals.branch_share(pd.DataFrame(parts))
    assert list(zip(shares.epoch, shares.block, strict=True)) == [(0, "b1"), (1, "b1")]


@pytest.mark.slow
def test_a_contest_trains_and_tests(results, contest):
    gap.main("tiny", runs=results / "runs")
    table = pd.read_csv(results / "gap.csv")
    assert table.stage.value_counts().to_dict() == {"trial": 8, "final": 5}
    assert table[table.stage == "trial"].test_accuracy.isna().all()
    tested = table[table.stage == "final"].groupby("row").test_accuracy.agg(["size", "count"])
    assert sorted(map(tuple, tested.values)) == [(1, 0), (2, 2), (2, 2)]
    assert len(list((results / "runs" / "tiny").glob("*/model.keras"))) == 5


# ---------------------------------------------------------------- races, and where time goes
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_races_on_a_gpu_runs_on_a_cpu(monkeypatch, precision):
    case = benchmark.Case("jax:nf_test_resnet", 32, 4, {"nfzoo:nf_test_resnet": None}, classes=5, precision=precision)
    monkeypatch.setitem(benchmark.CASES, "tiny", case)
    (row,) = benchmark.race("tiny", rounds=2, least=1)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["our_peak_mb"] > 50


def test_a_profile_finds_the_operations_of_a_step():
    import tensorflow as tf

    x, kernel = tf.ones((4, 16, 16, 8)), tf.Variable(tf.ones((3, 3, 8, 8)))

    @tf.function(jit_compile=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.nn.conv2d(x, kernel, 1, "SAME") ** 2)
        return tape.gradient(loss, kernel)

    step()
    kinds = Counter()
    for operation, milliseconds in profiles.operations(step, repeats=3).items():
        kinds[profiles.kind_of(operation)] += milliseconds
    assert kinds["convolutions"] > 0 and kinds["convolutions, gradients"] > 0
    assert not kinds["depthwise convolutions"] and not kinds["matrix products: 1 x 1 convolutions"]
    assert profiles.kind_of("_MklNativeDepthwiseConv2dNativeBackpropFilter") == "depthwise convolutions, gradients"


def test_where_all_reach_the_final_nobody_waits_for_a_semifinal(results, contest, monkeypatch):
    monkeypatch.setitem(experiments.CONTESTS, "tiny", replace(contest, rows=contest.rows[:3], finalists=2))
    ran = []

    def train(budget, stage, row, seed, *_):
        if stage == "final" and (row.name, seed) == ("tanh", 0):
            raise engine.Taken("by another process")
        ran.append((stage, row.name, seed))
        return {"budget": budget, "stage": stage, **_trained(row, seed, val_accuracy=0.1, epochs=1)}

    monkeypatch.setattr(gap, "train", train)

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(gap.time, "sleep", sleep)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: pytest.fail("the test split is read last"))
    with pytest.raises(KeyboardInterrupt):
        gap.main("tiny", runs=results)
    assert sorted(ran[6:]) == [
        ("final", name, seed) for name, seed in [("relu", 0), ("relu", 1), ("selu", 0), ("selu", 1), ("tanh", 1)]
    ]

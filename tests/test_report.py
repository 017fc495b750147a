"""What the file of a report holds, read from its JSON; `test_report_browser.py` opens it."""

import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
from logs import make_log, write_log, write_run

from nfzoo import report
from nfzoo.report import contents


def _data(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


def test_a_run_folder_becomes_cards_options_history_and_numbers(tmp_path):
    log = make_log()
    path = report.write([write_run(tmp_path / "nf", log)], tmp_path / "new" / "report.html")
    [run] = _data(path)["runs"]
    assert (run["title"], run["model"], run["status"]) == ("nf", "nf_test_resnet", "complete")
    assert ["test accuracy", "91.5 %"] in run["facts"] and ["training", "12 s"] in run["facts"]
    assert ["recipe.optimizer.learning_rate", "0.01"] in run["options"] and run["history"]["val_loss"] == [3.5, 2.5, 2]
    signal = run["signals"][0]
    assert (signal["kind"], signal["steps"], signal["epochs"]) == ("activation", [0, 10, 20, 30], [0, 1, 2, 3])
    assert signal["layers"][:3] == ["stage1_block1_branch", "stage1_block1_out", "stage1_block2_branch"]
    assert signal["stages"] == ["stage1"] * 4 + ["stage2"] * 2 and signal["groups"][:2] == ["branch", "block"]
    expected = log[(log.kind == "activation") & (log.layer == "stage1_block2_out") & (log.step == 20)].acv.item()
    assert signal["values"]["acv"][2][3] == pytest.approx(expected, rel=1e-5)
    kinds = [signal["kind"] for signal in run["signals"]]
    assert kinds == ["activation", "gradient", "weight", "effective_weight", "weight_gradient", "parameter"]
    assert set(run["signals"][5]["values"]) == {"value", "std"} and run["signals"][5]["groups"][0] == "gamma"
    assert not list(path.parent.glob(".partial*"))


def test_numbers_keep_six_digits_and_what_is_not_finite_is_null(tmp_path):
    log = pd.DataFrame({"kind": "activation", "layer": ["a", "b", "c"], "acv": [1 / 3, np.nan, np.inf]})
    path = report.write({"by hand": log}, tmp_path / "a.html")
    [run] = _data(path)["runs"]
    assert run["signals"][0]["values"]["acv"] == [[0.333333, None, None]] and run["status"] == "log only"
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1].replace("NaN origin", "")


def test_alarms_of_a_diverged_run(tmp_path):
    log = make_log()
    log.loc[(log.step >= 20), ["acsm", "acv", "second_moment"]] = np.nan
    folder = write_run(tmp_path / "lost", log, status="diverged", diverged_at_step=7, test_accuracy=None, epochs=1)
    [run] = _data(report.write([folder], tmp_path / "a.html"))["runs"]
    assert run["status"] == "diverged" and ["diverged", "step 7 of epoch 2"] in run["facts"]
    alarms = {alarm["kind"]: alarm for alarm in run["alarms"]}
    assert alarms["NaN origin"]["step"] == 20 and "test accuracy" not in dict(run["facts"])


def test_live_records_stand_beside_those_of_the_probe(tmp_path):
    live = make_log(seed=1, source="live", first_bad=-1)
    [run] = _data(report.write({"a": pd.concat([make_log(), live])}, tmp_path / "a.html"))["runs"]
    pairs = [(signal["kind"], signal["source"]) for signal in run["signals"]]
    assert pairs[:4] == [("activation", "live"), ("activation", "probe"), ("gradient", "live"), ("gradient", "probe")]


def test_theory_is_taken_by_layer_and_statistic(tmp_path):
    folder, asked = write_run(tmp_path / "nf", make_log()), []

    def theory(options, log):
        asked.append(options["model"])
        known = {"kind": "activation", "layer": ["stage1_block1_out", "stage1_block2_out"], "acv": [1.0, 2.0]}
        return None if options["model"] == "unknown" else pd.DataFrame(known)

    page = _data(report.write({"nf": folder, "unknown": make_log()}, tmp_path / "a.html", theory=theory))
    assert asked == ["nf_test_resnet", "unknown"]
    assert page["runs"][0]["signals"][0]["theory"] == {"acv": [None, 1.0, None, 2.0, None, None]}
    assert page["runs"][1]["signals"][0]["theory"] == {}


def test_long_logs_are_thinned_and_it_is_said(tmp_path):
    rows = {"kind": "activation", "layer": "a", "step": range(1000), "epoch": 0, "acv": 1.0}
    [run] = _data(report.write({"long": pd.DataFrame(rows)}, tmp_path / "a.html"))["runs"]
    steps = run["signals"][0]["steps"]
    assert len(steps) == contents.MOST_STEPS and (steps[0], steps[-1]) == (0, 999) and run["thinned"] == 1000


def test_the_path_of_one_run_may_be_the_name_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, folder in enumerate(("a/run", "run")):
        write_log(pathlib.Path(folder), make_log(seed=i))
    runs = _data(report.write(["a/run", "run"], tmp_path / "a.html"))["runs"]
    assert [run["title"] for run in runs] == ["run", str(tmp_path / "run")]
    assert runs[0]["signals"] != runs[1]["signals"]


def test_runs_of_one_name_keep_apart(tmp_path):
    folders = [write_log(tmp_path / name / "run", make_log(seed=i)) for i, name in enumerate("ab")]
    titles = [run["title"] for run in _data(report.write(folders, tmp_path / "a.html"))["runs"]]
    assert titles == ["run", str(folders[1])]


MISTAKES = {
    "no folder": (lambda folder: None, FileNotFoundError, "does not exist"),
    "no log": (lambda folder: folder.mkdir(), FileNotFoundError, "spp.jsonl"),
    "empty log": (lambda folder: write_log(folder, pd.DataFrame()), ValueError, "no line is whole"),
    "another file": (lambda folder: write_log(folder, pd.DataFrame({"a": [1]})), ValueError, "kind and layer"),
    "damaged": (
        lambda folder: (write_run(folder, make_log()) / "metrics.json").write_text("{"),
        ValueError,
        "metrics.json",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_folder_and_leave_no_file(mistake, tmp_path):
    make, error, text = MISTAKES[mistake]
    make(tmp_path / "run_7")
    with pytest.raises(error, match="run_7") as raised:
        report.write([tmp_path / "run_7"], tmp_path / "a.html")
    assert text in str(raised.value) and not (tmp_path / "a.html").exists()


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        report.write([], tmp_path / "a.html")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = report.write({"a": make_log()}, tmp_path / "a.html")
    before = path.read_bytes()

    def full(self, text, **kwargs):
        self.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        report.write({"b": make_log()}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.html"]

"""What the README shows runs, and its tables are those of the committed results."""

import pathlib
import re
import shlex
import sys

import pandas as pd
import pytest

from nfzoo import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "training"))


@pytest.mark.parametrize("table", ["poster_table1", "first_look"])
def test_tables_are_those_of_the_results(table):
    import reproduce

    results = pd.read_csv(ROOT / "training" / "results" / f"{table}.csv")
    assert reproduce.markdown(table, results) in README


def test_demo_table_is_that_of_the_results():
    for row in pd.read_csv(ROOT / "training" / "results" / "demo.csv").itertuples():
        line = f"| {row.model} | {row.test_accuracy:.1%} | {row.test_loss:.3f} | {row.agc_clipped:.1%} |"
        assert line in README


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
LINES = [line for language, block in FENCES if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("nfzoo ")]


def test_every_command_is_shown():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {shlex.split(command)[1] for command in COMMANDS} == known


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_are_accepted(command, monkeypatch, capsys, tmp_path):
    """Those that train or scan resolve in a dry run; those that need a trained run at least say so."""
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    if words[1] in ("train", "scan", "lr-find", "doctor"):
        words.append("--dry-run")
    if words[1] == "data":
        words = ["nfzoo", "data", "--help"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as stop:
        missing = re.search("Expected (the folder of a run|weights of)", capsys.readouterr().err)
        untrained = words[1] == "spp" and words[2].startswith("runs/")  # then runs/nf reads as a model's name
        assert not stop.code or (missing and words[1] in ("eval", "export", "report", "convert")) or untrained


@pytest.mark.slow
def test_python_of_the_readme_runs(fresh_process, tmp_path):
    code = "\n".join(block for language, block in FENCES if language == "python")
    shown = f"import os; os.chdir({str(tmp_path)!r})\n{code}\nimport json; print(json.dumps(len(table)))"
    assert fresh_process(shown) > 100
    assert (tmp_path / "runs" / "sn.png").stat().st_size > 5000
    assert (tmp_path / "runs" / "first.html").stat().st_size > 1e6

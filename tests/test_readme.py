"""What the README and docs show runs, and their tables are those of the committed results."""

import pathlib
import re
import shlex
import sys
import time

import pandas as pd
import pytest
from conftest import slow_but

from nfzoo import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "training"))


def test_demo_table_is_that_of_the_results():
    for row in pd.read_csv(ROOT / "training" / "results" / "demo.csv").itertuples():
        line = f"| {row.model} | {row.test_accuracy:.1%} | {row.test_loss:.3f} | {row.agc_clipped:.1%} |"
        assert line in README


DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_pictures_and_links_exist():
    for document in (ROOT / "README.md", *DOCS):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_marked_tables_are_those_of_the_results():
    import tables

    for document in tables.DOCUMENTS:
        assert tables.filled(document.read_text()) == document.read_text(), "run: python training/tables.py"


FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
LINES = [line for language, block in FENCES if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("nfzoo ")]
_SHOWN = (line for document in DOCS for line in document.read_text().splitlines())
# "…" stands for what a reader puts there; folders of other machines are not here.
DOCUMENTED = [line for line in _SHOWN if re.match(r"nfzoo [a-z]", line) and not re.search("…|/shared/|--coord", line)]

SHOWN = list(dict.fromkeys(COMMANDS + DOCUMENTED))


def test_every_command_is_shown():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {shlex.split(command)[1] for command in COMMANDS} == known


@pytest.mark.parametrize("command", slow_but([c for c in SHOWN if "three.png" not in c], SHOWN))
def test_commands_that_are_shown_are_accepted(command, monkeypatch, capsys, tmp_path):
    """Those that train or scan resolve in a dry run; those that need a trained run at least say so."""
    words = shlex.split(command, comments=True)
    monkeypatch.chdir(tmp_path)
    if words[1] in ("train", "scan", "lr-find", "doctor"):
        words.append("--dry-run")
    if words[1] in ("data", "certify") or (words[1] == "export" and "runs/nf" not in words):  # they take long
        words = ["nfzoo", words[1], "--help"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as stop:
        missing = re.search("Expected (the folder of a run|weights of|a SavedModel)", capsys.readouterr().err)
        untrained = words[1] == "spp" and words[2].startswith("runs/")  # then runs/nf reads as a model's name
        assert (
            not stop.code
            or (missing and words[1] in ("eval", "export", "report", "convert", "serve-check"))
            or untrained
        )


# docs/agc.md has a test of its own.
PAGES = [page for page in DOCS if page.stem != "agc" and "```python" in page.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_pages_runs(page, fresh_process, tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
    assert fresh_process(f"import os; os.chdir({str(tmp_path)!r})\n{code}\nprint(1)") == 1


@pytest.mark.slow
def test_the_notebook_runs_within_three_minutes(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "quick_start.ipynb", 4)
    began = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.perf_counter() - began < 180
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2


def test_links_of_the_notebook_exist():
    text = (ROOT / "docs" / "quick_start.ipynb").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.slow
def test_python_of_the_readme_runs(fresh_process, tmp_path):
    code = "\n".join(block for language, block in FENCES if language == "python")
    shown = f"import os; os.chdir({str(tmp_path)!r})\n{code}\nimport json; print(json.dumps(len(table)))"
    assert fresh_process(shown) > 100
    assert (tmp_path / "runs" / "sn.png").stat().st_size > 5000
    assert (tmp_path / "runs" / "first.html").stat().st_size > 1e6

"""What docs/agc.md shows runs, and the cases it names are those of the correctness suite."""

import pathlib
import re
import shlex
import sys

import keras
import pytest
from agc_suite import CASES

from nfzoo import agc, cli

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "agc.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.S | re.M)
PEERS = [block for block in BLOCKS if "import torch" in block]


def _table(heading):
    """Rows of the first table below a heading, as lists of cells, without its header."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", section, re.M).group().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_python_of_the_guide_runs():
    found = {}
    exec("\n".join(block for block in BLOCKS if block not in PEERS), found)
    # SGD's step is the factor's, Adam's is not.
    assert found["sgd"] == pytest.approx([0.005, 0.0005], rel=0.01)
    assert found["adam"] == pytest.approx([0.0136, 0.0135], rel=0.01)


def test_the_measurement_of_peers_is_short_and_whole():
    assert len(PEERS) == 1 and len(PEERS[0].splitlines()) <= 25
    compile(PEERS[0], "docs/agc.md", "exec")


def test_the_suite_is_described_in_full():
    described = [name for row in _table("The correctness suite") for name in re.findall("`(.+?)`", row[0])]
    assert described == list(CASES)


def test_the_table_of_implementations_names_cases_of_the_suite():
    rows = _table("Which implementations are right")
    assert {len(row) for row in rows} == {8}
    named = {name for row in rows for name in re.findall("`(.+?)`", row[1])}
    assert named < set(CASES) and len(named) == 5
    for row in rows:
        assert row[1].startswith("✓ run")
        for cell in row[2:]:  # what is right or wrong, we say how we know
            assert not re.search("[✓✗]", cell) or re.search("run|read", cell), row


KERNELS = {
    "Dense": (keras.layers.Dense, (0,)),
    "Embedding": (keras.layers.Embedding, (0,)),
    "all but the last": (keras.layers.Conv2D, (0, 1, 2)),
    "all but the last two": (keras.layers.DepthwiseConv2D, (0, 1)),
    "all but the last but one": (keras.layers.Conv2DTranspose, (0, 1, 3)),
}


def test_the_axes_of_the_guide_are_those_of_the_code():
    assert {row[3] for row in _table("What it does")} == {"0", "all; none", *list(KERNELS)[2:]}
    for layer, axes in KERNELS.values():
        assert list(agc.UNIT_AXES[layer].values()) == [axes]


def test_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("command", re.findall(r"^    (nfzoo .+)$", DOCUMENT, re.M))
def test_commands_of_the_guide_are_accepted(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--dry-run"])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err

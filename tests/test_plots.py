"""Pictures are drawn from tables; what they show is checked on the axes, how they look by eye."""

import numpy as np
import pandas as pd
import pytest

from nfzoo import plots


def _log(epochs=3, blocks=5):
    rows = []
    for epoch in range(epochs):
        for depth in range(blocks):
            stage = 1 + depth // 2
            row = {"step": epoch * 10, "epoch": epoch, "depth": depth, "acsm": 1e-3, "acv": 2.0**depth + epoch}
            row |= {"second_moment": 1.0, "kind": "activation", "place": "block"}
            rows.append({**row, "layer": f"stage{stage}_block{1 + depth % 2}_out"})
    return pd.DataFrame(rows)


def test_profile_draws_a_line_per_epoch_and_marks_stage_ends():
    figure = plots.signal_propagation({"a": _log(), "b": _log()}, panels=("variance", "branch"))
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["at initialisation", "epoch 1", "epoch 2"]
    np.testing.assert_array_equal(lines["epoch 2"].get_ydata(), [3, 4, 6, 10, 18])
    ends = [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")]
    assert ends == [1.5, 3.5] and axes.get_yscale() == "log"
    assert [a.get_title() for a in figure.axes[:2]] == ["a", "b"]
    assert "not recorded" in figure.axes[2].texts[0].get_text()


def test_many_epochs_are_thinned_and_the_last_is_kept():
    figure = plots.signal_propagation({"a": _log(epochs=40)}, panels=("variance",))
    labels = [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert len(labels) == 6 and labels[0] == "at initialisation" and labels[-1] == "epoch 39"


def test_values_that_no_logarithm_has_leave_a_gap(tmp_path):
    log = _log(epochs=1)
    log.loc[[1, 2], "acv"] = [np.nan, np.inf]
    log.loc[3, "acv"] = 0.0
    figure = plots.signal_propagation({"a": log}, panels=("variance",))
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True, True, False]
    assert plots.save(figure, tmp_path / "new" / "spp.png").stat().st_size > 5000


def test_histories():
    run = pd.DataFrame(
        {"epoch": [1, 2], "loss": [2, 1], "val_loss": [3, 2], "accuracy": [0.1, 0.2], "val_accuracy": [0, 1]}
    )
    figure = plots.histories({"bn": run, "nf": run})
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    figure = plots.signal_propagation({"a": _log()})

    def full(path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, tmp_path / "spp.png")
    assert not list(tmp_path.iterdir())

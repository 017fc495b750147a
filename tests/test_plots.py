"""Figures are drawn from tables; what they show is checked on the axes, how they look by eye."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nfzoo import plots

LAYERS = [f"stage{1 + depth // 2}_block{1 + depth % 2}_" for depth in range(5)]
EDGES = [-1.0, -0.1, 0.0, 0.1, 1.0]
STATISTICS = ("acsm", "acv", "second_moment", "nonzero")
# kind, place, and what the layer's name ends with
KINDS = [
    ("activation", "block", "out"), ("activation", "branch", "branch"), ("activation", "activation", "act1"),
    ("gradient", "block", "out"), ("weight", "parameter", "conv1/kernel"), ("parameter", "parameter", "out/gain"),
]  # fmt: skip


def _log(epochs=3, kinds=KINDS, offset=0.0):
    """A value of its own for every kind, statistic, depth and epoch, all within two decades; in no order."""
    rows = []
    for epoch in range(epochs):
        for k, (kind, place, end) in enumerate(kinds):
            for depth, prefix in enumerate(LAYERS):
                row = {"step": 10 * epoch, "epoch": epoch, "kind": kind, "place": place, "layer": prefix + end}
                row |= {"depth": 10 * depth + k}
                row |= {name: 1 + depth + 0.1 * epoch + 0.01 * k + s + offset for s, name in enumerate(STATISTICS)}
                if kind == "parameter":
                    row |= {"value": depth - epoch, "min": depth - epoch - 0.5, "max": depth - epoch + 0.5}
                if kind == "weight":
                    row |= {"histogram": [0.0, 0.5 - 0.1 * epoch, 0.5, 0.1 * epoch, 0.0, 0.0]}
                rows.append(row)
    return pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True)


def _column(log, kind, place, name, epoch=0):
    """What a figure should show, in the order of depth."""
    rows = log[(log.kind == kind) & (log.epoch == epoch) & ((log.place == place) | (place is None))]
    return rows.sort_values("depth")[name].to_numpy()


def _theory(log):
    """A table like `nfzoo.theory.profile`'s: all but the last block, and nothing of gradients."""
    rows = log[(log.epoch == 0) & log.kind.isin(["activation", "weight"]) & (log.depth < 40)]
    return rows.assign(**{name: 0.5 * rows[name] for name in STATISTICS})


def _lines(axes):
    return {line.get_label(): line for line in axes.lines if line.get_gid() is None}


def _told(axes):
    return [line for line in axes.lines if line.get_gid() == "theory"]


def _stage_ends(axes):
    return [line.get_xdata()[0] for line in axes.lines if line.get_gid() == "stage"]


BLOCK, BRANCH, GRADIENT = ("activation", "block"), ("activation", "branch"), ("gradient", "block")
LOGS = {"a": _log(), "b": _log(offset=2)}
LOGS["b"] = LOGS["b"][LOGS["b"].place != "branch"]
# figure, axes, line, log, what it shows, epoch, whether the theory has a word on it
SHOWN = [
    ("propagation", 0, "at initialisation", "a", (*BLOCK, "acsm"), 0, True),
    ("propagation", 3, "epoch 1", "b", (*BLOCK, "acv"), 1, True),
    ("propagation", 4, "epoch 2", "a", (*BRANCH, "acv"), 2, True),
    ("propagation", 7, "epoch 2", "b", (*GRADIENT, "second_moment"), 2, False),
    ("epochs", 0, "b", "b", (*BLOCK, "acv"), 0, True),
    ("epochs", 5, "a", "a", (*GRADIENT, "second_moment"), 2, False),
    ("models", 0, "a", "a", (*BLOCK, "acv"), 0, True),
    ("models", 1, "b", "b", (*BLOCK, "acv"), 2, True),
    ("nonzero", 0, "b", "b", ("activation", "activation", "nonzero"), 0, True),
    ("nonzero", 1, "a", "a", ("activation", "activation", "nonzero"), 2, True),
    ("variance", 0, "b", "b", (*BLOCK, "acv"), 2, True),
    ("gradients", 0, "epoch 1", "a", ("gradient", None, "second_moment"), 1, False),
    ("poster", 0, "epoch 2", "a", ("activation", None, "acsm"), 2, True),
    ("poster", 3, "epoch 1", "b", ("activation", None, "acv"), 1, True),
    ("poster", 4, "at initialisation", "a", ("weight", None, "second_moment"), 0, True),
    ("poster", 7, "epoch 2", "b", ("gradient", None, "second_moment"), 2, False),
    ("resnetv2", 0, "a", "a", (*BLOCK, "acsm"), 0, True),
    ("resnetv2", 1, "b", "b", (*BLOCK, "acv"), 0, True),
    ("resnetv2", 2, "a", "a", (*BRANCH, "acv"), 0, True),
]


@pytest.fixture(scope="module")
def drawn():
    theory = {title: _theory(log) for title, log in LOGS.items()}
    names = {name for name, *_ in SHOWN}
    return {name: plots.draw(name, LOGS, theory=theory, edges=EDGES) for name in names}


def test_every_figure_is_tested_here():
    assert set(plots.FIGURES) == {name for name, *_ in SHOWN} | {"history", "heatmap", "weights", "scalars"}


@pytest.mark.parametrize("name, index, label, title, what, epoch, told", SHOWN)
def test_lines_are_the_numbers_of_the_log(drawn, name, index, label, title, what, epoch, told):
    axes = drawn[name].axes[index]
    values = _column(LOGS[title], *what, epoch)
    line = _lines(axes)[label]
    np.testing.assert_array_equal(line.get_ydata(), values)
    first = 1 if what[1] == "branch" else 0  # the stem, 0, has no branch
    np.testing.assert_array_equal(line.get_xdata(), np.arange(len(values)) + first)
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] <= 0
    expected = _column(_theory(LOGS[title]), *what[:2], what[2])
    found = [list(theory.get_ydata()) for theory in _told(axes)]
    assert (list(expected) in found) == told and bool(found) == told
    assert all(theory.is_dashed() for theory in _told(axes))


@pytest.mark.parametrize("name", ["propagation", "epochs", "models", "variance", "resnetv2"])
def test_stage_ends_are_marked(drawn, name):
    assert _stage_ends(drawn[name].axes[0]) == [1.5, 3.5]
    if name in ("propagation", "resnetv2"):
        branch = drawn[name].axes[4 if name == "propagation" else 2]
        assert _stage_ends(branch) == [2.5, 4.5]


@pytest.mark.parametrize(
    "name, titles, entries",
    [
        ("propagation", ["a", "b"], ["at initialisation", "epoch 1", "epoch 2", "theory"]),
        ("epochs", ["at initialisation", "epoch 1", "epoch 2"], ["a", "b", "theory"]),
        ("models", ["at initialisation", "at the end"], ["a", "b", "theory"]),
        ("variance", [""], ["a", "b", "theory"]),
    ],
)
def test_titles_and_the_one_legend(drawn, name, titles, entries):
    figure = drawn[name]
    assert [axes.get_title() for axes in figure.axes[: len(titles)]] == titles
    assert [text.get_text() for text in figure.legends[0].get_texts()] == entries
    assert len(figure.legends) == 1 and not any(axes.get_legend() for axes in figure.axes)


def test_what_was_not_recorded_is_said(drawn):
    without = drawn["propagation"].axes[5]  # the branches of b
    assert without.texts[0].get_text() == "not recorded" and not without.lines and not without.axison
    assert all(not axes.texts for axes in drawn["propagation"].axes if axes is not without)


@pytest.mark.parametrize("factor, scale", [(90.0, "linear"), (110.0, "log")])
def test_the_axis_is_logarithmic_beyond_two_decades_of_one_row(factor, scale):
    log = _log(1, KINDS[:2])
    log["acv"] = np.where(log.depth >= 40, factor, 1.0)
    figure = plots.signal_propagation({"a": log, "b": _log(1)}, panels=("mean", "variance"))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", scale, scale]


def _damaged(values):
    log = _log(1, KINDS[:1]).sort_values("depth", ignore_index=True)
    return log.assign(acv=values)


def test_not_finite_is_a_cross_and_zero_on_a_logarithmic_axis_a_triangle():
    logs = {"a": _damaged([1.0, np.nan, np.inf, 0.0, 1000.0]), "b": _damaged([3.0, 2.0, 0.0, 2.0, 1.0])}
    axes = plots.signal_propagation({"a": logs["a"]}, panels=("variance",)).axes[0]
    lines = _lines(axes)
    np.testing.assert_array_equal(lines["at initialisation"].get_ydata(), [1, np.nan, np.nan, np.nan, 1000])
    assert list(lines["not finite"].get_xdata()) == [1, 2] and lines["not finite"].get_marker() == "x"
    assert list(lines["zero"].get_xdata()) == [3] and lines["zero"].get_marker() == "v"
    plain = _lines(plots.signal_propagation({"b": logs["b"]}, panels=("variance",)).axes[0])
    assert list(plain) == ["at initialisation"]
    np.testing.assert_array_equal(plain["at initialisation"].get_ydata(), [3, 2, 0, 2, 1])


def test_a_squared_mean_that_is_rounding_is_zero():
    log = _damaged(1.0).assign(second_moment=1.0, acsm=[1e-14, 0.1, 2e-13, 0.2, 0.3])
    axes = plots.signal_propagation({"a": log}, panels=("mean",)).axes[0]
    np.testing.assert_array_equal(_lines(axes)["at initialisation"].get_ydata(), [0, 0.1, 0, 0.2, 0.3])
    assert axes.get_yscale() == "linear"


def test_on_a_logarithmic_axis_theory_has_a_gap_where_it_expects_zero():
    log = _damaged([1.0, 10.0, 100.0, 1000.0, 10000.0])
    theory = _theory(log)
    theory.loc[theory.depth == 10, "acv"] = 0.0
    (line,) = _told(plots.signal_propagation({"a": log}, panels=("variance",), theory={"a": theory}).axes[0])
    np.testing.assert_array_equal(line.get_ydata(), [0.5, np.nan, 50, 500])


def test_scalars_of_a_network_without_blocks_are_one_line():
    rows = [
        {"kind": "parameter", "layer": f"{name}/gamma", "depth": i, "step": 0, "epoch": 0, "value": 1.0 + i}
        for i, name in enumerate(["bn_conv1", "block_1_expand_BN", "block_1_project_BN"])
    ]
    axes = plots.draw("scalars", {"mobile": pd.DataFrame(rows)}).axes[0]
    assert [(label, list(line.get_ydata())) for label, line in _lines(axes).items()] == [("gamma", [1, 2, 3])]


def test_many_epochs_are_thinned_and_the_first_and_the_last_kept():
    logs = {"a": _log(epochs=40, kinds=KINDS[:1])}
    labels = list(_lines(plots.draw("propagation", logs, panels=("variance",)).axes[0]))
    assert len(labels) == 6 and labels[0] == "at initialisation" and labels[-1] == "epoch 39"
    titles = [axes.get_title() for axes in plots.draw("epochs", logs, panels=("variance",)).axes]
    assert len(titles) == 5 and titles[0] == "at initialisation" and titles[-1] == "epoch 39"


def test_history_shows_layers_over_epochs():
    figure = plots.draw("history", LOGS, panels=("variance", "branch"), layers=["stage3_block1_out"])
    line = _lines(figure.axes[1])["s3b1"]
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(line.get_ydata(), [8, 8.1, 8.2])  # 1 + depth 4 + acv 1 + b 2, and 0.1 per epoch
    assert [a.texts[0].get_text() for a in figure.axes[2:]] == ["not recorded"] * 2
    assert figure.axes[1].get_xlabel() == "epoch"
    many = _lines(plots.history({"a": LOGS["a"]}, panels=("variance",), most=3).axes[0])
    assert list(many) == ["s1b1", "s2b1", "s3b1"]
    with pytest.raises(ValueError, match="Expected layers of the log, such as .* Received: nowhere"):
        plots.history(LOGS, layers=["nowhere"])


def test_heatmap_is_the_table_of_layers_by_epochs():
    log = LOGS["a"].copy()
    lost = (log.layer == "stage1_block2_out") & (log.epoch == 2) & (log.kind == "activation")
    log.loc[lost, "acv"] = np.nan
    figure = plots.draw("heatmap", {"a": log, "b": LOGS["b"]})
    meshes = [axes.collections[0] for axes in figure.axes[:2]]
    expected = np.transpose([_column(log, *BLOCK, "acv", epoch) for epoch in range(3)])
    np.testing.assert_array_equal(meshes[0].get_array().filled(np.nan), expected)
    assert {mesh.get_clim() for mesh in meshes} == {(2.0, 8.2)}  # one scale for both
    cross = _lines(figure.axes[0])["not finite"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([2], [1])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"s{p[5]}b{p[12]} out" for p in LAYERS]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_gid() == "stage"] == [1.5, 3.5]


def test_weights_are_quantiles_of_the_histograms():
    logs = {"a": LOGS["a"]}
    figure = plots.draw("weights", logs, theory={"a": _theory(LOGS["a"])}, edges=EDGES)
    assert [axes.get_title() for axes in figure.axes] == ["a, at initialisation", "a, epoch 2"]
    first, last = figure.axes
    # Shares 0.5 in [-1, -0.1] and 0.5 in [-0.1, 0]; in the end 0.3, 0.5, and 0.2 in [0, 0.1].
    np.testing.assert_allclose(_lines(first)["median"].get_ydata(), [-0.1] * 5)
    np.testing.assert_allclose(_lines(last)["median"].get_ydata(), [-0.06] * 5)
    widest = [band.get_paths()[0].get_extents() for band in (first.collections[0], last.collections[0])]
    np.testing.assert_allclose([widest[0].y0, widest[0].y1], [-1 + 0.9 * 0.05, -0.005])
    np.testing.assert_allclose([widest[1].y0, widest[1].y1], [-1 + 0.9 * 0.025 / 0.3, 0.0875])
    assert first.collections[0].get_label() == "95 % of the values"
    expected = 1.96 * np.sqrt(0.5 * _column(LOGS["a"], "weight", None, "second_moment")[:4])
    bounds = [np.asarray(line.get_ydata()) for line in _told(first)]
    np.testing.assert_allclose([np.abs(b[:4]) for b in bounds], [expected] * 2)
    assert all(np.isnan(b[4]) for b in bounds)  # the theory is silent on the last layer
    with pytest.raises(ValueError, match="Expected the edges of the histograms"):
        plots.draw("weights", logs)
    with pytest.raises(ValueError, match="Expected records of kind 'effective_weight' with the statistic"):
        plots.draw("weights", logs, edges=EDGES, kind="effective_weight")


def test_scalars_are_drawn_by_block():
    logs = {"a": LOGS["a"], "b": LOGS["b"][LOGS["b"].kind != "parameter"]}
    figure = plots.draw("scalars", logs)
    lines = list(figure.axes[0].lines)
    np.testing.assert_array_equal(lines[0].get_ydata(), [-2, -1, 0, 1, 2])  # the last epoch
    np.testing.assert_array_equal(lines[0].get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(lines[1].get_ydata(), [0, 1, 2, 3, 4])  # thin: at initialisation
    assert lines[0].get_label() == "out gain" and lines[1].get_linestyle() == ":"
    extents = figure.axes[0].collections[0].get_paths()[0].get_extents()
    assert (extents.y0, extents.y1) == (-2.5, 2.5)  # from least to largest
    assert figure.axes[1].texts[0].get_text() == "not recorded"
    with pytest.raises(ValueError, match="that match 'beta'"):
        plots.scalars(logs, pattern="beta")


def test_frames_keep_the_axes(tmp_path):
    logs = {"a": LOGS["a"], "b": LOGS["b"]}
    figures = list(plots.frames(logs, panels=("variance", "branch")))
    limits = [[(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes] for figure in figures]
    assert len(figures) == 3 and limits[0] == limits[1] == limits[2]
    for epoch, figure in enumerate(figures):
        np.testing.assert_array_equal(figure.axes[0].lines[-3].get_ydata(), _column(logs["a"], *BLOCK, "acv", epoch))
    assert figures[2].get_suptitle() == "epoch 2"


@pytest.mark.parametrize("ending", [".gif", ".png"])
def test_a_film_has_a_frame_per_step(tmp_path, ending):
    (path,) = plots.animate({"a": LOGS["a"]}, tmp_path / f"film{ending}", panels=("variance",))
    with Image.open(path) as film:
        assert film.n_frames == 3
    with pytest.raises(ValueError, match="Expected a folder, or a file ending with .* Received: film.mp4"):
        plots.animate({"a": LOGS["a"]}, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_holds_the_frames_of_the_last_film_only(tmp_path):
    plots.animate({"a": LOGS["a"]}, tmp_path / "film", panels=("variance",))
    assert len(list((tmp_path / "film").iterdir())) == 3
    written = plots.animate({"a": _log(epochs=2)}, tmp_path / "film", panels=("variance",))
    assert sorted((tmp_path / "film").iterdir()) == written and [p.name for p in written] == [
        "frame-0000.png", "frame-0001.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, logs, options, message",
    [
        ("spp", LOGS, {}, "Expected the name of a figure: one of propagation, .* Received: 'spp'"),
        ("models", {}, {}, "Expected at least one log"),
        ("models", {"a": pd.DataFrame()}, {}, "for 'a'. Received: an empty table"),
        ("models", {"a": pd.DataFrame({"epoch": [1]})}, {}, "a table without depth, kind, layer"),
        ("models", LOGS, {"panels": ("kurtosis",)}, "Expected records of kurtosis of kind 'activation'"),
        ("models", LOGS, {"panels": ("heat",)}, "Expected a panel: one of mean, .* Received: 'heat'"),
        ("models", LOGS, {"at": ("middle",)}, "Received: \\['middle'\\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(name, logs, options, message):
    with pytest.raises(ValueError, match=message):
        plots.draw(name, logs, **options)


def test_histories():
    run = {"epoch": [1, 2], "loss": [2, 1], "val_loss": [3, 2], "accuracy": [0.1, 0.2], "val_accuracy": [0, 1]}
    figure = plots.histories({"bn": pd.DataFrame(run), "nf": pd.DataFrame(run)})
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [3, 2])
    without = pd.DataFrame({key: run[key] for key in ("epoch", "loss", "accuracy")})
    named = plots.histories({"bn": without}).axes[1].get_legend().get_texts()
    assert [text.get_text() for text in named] == ["bn"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = plots.signal_propagation(LOGS, panels=("variance",))
    assert plots.save(figure, tmp_path / "new" / "spp.png").stat().st_size > 5000

    def full(path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, tmp_path / "spp.png")
    assert not list(tmp_path.glob("*spp*"))


def test_a_log_that_began_later_is_not_called_initial():
    """Signals of `source="live"` start with the first steps."""
    log = pd.DataFrame(
        {"kind": "activation", "place": "block", "layer": ["stem_out", "stage1_block1_out"] * 2, "depth": [0, 1] * 2,
         "step": [79, 79, 158, 158], "epoch": [1, 1, 2, 2], "acsm": 0.1, "acv": 1.0}
    )  # fmt: skip
    titles = lambda logs: [axes.get_title() for axes in plots.compare(logs, ["variance"]).axes]  # noqa: E731
    assert titles({"a": log}) == ["epoch 1", "at the end"]
    initial = log.assign(step=log.step - 79, epoch=log.epoch - 1)
    assert titles({"a": initial}) == ["at initialisation", "at the end"]
    assert titles({"a": log, "b": initial}) == ["at first", "at the end"]

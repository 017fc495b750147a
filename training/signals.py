"""Measure signal propagation, draw docs/figures, print the tables of docs/signal_propagation.md.

    python training/signals.py resnetv2_profiles
    python training/signals.py ffnn_gradients --data-dir ~/tensorflow_datasets
    python training/signals.py all --draw

What training/results has is not measured again; --draw measures nothing. TABLE.csv has a line per run or network (what
was run, on what); TABLE_signals.csv the signals, as `nfzoo.spp.read` gives them.
"""

import datetime
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import pictures
import typer
from experiments import PROFILES, Profile, Row
from matplotlib.figure import Figure
from PIL import Image
from reproduce import RESULTS, add, read, run_missing
from rich.console import Console

from nfzoo.cli import quiet_start

with quiet_start():
    import keras

    import nfzoo
    from nfzoo import data, engine, plots, recipes, spp, theory
    from nfzoo.engine.training import PROBE_SIZE
    from nfzoo.files import atomic, waited_for

FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
COLUMNS = ["row", "seed", "step", "epoch", "kind", "place", "layer", "depth"]
STATISTICS = ["acsm", "acv", "second_moment", "nonzero", "value"]
POSTER_EPOCHS = (1, 10, 20)  # the poster counts from 0, and averages over the batches of the epoch


# ------------------------------------------------------------ files
def signals_of(table: str) -> pd.DataFrame:
    path = RESULTS / f"{table}_signals.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)


def add_signals(table: str, row: str, seed: int, rows: pd.DataFrame) -> None:
    """Put the signals of one run or network into the table's file, in place of those that may be there."""
    rows = rows.assign(row=row, seed=seed)
    rows = rows[COLUMNS + [name for name in rows.columns if name not in COLUMNS]]
    with waited_for(RESULTS), atomic(RESULTS / f"{table}_signals.csv") as partial:
        before = signals_of(table)
        before = before[(before.row != row) | (before.seed != seed)]
        (pd.concat([before, rows]) if len(before) else rows).to_csv(partial, index=False, float_format="%.4g")


def split(signals: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {name: rows for name, rows in signals.groupby("row", sort=False)}


# ------------------------------------------------------------ networks at initialisation
def profile(row: Profile, seed: int) -> pd.DataFrame:
    """Signals by block of one draw of weights; noise and batch are the same for all."""
    keras.utils.set_random_seed(seed)
    shape = (row.size, row.size, 3)
    x = np.random.default_rng(0).standard_normal((row.batch, *shape)).astype("float32")
    net = nfzoo.build(row.model, input_shape=shape, **row.build)
    return spp.snapshot(net, x, taps="blocks", what=("activations",)).assign(step=0, epoch=0)


def measure_profiles(table: str, data_dir: str | None, runs: pathlib.Path, console: Console) -> None:
    path, key = RESULTS / f"{table}.csv", ["row", "model", "build", "size", "batch", "seed"]
    done = read(path, key)
    for row in PROFILES[table]:
        build = json.dumps(row.build, sort_keys=True)
        for seed in row.seeds:
            line = dict(zip(key, [row.name, row.model, build, row.size, row.batch, seed], strict=True))
            if (done[key].astype(str) == list(map(str, line.values()))).all(axis=1).any():
                continue
            console.print(f"[bold]{row.name}[/], seed {seed}")
            add_signals(table, row.name, seed, profile(row, seed))
            where = engine.environment()
            line |= {"date": datetime.date.today().isoformat(), "commit": where["commit"], "machine": where["machine"]}
            line |= {"versions": json.dumps(where["versions"])}
            done = add(path, line, key)


def compare(row: Profile, signals: pd.DataFrame) -> pd.DataFrame:
    """Expected against measured, the mean over draws: quantity, block, expected, measured, std, deviation (relative).

    Of a range (branches, means) both ends are compared. Where a mean of zero is expected, its range is a bound, and
    what keeps it deviates by 0.
    """
    mine = signals[signals.row == row.name]
    of = lambda place, name: mine[mine.place == place].pivot(index="seed", columns="depth", values=name)  # noqa: E731
    variance, mean, branch = of("block", "acv"), of("block", "acsm").iloc[:, 1:], of("branch", "acv")
    lines = [("variance", block, expected, variance.iloc[:, block]) for block, expected in row.variance.items()]
    square = of("block", "second_moment")
    lines += [("square", block, expected, square.iloc[:, block]) for block, expected in row.square.items()]
    for name, ends, values in (("branch", row.branch, branch), ("mean", row.mean, mean)):
        if ends and ends[0]:
            lines.append((name, "least", ends[0], values.min(axis=1)))
        if ends:
            lines.append((name, "most", ends[1], values.max(axis=1)))
    table = pd.DataFrame(
        [(row.name, q, b, e, v.mean(), v.std(), v.min(), v.max()) for q, b, e, v in lines],
        columns=["row", "quantity", "block", "expected", "measured", "std", "min", "max"],
    )
    table["deviation"] = table.measured / table.expected - 1
    if row.mean and not row.mean[0]:
        bound = table.quantity == "mean"
        table.loc[bound, "deviation"] = table.deviation.clip(lower=0)
    return table


def profile_tables(signals: pd.DataFrame) -> str:
    lines = [
        "| network | compared | largest deviation, % | median, % | within 10 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    tables = []
    for row in PROFILES["resnetv2_profiles"]:
        table = compare(row, signals)
        tables.append(table)
        for quantity, part in table.dropna(subset="deviation").groupby("quantity", sort=False):
            size = 100 * part.deviation.abs()
            within = f"{(size <= 100 * row.tolerance).sum()} of {len(size)}"
            lines.append(f"| {row.name} | {quantity} | {size.max():.1f} | {size.median():.1f} | {within} |")
    with atomic(RESULTS / "resnetv2_profiles_expected.csv") as partial:
        pd.concat(tables).to_csv(partial, index=False, float_format="%.4g")
    return "\n".join(lines)


def expected(row: Profile) -> pd.DataFrame:
    return theory.profile(row.model, row.build, input_shape=(row.size, row.size, 3), batch=row.batch)


def profile_figures(signals: pd.DataFrame) -> dict[str, Figure]:
    logs = split(signals[signals.seed == 0])
    figures = {}
    for depth in ("50", "600"):
        rows = {row.name.split(", ")[1]: row for row in PROFILES["resnetv2_profiles"] if row.name.startswith(depth)}
        measured = {title: logs[row.name] for title, row in rows.items()}
        told = {title: expected(row) for title, row in rows.items()}
        figures[f"resnetv2_{depth}"] = plots.draw("resnetv2", measured, theory=told)
    return figures


# ------------------------------------------------------------ networks in training
def measure_runs(keep: Callable[[Row, int, pathlib.Path], pd.DataFrame]) -> Callable:
    def measure(table: str, data_dir: str | None, runs: pathlib.Path, console: Console) -> None:
        def collect(row: Row, seed: int, folder: pathlib.Path) -> None:
            rows = keep(row, seed, folder)
            add_signals(table, row.name, seed, rows[[c for c in COLUMNS + STATISTICS if c in rows]])

        run_missing(table, data_dir, runs, console, collect=collect)

    return measure


def keep_linear(row: Row, seed: int, folder: pathlib.Path) -> pd.DataFrame:
    """Every epoch: all signals of the first seed, of the others the gradients at the linear layers."""
    log = spp.read(folder)
    log = log[~log.layer.str.startswith("hidden_out") & (log.kind != "weight_gradient")]
    return log if seed == row.seeds[0] else linear_gradients(log)


def keep_poster_epochs(row: Row, seed: int, folder: pathlib.Path) -> pd.DataFrame:
    """Initialisation and the epochs that the poster shows; of a shorter run, its last."""
    log = spp.read(folder)
    shown = log.epoch.isin((0, *POSTER_EPOCHS)) | (log.epoch == log.epoch.max())
    return log[shown & (log.kind != "weight_gradient")]


def keep_activations(row: Row, seed: int, folder: pathlib.Path) -> pd.DataFrame:
    """Variance and non-zero ratio of block outputs on the probe images, and skip gains, before and after training."""
    options = engine.read_options(folder)
    recipe = recipes.Recipe.model_validate(options["recipe"])
    images = data.load(recipe.data, recipe.seed)
    x, _ = data.Batches(data.subset(images.train, PROBE_SIZE), PROBE_SIZE, images.mean, images.std)[0]
    keras.utils.set_random_seed(recipe.seed)
    new = nfzoo.build(row.model, classes=len(images.classes), input_shape=x.shape[1:], **options["build"])
    asked = {"taps": "*_out", "what": ("activations", "parameters"), "statistics": ("acsm", "acv", "nonzero")}
    parts = [
        spp.snapshot(net, x, **asked).assign(step=epoch, epoch=epoch)
        for epoch, net in ((0, new), (recipe.epochs, engine.load_run(folder)))
    ]
    log = pd.concat(parts)
    return log[(log.kind == "activation") | log.layer.str.contains("_sum/gain")]


# ------------------------------------------------------------ FFNN
def linear_gradients(signals: pd.DataFrame) -> pd.DataFrame:
    """Second moment of the loss' gradient at the ten linear layers' outputs: the poster's "ACSM" of rank-2 tensors."""
    linear = signals.layer.str.match(r"hidden_linear\d+$|head$")
    return signals[(signals.kind == "gradient") & linear]


def levels(signals: pd.DataFrame) -> pd.DataFrame:
    """Per row, seed and epoch: geometric mean over the ten linear layers; largest over smallest; that of the eight of
    equal width, between the first and the classifier.

    Example:
        Ten layers whose second moments are 1, 2, 4, … 512: level 2^4.5, ratio 512, inner 128.
    """
    lines = []
    for (row, seed, epoch), part in linear_gradients(signals).groupby(["row", "seed", "epoch"], sort=False):
        values, inner = part.second_moment, part.second_moment[~part.layer.isin(["hidden_linear1", "head"])]
        level = float(np.exp(np.log(values).mean()))
        lines.append((row, seed, epoch, level, values.max() / values.min(), inner.max() / inner.min()))
    return pd.DataFrame(lines, columns=["row", "seed", "epoch", "level", "ratio", "inner"])


def ffnn_tables(signals: pd.DataFrame) -> str:
    """Means over seeds, with least and largest."""
    lines = [
        "| network | epoch | geometric mean | largest / smallest | of the eight of equal width | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def cell(values: pd.Series, digits: int) -> str:
        text = f"{values.mean():.{digits}g}"
        return text if len(values) == 1 else f"{text} ({values.min():.{digits}g} to {values.max():.{digits}g})"

    table = levels(signals)
    for (row, epoch), part in table[table.epoch.isin((0, *POSTER_EPOCHS))].groupby(["row", "epoch"], sort=False):
        cells = [cell(part.level, 2), cell(part.ratio, 3), cell(part.inner, 3)]
        lines.append(f"| {row} | {epoch} | {' | '.join(cells)} | {len(part)} |")
    return "\n".join(lines)


def ffnn_figures(signals: pd.DataFrame) -> dict[str, Figure]:
    seed = signals.seed.iloc[0]
    return {"ffnn_gradients": plots.draw("gradients", split(linear_gradients(signals[signals.seed == seed])))}


# ------------------------------------------------------------ EfficientNet, the poster's Figures 4 and 5
def efficientnet_figures(signals: pd.DataFrame) -> dict[str, Figure]:
    return {"efficientnet_signals": plots.draw("poster", split(signals))}


def efficientnet_tables(signals: pd.DataFrame) -> str:
    """First and last block, and the span in between, by epoch."""
    blocks = signals[(signals.place == "block") & (signals.kind == "activation")]
    gradients = signals[(signals.place == "block") & (signals.kind == "gradient")]
    lines = [
        "| network | epoch | variance, first → last block | gradient, last → first block |", "| --- | --- | --- | --- |"
    ]  # fmt: skip
    for (row, epoch), part in blocks.groupby(["row", "epoch"], sort=False):
        back = gradients[(gradients.row == row) & (gradients.epoch == epoch)].sort_values("depth").second_moment
        forth = part.sort_values("depth").acv
        ends = [f"{values.iloc[i]:.1e}" for values, i in ((forth, 0), (forth, -1), (back, -1), (back, 0))]
        lines.append(f"| {row} | {epoch} | {ends[0]} → {ends[1]} | {ends[2]} → {ends[3]} |")
    return "\n".join(lines)


# ------------------------------------------------------------ EUNNet, its Figures 5 and 7
def eunnet_figures(signals: pd.DataFrame) -> dict[str, Figure]:
    return {"eunnet_activations": plots.signal_propagation(split(signals), ("variance", "nonzero"))}


def eunnet_tables(signals: pd.DataFrame) -> str:
    lines = ["| network | epoch | quantity | by block (0: stem) |", "| --- | --- | --- | --- |"]
    quantities = {"variance": ("block", "acv"), "non-zero ratio": ("block", "nonzero"), "scale": ("parameter", "value")}
    for (row, epoch), part in signals.sort_values("depth").groupby(["row", "epoch"]):
        for name, (place, column) in quantities.items():
            values = " ".join(f"{value:.2g}" for value in part[part.place == place][column])
            lines += [f"| {row} | {epoch} | {name} | {values} |"] if values else []
    return "\n".join(lines)


# ------------------------------------------------------------ residual branches, docs/closing-the-gap.md
SIDE_BY_SIDE = ("BN", "SN, MP", "NF, gain 1, plain depthwise")
BRANCHES = (
    *SIDE_BY_SIDE, "NF, gain 1, plain", "NF, AGC 0.01", "NF, no AGC", "NF, AGC 0.01, small stem", "BN, small stem",
    "GN", "SkipInit", "no BN, He by fan-in",
)  # fmt: skip


def keep_blocks(row: Row, seed: int, folder: pathlib.Path) -> pd.DataFrame:
    """Outputs of blocks and branches, and the gradients there, at every epoch."""
    log = spp.read(folder)
    kept = log[log.kind.isin(("activation", "gradient")) & log.place.isin(("block", "branch"))]
    return kept.dropna(axis="columns", how="all")


def branch_share(signals: pd.DataFrame) -> pd.DataFrame:
    """What a residual branch brings to its block, relative to the output: row, epoch, block, weight, share.

    The share is the mean square of the branch times w^2, where w is its weight in the merge. out = a skip + w branch
    sends back w times the gradient at out: w^2 is the ratio of two gradients' mean squares, whatever w is made of.
    """
    table = signals.assign(block=signals.layer.str.rsplit("_", n=1).str[0]).pivot_table(
        index=["row", "epoch", "block"], columns=["kind", "place"], values="second_moment"
    )
    # Where nothing is added the branch is the block, at every epoch; in a file of four digits it may look so at one.
    adds = table.activation.branch != table.activation.block
    table = table[adds.groupby(level=["row", "block"]).transform("any")]
    square = table.gradient.branch / table.gradient.block
    share = square * table.activation.branch / table.activation.block
    return pd.DataFrame({"weight": np.sqrt(square), "share": share}).dropna().reset_index()


def gap_figures(signals: pd.DataFrame) -> dict[str, Figure]:
    logs = split(signals)
    shares = branch_share(pd.concat([logs[name] for name in BRANCHES if name in logs]))
    order = {name: place for place, name in enumerate(BRANCHES)}
    return {
        "gap_branches": pictures.branches(shares.sort_values("row", key=lambda names: names.map(order), kind="stable")),
        "gap_signals": plots.signal_propagation({name: logs[name] for name in SIDE_BY_SIDE if name in logs}),
    }


def gap_tables(signals: pd.DataFrame) -> str:
    """Median over the residual blocks of a stage, at some epochs."""
    shares = branch_share(signals[signals.row.isin(BRANCHES)]).assign(stage=lambda t: t.block.str.split("_").str[0])
    stages = sorted(shares.stage.unique())
    lines = [f"| network | epoch | {' | '.join(stages)} |", "| --- | --- |" + " --- |" * len(stages)]
    medians = shares.groupby(["row", "epoch", "stage"]).share.median().unstack()[stages]
    for (row, epoch), part in medians.iterrows():
        if epoch in (0, *POSTER_EPOCHS):
            lines.append(f"| {row} | {epoch} | {' | '.join(f'{value:.1e}' for value in part)} |")
    return "\n".join(lines)


# ------------------------------------------------------------ the command
@dataclass(frozen=True)
class Experiment:
    """How to measure a table; its figures by name; its tables as markdown."""

    measure: Callable | None  # None: another script collects the signals
    figures: Callable[[pd.DataFrame], dict[str, Figure]]
    tables: Callable[[pd.DataFrame], str]


EXPERIMENTS = {
    "resnetv2_profiles": Experiment(measure_profiles, profile_figures, profile_tables),
    "ffnn_gradients": Experiment(measure_runs(keep_linear), ffnn_figures, ffnn_tables),
    "eunnet_activations": Experiment(measure_runs(keep_activations), eunnet_figures, eunnet_tables),
    "efficientnet_signals": Experiment(measure_runs(keep_poster_epochs), efficientnet_figures, efficientnet_tables),
    "gap": Experiment(None, gap_figures, gap_tables),
}


def main(
    table: str,
    data_dir: Annotated[str | None, typer.Option(help="of tensorflow-datasets; default: TFDS_DATA_DIR")] = None,
    runs: Annotated[pathlib.Path, typer.Option(help="where the runs go")] = pathlib.Path("runs/experiments"),
    draw: Annotated[bool, typer.Option("--draw", help="from training/results alone, measure nothing")] = False,
) -> None:
    """Measure a table's signals ("all" for all tables), draw its figures, print its tables."""
    if table not in (*EXPERIMENTS, "all"):
        raise typer.BadParameter(f"Expected all, or one of {', '.join(EXPERIMENTS)}. Received: {table!r}")
    console = Console()
    for name in EXPERIMENTS if table == "all" else [table]:
        experiment = EXPERIMENTS[name]
        if not draw and experiment.measure:
            experiment.measure(name, data_dir, runs, console)
        signals = signals_of(name)
        if signals.empty:
            console.print(f"{name}: not measured yet")
            continue
        print(f"\n{name}\n\n{experiment.tables(signals)}\n")
        FIGURES.mkdir(parents=True, exist_ok=True)
        for figure, drawing in experiment.figures(signals).items():
            path = plots.save(drawing, FIGURES / f"{figure}.png")
            with atomic(path) as partial:  # a palette takes a third of the bytes
                Image.open(path).quantize(64).save(partial, "PNG", optimize=True)
            print(path)


if __name__ == "__main__":
    typer.run(main)

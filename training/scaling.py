"""How time and memory of a training step grow with batch, resolution and depth.

    python training/scaling.py           # measures what is missing in training/results/scaling.csv, then draws
    python training/scaling.py --draw    # draws the committed measurements

Each point is a process of its own, with all cores to itself. docs/figures/scaling.png shows them.
"""

import pathlib
import statistics
from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import typer
from benchmark import Case, Contestant, facts
from rich.console import Console

RESULTS = pathlib.Path(__file__).parent / "results" / "scaling.csv"
FIGURE = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "scaling.png"
VARIANTS = ("bn", "nf", "sn")
KEY = ["axis", "variant", "value"]


@dataclass(frozen=True)
class Axis:
    """What grows, over which values, and the case of a value."""

    label: str
    values: tuple[int, ...]
    size: int = 32
    batch: int = 32

    def case(self, name: str, variant: str, value: int) -> Case:
        architecture = f"resnet{value}_cifar" if name == "depth" else "efficientnet_b0"
        size = value if name == "resolution" else self.size
        batch = value if name == "batch" else self.batch
        return Case(f"nfzoo:{variant}_{architecture}", size, batch, {}, classes=100)


AXES = {
    "batch": Axis("images per step (EfficientNet-B0, 32 px)", (16, 32, 64, 128, 256)),
    "resolution": Axis("pixels of a side (EfficientNet-B0, batch 16)", (32, 64, 96, 128), batch=16),
    "depth": Axis("layers (ResNet of CIFAR, 32 px, batch 32)", (20, 32, 56, 110)),
}


def measure(case: Case, rounds: int) -> dict:
    contestant = Contestant(case, case.ours)
    try:
        contestant.warm_up(3)
        for _ in range(rounds):
            contestant.run()
        return {
            "ms": 1000 * statistics.median(contestant.seconds), "least_ms": 1000 * min(contestant.seconds),
            "peak_mb": contestant.peak_mb(), "build_s": contestant.build_seconds, "rounds": rounds,
        }  # fmt: skip
    finally:
        contestant.process.kill()


def draw(table: pd.DataFrame):
    """Time above, memory below, an axis per column."""
    from nfzoo.plots.style import COLOURS, new_figure, styled

    @styled
    def figure():
        made = new_figure(11, 6)
        grid = made.subplots(2, len(AXES), squeeze=False)
        for column, (name, axis) in enumerate(AXES.items()):
            for row, (key, label) in enumerate((("ms", "training step, ms"), ("peak_mb", "peak memory, MB"))):
                ax = grid[row][column]
                for number, variant in enumerate(VARIANTS):
                    got = table[(table.axis == name) & (table.variant == variant)].sort_values("value")
                    ax.plot(got.value, got[key], marker="o", color=COLOURS[number], label=variant)
                ax.set(xlabel=axis.label if row else "", ylabel="" if column else label, xlim=(0, None), ylim=(0, None))
        grid[0][0].legend(frameon=False)
        return made

    return figure()


def main(
    rounds: Annotated[int, typer.Option(help="turns of half a second; their median counts")] = 5,
    only_draw: Annotated[bool, typer.Option("--draw", help="measure nothing")] = False,
) -> None:
    """Measure what is missing, print it, draw it."""
    from reproduce import add, read

    from nfzoo import plots

    console = Console()
    table = read(RESULTS, KEY)
    for name, axis in () if only_draw else AXES.items():
        for value in axis.values:
            for variant in VARIANTS:
                if ((table.axis == name) & (table.variant == variant) & (table.value == value)).any():
                    continue
                case = axis.case(name, variant, value)
                with console.status(f"{name} {value}: {case.ours}"):
                    row = {"axis": name, "variant": variant, "value": value, "model": case.ours.partition(":")[2],
                           "size": case.size, "batch": case.batch, **measure(case, rounds), **facts()}  # fmt: skip
                console.print(f"{name} {value} {variant}: {row['ms']:.1f} ms, {row['peak_mb']:.0f} MB")
                rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                table = add(RESULTS, rounded, KEY)
    print(plots.save(draw(table), FIGURE))


if __name__ == "__main__":
    typer.run(main)

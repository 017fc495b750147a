"""Certify every variant in every family, and write training/results/certify.csv.

    python training/certify.py              # what is missing; --markdown prints the table of docs and README

The networks are the zoo's small rows: whether examples are independent is decided by variant and family, not by size.
Some of full size are measured beside them.
"""

import json
import pathlib
from typing import Annotated

import pandas as pd
import typer
from benchmark import facts
from reproduce import add, read
from rich.console import Console
from rich.progress import track

from nfzoo.cli import quiet_start

with quiet_start():
    from nfzoo import certify, names

RESULTS = pathlib.Path(__file__).parent / "results" / "certify.csv"
KEY = ["model", "build"]
READINGS = [  # of what EUN standardizes by, and RescaleNet without its centring biases
    *((f"eun_test_{family}", {"statistics": one}) for family in ("efficientnet", "resnet")
      for one in ("channel_l2", "per_channel_batch")),
    *((f"rescale_test_{family}", {"prebias": False}) for family in ("efficientnet", "resnet")),
]  # fmt: skip
FULL = ["bn_efficientnet_b0", "sn_efficientnet_b0", "nf_efficientnet_b0", "bn_resnet50", "nf_resnet50", "dm_nfnet_f0"]


def networks() -> list[tuple[str, dict]]:
    """Names and overrides, in the order of the table."""
    small = [(name, {}) for name in names.list_models("*_test_*", tests=True)]
    return [*small, *READINGS, *((name, {}) for name in FULL)]


def markdown(results: pd.DataFrame) -> str:
    """The table: a row per network, the largest relative difference of each check."""
    lines = [
        f"| network | {' | '.join(certify.CHECKS)} | independent |",
        "| --- |" + " --- |" * (len(certify.CHECKS) + 1),
    ]
    for _, row in results.iterrows():
        options = ", ".join(f"{k}={v}" for k, v in json.loads(row.build).items())
        values = " | ".join(f"{row[check]:.0e}" for check in certify.CHECKS)
        name = row.model + (f" ({options})" if options else "")
        lines.append(f"| {name} | {values} | {'yes' if row.independent else 'no'} |")
    return "\n".join(lines)


def main(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the CSV and stop")] = False,
) -> None:
    """Certify what has no row yet."""
    results = read(RESULTS, KEY)
    if as_markdown:
        print(markdown(results))
        return
    done = set(zip(results.model, results.build, strict=True))
    missing = [(name, build) for name, build in networks() if (name, json.dumps(build)) not in done]
    common = facts()
    for name, build in track(missing, "networks", console=Console()):
        with quiet_start():
            found = certify.certify(name, **build)
        row = {
            "model": name, "build": json.dumps(build), **found.differences, "independent": found.independent,
            **common,
        }  # fmt: skip
        results = add(RESULTS, {**row, **{name: float(f"{x:.2e}") for name, x in found.differences.items()}}, KEY)
    print(markdown(results))


if __name__ == "__main__":
    typer.run(main)

"""Where the time of a contestant's step goes, by kind of operation: the cases of benchmark.py that miss their aim,
or meet it by little.

    python training/profiles.py                 # measure, and print
    python training/profiles.py --markdown      # of training/results/profiles.csv

TensorFlow's own profiler times every operation. Operations run side by side on the cores, so that their times add up to
more than a step takes.
"""

import pathlib
import re
import tempfile
import time
from collections import Counter
from typing import Annotated

import pandas as pd
import typer
from benchmark import CASES, Case, facts
from contestants import step_of
from rich.console import Console

from nfzoo.files import atomic

RESULTS = pathlib.Path(__file__).parent / "results" / "profiles.csv"
# Case, contestant: ours, and what it is to be compared with.
PROFILED = [
    ("nf_resnet50", "nfzoo:nf_resnet50"),
    ("agc", "agc:nf_efficientnet_b0"),
    ("agc", "nfzoo:nf_efficientnet_b0"),
    ("latency_nf_resnet50_batch1", "folded:nf_resnet50"),
    ("latency_nf_resnet50_batch1", "folded:bn_resnet50"),
]
# The first that is found in the name of an operation.
KINDS = {
    "convolutions, gradients": "Conv2DBackprop",
    "depthwise convolutions, gradients": "DepthwiseConv2dNativeBackprop",
    "depthwise convolutions": "DepthwiseConv2d",
    "convolutions": "Conv2D",
    "matrix products: 1 x 1 convolutions": "MatMul",
    "standardization of kernels": "BatchNorm",
    "sums, means and pools": "Sum|Mean|AddN|BiasAddGrad|Pool",
    "variables": "Variable|ResourceApply",
    "activations, products and copies": "",
}


def kind_of(operation: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, operation))


def operations(step, repeats: int) -> Counter:
    """Milliseconds of one step by the type of operation."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(repeats):
            step()
        tf.profiler.experimental.stop()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    spent = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # "node:Operation"; "Class::Function" is what runs them.
                if found := re.fullmatch(r"[^:]+:(\w+)", plane.event_metadata[event.metadata_id].name):
                    spent[found[1]] += event.duration_ps / 1e9 / repeats
    return spent


def profile(case: Case, contestant: str, repeats: int) -> dict[str, float]:
    """Milliseconds of one step by kind of operation, and "step": of the whole, on the clock."""
    step = step_of(case, contestant)
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    spent = {"step": 1000 * (time.perf_counter() - start) / repeats}
    for operation, milliseconds in operations(step, repeats).items():
        spent[kind_of(operation)] = spent.get(kind_of(operation), 0.0) + milliseconds
    return spent


def markdown(results: pd.DataFrame) -> str:
    """Milliseconds of a step by kind of operation, a column per contestant."""
    table = results.pivot_table(index="kind", columns=["case", "contestant"], values="ms", sort=False).fillna(0.0)
    order = [kind for kind in (*KINDS, "step") if kind in table.index]
    names = [f"{contestant}, {CASES[case].size} px, batch {CASES[case].batch}" for case, contestant in table.columns]
    lines = [f"| ms | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for kind, row in table.loc[order].iterrows():
        lines.append(f"| {kind} | {' | '.join(f'{value:.1f}' for value in row)} |")
    return "\n".join(lines)


def main(
    repeats: Annotated[int, typer.Option(help="steps that are timed")] = 10,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the CSV and stop")] = False,
) -> None:
    """Measure where time goes, and write training/results/profiles.csv."""
    if not as_markdown:
        rows = []
        for case, contestant in PROFILED:
            with Console().status(f"{contestant}, {case}"):
                spent = profile(CASES[case], contestant, repeats)
            rows += [{"case": case, "contestant": contestant, "kind": k, "ms": round(ms, 3)} for k, ms in spent.items()]
        with atomic(RESULTS) as partial:
            pd.DataFrame([{**row, **facts()} for row in rows]).to_csv(partial, index=False)
    print(markdown(pd.read_csv(RESULTS)))


if __name__ == "__main__":
    typer.run(main)

"""Time training steps of nfzoo against its peers, and what watching and feeding them costs, and print the ratios.

    python training/benchmark.py            # every case whose peers are installed
    python training/benchmark.py --list

Each contestant is a process of its own with all cores; the processes take turns, a few steps each, so that both see the
same machine. A ratio is nfzoo's time over the peer's, the median over the rounds: below 1 nfzoo is faster. Rows are
appended to training/results/benchmark.csv. timm (with PyTorch) is optional: `pip install torch timm`.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results" / "benchmark.csv"


@dataclass(frozen=True)
class Case:
    """One comparison: the same network, batch and work for each contestant."""

    ours: str
    """A model, of the same dialect as the first peer, so that both do the same work; or "contestant:model"."""
    size: int
    batch: int
    peers: tuple[str, ...]
    """"library:model"."""
    target: float | None = None
    """Largest ratio that we accept against the first peer."""
    options: dict = field(default_factory=dict)
    """Of `nfzoo.build`."""
    classes: int = 1000


CASES = {
    "nfnet_f0": Case("dm_nfnet_f0", 192, 4, ("timm:dm_nfnet_f0",), 0.95, {"dropout_rate": 0.0}),
    "nf_resnet50": Case("nf_resnet50", 224, 8, ("timm:nf_resnet50",), 0.9, {"dialect": "timm"}),
    "efficientnet_b0_32px": Case(
        "bn_efficientnet_b0", 32, 128, ("keras.applications:EfficientNetB0", "timm:tf_efficientnet_b0"), classes=100
    ),
    # What it costs to look, in training steps. An epoch of CIFAR-100's 40,000 training images has 312 steps of 128: one
    # default probe at its end may take 3 % of that.
    **{
        f"{what}_{short}": Case(f"{what}:{model}", size, batch, (f"nfzoo:{model}",), target, options, classes)
        for short, model, size, batch, options, classes in (
            ("b0", "bn_efficientnet_b0", 32, 128, {}, 100),
            ("nf_resnet50", "nf_resnet50", 224, 8, {"dialect": "timm"}, 1000),
        )
        for what, target in (("probe", 0.03 * 312), ("full_probe", 2.5), ("live", 1.15))
    },
    # What feeds a step: a batch by a recipe's augmentation, three times as fast as the step of 32x32 images it is for.
    **{
        f"input_pipeline_{recipe}": Case(
            f"batches:{recipe}", 32, 128, ("nfzoo:nf_efficientnet_b0",), 1 / 3, classes=100
        )
        for recipe in ("poster", "nfnet")
    },
}


# ---------------------------------------------------------------- contestants: each returns a function of one step
def _compiled(model):
    import keras

    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _nfzoo_model(name: str, case: Case, images):
    import nfzoo

    return _compiled(nfzoo.build(name, classes=case.classes, input_shape=images.shape[1:], **case.options))


def nfzoo_step(name: str, case: Case, images, labels):
    model = _nfzoo_model(name, case, images)
    return lambda: model.train_on_batch(images, labels)


def probe_step(name: str, case: Case, images, labels):
    """One measurement with the callback's default settings."""
    return _probe(name, case, images, labels)


def full_probe_step(name: str, case: Case, images, labels):
    """One measurement of all layers, all statistics, all kinds."""
    from nfzoo import spp

    return _probe(name, case, images, labels, taps="layers", statistics="all", what=spp.WHAT)


def _probe(name: str, case: Case, images, labels, **options):
    from nfzoo import spp

    model = _nfzoo_model(name, case, images)
    probe = spp.Probe(model, loss=model.loss, **options)
    return lambda: probe(images, labels)


def live_step(name: str, case: Case, images, labels):
    """A training step that keeps the statistics of its own tensors, default settings."""
    from nfzoo import spp

    model = _nfzoo_model(name, case, images)
    spp.SignalPropagation(source="live").set_model(model)
    return lambda: model.train_on_batch(images, labels)


def batches_step(name: str, case: Case, images, labels):
    """One shuffled batch of 8-bit images, augmented and standardized as a recipe says; no network."""
    import itertools

    import numpy as np

    from nfzoo import data, recipes

    recipe = recipes.override(recipes.get(name), {"batch_size": case.batch})
    rng, n = np.random.default_rng(0), 100 * case.batch
    split = data.Split(
        rng.integers(0, 256, (n, case.size, case.size, 3), np.uint8), rng.integers(0, case.classes, n).astype("int32")
    )
    none, classes = split.take(slice(0)), tuple(map(str, range(case.classes)))
    stream = data.pipeline(data.Images(split, none, none, classes, (0.5,) * 3, (0.25,) * 3, "noise"), recipe)["train"]
    steps = itertools.cycle(range(len(stream)))
    return lambda: stream[next(steps)]


def keras_step(name: str, case: Case, images, labels):
    import keras

    options = {"weights": None, "classes": case.classes, "classifier_activation": None}
    model = getattr(keras.applications, name)(input_shape=images.shape[1:], **options)
    _compiled(model)
    return lambda: model.train_on_batch(images, labels)


def timm_step(name: str, case: Case, images, labels):
    import timm
    import torch

    model = timm.create_model(name, num_classes=case.classes).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()

    def step():
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


CONTESTANTS = {
    "nfzoo": nfzoo_step, "probe": probe_step, "full_probe": full_probe_step, "live": live_step, "batches": batches_step,
    "keras.applications": keras_step, "timm": timm_step,
}  # fmt: skip
PACKAGES = {"timm": ("torch", "timm")}  # beside what nfzoo needs


def work(case_name: str, contestant: str) -> None:
    """Contestant's process: build, warm up, then for every number read from stdin do so many steps, print seconds."""
    import numpy as np

    case, (library, name) = CASES[case_name], contestant.split(":")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case.batch, case.size, case.size, 3)).astype("float32")
    labels = rng.integers(0, case.classes, case.batch)
    began = time.perf_counter()
    step = CONTESTANTS[library](name, case, images, labels)
    built = time.perf_counter() - began
    for _ in range(3):
        step()
    print(json.dumps(built), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps((time.perf_counter() - began) / int(line)), flush=True)


# ---------------------------------------------------------------- the race
class Contestant:
    """A process that waits for its turn."""

    def __init__(self, case: str, name: str):
        command = [sys.executable, __file__, "--work", case, name]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.name, self.process = name, subprocess.Popen(command, text=True, env=quiet, **pipes)
        self.build_seconds, self.seconds = self._read(), []

    def _read(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Expected a time from {self.name}. Received: its process ended")
        return json.loads(line)

    def run(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.seconds.append(self._read())


def installed(contestant: str) -> bool:
    return all(importlib.util.find_spec(package) for package in PACKAGES.get(contestant.split(":")[0], ()))


def race(case_name: str, rounds: int, steps: int) -> list[dict]:
    """Let the contestants of a case take turns; return one row per peer."""
    case = CASES[case_name]
    present = [
        case.ours if ":" in case.ours else f"nfzoo:{case.ours}",
        *(peer for peer in case.peers if installed(peer)),
    ]
    with contextlib.ExitStack() as stack:
        contestants = []
        for name in present:
            contestants.append(Contestant(case_name, name))
            stack.callback(contestants[-1].process.kill)
        for _ in range(rounds):
            for contestant in contestants:
                contestant.run(steps)
    ours, *peers = contestants
    return [
        {
            "case": case_name, "peer": peer.name, "size": case.size, "batch": case.batch,
            "ratio": statistics.median(a / b for a, b in zip(ours.seconds, peer.seconds, strict=True)),
            "target": case.target if peer.name == case.peers[0] else None,
            "our_ms": 1000 * statistics.median(ours.seconds), "peer_ms": 1000 * statistics.median(peer.seconds),
            "our_build_s": ours.build_seconds, "rounds": rounds, "steps": steps,
        }
        for peer in peers
    ]  # fmt: skip


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(CASES)}; default: all")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each contestant")] = 7,
    steps: Annotated[int, typer.Option(help="training steps per turn")] = 3,
    list_: Annotated[bool, typer.Option("--list", help="show the cases and stop")] = False,
    record: Annotated[bool, typer.Option(help="append to training/results/benchmark.csv")] = True,
) -> None:
    """Time training steps of nfzoo against its peers, and signal propagation and data against training steps."""
    console = Console()
    unknown = set(cases or ()) - CASES.keys()
    if unknown:
        raise typer.BadParameter(f"Expected cases among {', '.join(CASES)}. Received: {', '.join(sorted(unknown))}")
    if list_:
        for name, case in CASES.items():
            console.print(f"{name}: {case.ours} {case.size}x{case.size}, batch {case.batch}, against {case.peers}")
        return
    view = Table("case", "peer", "ratio", "at most", "nfzoo ms", "peer ms", title="nfzoo over peer")
    rows = []
    for name in cases or CASES:
        absent = [peer for peer in CASES[name].peers if not installed(peer)]
        if absent:
            console.print(f"{name}: {', '.join(absent)} not installed (pip install torch timm): left out")
        with console.status(f"{name}: building and racing"):
            rows += race(name, rounds, steps)
    for row in rows:
        target = f"{row['target']:.3g}" if row["target"] else ""
        numbers = (f"{row['ratio']:.2f}", target, f"{row['our_ms']:.0f}", f"{row['peer_ms']:.0f}")
        view.add_row(row["case"], row["peer"], *numbers)
    console.print(view)
    if record and rows:
        _record(rows)


def _record(rows: list[dict]) -> None:
    from nfzoo import engine

    facts = engine.environment()
    common = {
        "date": datetime.date.today().isoformat(), "commit": facts["commit"], "machine": facts["machine"],
        "versions": json.dumps(facts["versions"]),
    }  # fmt: skip
    new = pd.DataFrame([{**row, **common} for row in rows]).round(4)
    new.to_csv(RESULTS, mode="a", header=not RESULTS.exists(), index=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4])
    else:
        typer.run(main)

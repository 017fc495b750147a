"""Time nfzoo against its peers, training and inference, and what watching and feeding cost, and print the ratios.

    python training/benchmark.py            # every case whose peers are installed; those of a GPU where there is one
    python training/benchmark.py --list
    KERAS_BACKEND=jax python training/benchmark.py $(python training/benchmark.py --list | grep -o "^gpu_[a-z0-9_]*")

Each contestant is a process of its own with all cores; the processes take turns, a few steps each, so that both see the
same machine. A ratio is nfzoo's time over the peer's, the median over the rounds: below 1 nfzoo is faster. Rows are
appended to training/results/benchmark.csv. Peers are optional: `pip install torch timm`; for keras_cv_attention_models
on legacy Keras (kecam) `pip install keras-cv-attention-models tf-keras`.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pandas as pd
import typer
from contestants import ENVIRONMENTS, PACKAGES
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results" / "benchmark.csv"


@dataclass(frozen=True)
class Case:
    """One comparison: the same network, batch and work for each contestant.

    Attributes:
        ours: a contestant and a model, "folded:nf_resnet50"; a training step if there is a model alone. It is of the
            same dialect as the peers, so that all do the same work.
        peers: contestant → the largest ratio to it that we accept, or None.
        options: of `nfzoo.build`.
        precision: "float32" (GPUs multiply in TF32, everybody's) or "bfloat16" (mixed); of the contestants of a GPU.
    """

    ours: str
    size: int
    batch: int
    peers: dict[str, float | None]
    options: dict = field(default_factory=dict)
    classes: int = 1000
    precision: str = "float32"


_TIMM = {"dialect": "timm"}
_F0 = {"dropout_rate": 0.0}
_B0 = "efficientnet_b0"

TRAINING = {
    "nfnet_f0": Case("dm_nfnet_f0", 192, 4, {"timm:dm_nfnet_f0": 0.85, "kecam:nfnets.NFNetF0": None}, _F0),
    "nf_resnet50": Case("nf_resnet50", 224, 8, {"timm:nf_resnet50": 0.8}, _TIMM),
    "efficientnet_b0_32px": Case(
        "bn_efficientnet_b0", 32, 128,
        {"keras.applications:EfficientNetB0": 0.9, "timm:tf_efficientnet_b0": 1.0,
         "kecam:efficientnet.EfficientNetV1B0": None},
        classes=100,
    ),
    "sn_against_bn": Case(f"sn_{_B0}", 32, 128, {f"nfzoo:bn_{_B0}": 0.75}, classes=100),
    "nf_against_bn": Case(f"nf_{_B0}", 32, 128, {f"nfzoo:bn_{_B0}": None}, classes=100),
    "agc": Case(f"agc:nf_{_B0}", 32, 128, {f"nfzoo:nf_{_B0}": 1.03}, classes=100),
    # EUNNet's Table 6: memory of training against its BN twin.
    **{
        f"memory_{variant}_resnet50": Case(f"{variant}_resnet50", 224, 16, {"nfzoo:bn_resnet50": None})
        for variant in ("fixup", "rescale", "eun", "nf")
    },
    # What it costs to look, in training steps. An epoch of CIFAR-100's 40,000 training images has 312 steps of 128: one
    # default probe at its end may take 3 % of that.
    **{
        f"{what}_{short}": Case(f"{what}:{model}", size, batch, {f"nfzoo:{model}": target}, options, classes)
        for short, model, size, batch, options, classes in (
            ("b0", "bn_efficientnet_b0", 32, 128, {}, 100),
            ("nf_resnet50", "nf_resnet50", 224, 8, _TIMM, 1000),
        )
        for what, target in (("probe", 0.03 * 312), ("full_probe", 2.5), ("live", 1.15))
    },
    # What feeds a step: a batch by a recipe's augmentation, three times as fast as the step of 32x32 images it is for.
    **{
        f"input_pipeline_{recipe}": Case(f"batches:{recipe}", 32, 128, {f"nfzoo:nf_{_B0}": 1 / 3}, classes=100)
        for recipe in ("poster", "nfnet")
    },
}  # fmt: skip
INFERENCE = {
    **{
        f"latency_nf_resnet50_batch{batch}": Case(
            "folded:nf_resnet50", 224, batch,
            {"infer:nf_resnet50": 0.6 if batch == 1 else None, "folded:bn_resnet50": 1.0,
             "timm_infer:nf_resnet50": None, "timm_infer:resnet50": None}, _TIMM,
        )
        for batch in (1, 16)
    },
    "latency_nfnet_f0": Case(
        "folded:dm_nfnet_f0", 192, 1,
        {"timm_infer:dm_nfnet_f0": None, "infer:dm_nfnet_f0": None, "kecam_infer:nfnets.NFNetF0": None}, _F0,
    ),
    **{
        f"latency_{variant}_b0": Case(
            f"folded:{variant}_{_B0}", 224, 1,
            {f"infer:{variant}_{_B0}": None, f"folded:bn_{_B0}": None, "keras_infer:EfficientNetB0": None},
        )
        for variant in ("sn", "nf")
    },
    "exported_nf_resnet50": Case(
        "folded:nf_resnet50", 224, 1,
        {f"{kind}:nf_resnet50": None for kind in ("saved_model", "litert", "onnx", "portable")}, _TIMM,
    ),
}  # fmt: skip
BEGINNINGS = {
    "import": Case("import:nfzoo", 8, 1, {"import:keras": None, "import:tensorflow": None, "import:timm": None}),
    "build_efficientnet_b0": Case(
        "build:bn_efficientnet_b0", 224, 1,
        {"keras_build:EfficientNetB0": None, "kecam_build:efficientnet.EfficientNetV1B0": None},
    ),
    "build_nfnet_f0": Case("build:dm_nfnet_f0", 192, 1, {"kecam_build:nfnets.NFNetF0": None}),
}  # fmt: skip
# Training steps on one GPU: nfzoo on JAX, timm in PyTorch as it is and compiled.
GPU = {
    f"gpu_{model}_{precision}": Case(
        f"jax:{model}", size, 128, {f"timm:{timm}": None, f"timm_compiled:{timm}": None}, options, precision=precision
    )
    for precision in ("float32", "bfloat16")
    for model, size, timm, options in (
        ("dm_nfnet_f0", 192, "dm_nfnet_f0", _F0),
        ("nf_resnet50", 224, "nf_resnet50", _TIMM),
        *((f"{variant}_{_B0}", 224, f"tf_{_B0}", {}) for variant in ("bn", "nf", "sn")),
    )
}
CASES = {**TRAINING, **INFERENCE, **BEGINNINGS, **GPU}


# ---------------------------------------------------------------- the race
class Contestant:
    """A process that waits for its turn."""

    def __init__(self, case: Case, name: str):
        work = pathlib.Path(__file__).with_name("contestants.py")
        command = [sys.executable, str(work), json.dumps(dataclasses.asdict(case)), name]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENTS.get(name.split(":")[0], {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.name, self.process = name, subprocess.Popen(command, text=True, env=quiet, **pipes)
        self.build_seconds, self.seconds, self.steps = self._read(), [], 1

    def _read(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Expected a time from {self.name}. Received: its process ended")
        return json.loads(line)

    def _ask(self, line: str | int) -> float:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._read()

    def warm_up(self, least: int) -> None:
        """Choose how many steps a turn has: half a second of them."""
        self.steps = max(least, min(200, round(0.5 / self._ask(least))))

    def run(self) -> None:
        self.seconds.append(self._ask(self.steps))

    def peak_mb(self) -> float:
        return self._ask("peak")


def installed(contestant: str) -> bool:
    kind, name = contestant.split(":")
    needed = (name,) if kind == "import" else PACKAGES.get(kind, ())
    return all(importlib.util.find_spec(package) for package in needed)


def race(case_name: str, rounds: int, least: int) -> list[dict]:
    """Let the contestants of a case take turns; return one row per peer."""
    case = CASES[case_name]
    ours_name = case.ours if ":" in case.ours else f"nfzoo:{case.ours}"
    with contextlib.ExitStack() as stack:
        contestants = []
        for name in (ours_name, *(peer for peer in case.peers if installed(peer))):
            contestants.append(Contestant(case, name))
            stack.enter_context(contestants[-1].process)  # which waits, and closes its pipes
            stack.callback(contestants[-1].process.kill)
            contestants[-1].warm_up(least)
        for _ in range(rounds):
            for contestant in contestants:
                contestant.run()
        ours, *peers = contestants
        return [_row(case_name, case, ours, peer) for peer in peers]


def _row(name: str, case: Case, ours: Contestant, peer: Contestant) -> dict:
    ratios = sorted(a / b for a, b in zip(ours.seconds, peer.seconds, strict=True))
    return {
        "case": name, "peer": peer.name, "size": case.size, "batch": case.batch,
        "ratio": statistics.median(ratios), "target": case.peers[peer.name],
        "our_ms": 1000 * statistics.median(ours.seconds), "peer_ms": 1000 * statistics.median(peer.seconds),
        "our_build_s": ours.build_seconds, "rounds": len(ratios), "steps": ours.steps,
        "ratio_min": ratios[0], "ratio_max": ratios[-1], "our_peak_mb": ours.peak_mb(), "peer_peak_mb": peer.peak_mb(),
        "peer_build_s": peer.build_seconds,
    }  # fmt: skip


_SHOWN = (("our_ms", 1), ("peer_ms", 1), ("our_peak_mb", 0), ("peer_peak_mb", 0))


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(CASES)}; default: all")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each contestant")] = 7,
    steps: Annotated[int, typer.Option(help="least steps per turn")] = 3,
    list_: Annotated[bool, typer.Option("--list", help="show the cases and stop")] = False,
    record: Annotated[bool, typer.Option(help="append to training/results/benchmark.csv")] = True,
) -> None:
    """Time training steps and inference of nfzoo against its peers; signal propagation and data against steps."""
    console = Console()
    unknown = set(cases or ()) - CASES.keys()
    if unknown:
        raise typer.BadParameter(f"Expected cases among {', '.join(CASES)}. Received: {', '.join(sorted(unknown))}")
    if list_:
        for name, case in CASES.items():
            peers = ", ".join(case.peers)
            console.print(f"{name}: {case.ours} {case.size}x{case.size}, batch {case.batch}, against {peers}")
        return
    heads = ("case", "peer", "ratio", "min … max", "at most", "nfzoo ms", "peer ms", "nfzoo MB", "peer MB")
    view = Table(*heads, title="nfzoo over peer")
    rows = []
    for name in cases or (case for case in CASES if case not in GPU or shutil.which("nvidia-smi")):
        absent = [peer for peer in CASES[name].peers if not installed(peer)]
        if absent:
            console.print(f"{name}: {', '.join(absent)} not installed: left out")
        with console.status(f"{name}: building and racing"):
            found = race(name, rounds, steps)
        rows += found
        if record:
            _record(found)
    for row in rows:
        target = f"{row['target']:.3g}" if row["target"] else ""
        spread = f"{row['ratio_min']:.2f} … {row['ratio_max']:.2f}"
        numbers = (f"{row[key]:.{digits}f}" for key, digits in _SHOWN)
        view.add_row(row["case"], row["peer"], f"{row['ratio']:.2f}", spread, target, *numbers)
    console.print(view)


def facts() -> dict[str, str]:
    """Date, commit, machine and versions, as columns."""
    from nfzoo import engine

    known = engine.environment()
    return {
        "date": datetime.date.today().isoformat(), "commit": known["commit"], "machine": known["machine"],
        "versions": json.dumps(known["versions"]),
    }  # fmt: skip


def _record(rows: list[dict]) -> None:
    from nfzoo.files import atomic, waited_for

    common = facts()
    new = pd.DataFrame([{**row, **common} for row in rows]).round(4)
    with waited_for(RESULTS.parent), atomic(RESULTS) as partial:
        before = [pd.read_csv(RESULTS)] if RESULTS.exists() else []
        pd.concat([*before, new]).to_csv(partial, index=False)


if __name__ == "__main__":
    typer.run(main)

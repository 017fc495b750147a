"""The main job on real images in a few minutes: train BN, SN and NF EfficientNet-B0, watch, compare, export.

    python training/demo.py --out runs/demo

Each model is an ordinary run: stop it and start it again, and it goes on where it was.
"""

import pathlib
import shutil

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from nfzoo.cli import quiet_start

with quiet_start():
    from nfzoo import engine, export, plots, recipes, spp
    from nfzoo.files import atomic

MODELS = ("bn_efficientnet_b0", "sn_efficientnet_b0", "nf_efficientnet_b0")
EXPORTED = "sn_efficientnet_b0"
RECORDED = ("fingerprint", "commit", "machine", "versions")


def main(out: pathlib.Path = pathlib.Path("runs/demo"), epochs: int = recipes.get("demo").epochs) -> None:
    """Train three networks on real digits with AGC and signal propagation; write plots and a SavedModel."""
    console = Console()
    recipe = recipes.override(recipes.get("demo"), {"epochs": epochs})
    rows = []
    view = Table("model", "test accuracy", "test loss", "units clipped", "images/s", title="digits, test split")
    for model in MODELS:
        console.rule(model)
        metrics = engine.run(model, recipe, out / model, console=console)
        if metrics["status"] != "complete":
            raise SystemExit(f"{model} diverged at step {metrics['diverged_at_step']}; see {out / model}")
        clipped = f"{metrics['agc_clipped']:.1%}"
        speed = f"{metrics['images_per_second']:.0f}"
        rows.append(
            {
                "model": model,
                "seed": recipe.seed,
                **metrics,
                **{k: engine.read_options(out / model)[k] for k in RECORDED},
            }
        )
        view.add_row(model, f"{metrics['test_accuracy']:.1%}", f"{metrics['test_loss']:.3f}", clipped, speed)
    signals = plots.signal_propagation({model: spp.read(out / model) for model in MODELS})
    histories = plots.histories({model: pd.read_csv(out / model / "history.csv") for model in MODELS})
    artefact = out / "saved_models" / EXPORTED
    shutil.rmtree(artefact, ignore_errors=True)
    entry = export.export(out / EXPORTED, artefact)
    console.rule()
    console.print(view)
    print(f"signal propagation   {plots.save(signals, out / 'signal_propagation.png')}")
    print(f"loss and accuracy    {plots.save(histories, out / 'history.png')}")
    with atomic(out / "results.csv") as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)
    difference = entry["largest_relative_difference"]
    print(f"SavedModel           {artefact} (reloaded: differs by {difference:.0e})")


if __name__ == "__main__":
    typer.run(main)

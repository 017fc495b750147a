"""What eight bits cost: test accuracy of the kept CIFAR-100 networks before and after quantization, in LiteRT.

    python training/int8.py --data-dir ~/tensorflow_datasets

Each network is folded, quantized after training by 256 training images, reloaded by LiteRT, and evaluated on all test
images. Writes training/results/int8.csv.
"""

import pathlib
import tempfile
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from benchmark import facts
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nfzoo.cli import quiet_start

with quiet_start():
    from nfzoo import data, export, recipes
    from nfzoo.export import runtimes
    from nfzoo.files import atomic

RESULTS = pathlib.Path(__file__).parent / "results" / "int8.csv"
NETWORKS = ("bn_efficientnet_b0.cifar100", "sn_efficientnet_b0.cifar100", "nf_efficientnet_b0.cifar100")


def accuracy(path: pathlib.Path, x: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy of an artefact, in its own runtime."""
    run, _ = runtimes.load(path)
    classes = np.concatenate([run(batch).argmax(-1) for batch in np.array_split(x, max(1, len(x) // 250))])
    return float((classes == labels).mean())


def measured(name: str, images: data.Images) -> dict:
    """One row: the network in float32 and in 8 bits."""
    test, calibration = (
        data.Batches(split, len(split), images.mean, images.std)[0][0]
        for split in (images.test, data.subset(images.train, 256))
    )
    row = {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        for kind, bits in (("float32", None), ("int8", "int8")):
            path = pathlib.Path(folder) / f"{kind}.tflite"
            entry = export.export(name, path, quantize=bits, images=calibration)
            row |= {
                f"{kind}_accuracy": accuracy(path, test, images.test.labels),
                f"{kind}_mb": entry["bytes"] / 1e6,
                f"{kind}_ms": entry["latency_ms"],
            }
    return row


def main(
    data_dir: Annotated[str | None, typer.Option(help="of tensorflow-datasets; default: TFDS_DATA_DIR")] = None,
    limit: Annotated[int | None, typer.Option(help="use so many test images, and record nothing")] = None,
) -> None:
    """Measure what quantization to 8 bits costs each kept network."""
    console = Console()
    images = data.load(recipes.Data(name="cifar100", data_dir=data_dir))
    if limit:
        images = data.Images(**{**vars(images), "test": data.subset(images.test, limit)})
    with quiet_start():
        rows = [measured(name, images) for name in track(NETWORKS, "networks", console=console)]
    view = Table("network", "float32 %", "int8 %", "float32 MB", "int8 MB", "float32 ms", "int8 ms")
    for row in rows:
        shown = [f"{100 * row[f'{kind}_accuracy']:.2f}" for kind in ("float32", "int8")]
        shown += [f"{row[f'{kind}_{what}']:.2f}" for what in ("mb", "ms") for kind in ("float32", "int8")]
        view.add_row(row["model"], *shown)
    console.print(view)
    if limit is None:
        common = {"images": len(images.test), **facts()}
        with atomic(RESULTS) as partial:
            pd.DataFrame([{**row, **common} for row in rows]).round(4).to_csv(partial, index=False)


if __name__ == "__main__":
    typer.run(main)

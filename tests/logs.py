"""Logs of signal propagation made by hand, as the callback and the engine leave them."""

import json

import numpy as np
import pandas as pd

EDGES = [-1.0, -0.1, 0.1, 1.0]


def make_log(blocks=3, epochs=4, seed=0, **columns):
    """A log as the callback writes it: every kind, values that no two rows share."""
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(epochs):
        for i in range(blocks):
            name = f"stage{1 + i // 2}_block{1 + i % 2}"
            where = {"step": 10 * epoch, "epoch": epoch, "place": "layer", "depth": i}
            for kind in ("activation", "gradient"):
                for place, ending in (("branch", "branch"), ("block", "out")):
                    mean, variance = 10.0 ** rng.uniform(-2, 2, 2)
                    values = {
                        "acsm": mean,
                        "acv": variance,
                        "second_moment": mean + variance,
                        "dead": rng.uniform(0, 1),
                    }
                    histogram = rng.dirichlet(np.ones(len(EDGES) + 1)).tolist() if kind == "activation" else None
                    at = {**where, "place": place, "depth": 2 * i + (place == "block")}
                    rows.append({**at, "kind": kind, "layer": f"{name}_{ending}", **values, "histogram": histogram})
            for kind in ("weight", "effective_weight", "weight_gradient"):
                more = {"update_to_weight": 10.0 ** rng.uniform(-4, -2)} if kind == "weight" and epoch else {}
                more |= {"agc_clipped": rng.uniform(), "to_weight": rng.uniform()} if kind == "weight_gradient" else {}
                values = dict(zip(("acsm", "acv", "second_moment"), rng.uniform(size=3), strict=True))
                rows.append({**where, "kind": kind, "layer": f"{name}_conv1/kernel", **values, **more})
            for leaf in ("gamma", "skip_gain"):
                at = {**where, "kind": "parameter", "place": "parameter", "layer": f"{name}_norm1/{leaf}"}
                rows.append({**at, "value": rng.normal(), "std": rng.uniform()})
    return pd.DataFrame(rows).assign(**columns)


def write_log(folder, log):
    folder.mkdir(parents=True)
    records = [{k: v for k, v in row.items() if isinstance(v, list) or pd.notna(v)} for row in log.to_dict("records")]
    (folder / "spp.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_run(folder, log, **metrics):
    """A folder as the engine leaves it."""
    write_log(folder, log)
    recipe = {"seed": 3, "optimizer": {"learning_rate": 0.01}}
    options = {"model": "nf_test_resnet", "build": {"alpha": 0.1}, "recipe": recipe, "images": {"name": "digits"}}
    metrics = {"status": "complete", "epochs": 3, "seconds": 12.3, "test_accuracy": 0.915, "test_loss": 0.25} | metrics
    meta = {"model": "nf_test_resnet", "edges": EDGES, "definitions": {"acv": "A definition of its own."}}
    for name, content in (("options", options), ("metrics", metrics), ("spp_meta", meta)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    history = {"epoch": [1, 2, 3], "loss": [3, 2, 1.5], "val_loss": [3.5, 2.5, 2], "accuracy": [0.1, 0.4, 0.5]}
    pd.DataFrame(history | {"val_accuracy": [0.1, 0.3, 0.4]}).to_csv(folder / "history.csv", index=False)
    return folder

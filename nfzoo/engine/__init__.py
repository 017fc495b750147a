"""Train and evaluate: one flat function per job, and a folder that tells everything about its run.

A run's folder holds options.json (model, recipe, versions, commit, command), history.csv, spp.jsonl, checkpoints/,
and at the end model.keras and metrics.json. Running the same command again resumes, or returns the result.
"""

from nfzoo.engine.devices import Devices
from nfzoo.engine.folder import Taken, environment, options, read_metrics, read_options
from nfzoo.engine.learning import loss, optimizer
from nfzoo.engine.training import run
from nfzoo.engine.use import evaluate, load_run

__all__ = [
    "Devices", "Taken", "environment", "evaluate", "load_run", "loss", "optimizer", "options", "read_metrics",
    "read_options", "run",
]  # fmt: skip

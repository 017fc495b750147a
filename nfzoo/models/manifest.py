"""Write manifest.json, the counts of every model: `python -m nfzoo.models.manifest`."""

import json
import pathlib

import keras
from rich.progress import track

from nfzoo import names, registry

if __name__ == "__main__":
    lines = []
    for name in track(names.table(), description="counting"):
        lines.append(f"{json.dumps(name)}: {json.dumps(registry.measure(name))}")
        keras.utils.clear_session()
    path = pathlib.Path(__file__).with_name("manifest.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

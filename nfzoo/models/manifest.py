"""Write manifest.json, the counts of every model: `python -m nfzoo.models.manifest`."""

import json
import pathlib

from nfzoo import registry

if __name__ == "__main__":
    counts = {name: registry.measure(name) for name in registry.list_models(tests=True)}
    path = pathlib.Path(__file__).with_name("manifest.json")
    path.write_text(json.dumps(counts, indent=1) + "\n")

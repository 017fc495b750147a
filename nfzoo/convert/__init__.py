"""Weights of other implementations, in and out: timm, DeepMind's nfnets, keras.applications.

    model = nfzoo.convert.load("nf_resnet50", "timm", "nf_resnet50.safetensors")
    model = nfzoo.build("nf_resnet50", weights="timm")  # what timm has published, see nfzoo.convert.published
    nfzoo.convert.save(model, "mine.safetensors", target="timm")

A source is a module with `DIALECTS` (the readings it can hold, its own first), `IGNORED` (patterns of tensors without a
counterpart), `read(weights, name)` → {name: array}, `rule(name, spec)` → function from our variable paths to its
names, and `to_keras(value, shape)`.
"""

from nfzoo.convert.driver import load, save

__all__ = ["load", "save"]

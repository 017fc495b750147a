"""What signal propagation should look like at initialisation, computed without a network: no Keras here.

`profile` gives the expected statistics of every layer of a model of this zoo as a table like a log's, so that whatever
draws a log draws the theory beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from nfzoo import names
from nfzoo.models.sites import Site
from nfzoo.theory.moments import Moments, UnknownFunction
from nfzoo.theory.words import WORDS

__all__ = ["Moments", "of_run", "profile"]


def profile(
    model: str, build: Mapping[str, Any] | None = None, *, input_shape: tuple | None = None,
    batch: int | None = None, stem: tuple[float, float] | None = None, classes: int | None = None,
    definition: str = "channel",
) -> pd.DataFrame:  # fmt: skip
    """Compute the expected statistics of every layer and kernel of a freshly initialised model.

    The image is white noise of mean 0 and variance 1. For a pre-activation network this comes to the papers' rules:
    NF starts each stage at 1 + alpha^2 and adds alpha^2 per block; BN starts it at 2r and adds r, with
    r = 1 - 1/pi in the order BN-ReLU-Conv and 2 in the order ReLU-BN-Conv (He's weights); an unnormalised network
    doubles its second moment in every block.

    Args:
        model: name of a model, or an alias.
        build: overrides as of `nfzoo.build`: fields of the variant or of the architecture.
        input_shape: (height, width, channels) of the image, to count what borders padded with zeros take; default: a
            map so large that they take nothing.
        batch: number of examples measured, to count how far the mean over them is from the expected one.
        stem: measured (acsm, acv) after the stem, to go on from there: photos are no white noise.
        classes: units of the classifier; default: the architecture's.
        definition: as of `nfzoo.SignalPropagation`; "poster" takes weights and dense layers as flat vectors.

    Returns:
        A row per layer that has moments of its own: step 0, epoch 0, kind ("activation", "weight",
        "effective_weight"), layer, depth (counted here), mean, acsm, acv, second_moment, nonzero.

    Raises:
        ValueError: for an unknown model, definition or activation.
        TypeError: for an override that is no field.

    Example:
        >>> table = profile("nf_resnet50", {"skip_gain": 1.0, "stem": "small"})
        >>> table[table.layer == "stage2_block3_out"].acv.round(2).tolist()  # 1 + 3 alpha^2
        [1.12]

    References: De & Smith 2020 (arXiv 2002.10444); NF-ResNet paper (arXiv 2101.08692), sections 3 and 4; Poole et al.
    2016 (arXiv 1606.05340).
    """
    if definition not in ("channel", "poster"):
        raise ValueError(f'Expected definition "channel" or "poster". Received: definition={definition!r}')
    name = names.parse(model)
    words, spec = names.resolve_fields(name, dict(build or {}), WORDS)
    words.stem = stem
    plain = not hasattr(spec, "stem")  # a network without convolutions needs the number of its inputs
    shape = input_shape or (spec.input_shape if plain else (None, None, 3))
    x, _ = names.FAMILIES[name.family].body(spec, words, Moments((batch, *shape)))
    words.head(words.leave(x, Site("top", role="top")), classes or spec.classes, spec.head_scheme)
    rows = [("activation", layer, _of_map(x, definition)) for layer, x in words.maps.items()]
    for path, (raw, effective, fan_in) in words.kernels.items():
        rows.append(("weight", path, _of_kernel(raw, 1 / fan_in, definition)))
        if effective is not None:  # standardized: no mean is left
            rows.append(("effective_weight", path, _of_kernel(effective, 0.0, definition)))
    columns = {"step": 0, "epoch": 0}
    return pd.DataFrame(
        [{**columns, "kind": k, "layer": layer, "depth": i, **row} for i, (k, layer, row) in enumerate(rows)]
    )


def of_run(options: Mapping[str, Any], log: pd.DataFrame | None = None) -> pd.DataFrame | None:
    """The theory of a run, by its options.json; None for a model that is not of this zoo, or of an unknown activation.

    Args:
        options: content of options.json ("model", "build", "images", "signals").
        log: signals of the run; what was measured after the stem at initialisation is where the theory sets out, since
            photos are no white noise.

    Example:
        >>> of_run({"model": "bn_resnet50", "build": {}}).kind.unique().tolist()
        ['activation', 'weight']
        >>> of_run({"model": "my_net"}) is None
        True
    """
    model, build, images = options.get("model"), options.get("build") or {}, options.get("images") or {}
    if model not in names.table() and model not in names.aliases():
        return None
    known = {"classes": len(images["classes"])} if images.get("classes") else {}
    if images.get("shape"):
        known["input_shape"] = tuple(images["shape"])
    name = names.parse(model)
    mattering = {field.name for thing in (WORDS[name.variant], name.spec) for field in fields(thing)}
    build = {key: value for key, value in build.items() if key in mattering}  # not: weights, pooling, …
    known["definition"] = (options.get("signals") or {}).get("definition", "channel")
    try:
        return profile(model, build, stem=None if log is None else _measured_stem(log), **known)
    except UnknownFunction:
        return None


def _measured_stem(log: pd.DataFrame) -> tuple[float, float] | None:
    """ACSM and ACV after the stem, where they were recorded at initialisation."""
    if not {"kind", "layer", "acsm", "acv"} <= set(log.columns):
        return None
    first = log[(log.kind == "activation") & (log.layer == "stem_out")]
    first = first[(first.step == 0) & (first.acv > 0)] if "step" in first else first
    return None if first.empty else (float(first.acsm.iloc[0]), float(first.acv.iloc[0]))


def _of_map(x: Moments, definition: str) -> dict[str, float]:
    # The mean over n values scatters by their variance / n, which a measured variance then lacks.
    found = 0.0 if None in x.shape else x.scatter * x.acv / math.prod(x.shape[:-1])
    values = {"mean": x.mean, "acsm": x.acsm + found, "acv": x.acv - found}
    if definition == "poster" and len(x.shape) == 2:
        values |= {"acsm": x.second_moment, "acv": x.second_moment - x.mean**2}
    return {**values, "second_moment": x.second_moment, "nonzero": x.nonzero}


def _of_kernel(variance: float, mean_share: float, definition: str) -> dict[str, float]:
    """Statistics of weights whose units have a squared mean of `mean_share` of the variance, expected."""
    flat = definition == "poster"
    acsm, acv = (variance, variance) if flat else (variance * mean_share, variance * (1 - mean_share))
    return {"mean": 0.0, "acsm": acsm, "acv": acv, "second_moment": variance, "nonzero": float(variance > 0)}

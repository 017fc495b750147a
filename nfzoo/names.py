"""Model names: generated from tables, parsed, listed, resolved to a variant and a spec. No Keras before `resolve`.

A name is `<variant>_<row>`, from the rows of every family and the variants it admits. Other libraries' names are
aliases.
"""

import difflib
import fnmatch
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import ModuleType
from typing import Any

from nfzoo.models import efficientnet, ffnn, nfnet, regnet, resnet

FAMILIES: dict[str, ModuleType] = {
    "efficientnet": efficientnet, "resnet": resnet, "nfnet": nfnet, "regnet": regnet, "ffnn": ffnn,
}  # fmt: skip
USER_MODELS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Name:
    """A parsed model name; `overrides` are what a foreign name implies beyond variant and row."""

    variant: str
    row: str
    family: str
    overrides: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.variant}_{self.row}"

    @property
    def spec(self) -> Any:
        return FAMILIES[self.family].SPECS[self.row]


@cache
def table() -> dict[str, Name]:
    """All generated names, tiny test rows included."""
    found = {}
    for family, module in FAMILIES.items():
        for row in module.SPECS:
            for variant in module.ADMITS:
                name = Name(variant, row, family)
                found[str(name)] = name
    return found


@cache
def aliases() -> dict[str, Name]:
    """Names that other libraries use to ours, with the overrides that they imply."""
    found = {}

    def add(alias, variant, row, **overrides):
        found[alias] = replace(table()[f"{variant}_{row}"], overrides=tuple(overrides.items()))

    for row in efficientnet.SPECS:
        if row.startswith("efficientnet_"):
            add(row, "bn", row)
            add(f"tf_{row}", "bn", row, dialect="keras")
            add(f"EfficientNet{row[-2:].upper()}", "bn", row, dialect="keras")
    for row in resnet.SPECS:
        if not row.startswith("test_"):
            add(row, "bn", row)
    for depth in (50, 101, 152):
        add(f"ResNet{depth}", "bn", f"resnet{depth}", dialect="keras")
        add(f"ResNet{depth}V2", "bn", f"resnetv2_{depth}", dialect="keras")
    add("resnet50_gn", "gn", "resnet50")
    for row in ("resnet50", "resnet101", "resnet110_cifar"):
        add(row.replace("res", "eun"), "eun", row)
    # timm computes DeepMind's checkpoints with its own epsilon and the exact GELU.
    timm_dm = {"dialect": "timm", "padding": "same", "gamma_in": "activation", "skip_gain": 0.0, "last_gain": 1.0}
    for row in nfnet.SPECS:
        add(row, "nf", row)
        if row.startswith("nfnet_f") and "plus" not in row and row != "nfnet_f7":
            add(f"dm_{row}", "nf", row, **timm_dm)
        if row.endswith("plus"):
            add(row.replace("plus", "+"), "nf", row)
    return found


def canonical(name: str) -> str:
    """The name of ours that an alias stands for, without what the alias implies; any other name as it is.

    Example:
        >>> canonical("EfficientNetB0"), canonical("my_net")
        ('bn_efficientnet_b0', 'my_net')
    """
    return str(aliases()[name]) if name in aliases() else name


def parse(name: str) -> Name:
    """Resolve a model name.

    Raises:
        ValueError: for an unknown name (close matches are given) or a variant that the family does not admit.

    Example:
        >>> str(parse("sn_efficientnet_b0")), str(parse("dm_nfnet_f0"))
        ('sn_efficientnet_b0', 'nf_nfnet_f0')
    """
    if name in table():
        return table()[name]
    if name in aliases():
        return aliases()[name]
    for module in FAMILIES.values():
        for row in module.SPECS:
            if name.endswith(f"_{row}") and re.fullmatch(r"[a-z]+", name.removesuffix(f"_{row}")):
                raise ValueError(
                    f"Expected a variant that {row} admits: {', '.join(module.ADMITS)}. "
                    f"Received: {name.removesuffix(f'_{row}')!r} in {name!r}"
                )
    known, _, tag = name.partition(".")
    if tag and (known in table() or known in aliases()):
        raise ValueError(
            f"Expected the name of an architecture. Received: {name!r}, which names weights as well; take {known!r} "
            f"here, and nfzoo.build({name!r}) or nfzoo export {name} for the network with its weights"
        )
    close = difflib.get_close_matches(name, [*table(), *aliases(), *USER_MODELS], n=4, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"Expected the name of a model. Received: {name!r}.{hint} nfzoo.list_models() lists them.")


def list_models(
    pattern: str = "*", *, variant: str | None = None, family: str | None = None, tests: bool = False
) -> list[str]:
    """List model names, naturally sorted.

    Args:
        pattern: shell wildcards, e.g. "sn_*".
        variant, family: keep one variant ("bn") or family ("efficientnet").
        tests: include the tiny rows that tests use.

    Raises:
        ValueError: for a variant or a family that nothing has.

    Example:
        >>> list_models("?n_efficientnet_b0")
        ['bn_efficientnet_b0', 'gn_efficientnet_b0', 'sn_efficientnet_b0']
    """
    for word, value in (("variant", variant), ("family", family)):
        known = dict.fromkeys(getattr(name, word) for name in table().values())
        if value is not None and value not in known:
            raise ValueError(f"Expected {word} to be one of {', '.join(known)}. Received: {word}={value!r}")
    found = [
        text
        for text, name in table().items()
        if (variant in (None, name.variant) and family in (None, name.family))
        and (tests or not name.row.startswith("test_"))
    ]
    if variant is None and family is None:
        found += USER_MODELS
    key = lambda text: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]  # noqa: E731
    return sorted(fnmatch.filter(found, pattern), key=key)


def register_model(function: Callable | None = None, *, name: str | None = None, override: bool = False):
    """Register a function that builds a model, so that `build`, `list_models` and the engine know it by name.

    Args:
        function: takes keyword arguments of `build`, returns a `keras.Model`. It is given those that differ from
            `build`'s defaults: one that it does not take is a TypeError.
        name: default: the function's.
        override: replace an existing registration.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> @register_model(override=True)
        ... def my_net(*, classes=10, **kwargs):
        ...     return nfzoo.build("nf_test_efficientnet", classes=classes, **kwargs)
        >>> "my_net" in list_models("my_*")
        True
    """

    def decorate(function):
        key = name or function.__name__
        if key in table() or key in aliases() or (key in USER_MODELS and not override):
            raise ValueError(
                f"Expected a name that is free. Received: {key!r}; pass override=True to replace your own."
            )
        USER_MODELS[key] = function
        return function

    return decorate if function is None else decorate(function)


def resolve_fields(name: Name, overrides: dict, kinds: Mapping[str, type] | None = None) -> tuple[Any, Any]:
    """Resolve variant and spec: their defaults, then what dialect and variant imply, then the overrides.

    `kinds` are the classes of the variants: `nfzoo.variants.VARIANTS`, or those of `nfzoo.theory`, which need no Keras.
    """
    if kinds is None:
        from nfzoo.variants import VARIANTS as kinds

    module, kind, spec = FAMILIES[name.family], kinds[name.variant], name.spec
    overrides = dict(name.overrides) | {k: v for k, v in overrides.items() if (k, v) != ("dialect", None)}
    of_variant, of_spec = ({f.name for f in fields(x) if f.init} for x in (kind, spec))
    unknown = sorted(overrides.keys() - of_variant - of_spec)
    if unknown:
        raise TypeError(
            f"build({str(name)!r}) got unexpected keyword(s) {', '.join(unknown)}. Overrides of the variant: "
            f"{', '.join(sorted(of_variant))}; of the architecture: {', '.join(sorted(of_spec))}."
        )
    if overrides.get("dialect", module.DIALECTS[0]) not in module.DIALECTS:
        raise ValueError(
            f"Expected a dialect of {name.row}: {', '.join(module.DIALECTS)}. Received: {overrides['dialect']!r}"
        )
    for rate in ("dropout_rate", "drop_path_rate"):
        value = overrides.get(rate, 0)
        if not isinstance(value, numbers.Real) or not 0 <= value < 1:
            raise ValueError(f"Expected {rate} in [0, 1), a probability. Received: {rate}={value!r}")
    given = {k: v for k, v in overrides.items() if k in of_spec}
    implied = module.conventions(replace(spec, **given), name.variant)
    dialect = implied.get("dialect") or given.get("dialect") or spec.dialect
    implied = kind.conventions(dialect) | implied
    spec = replace(spec, **{k: v for k, v in (implied | given).items() if k in of_spec})
    of_both = implied | overrides
    variant = kind(**{k: v for k, v in of_both.items() if k in of_variant})
    # A field of both (activation) is the variant's to decide, and the architecture's to fill in.
    return variant if variant.activation else replace(variant, activation=spec.activation), spec

"""The public surface is a tested list; what is public is documented."""

import inspect

import pytest

import nfzoo
from nfzoo import (
    agc,
    alarms,
    augment,
    callbacks,
    certify,
    cli,
    data,
    doctor,
    engine,
    export,
    folding,
    layers,
    numerics,
    optimizers,
    plots,
    recipes,
    registry,
    report,
    schedules,
    settings,
    spp,
    theory,
    trainer,
    tune,
    variants,
    weights,
)  # fmt: skip
from nfzoo.models import sites
from nfzoo.tune import lr_range, plan, progress, results, search, space, trials, workers

MODULES = [
    agc, alarms, augment, callbacks, certify, cli, data, doctor, engine, export, folding, layers, lr_range, numerics,
    optimizers, plan, plots, progress, recipes, registry, report, results, schedules, search, settings, sites,
    space, spp, theory, trainer, trials, tune, variants, weights, workers,
]  # fmt: skip


def test_all_is_sorted_and_resolves():
    assert nfzoo.__all__ == sorted(set(nfzoo.__all__))
    assert all(getattr(nfzoo, name) is not None for name in nfzoo.__all__)
    assert set(nfzoo.__all__) <= set(dir(nfzoo))
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        nfzoo.biuld  # noqa: B018


def test_what_is_public():
    assert nfzoo.__all__ == [
        "AGC", "NFModel", "SignalPropagation", "agc", "alarms", "augment", "build", "certify", "convert", "data",
        "doctor", "engine", "export", "fold", "layers", "list_models", "memory", "model_info", "numerics", "optimizers",
        "plots", "recipes", "register_model", "report", "schedules", "set_head", "spp", "theory", "tune", "weights",
    ]  # fmt: skip


def _public():
    for module in MODULES:
        for name, item in vars(module).items():
            if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(item) or inspect.isfunction(item):
                yield pytest.param(item, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("item", list(_public()))
def test_everything_public_has_a_docstring(item):
    assert item.__doc__ and not item.__doc__.startswith(f"{item.__name__}(")
    if inspect.isfunction(item):
        assert item.__doc__.strip().splitlines()[0].rstrip().endswith((".", ":"))


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_documented_and_short(module):
    assert module.__doc__
    assert len(inspect.getsource(module).splitlines()) < 400

"""nfzoo: networks that train without batch normalization, for Keras 3.

    model = nfzoo.build("sn_efficientnet_b0", classes=100, input_shape=(32, 32, 3))
    model.compile("adam", loss, agc=nfzoo.AGC(0.01))
    model.fit(data, callbacks=[nfzoo.SignalPropagation(x, y, log_dir="runs/first")])

Importing nfzoo does not import Keras: each public name loads its module on first use.
"""

import importlib
import pkgutil
import sys

import wrapt

__version__ = "0.1.0"

_HOME = {
    "AGC": "nfzoo.agc",
    "NFModel": "nfzoo.trainer",
    "SignalPropagation": "nfzoo.spp",
    "build": "nfzoo.registry",
    "fold": "nfzoo.folding",
    "list_models": "nfzoo.names",
    "model_info": "nfzoo.registry",
    "register_model": "nfzoo.names",
    "set_head": "nfzoo.registry",
}
_MODULES = (
    "agc",
    "alarms",
    "augment",
    "certify",
    "convert",
    "data",
    "doctor",
    "engine",
    "export",
    "layers",
    "memory",
    "numerics",
    "optimizers",
    "plots",
    "recipes",
    "report",
    "schedules",
    "spp",
    "theory",
    "tune",
    "weights",
)

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"nfzoo.{name}")
    raise AttributeError(f"module 'nfzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


# A saved model names its classes by "nfzoo>…"; Keras finds them only once they are registered. So they register as soon
# as both packages are imported, in either order, and `nfzoo list` need not wait for TensorFlow. Where a module of ours
# is what imports Keras, registration waits for its end: the trainer needs that module whole.
_PARTS = {f"{__name__}.{part.name}" for part in pkgutil.iter_modules(__path__)}
_whole: set[str] = set()


def _imported(module) -> None:
    _whole.add(module.__name__)
    begun = {name for name in _PARTS if name in sys.modules}
    if "keras" in _whole and begun <= _whole:
        importlib.import_module("nfzoo.schedules")
        importlib.import_module("nfzoo.trainer")


for _name in ("keras", *sorted(_PARTS)):
    wrapt.register_post_import_hook(_imported, _name)

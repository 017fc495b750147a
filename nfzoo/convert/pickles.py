"""Read a pickle of arrays and containers, and refuse any other."""

import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def _from_latin(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"Expected the encoding latin1. Received: {encoding!r}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _from_latin,
    # Haiku's immutable dictionaries are made from a plain one.
    ("haiku._src.data_structures", "FlatMapping"): dict,
    ("haiku._src.data_structures", "FlatMap"): dict,
    ("haiku._src.data_structures", "to_immutable_dict"): dict,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the old and the new name of one module
    for _name in ("_reconstruct", "scalar"):
        ALLOWED[_module, _name] = getattr(np._core.multiarray, _name)


class Unpickler(pickle.Unpickler):
    """Resolve the names of a table, and nothing else: a pickle can otherwise run any code."""

    def __init__(self, file, allowed: dict[tuple[str, str], Callable], path: Path | str):
        super().__init__(file)
        self.allowed, self.path = allowed, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise ValueError(
            f"Expected a pickle of arrays and containers. Received: {self.path}, which names {module}.{name}; it is "
            "not read, because that could run code. Convert it to safetensors or npz where you trust it."
        )


def load(content: bytes, path: Path | str = "the pickle") -> Any:
    """Unpickle arrays, numbers, text and containers.

    Raises:
        ValueError: if the pickle names anything else, or is damaged.

    Example:
        >>> load(pickle.dumps({"w": np.ones(2)}))["w"].tolist()
        [1.0, 1.0]
    """
    try:
        return Unpickler(io.BytesIO(content), ALLOWED, path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"Expected a pickle. Received: {path}, which is damaged: {error}") from None

"""Read a pickle of arrays and containers, and refuse any other."""

import collections
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class Refused(ValueError):
    """A pickle names, or holds, what is not data."""


def _from_latin(text: str, _encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _Dtype:
    """A kind of number and its byte order. NumPy's own takes any state: a forged one makes it follow wild addresses."""

    def __init__(self, code: Any, *_ignored):
        plain = isinstance(code, str) and re.fullmatch(r"[<>|=]?[fiubc]\d{1,2}", code)
        if not plain and code is not ml_dtypes.bfloat16:
            raise Refused(f"Expected arrays of numbers. Received: an array of {code!r}")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple):
        if state[1] == ">":
            self.numpy = self.numpy.newbyteorder(">")


class _Array(np.ndarray):
    def __setstate__(self, state: tuple):
        version, shape, dtype, *rest = state
        super().__setstate__((version, shape, dtype.numpy, *rest))


def _array(*_ignored) -> _Array:
    return np.ndarray.__new__(_Array, 0, np.int8)  # its state follows


def _from_buffer(buffer, dtype: _Dtype, shape: tuple, order: str, *_ignored) -> np.ndarray:
    return np.frombuffer(buffer, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, content: bytes) -> np.generic:
    return np.frombuffer(content, dtype.numpy, 1)[0]


def _jax_array(function: Callable, arguments: tuple, state: tuple, _ignored=None) -> np.ndarray:
    array = function(*arguments)
    array.__setstate__(state)
    return array


class _Call:
    """A function that a pickle may call and not change: the opcode BUILD sets attributes of whatever it is given."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, name, value):
        raise Refused("Expected a pickle of arrays and containers. Received: one that changes a function")


class _Unchanging(type):
    def __setattr__(cls, name, value):
        raise Refused("Expected a pickle of arrays and containers. Received: one that changes a class")


class _Options(metaclass=_Unchanging):
    """Stands for argparse.Namespace: timm's training script keeps its options beside the weights."""


ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _array,
    ("numpy", "dtype"): _Dtype,
    ("ml_dtypes", "bfloat16"): ml_dtypes.bfloat16,
    ("jax._src.array", "_reconstruct_array"): _jax_array,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,  # of a schedule's milestones
    ("argparse", "Namespace"): _Options,
    ("_codecs", "encode"): _from_latin,
    # Haiku's immutable dictionaries are made from a plain one.
    ("haiku._src.data_structures", "FlatMapping"): dict,
    ("haiku._src.data_structures", "FlatMap"): dict,
    ("haiku._src.data_structures", "to_immutable_dict"): dict,
}
for _core in ("numpy.core", "numpy._core"):  # the old and the new name of one package
    ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _array
    ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class Unpickler(pickle.Unpickler):
    """Resolve the names of a table, and nothing else: a pickle can otherwise run any code."""

    def __init__(self, file, allowed: dict[tuple[str, str], Callable], path: Path | str):
        super().__init__(file)
        self.allowed, self.path = allowed, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            found = self.allowed[module, name]
            # Classes of the interpreter and of NumPy cannot be changed; what is Python's own can.
            return found if isinstance(found, type) and found is not _Dtype else _Call(found)
        raise Refused(
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
    except Refused:
        raise
    except Exception as error:  # bytes that are no pickle fail in any way
        raise ValueError(f"Expected a pickle. Received: {path}, which is damaged: {error}") from None

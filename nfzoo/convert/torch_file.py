"""Read the tensors of a PyTorch file without PyTorch and without running its code.

Both formats: the zip archive (since 1.6) and the older sequence of pickles. Tensors come as NumPy arrays.
"""

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nfzoo.convert.pickles import ALLOWED, Refused, Unpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_, "BFloat16Storage": ml_dtypes.bfloat16,
}  # fmt: skip


@dataclass
class Storage:
    """A flat buffer that tensors view."""

    data: np.ndarray


def _rebuild_tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_ignored) -> np.ndarray:
    # NumPy's integers, which a file may hold, would overflow below.
    offset, size, stride = int(offset), tuple(map(int, size)), tuple(map(int, stride))
    if 0 in size:
        return np.zeros(size, storage.data.dtype)
    end = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    if min((offset, *size, *stride)) < 0 or end > storage.data.size:
        raise ValueError(f"a tensor of size {tuple(size)} reaches beyond its storage of {storage.data.size} numbers")
    strides = [s * storage.data.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage.data[offset:], size, strides, writeable=False)


_TENSORS = ALLOWED | {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_ignored: tensor,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Tensors(Unpickler):
    def __init__(self, file, path, storage):
        super().__init__(file, _TENSORS, path)
        self.storage = storage

    def persistent_load(self, reference: tuple) -> Any:
        kind, dtype, key, _, count, *view = reference
        if kind != "storage" or dtype not in _DTYPES.values() or any(part is not None for part in view):
            raise ValueError(f"an unknown reference {reference!r}")
        return self.storage(str(key), np.dtype(dtype), int(count))


def read(path: Path) -> Any:
    """Read a .pth, .pt or .bin file.

    Returns:
        What was saved, mostly a dictionary, with tensors as arrays.

    Raises:
        ValueError: for a damaged file, or one that names anything but tensors and containers.
    """
    with path.open("rb") as file:  # a path that cannot be opened says so itself
        begins_as_zip = file.read(4) == b"PK\x03\x04"
    if begins_as_zip and not zipfile.is_zipfile(path):
        raise ValueError(f"Expected a PyTorch file. Received: {path}, which is damaged: its end is missing")
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except Refused:
        raise
    except Exception as error:  # bytes of another kind fail in any way
        raise ValueError(f"Expected a PyTorch file. Received: {path}, which is damaged: {error}") from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), None)
        if root is None:
            raise ValueError("the archive has no data.pkl")
        storages: dict[str, Storage] = {}

        def storage(key: str, dtype: np.dtype, count: int) -> Storage:
            if key not in storages:
                storages[key] = Storage(np.frombuffer(archive.read(f"{root}data/{key}"), dtype, count))
            return storages[key]

        return _Tensors(io.BytesIO(archive.read(f"{root}data.pkl")), path, storage).load()


def _read_legacy(path: Path) -> Any:
    storages: dict[str, Storage] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        # The numbers follow the pickles: views are made now, and filled below.
        return storages.setdefault(key, Storage(np.empty(count, dtype)))

    with path.open("rb") as file:
        if Unpickler(file, {}, path).load() != _LEGACY_MAGIC:
            raise ValueError("it does not begin as one")
        for _ in range(2):  # protocol and platform
            Unpickler(file, {}, path).load()
        result = _Tensors(file, path, storage).load()
        keys = [str(key) for key in Unpickler(file, {}, path).load()]
        if sorted(keys) != sorted(storages):
            raise ValueError(f"tensors need the storages {sorted(storages)}, it has {sorted(keys)}")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            data = storages[key].data
            if count != data.size:
                raise ValueError(f"storage {key} has {count} numbers, tensors need {data.size}")
            raw = file.read(data.nbytes)
            if len(raw) != data.nbytes:
                raise EOFError(f"{math.ceil((data.nbytes - len(raw)) / 1e6)} MB are missing")
            data[...] = np.frombuffer(raw, data.dtype)
    return result

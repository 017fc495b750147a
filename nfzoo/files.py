"""Files that are whole or not there, their digests, and JSON that every reader takes."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Container, Iterator
from typing import Any


@contextlib.contextmanager
def atomic(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Write under a temporary name beside `path`, then rename: a reader sees the old content or the new, never half.

    Yields:
        The temporary path, with the suffix of `path`. An error inside removes it and leaves `path` as it was.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with atomic(folder / "new" / "a.txt") as partial:
        ...     _ = partial.write_text("whole")
        >>> [p.name for p in (folder / "new").iterdir()]
        ['a.txt']
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # the name must not be on the disk before the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def waited_for(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder for this process, once others that do are done. The lock ends with the process."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def title_of(folder: pathlib.Path, taken: Container[str]) -> str:
    """What a run is called among others: the first free one of its folder's name, its path as given, the whole path.

    Example:
        >>> title_of(pathlib.Path("runs/a"), taken=()), title_of(pathlib.Path("runs/a"), taken=["a"])
        ('a', 'runs/a')
    """
    whole = folder.resolve()
    return next((name for name in (whole.name, str(folder), str(whole)) if name not in taken), str(whole))


def sha256(path: str | pathlib.Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(content: Any) -> Any:
    """Replace NaN and infinity by None, at any depth: JSON has no word for them. Tuples become lists.

    Example:
        >>> finite({"loss": float("nan"), "of": [1.5, float("inf")]})
        {'loss': None, 'of': [1.5, None]}
    """
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text; what is not finite is null."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)

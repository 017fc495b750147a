"""Files that are whole or not there, and their digests."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator


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
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: str | pathlib.Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

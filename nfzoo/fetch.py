"""Download a file once: resume what broke off, verify what came, rename it when it is whole."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nfzoo.files import waited_for

_CHUNK = 1 << 20
_SECONDS = 30  # without a byte, until a connection counts as broken


def fetch(address: str, path: str | pathlib.Path, digest: str | None = None) -> pathlib.Path:
    """Download a file, unless it is there.

    Args:
        address: https://… ; where the variable NFZOO_MIRROR is set, e.g. to http://my.host:8000, it replaces the host.
        path: where the file shall be. Until it is whole and verified it is PATH.partial, which the next call continues.
        digest: "md5:…" or "sha256:…"; default: the sha256 that the server states, if it does (X-Linked-ETag).

    Returns:
        The path.

    Raises:
        ConnectionError: no network, no such address, or a connection that broke.
        ValueError: content of another digest; it is removed.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = path.write_bytes(b"put there by hand")
        >>> fetch("https://example.org/model.safetensors", path) == path
        True
    """
    path = pathlib.Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with waited_for(path.parent):  # several workers may want it
        if not path.exists():
            _download(_mirrored(address), path, digest)
    return path


def _download(address: str, path: pathlib.Path, digest: str | None) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        stated = _receive(address, partial)
    except (OSError, http.client.HTTPException) as error:
        kept = f"{partial.stat().st_size:,} bytes are kept, and the same call resumes. " if partial.exists() else ""
        raise ConnectionError(
            f"Expected to download {address}. Received: {_reason(error)}. {kept}"
            f"Without a network, put the file at {path} by hand."
        ) from None
    _verify(partial, address, digest or stated)
    partial.replace(path)


def _mirrored(address: str) -> str:
    mirror = os.environ.get("NFZOO_MIRROR")
    return mirror.rstrip("/") + urllib.parse.urlsplit(address).path if mirror else address


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and keep the digest that an answer on the way states."""

    digest: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.read(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def read(self, headers) -> None:
        found = re.search(r"\b[0-9a-f]{64}\b", headers.get("X-Linked-ETag", ""))
        self.digest = f"sha256:{found[0]}" if found else self.digest


def _receive(address: str, partial: pathlib.Path) -> str | None:
    """Append to the partial file what it lacks; return the digest that the server states."""
    start = partial.stat().st_size if partial.exists() else 0
    redirects = _Redirects()
    asked = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(redirects).open(asked, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        partial.unlink()  # longer than the server's file: not a part of it
        return _receive(address, partial)
    with response:
        redirects.read(response.headers)
        continues = response.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and not continues:
            raise ConnectionError(f"another part of the file than asked for, {response.headers.get('Content-Range')!r}")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        size = None if length is None else start + int(length)
        _save(response, partial, start, size)
    if size is not None and partial.stat().st_size < size:
        raise ConnectionError(f"a connection that broke at {partial.stat().st_size:,} of {size:,} bytes")
    return redirects.digest


def _save(response, partial: pathlib.Path, start: int, size: int | None) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with bar, partial.open("ab" if start else "wb") as file:
        task = bar.add_task(partial.stem, total=size, completed=start)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.advance(task, len(chunk))


def _verify(partial: pathlib.Path, address: str, digest: str | None) -> None:
    if digest is None:
        return
    kind, _, expected = digest.partition(":")
    with partial.open("rb") as file:
        received = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if received != expected:
        size = partial.stat().st_size
        partial.unlink()
        raise ValueError(
            f"Expected {address} to have the {kind} {expected}. Received: {size:,} bytes with {received}. They have "
            "been removed; the same call downloads the file anew."
        )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error or type(error).__name__)

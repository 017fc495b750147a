"""The command line: handlers of a few lines, heavy imports inside them, errors in one line."""

import importlib
import os
import sys

from rich.console import Console
from rich.markup import escape

from nfzoo.cli.common import app, console, quiet_start

__all__ = ["app", "console", "main", "quiet_start"]

for _module in ("models", "recipes", "runs", "scans", "signals", "artefacts"):  # in the order of `nfzoo --help`
    importlib.import_module(f"nfzoo.cli.{_module}")


def _told(error: Exception) -> str:
    """Say an error in one line, without the trace that TensorFlow puts into its messages."""
    if isinstance(error, MemoryError) or "ResourceExhausted" in type(error).__name__ or "RESOURCE_EXH" in str(error):
        return "error: Out of memory. Try smaller images, or a smaller batch: train and scan take --set batch_size=…"
    trace = ('File "', "[[", "Graph execution error", "Detected at node")
    lines = [line.strip() for line in str(error).splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(trace))
    if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
        return f"error: {message}"
    return f"Unexpected error: {type(error).__name__}: {message}; set NFZOO_TRACEBACK=1 to see where"


def main() -> None:
    """Entry point: an error is one line on stderr and exit status 1; NFZOO_TRACEBACK=1 shows its origin."""
    # TensorFlow's start-up notes are not about the user's run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            Console(stderr=True).print("interrupted; the same command resumes")
        raise
    except Exception as error:
        if os.environ.get("NFZOO_TRACEBACK"):
            raise
        kind, _, text = _told(error).partition(":")
        Console(stderr=True).print(f"[red]{kind}:[/]{escape(text)}", highlight=False, soft_wrap=True)
        sys.exit(1)

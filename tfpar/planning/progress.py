"""A line for what takes long."""

import contextlib
import sys
import threading
from collections.abc import Iterator

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Inside, what takes longer than two seconds is told, once, on standard error."""
    timer = threading.Timer(PATIENCE, lambda: print(f"tfpar: {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""A line on standard error for what takes long."""

import contextlib
import sys
import threading
from collections.abc import Iterator

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Inside, `what` is printed on standard error, once, if this takes longer than two seconds."""
    timer = threading.Timer(PATIENCE, lambda: print(f"tfpar: {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

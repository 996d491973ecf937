"""Functions of Keras that are others for as long as somebody needs it."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Replacement:
    """Attributes of classes and modules that are replaced while somebody is inside.

    Args:
        replacements: owner, name, and what takes the place of the function there: `by(function, ...)`.

    Attributes:
        methods: for each owner and name, what is there, and what takes its place.
    """

    def __init__(self, *replacements: tuple[Any, str, Callable]):
        self.methods = {(owner, name): replaced(owner, name, by) for owner, name, by in replacements}
        self.users, self.lock = 0, threading.Lock()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, all are replaced; when the last one is outside, none is."""
        with self.lock:
            self.users += 1
            if self.users == 1:
                for (owner, name), (_, replacement) in self.methods.items():
                    setattr(owner, name, replacement)
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    for (owner, name), (original, _) in self.methods.items():
                        setattr(owner, name, original)


def replaced(owner: Any, name: str, by: Callable) -> tuple[Callable, Callable]:
    """A function of a class or module, and what takes its place: `by(function, ...)`."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return by(original, *args, **kwargs)

    return original, replacement

"""Functions of Keras that are others for as long as somebody needs it."""

import contextlib
import contextvars
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


class InThread(Replacement):
    """The same for the threads that are inside alone; others call what was there.

    Attributes:
        given: what this thread is inside with; `None` outside.
    """

    def __init__(self, *replacements: tuple[Any, str, Callable]):
        self.given: contextvars.ContextVar[Any] = contextvars.ContextVar("given", default=None)
        super().__init__(*((owner, name, functools.partial(self.chosen, by)) for owner, name, by in replacements))

    def chosen(self, by: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """What takes the function's place, in a thread that is inside; else the function."""
        return function(*args, **kwargs) if self.given.get() is None else by(function, *args, **kwargs)

    @contextlib.contextmanager
    def inside(self, given: Any = True) -> Iterator[None]:
        """Inside, in this thread, all are replaced."""
        token = self.given.set(given)
        try:
            with super().inside():
                yield
        finally:
            self.given.reset(token)


def replaced(owner: Any, name: str, by: Callable) -> tuple[Callable, Callable]:
    """A function of a class or module, and what takes its place: `by(function, ...)`."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return by(original, *args, **kwargs)

    return original, replacement

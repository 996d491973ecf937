"""Files of a model under a strategy: written and read to the end or not at all, exported for one device."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_calls, _keras_parts
from tfpar.errors import Caught, FileError, brief
from tfpar.variables.logical import LogicalVariable, as_host_variables
from tfpar.variables.parts import HOST, copy_on_device

WRITER = ThreadPoolExecutor(1, thread_name_prefix="tfpar-writer")
PENDING: set[Future] = set()


def save(
    model: keras.Model,
    filepath: Any,
    overwrite: bool = True,
    zipped: bool | None = None,
    asynchronous: bool = False,
    **options: Any,
) -> Future | None:
    """`keras.Model.save`; a process that dies while it writes leaves the file that was there.

    Args:
        asynchronous: whether to return once the values are in host memory, and write the file while training goes on.

    Returns:
        If asynchronous, a future: its `result()` waits until the file is there, and raises what went wrong.
    """

    def write():
        with replacing(filepath, overwrite and zipped is not False) as path:
            type(model).save(model, path, overwrite, zipped, **options)

    return written(model, write, asynchronous)


def save_weights(
    model: keras.Model,
    filepath: Any,
    overwrite: bool = True,
    max_shard_size: float | None = None,
    asynchronous: bool = False,
) -> Future | None:
    """`keras.Model.save_weights`; a process that dies while it writes leaves the file that was there.

    Args, returns: as for `save`.
    """

    def write():
        with replacing(filepath, overwrite and not max_shard_size) as path:
            type(model).save_weights(model, path, overwrite, max_shard_size)

    return written(model, write, asynchronous)


def written(model: keras.Model, write: Callable[[], None], asynchronous: bool) -> Future | None:
    """Write a model's files, after those that are being written; in the background if asynchronous."""
    finish()
    if not asynchronous:
        write()
        return None
    future = WRITER.submit(in_background, Snapshot(variables_of(model)), write)
    PENDING.add(future)
    future.add_done_callback(PENDING.discard)
    return future


def in_background(values: "Snapshot", write: Callable[[], None]):
    """Write what variables were; what goes wrong is logged, as nobody may ask for it."""
    try:
        with values, _keras_parts.SAVING_IN_SCOPE.inside():
            write()
    except Exception:
        logging.getLogger("tfpar").exception("a model could not be saved in the background")
        raise


def finish():
    """Wait until what is being written in the background is there, or has failed."""
    if not threading.current_thread().name.startswith("tfpar-writer"):
        wait(PENDING)


class Snapshot(keras.StatelessScope):
    """Inside, in this thread, variables have the values that they had when this was made.

    Values are in host memory. What a CPU has is shared with the variable until that changes.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        super().__init__()
        self.values = {id(variable): kept(_keras.stored(variable)) for variable in variables}

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = self.values.get(id(variable))
        return value() if value else None


def kept(variable: tf.Variable) -> Callable[[], Any]:
    """A function that gives the value that a variable has now, from host memory."""
    if isinstance(variable, LogicalVariable):
        return variable.kept()
    with tf.device(HOST):
        return partial(tf.identity, copy_on_device(variable))


def load_weights(model: keras.Model, filepath: Any, skip_mismatch: bool = False, **options: Any):
    """`keras.Model.load_weights`; a file that cannot be read to its end leaves the model as it is.

    Raises:
        FileError: a file that is damaged, or is not of this model.
    """
    finish()
    try:
        with warnings.catch_warnings(), _keras_parts.unwritten(variables_of(model)), tf.device(HOST):
            warnings.simplefilter("ignore")
            type(model).load_weights(model, filepath, skip_mismatch, **options)
    except Exception as error:
        Caught.theirs(error, f"loading {filepath}")
        raise FileError(
            f"{filepath} cannot be loaded into {model.name}, which stays as it is: the file is damaged, or of another "
            f"model. {type(error).__name__}: {brief(error)}"
        ) from error
    with tf.device(HOST):
        type(model).load_weights(model, filepath, skip_mismatch, **options)


def variables_of(model: keras.Model) -> list[keras.Variable]:
    """The variables of a model, of its metrics and of its optimizers, each once."""
    found = [*model.variables, *(model.metrics_variables if model.compiled else [])]
    found += [v for optimizer in _keras_parts.optimizers_of(model) for v in optimizer.variables]
    return list({id(v): v for v in found}.values())


def export(model: keras.Model, filepath: Any, *args: Any, **options: Any):
    """`keras.Model.export`, with all of each weight in host memory while it writes: it serves on one device."""
    variables = [_keras.stored(v) for v in model.variables]
    with _keras_calls.own_calls(), as_host_variables([v for v in variables if isinstance(v, LogicalVariable)]):
        type(model).export(model, filepath, *args, **options)


@contextlib.contextmanager
def replacing(filepath: Any, is_file: bool = True) -> Iterator[Any]:
    """A path to write to; the file there takes the place of `filepath` at the end.

    `filepath` itself, if it is no local `.keras` or `.h5` file.

    Args:
        is_file: whether one file is written, and may replace another.
    """
    if not is_file or not isinstance(filepath, str | os.PathLike) or "://" in str(filepath):
        yield filepath
        return
    path = Path(filepath)
    if not path.name.endswith((".keras", ".h5")):
        yield filepath
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    try:
        yield str(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

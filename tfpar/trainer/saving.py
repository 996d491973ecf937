"""Files of a model under a strategy: written and read to the end or not at all, exported for one device."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_calls, _keras_parts
from tfpar.errors import Caught, FileError, brief
from tfpar.variables.logical import LogicalVariable, as_host_variables
from tfpar.variables.parts import HOST


def save(model: keras.Model, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **options: Any):
    """`keras.Model.save`; a process that dies while it writes leaves the file that was there."""
    with replacing(filepath, overwrite and zipped is not False) as path:
        type(model).save(model, path, overwrite, zipped, **options)


def save_weights(model: keras.Model, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None):
    """`keras.Model.save_weights`; a process that dies while it writes leaves the file that was there."""
    with replacing(filepath, overwrite and not max_shard_size) as path:
        type(model).save_weights(model, path, overwrite, max_shard_size)


def load_weights(model: keras.Model, filepath: Any, skip_mismatch: bool = False, **options: Any):
    """`keras.Model.load_weights`; a file that cannot be read to its end leaves the model as it is.

    Raises:
        FileError: a file that is damaged, or is not of this model.
    """
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

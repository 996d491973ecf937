"""Callbacks of `fit`, besides Keras' own."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import keras

from tfpar.compat import _keras_backup
from tfpar.trainer import saving
from tfpar.trainer.hooks import hooks_of


class CheckNumerics(keras.callbacks.Callback):
    """Makes a loss that is NaN or infinite an error that names the stage, the micro-batch and the layer it comes from.

    The step that failed changes no weights; the loss of every training step is looked at. A `train_step` of your own is
    checked where it calls `compute_loss`; a model of no strategy is not checked.

    Raises:
        StageError: from `fit`; with `run_eagerly=True` TensorFlow's `InvalidArgumentError`.

    Example:
        >>> model.fit(x, y, callbacks=[tfpar.CheckNumerics()])  # doctest: +SKIP
    """

    def on_train_begin(self, logs=None):
        hooks = hooks_of(self.model)
        if hooks is not None:
            hooks.check(True)


class BackupAndRestore(_keras_backup.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that survives a kill at any moment, also while it saves.

    Keras writes the weights, and then the epoch that they are of; a process that dies in between goes on with weights
    of one epoch and the number of another. Here both change at once. With a whole number as `save_freq` the epoch that
    was interrupted begins anew, as with Keras. The folder may be a remote one, such as `"gs://bucket/backup"`.

    Args:
        backup_dir, save_freq, double_checkpoint, delete_checkpoint: as for Keras.
        asynchronous: whether training goes on while a backup is written: it waits for the copy to host memory, and for
            the backup before, if that is not written yet.

    Raises:
        OSError: from `fit`, at the next backup or at the end, where an asynchronous one could not be written.

    Example:
        >>> model.fit(x, y, epochs=90, callbacks=[tfpar.BackupAndRestore("backup")])  # doctest: +SKIP
    """

    def __init__(self, backup_dir: Any, *args: Any, asynchronous: bool = False, **options: Any):
        super().__init__(backup_dir, *args, **options)
        self.asynchronous = asynchronous
        self.last: Future | None = None

    def write(self, backup: Callable[[], None]):
        self.finish()
        self.last = saving.written(self.model, backup, self.asynchronous)

    def finish(self):
        """Wait for the last backup."""
        if self.last:
            self.last.result()

    def on_train_begin(self, logs=None):
        saving.finish()
        super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        self.finish()
        super().on_train_end(logs)

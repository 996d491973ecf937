"""Private names of Keras' BackupAndRestore. Checked against Keras 3.15.1; `tests/trainer/test_killed.py` tests each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import keras
from tensorflow.io import gfile


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` whose backup is the old one or the new one at any moment.

    With a whole number as `save_freq` the epoch that was interrupted begins anew, as with Keras.
    """

    def _save_model(self):
        folder, epoch, batch = str(self.backup_dir), self._current_epoch, self._last_batch_seen
        gfile.makedirs(folder)
        weights = f"{epoch}-{batch}-{self.model.optimizer.iterations.numpy()}.weights.h5"

        def write():
            before = gfile.glob(gfile.join(folder, "*.weights.h5"))
            self.model.save_weights(gfile.join(folder, weights))
            backup = json.dumps({"epoch": epoch, "batch": batch, "weights": weights})
            write_at_once(str(self._training_metadata_path), backup)  # from here on, this is the backup
            for old in before:
                if not old.endswith("/" + weights):
                    remove(old)

        self.write(write)

    def write(self, backup: Callable[[], None]):
        """Make a backup; here, at once."""
        backup()

    def _load_model(self):
        metadata = str(self._training_metadata_path)
        if gfile.exists(metadata):
            with gfile.GFile(metadata) as file:
                name = json.loads(file.read()).get("weights", "latest.weights.h5")
            self._weights_path = gfile.join(str(self.backup_dir), name)
            super()._load_model()


def is_remote(path: str) -> bool:
    """Whether a path is that of another file system than this machine's."""
    return "://" in path


def write_at_once(path: str, text: str):
    """Write a file that is the old one or the new one at any moment."""
    if is_remote(path):
        partial = path + ".partial"
        remove(partial)
        with gfile.GFile(partial, "w") as file:
            file.write(text)
        gfile.rename(partial, path, overwrite=True)
        return
    partial = Path(path).with_name("partial.json")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove(path: str):
    """Remove a file, if it is there."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif gfile.exists(path):
        gfile.remove(path)

"""Private names of Keras' BackupAndRestore. Checked against Keras 3.15.1; `tests/test_killed.py` tests each."""

import json
import os
from pathlib import Path

import keras


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that survives a kill at any moment, also while it saves.

    Keras writes the weights, and then the epoch that they are of; a process that dies in between goes on with weights
    of one epoch and the number of another. Here both change at once. With a whole number as `save_freq` the epoch that
    was interrupted begins anew, as with Keras.

    Example:
        >>> model.fit(x, y, epochs=90, callbacks=[tfpar.BackupAndRestore("backup")])  # doctest: +SKIP
    """

    def _save_model(self):
        folder, epoch, batch = Path(self.backup_dir), self._current_epoch, self._last_batch_seen
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.glob("*.weights.h5"))
        weights = folder / f"{epoch}-{batch}-{self.model.optimizer.iterations.numpy()}.weights.h5"
        self.model.save_weights(weights)
        partial = folder / "partial.json"
        with partial.open("w") as file:
            file.write(json.dumps({"epoch": epoch, "batch": batch, "weights": weights.name}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._training_metadata_path)  # from here on, this is the backup
        for old in before - {weights}:
            old.unlink(missing_ok=True)

    def _load_model(self):
        metadata = Path(self._training_metadata_path)
        if metadata.exists():
            name = json.loads(metadata.read_text()).get("weights", "latest.weights.h5")
            self._weights_path = str(Path(self.backup_dir) / name)
            super()._load_model()

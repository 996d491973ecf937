"""A process that is killed at any moment, and started again, ends where one that was not killed does."""

import contextlib
import json
import pathlib
import subprocess
import sys

import keras
import pytest
import tensorflow as tf
import train_and_die
from training import compiled, data, history, mostly, some_fast

import tfpar
from tfpar.testing import assert_same


@pytest.mark.parametrize("mesh", mostly(["cube", "pipeline"], ["cube"]))
def test_killed_at_random_moments(mesh, tmp_path):
    run = subprocess.run([sys.executable, train_and_die.__file__, str(tmp_path), mesh], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.split()[-1]) > 4
    assert_same(train_and_die.trained(contextlib.nullcontext()), keras.saving.load_model(tmp_path / "end.keras"), 1e-9)


X, Y = data()


class Killed(BaseException):
    """In place of the signal."""


@pytest.mark.parametrize("at", some_fast(["weights", "file", "metadata", "old"], "file"))
def test_killed_in_the_middle_of_a_save(at, tmp_path, monkeypatch):
    """After each step of a save, the backup is the old one or the new one."""
    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2)
    whole, model, again = (compiled(strategy, "adam") for _ in range(3))
    history(X, Y, batch_size=8, epochs=4)(whole)
    original = {"rename": pathlib.Path.replace, "unlink": pathlib.Path.unlink}

    def die(path, *args, how="rename", **kwargs):
        metadata = tmp_path / "training_metadata.json"
        epoch = json.loads(metadata.read_text())["epoch"] if metadata.exists() else 0
        now = epoch == 2
        before = {"weights": "h5", "metadata": "json"}.get(at)
        if now and before and path.name.endswith(before):
            raise Killed
        if now and at == "old" and how == "unlink" and path.name[0] == "1":
            raise Killed
        result = original[how](path, *args, **kwargs)
        if now and at == "file" and path.name.endswith("h5"):
            raise Killed
        return result

    monkeypatch.setattr(pathlib.Path, "replace", die)
    monkeypatch.setattr(pathlib.Path, "unlink", lambda *a, **k: die(*a, how="unlink", **k))
    with pytest.raises(Killed):
        history(X, Y, batch_size=8, epochs=4, callbacks=[tfpar.BackupAndRestore(str(tmp_path))])(model)
    monkeypatch.undo()
    history(X, Y, batch_size=8, epochs=4, callbacks=[tfpar.BackupAndRestore(str(tmp_path))])(again)
    assert_same(whole, again, 1e-6)


def test_a_remote_folder():
    """Of a file system that TensorFlow knows; nothing of it is left on this one."""
    strategy, folder = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2), "ram://bucket/backup"
    whole, model, again = (compiled(strategy, "adam") for _ in range(3))
    history(X, Y, batch_size=8, epochs=4)(whole)
    keep = tfpar.BackupAndRestore(folder, delete_checkpoint=False)
    history(X, Y, batch_size=8, epochs=2, callbacks=[keep])(model)
    assert sorted(tf.io.gfile.listdir(folder)) == ["2-0-6.weights.h5", "training_metadata.json"]
    assert not pathlib.Path("ram:").exists()
    history(X, Y, batch_size=8, epochs=4, callbacks=[tfpar.BackupAndRestore(folder)])(again)
    assert_same(whole, again, 1e-6)
    assert not tf.io.gfile.exists(folder)


def test_a_backup_that_keras_made(tmp_path):
    whole, model = compiled(None, "adam"), compiled(tfpar.LayerPlacementStrategy(["CPU:0", "CPU:1"]), "adam")
    history(X, Y, batch_size=8, epochs=3)(whole)
    first = compiled(None, "adam")
    keep = keras.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)
    history(X, Y, batch_size=8, epochs=1, callbacks=[keep])(first)
    history(X, Y, batch_size=8, epochs=3, callbacks=[tfpar.BackupAndRestore(str(tmp_path))])(model)
    assert_same(whole, model, 1e-5, 1e-7)

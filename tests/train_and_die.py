"""Trains with a backup and is killed at random moments, again and again, until a run comes to its end.

`train_and_die.py folder mesh`: each run is a process of its own, forked before TensorFlow starts.
"""

import os
import random
import signal
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import tfpar
from tfpar.testing import logical_cpus

EPOCHS, BATCH = 6, 100
ASYNCHRONOUS = ("cube",)  # where training goes on while a backup is written
STRATEGIES = {
    "cube": lambda: tfpar.MeshStrategy(tfpar.Mesh(2, 2, 2), zero=1),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
}


class Tells(keras.callbacks.Callback):
    """Says which epoch begins, and when a batch is over."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def on_epoch_begin(self, epoch, logs=None):
        os.write(self.pipe, bytes([epoch]))

    def on_train_batch_end(self, batch, logs=None):
        os.write(self.pipe, bytes([BATCH]))


def trained(scope, callbacks=()):
    """The model, trained to its end."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    with scope:
        x = h = layers.Input((64,))
        for _ in range(2):
            h = layers.Dense(256, activation="tanh")(h)
        model = keras.Model(x, layers.Dense(3)(h))
        model.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 64)), rng.normal(size=(64, 3))
    model.fit(x, y, batch_size=16, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[*callbacks])
    return model


def train(folder, mesh, pipe):
    """One run."""
    logical_cpus(8, threads=1)
    backup = tfpar.BackupAndRestore(f"{folder}/backup", delete_checkpoint=False, asynchronous=mesh in ASYNCHRONOUS)
    trained(STRATEGIES[mesh]().scope(), [backup, Tells(pipe)]).save(f"{folder}/end.keras")
    os.write(pipe, bytes([EPOCHS]))


def run(folder, mesh, events, seconds):
    """A run that is killed after so many batches and epochs, and seconds: the epochs that it began, in order."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        try:
            train(folder, mesh, writes)
        finally:
            os._exit(1)
    os.close(writes)
    begun = os.read(reads, 1)
    for _ in range(events):
        begun += os.read(reads, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reads, 1):
        begun += more
    os.close(reads)
    return [epoch for epoch in begun if epoch != BATCH]


def main(folder, mesh):
    """Every run goes on where the last backup was made: it repeats one epoch at most, and leaves none out.

    It repeats two, if training goes on while a backup is written.
    """
    random.seed(mesh)
    before, kills = [], 0
    while not before or before[-1] < EPOCHS:
        begun = run(folder, mesh, random.randint(0, 9), random.uniform(0.0, 0.1))  # a backup takes about as long
        last = before[-1] if before else 0
        assert begun and last - (mesh in ASYNCHRONOUS) <= begun[0] <= last + 1, (before, begun)
        assert begun == list(range(begun[0], begun[-1] + 1)), begun
        before, kills = begun, kills + 1
    print(kills)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Prints megabytes: of a model, and the most held after it was created, placed on devices, written and read."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import tfpar
from tfpar.testing import logical_cpus
from tfpar.trainer.hooks import hooks_of

WIDTH, LAYERS = 2048, 24  # 400 MB
MESHES = {
    "zero 3": lambda: tfpar.MeshStrategy(tfpar.Mesh(2, 2, 2), zero=3),
    "ranks": lambda: tfpar.TensorParallelStrategy(),
}


def peak():
    """Megabytes, the most that this process has had."""
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024


def build():
    x = h = layers.Input((WIDTH,))
    for _ in range(LAYERS):
        h = layers.Dense(WIDTH, use_bias=False, kernel_initializer="zeros")(h)
    return keras.Model(x, h)


def main(mesh, folder):
    logical_cpus(8, threads=1)
    strategy = MESHES[mesh]()
    with strategy.scope():  # what TensorFlow itself takes
        small = keras.Sequential([layers.Input((8,)), layers.Dense(8), layers.Dense(8)])
    small.predict(np.zeros((8, 8), "float32"), verbose=0)
    start = peak()
    with strategy.scope():
        model = build()
    for weight in model.weights:  # zeros need no memory before they are written
        weight.assign(np.full(weight.shape, 0.01, "float32"))
    created = peak() - start
    hooks_of(model).prepared((np.zeros((8, WIDTH), "float32"), None, None), 8)
    placed = peak() - start
    model.save_weights(f"{folder}/model.weights.h5")
    saved = peak() - start
    model.load_weights(f"{folder}/model.weights.h5")
    print(WIDTH * WIDTH * LAYERS * 4 / 2**20, created, placed, saved, peak() - start)


main(*sys.argv[1:])

"""Each collective once, inside programs and between them: a part of `python -m tfpar check`."""

import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfpar

MESHES = {
    "tensor": lambda n: {"tensor": n},
    "data": lambda n: {"data": n},
    "both": lambda n: {"data": 2, "tensor": n // 2},
}


def weights(strategy: tf.distribute.Strategy | None, devices: int) -> list[np.ndarray]:
    """The weights of a small model after a step."""
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else tf.device("CPU:0"):
        x = layers.Input((4 * devices,))
        h = layers.Dense(8 * devices, activation="relu")(x)
        h = layers.LayerNormalization()(layers.Dense(8 * devices)(h))
        model = keras.Model(x, layers.Dense(4 * devices)(h))
        model.compile("sgd", "mse", jit_compile=bool(strategy and strategy.mesh.on_gpus))
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4 * devices, 4 * devices)).astype("float32")
    model.fit(data, data, batch_size=len(data), verbose=0)
    return model.get_weights()


def main(kind: str):
    """Compare a step on all devices with one on the CPU."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    devices = len(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))
    expected = weights(None, devices)
    for where in ("between", "inside"):
        found = weights(tfpar.MeshStrategy(tfpar.Mesh(**MESHES[kind](devices)), collectives=where), devices)
        off = max(np.abs(a - b).max() for a, b in zip(expected, found, strict=True))
        if not off < 1e-4:
            raise ValueError(f"collectives {where} programs: weights are {off:.1e} off those of one device")


if __name__ == "__main__":
    main(sys.argv[1])

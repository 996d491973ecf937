"""On the GPUs of this host: each strategy and mesh against one GPU, every weight and slot, in float32 without TF32.

    python tests/on_gpus.py [PART OF A NAME ...]

XLA on and off, collectives inside programs and between them. Prints a line for each case; exits with 1 if one is off.
"""

import sys
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfpar

STEPS, BATCH, TOKENS, WIDTH, WORDS = 6, 16, 8, 32, 40
TOLERANCE = 2e-5  # of float32, relative to the largest of a weight


def encoder():
    """Look-ups, attention, normalisation and a classifier; one table looked up for each sample, one for all."""
    keras.utils.set_random_seed(0)
    x = layers.Input((TOKENS,), dtype="int32")
    h = layers.Embedding(WORDS, WIDTH)(x) + layers.Embedding(TOKENS, WIDTH)(keras.ops.arange(TOKENS))
    for _ in range(2):
        h = layers.LayerNormalization()(h + layers.MultiHeadAttention(4, WIDTH // 4)(h, h))
        h = layers.LayerNormalization()(h + layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(h)))
    return keras.Model(x, layers.Dense(WORDS, "softmax")(h))


def images():
    """Convolutions and batch statistics."""
    keras.utils.set_random_seed(0)
    x = h = layers.Input((8, 8, 4))
    for filters in (8, 16):
        h = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(h)))
    return keras.Model(x, layers.Dense(WORDS, "softmax")(layers.GlobalAveragePooling2D()(h)))


def data_of(build):
    """Samples for a model, `STEPS` batches."""
    rng, rows = np.random.default_rng(0), STEPS * BATCH
    if build is images:
        return rng.normal(size=(rows, 8, 8, 4)).astype("float32"), rng.integers(0, WORDS, rows)
    return rng.integers(0, WORDS, (rows, TOKENS)), rng.integers(0, WORDS, (rows, TOKENS))


def trained(build, strategy, jit_compile):
    """Weights and slots after some steps; `None` for one GPU."""
    with strategy.scope() if strategy else tf.device("GPU:0"):
        model = build()
        optimizer = keras.optimizers.Adam(1e-2, epsilon=1e-3, global_clipnorm=1.0)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)
    x, y = data_of(build)
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return {v.path: np.asarray(v.numpy()) for v in (*model.weights, *optimizer.variables)}


def cases(gpus):
    """Names, and what makes the strategy."""
    shapes = [{"tensor": 2}, {"data": 2}]
    if gpus >= 4:
        shapes += [{"tensor": 4}, {"data": 4}, {"data": 2, "tensor": 2}, {"stage": 2, "tensor": 2}]
    for shape in shapes:
        mesh, micro_batches = tfpar.Mesh(**shape), 4 if shape.get("stage") else 1
        options = [{}]
        options += [{"sequence_parallel": True}] if shape.get("tensor") else []
        options += [{"zero": 3}] if shape.get("data") else []
        for option in options:
            for where in ("inside", "between"):
                name = " ".join([str(mesh), *(f"{k}={v}" for k, v in option.items()), where])
                more = {"micro_batches": micro_batches, "collectives": where, **option}
                yield name, lambda mesh=mesh, more=more: tfpar.MeshStrategy(mesh, **more)


def main():
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    wrong = 0
    for build in (encoder, images):
        for jit_compile in (True, False):
            expected = None
            for name, make in cases(len(gpus)):
                title = f"{build.__name__} {name}{' XLA' if jit_compile else ''}"
                if not all(part in title for part in sys.argv[1:]):
                    continue
                expected = expected or trained(build, None, jit_compile)
                began = time.time()
                try:
                    found = trained(build, make(), jit_compile)
                    off = max(
                        np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)
                        for a, b in zip(expected.values(), found.values(), strict=True)
                    )
                    verdict = "ok" if off < TOLERANCE else "WRONG"
                except Exception as error:
                    off, verdict = float("nan"), f"FAILED {type(error).__name__}: {str(error)[:300]}"
                wrong += verdict != "ok"
                print(f"{title}: {off:.1e} {verdict} ({time.time() - began:.0f} s)", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""On the GPUs of this host: each strategy and mesh against one GPU, every weight and slot, in float32 without TF32.

    python tests/on_gpus.py [PART OF A NAME ...]

XLA on and off, collectives inside programs and between them; then 1,000 steps, a model that does not fit, and a process
that is killed. Prints a line for each case; exits with 1 if one is off.
"""

import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfpar
from tfpar.compat import _keras_attention

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


def trained(build, strategy, jit_compile, clipped):
    """Weights and slots after some steps; `None` for one GPU."""
    with strategy.scope() if strategy else tf.device("GPU:0"):
        model = build()
        optimizer = keras.optimizers.Adam(1e-2, epsilon=1e-3, global_clipnorm=1.0 if clipped else None)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)
    x, y = data_of(build)
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return {v.path: np.asarray(v.numpy()) for v in (*model.weights, *optimizer.variables)}


def cases(gpus):
    """Names, and what makes the strategy."""
    shapes = [{"tensor": 2}, {"data": 2}, {"stage": 2}]
    if gpus >= 4:
        shapes += [{"tensor": 4}, {"data": 4}, {"stage": 4}, {"data": 2, "tensor": 2}, {"stage": 2, "tensor": 2}]
        shapes += [{"data": 2, "shard": 2}]
    for shape in shapes:
        mesh, micro_batches = tfpar.Mesh(**shape), 4 if shape.get("stage") else 1
        options = [{}] if not shape.get("shard") else []
        options += [{"sequence_parallel": True}] if shape.get("tensor") else []
        options += [{"micro_batches": 2}] if shape.get("tensor") and not shape.get("stage") else []
        options += [{"zero": 1}, {"zero": 3}] if shape.get("data") else []
        for option in options:
            for where in ("inside", "between") if micro_batches == 1 else ("between",):
                name = " ".join([str(mesh), *(f"{k}={v}" for k, v in option.items()), where])
                more = {"micro_batches": micro_batches, "collectives": where, **option}
                yield name, lambda mesh=mesh, more=more: tfpar.MeshStrategy(mesh, **more)


# What a process trains, the signal that ends it if it is to be, what it is to say, which GPUs have little memory.
HOW_IT_ENDS = {
    "1,000 steps of Mesh(data=2)": ("Mesh(data=2)", 16, 1000, None, "trained"),
    "1,000 steps of Mesh(tensor=2)": ("Mesh(tensor=2)", 16, 1000, None, "trained"),
    "1,000 steps of Mesh(data=2, tensor=2)": ("Mesh(data=2, tensor=2)", 16, 1000, None, "trained"),
    "out of memory in Mesh(data=2)": ("Mesh(data=2)", 2**17, 1, None, "ResourceExhausted", "gpus"),
    "out of memory in Mesh(tensor=2)": ("Mesh(tensor=2)", 2**17, 1, None, "ResourceExhausted", "gpus"),
    "out of memory on one of Mesh(tensor=2)": ("Mesh(tensor=2)", 2**17, 1, None, "Termination timeout", "gpus[1:]"),
    "killed in Mesh(tensor=2)": ("Mesh(tensor=2)", 16, 10**6, signal.SIGKILL, "training"),
    "the next one": ("Mesh(tensor=2)", 16, 10, None, "trained"),
}
SCRIPT = """
import sys; sys.path.insert(0, {folder!r})
import keras, numpy as np, tensorflow as tf, tfpar, on_gpus
from tfpar import Mesh
gpus = tf.config.list_physical_devices("GPU")
for gpu in gpus:
    if gpu in {small}:
        tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=1536)])
    else:
        tf.config.experimental.set_memory_growth(gpu, True)
with tfpar.MeshStrategy({mesh}, collectives="inside").scope():
    model = on_gpus.encoder()
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=True)
x = np.random.default_rng(0).integers(0, on_gpus.WORDS, ({rows}, on_gpus.TOKENS))
batch = tf.data.Dataset.from_tensors((x, x)).cache().repeat()
print("training", flush=True)
found = model.fit(batch, steps_per_epoch={steps}, verbose=0).history["loss"][-1]
print("trained", "to a loss that is", "finite" if np.isfinite(found) else "NOT FINITE")
"""


def ended(mesh, rows, steps, killed, expected, small="()", most=150):
    """What is wrong with how a training ends in a process of its own, if anything."""
    script = SCRIPT.format(folder=sys.path[0], mesh=mesh, rows=rows, steps=steps, small=small)
    limit = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_nccl_termination_timeout_seconds=20"  # of waiting for another
    pipes = {"env": {**os.environ, "XLA_FLAGS": limit}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, "-P", "-c", script], **pipes) as process:
        try:
            if killed:
                time.sleep(30)
                process.send_signal(killed)
            said = process.communicate(timeout=most)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            return f"no end after {most} s"
    return None if expected in said and "NOT FINITE" not in said else said[-300:]


def attentions():
    """Names, and shapes and options of attentions."""
    for dtype in ("bfloat16", "float16"):
        for heads in ((4, 4), (4, 2), (4, 1)):
            for masks in (
                "none",
                "causal",
                "padding",
                "padding of each head",
                "causal and padding",
                "bias",
                "one bias",
            ):
                yield f"attention {dtype} heads={heads} {masks}", dtype, heads, masks


def attention_off(dtype, heads, masks):
    """How far cuDNN and the plain formula are from the formula in float32: the largest of output and gradients."""
    rng, (n, k), (b, t, s, h) = np.random.default_rng(0), heads, (2, 64, 96, 32)
    x = [tf.constant(rng.normal(size=size), tf.float32) for size in ([b, t, n, h], [b, s, k, h], [b, s, k, h])]
    biases = {"bias": [b, n, t, s], "one bias": [1, 1, t, s]}
    x += [tf.constant(rng.normal(size=biases[masks]), tf.float32)] if masks in biases else []
    x = [tf.cast(tf.cast(v, dtype), tf.float32) for v in x]
    mask = (
        tf.constant(rng.integers(0, 3, [b, n if "each head" in masks else 1, t, s]) > 0) if "padding" in masks else None
    )
    cotangent = tf.constant(rng.normal(size=[b, t, n, h]), tf.float32)

    def passed(dtype, fused):
        @tf.function(jit_compile=True, autograph=False)
        def run(values):
            values = [tf.cast(v, dtype) for v in values]
            given = dict(bias=values[3] if len(values) > 3 else None, mask=mask, is_causal="causal" in masks)
            told = []
            with _keras_attention.fused(256 if fused else 0, told.append), tf.GradientTape() as tape:
                tape.watch(values)
                q, key, v = values[:3]
                if k == 1 and not fused:  # which Keras' formula does not take on TensorFlow
                    key, v = tf.repeat(key, n, 2), tf.repeat(v, n, 2)
                y = keras.ops.dot_product_attention(q, key, v, flash_attention=fused or None, **given)
            assert not any(told), told
            return [y, *tape.gradient(y, values, tf.cast(cotangent, dtype))]

        return [tf.cast(v, tf.float32) for v in run(x)]

    exact, plain, fused = passed("float32", False), passed(dtype, False), passed(dtype, True)
    return [
        max(float(tf.reduce_max(tf.abs(a - e)) / tf.reduce_max(tf.abs(e))) for a, e in zip(found, exact, strict=True))
        for found in (fused, plain)
    ]


def main():
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    wrong = 0
    for name, *options in attentions():
        if all(part in name for part in sys.argv[1:]):
            try:
                off, plain = attention_off(*options)
                verdict = "ok" if off < 1.5 * plain else "WRONG"
            except Exception as error:
                off, plain, verdict = float("nan"), 0.0, f"FAILED {type(error).__name__}: {str(error)[:300]}"
            wrong += verdict != "ok"
            print(f"{name}: {off:.1e}, the plain formula {plain:.1e} {verdict}", flush=True)
    for name, how in HOW_IT_ENDS.items():
        if all(part in name for part in sys.argv[1:]) and len(gpus) >= eval(f"tfpar.{how[0]}").size:
            began, why = time.time(), ended(*how)
            wrong += why is not None
            print(f"{name}: {f'FAILED {why}' if why else 'ok'} ({time.time() - began:.0f} s)", flush=True)
    for build, clipped in ((encoder, False), (encoder, True), (images, True)):
        for jit_compile in (True, False):
            expected = None
            for name, make in cases(len(gpus)):
                title = f"{build.__name__} {name}{' XLA' if jit_compile else ''}{' clipped' if clipped else ' free'}"
                if not all(part in title for part in sys.argv[1:]):
                    continue
                expected = expected or trained(build, None, jit_compile, clipped)
                began = time.time()
                try:
                    found = trained(build, make(), jit_compile, clipped)
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

"""A decoder of KerasHub trained on one GPU: by Keras alone, by tfpar with the formula of attention, and with cuDNN's.

Llama's blocks, 8 of width 2048 with 16 heads of queries and 4 of keys, 2048 tokens, in mixed_bfloat16 with SGD.
"""

import argparse
import contextlib
import time

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import tfpar

WORDS, CLASSES = 32000, 1000


class Clock(keras.callbacks.Callback):
    """Notes when a step has ended."""

    def on_train_begin(self, logs=None):
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.times.append(time.perf_counter())


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("way", choices=("keras", "formula", "cudnn"))
    for name, default in (("blocks", 8), ("width", 2048), ("tokens", 2048), ("batch", 4), ("steps", 15)):
        p.add_argument(f"--{name}", type=int, default=default)
    options = p.parse_args()
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    keras.config.set_dtype_policy("mixed_bfloat16")
    if options.way == "formula":
        keras.config.disable_flash_attention()
    keras.utils.set_random_seed(0)
    strategy = None if options.way == "keras" else tfpar.MeshStrategy(tfpar.Mesh())
    with strategy.scope() if strategy else contextlib.nullcontext():
        backbone = keras_hub.models.LlamaBackbone(
            vocabulary_size=WORDS, num_layers=options.blocks, num_query_heads=16, num_key_value_heads=4,
            hidden_dim=options.width, intermediate_dim=11 * options.width // 4,
        )  # fmt: skip
        model = keras.Model(backbone.input, keras.layers.Dense(CLASSES)(backbone.output))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=True)
    rng, size, clock = np.random.default_rng(0), (options.batch, options.tokens), Clock()
    x = {"token_ids": rng.integers(1, WORDS, size, "int32"), "padding_mask": np.ones(size, "int32")}
    data = tf.data.Dataset.from_tensors((x, rng.integers(0, CLASSES, size, "int32"))).cache().repeat()
    model.fit(data, steps_per_epoch=options.steps, verbose=0, callbacks=[clock])
    first, *steps = np.diff(clock.times)
    memory = tf.config.experimental.get_memory_info("GPU:0")["peak"] if tf.config.list_physical_devices("GPU") else 0
    print(f"{options.way}: {min(steps) * 1e3:.1f} ms, {memory / 2**30:.1f} GiB, first step {first:.0f} s")


if __name__ == "__main__":
    main()

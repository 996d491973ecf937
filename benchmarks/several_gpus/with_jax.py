"""The model of `main.py` under Keras on JAX, on one GPU and by `keras.distribution` on all: what one could have else.

    python benchmarks/several_gpus/with_jax.py ModelParallel

It is run by a Python that has JAX and Keras, and prints a line of JSON: the fastest step in seconds, the first, and the
most memory of a GPU.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import harness
import jax
import keras


def distribution(run, blocks):
    """That of `keras.distribution`; its ModelParallel divides attention by heads, and dense layers in pairs."""
    devices = keras.distribution.list_devices()
    if run == "DataParallel":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["(query|key|value).*kernel"] = (None, "model", None)
    layout["(query|key|value).*bias"] = ("model", None)
    layout["attention_output.*kernel"] = ("model", None, None)
    names = [f"dense_{n}" if n else "dense" for n in range(2 * blocks)]
    for up, down in zip(names[1::2], names[::2], strict=True):  # of a block, Keras makes the second before the first
        layout[f"{up}/kernel"], layout[f"{up}/bias"] = (None, "model"), ("model",)
        layout[f"{down}/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def main(options):
    """Train, and print."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    if options.run != "one":
        keras.distribution.set_distribution(distribution(options.run, options.blocks))
    began = time.time()
    model = harness.tokens(options)
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    options.batch *= jax.device_count() if options.run == "DataParallel" else 1
    x, y = harness.words(options)
    model.train_on_batch(x, y)
    first, steps = time.time() - began, []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = float(model.train_on_batch(x, y))  # waits for the step
        steps.append(time.perf_counter() - began)
    memory = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    found = {"step": min(steps), "first": first, "loss": loss, "memory": memory, "batch": options.batch}
    print(json.dumps(found))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DataParallel", "ModelParallel"))
    for name, default in (("batch", 32), ("blocks", 16), ("width", 2048), ("tokens", 512), ("steps", 20)):
        p.add_argument(f"--{name}", type=int, default=default, help="for each GPU" if name == "batch" else None)
    main(p.parse_args())

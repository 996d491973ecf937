"""The model of `main.py` under Keras on JAX, on one GPU and by `keras.distribution` on all: what one could have else.

    python benchmarks/language_models/with_jax.py ModelParallel

It is run by a Python that has JAX, Keras and KerasHub, and prints a line of JSON. `ModelParallel` divides the weights
as KerasHub's own layout for it says.
"""

import argparse
import json
import os
import time

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import keras_hub
import models
import numpy as np


def distribution(run):
    """That of `keras.distribution`."""
    devices = keras.distribution.list_devices()
    if run == "DataParallel":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = keras_hub.models.LlamaBackbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def trained(options):
    """Seconds of a step, and of the first."""
    began = time.time()
    model = models.causal_lm(options)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    options.batch *= jax.device_count() if options.run == "DataParallel" else 1
    x, y = models.texts(options)
    model.train_on_batch(x, y)
    first, steps = time.time() - began, []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = float(np.ravel(model.train_on_batch(x, y))[0])  # waits for the step
        steps.append(time.perf_counter() - began)
    tokens = options.batch * options.tokens / min(steps)
    return {"step": min(steps), "first": first, "loss": loss, "batch": options.batch, "tokens": tokens}


def main(options):
    """Measure, and print."""
    keras.utils.set_random_seed(0)
    if options.run != "one":
        keras.distribution.set_distribution(distribution(options.run))
    if options.task == "train":
        found = trained(options)
    else:
        model = models.filled(options)
        found = {f"at {n}": models.tokens_in_a_second(options, model, n) for n in options.prompts}
    found["memory"] = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    print(json.dumps({"run": options.run, **found}))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DataParallel", "ModelParallel"))
    models.add_options(p)
    p.add_argument("--steps", type=int, default=10)
    main(p.parse_args())

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

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import harness
import keras


def layout_map(mesh, blocks):
    """Divides attention by heads, and dense layers in pairs."""
    layout = keras.distribution.LayoutMap(mesh)
    layout["(query|key|value).*kernel"] = (None, "model", None)
    layout["(query|key|value).*bias"] = ("model", None)
    layout["attention_output.*kernel"] = ("model", None, None)
    names = [f"dense_{n}" if n else "dense" for n in range(2 * blocks)]
    for up, down in zip(names[1::2], names[::2], strict=True):  # of a block, Keras makes the second before the first
        layout[f"{up}/kernel"], layout[f"{up}/bias"] = (None, "model"), ("model",)
        layout[f"{down}/kernel"] = ("model", None)
    return layout


def build(options):
    """The compiled model."""
    model = harness.tokens(options)
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    return model


def main(options):
    """Train, and print."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    if options.run != "one":
        chosen = harness.distribution_on_jax(options.run, lambda mesh: layout_map(mesh, options.blocks))
        keras.distribution.set_distribution(chosen)
    print(json.dumps(harness.measured_on_jax(options, build, harness.words)))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DataParallel", "ModelParallel"))
    for name, default in (("batch", 32), ("blocks", 16), ("width", 2048), ("tokens", 512), ("steps", 20)):
        p.add_argument(f"--{name}", type=int, default=default, help="for each GPU" if name == "batch" else None)
    main(p.parse_args())

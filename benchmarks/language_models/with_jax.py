"""The model of `main.py` under Keras on JAX, on one GPU and by `keras.distribution` on all: what one could have else.

    python benchmarks/language_models/with_jax.py ModelParallel

It is run by a Python that has JAX, Keras and KerasHub, and prints a line of JSON. `ModelParallel` divides the weights
as KerasHub's own layout for it says.
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
import keras_hub
import models


def build(options):
    """The compiled model."""
    model = models.causal_lm(options)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main(options):
    """Measure, and print."""
    keras.utils.set_random_seed(0)
    if options.run != "one":
        chosen = harness.distribution_on_jax(options.run, keras_hub.models.LlamaBackbone.get_layout_map)
        keras.distribution.set_distribution(chosen)
    if options.task == "train":
        found = harness.measured_on_jax(options, build, models.texts)
        found["tokens"] = options.batch * options.tokens / found["step"]
    else:
        model = models.filled(options)
        found = {f"at {n}": models.tokens_in_a_second(options, model, n) for n in options.prompts}
        found["memory"] = harness.most_memory_on_jax()
    print(json.dumps({"run": options.run, **found}))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DataParallel", "ModelParallel"))
    models.add_options(p)
    p.add_argument("--steps", type=int, default=10)
    main(p.parse_args())

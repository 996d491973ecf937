"""Keras on TensorFlow, with and without strategies, and on JAX: what a user adds to a script is a function's body."""

import os
import sys

from models import BLOCKS, LAYERS, MODELS


def stock(devices):
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(devices)


def tfpar_one(devices):
    import tfpar

    return tfpar.DataParallelStrategy(devices[:1])


def tfpar_data(devices):
    import tfpar

    return tfpar.DataParallelStrategy(devices)


def tfpar_zero(devices):
    import tfpar

    return tfpar.DataParallelStrategy(devices, zero=3)


def tfpar_tensor(devices):
    import tfpar

    return tfpar.TensorParallelStrategy(devices)


def tfpar_1f1b(devices):
    import tfpar

    return tfpar.PipelineStrategy(devices, micro_batches=8)


def tfpar_gpipe(devices):
    import tfpar

    return tfpar.PipelineStrategy(devices, micro_batches=8, schedule="gpipe")


def jax_data(devices):
    import keras

    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))


def jax_model(devices):
    import keras

    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["(query|key|value).*kernel"] = (None, "model", None)
    layout["(query|key|value).*bias"] = ("model", None)
    layout["attention_output.*kernel"] = ("model", None, None)
    for up, down in pairs(sys.argv):
        layout[f"{up}/kernel"], layout[f"{up}/bias"] = (None, "model"), ("model",)
        layout[f"{down}/kernel"] = ("model", None)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))


def pairs(arguments):
    """The names of dense layers that belong together; of a block, Keras makes the second before the first."""
    names = [f"dense_{n}" if n else "dense" for n in range(2 * (LAYERS if "gpt" in arguments else BLOCKS))]
    return [names[1:3]] if "mlp" in arguments else zip(names[1::2], names[::2], strict=True)


RUNS = {  # what a run adds to a script, and the cores that it uses
    "keras": (None, 1),
    "keras, all cores": (None, 2),
    "keras, all cores, XLA": (None, 2),
    "stock MirroredStrategy": (stock, 2),
    "tfpar, one device": (tfpar_one, 1),
    "tfpar data": (tfpar_data, 2),
    "tfpar ZeRO 3": (tfpar_zero, 2),
    "tfpar tensor": (tfpar_tensor, 2),
    "tfpar GPipe": (tfpar_gpipe, 2),
    "tfpar 1F1B": (tfpar_1f1b, 2),
    "jax": (None, 1),
    "jax, all cores": (None, 2),
    "jax DataParallel": (jax_data, 2),
    "jax ModelParallel": (jax_model, 2),
}


def measure(options):
    """The numbers of one run."""
    added, cores = RUNS[options.run]
    on_jax = options.run.startswith("jax")
    if on_jax:
        os.environ["KERAS_BACKEND"] = "jax"
        divided = "--xla_force_host_platform_device_count=2 " if added else ""
        os.environ["XLA_FLAGS"] = divided + ("--xla_cpu_multi_thread_eigen=false" if cores == 1 or added else "")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import harness

    if not on_jax and not options.run.startswith("keras, all cores"):
        from tfpar.testing import logical_cpus

        logical_cpus(2, threads=cores)
    import keras
    import numpy as np

    strategy, devices = None, ["CPU:0", "CPU:1"]
    if added:
        strategy = added(keras.distribution.list_devices("cpu") if on_jax else devices)
    model = MODELS[options.model]
    x, y = model.data(np.random.default_rng(0), model.batch)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if model.loss == "logits" else model.loss
    compiled = True if options.run.endswith("XLA") else "auto"
    found = harness.measured_fit(options, strategy, lambda _: model.build(), x, y, (), loss, compiled)
    return {**found, "lines": lines(added) + (strategy is not None)}  # and `with strategy.scope()`


def lines(added):
    """The lines of a function's body, imports and docstring aside."""
    import inspect

    if added is None:
        return 0
    body = inspect.getsource(added).splitlines()[1:]
    return sum(bool(line.strip()) and not line.strip().startswith(("import", '"""')) for line in body)

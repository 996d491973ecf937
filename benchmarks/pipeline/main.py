"""How much faster is a pipeline than one device, and what does it cost?

Each run is a process of its own; rounds of all runs alternate, so that a noisy machine is noisy for all of them.
Without GPUs, each device is one core: intra_op=1, and as many threads for operations as devices.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

RUNS = ("keras", "keras, all cores", "tfpar, one device", "layers", "gpipe", "1f1b")


def main():
    options = parser().parse_args()
    if options.run:
        print(json.dumps(measure(options)))
        return
    results = {}
    for _ in range(options.rounds):
        for run in options.runs:
            command = [sys.executable, __file__, *sys.argv[1:], "--run", run]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.setdefault(run, []).append(json.loads(output.splitlines()[-1]))
    best = {run: {key: min(r[key] for r in found) for key in found[0]} for run, found in results.items()}
    report(options, best)


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--blocks", type=int, default=8)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--micro-batches", type=int, default=8)
    p.add_argument("--policy", default="float32", help="the dtype policy")
    p.add_argument("--steps", type=int, default=8, help="timed steps in each process")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    p.add_argument("--run", choices=RUNS, help="one run in this process, its numbers as JSON")
    return p


def encoder(options):
    """Transformer encoder blocks, after Vaswani et al., normalised after each part."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    x = h = layers.Input((options.tokens, options.width))
    for _ in range(options.blocks):
        attention = layers.MultiHeadAttention(16, options.width // 16)
        h = layers.LayerNormalization()(layers.add([h, attention(h, h)]))
        f = layers.Dense(options.width)(layers.Dense(4 * options.width, activation="gelu")(h))
        h = layers.LayerNormalization()(layers.add([h, f]))
    return keras.Model(x, layers.Dense(options.width, dtype="float32")(h))


def strategy_of(options, gpus):
    """The strategy of a run; `None` for plain Keras."""
    import tfpar

    devices = [f"{'GPU' if gpus else 'CPU'}:{n}" for n in range(options.stages)]
    return {
        "keras": lambda: None,
        "keras, all cores": lambda: None,
        "tfpar, one device": lambda: tfpar.LayerPlacementStrategy(devices[:1]),
        "layers": lambda: tfpar.LayerPlacementStrategy(devices),
        "gpipe": lambda: tfpar.PipelineStrategy(devices, options.micro_batches, "gpipe"),
        "1f1b": lambda: tfpar.PipelineStrategy(devices, options.micro_batches, "1f1b"),
    }[options.run]()


def measure(options):
    """Seconds of tracing, of the first step, of the fastest, CPU seconds, the loss, the largest memory of any GPU."""
    import contextlib

    import keras
    import numpy as np
    import tensorflow as tf
    from tensorflow.python.eager import context

    from tfpar.testing import logical_cpus

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        one = options.run in ("keras", "tfpar, one device")
        logical_cpus(options.stages, threads=1 if one else options.stages)
    keras.config.set_dtype_policy(options.policy)
    strategy = strategy_of(options, gpus)
    rng = np.random.default_rng(0)
    shape = options.batch, options.tokens, options.width
    x, y = (tf.constant(rng.normal(size=shape), "float32") for _ in range(2))
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = encoder(options)
        model.compile(keras.optimizers.SGD(0.01), "mse")
    calls = []  # of TensorFlow functions; the longest is the first step itself, with the optimisation of its graph

    def timed(context, *args, call=context.Context.call_function):
        begin = time.perf_counter()
        try:
            return call(context, *args)
        finally:
            calls.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    with mock.patch.object(context.Context, "call_function", timed):
        model.fit(data, steps_per_epoch=1, verbose=0)
    first = time.perf_counter() - begin

    class Clock(keras.callbacks.Callback):
        steps = ()

        def on_train_batch_begin(self, batch, logs=None):
            self.began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            self.loss = float(logs["loss"])  # waits for the step
            self.steps += ((time.perf_counter() - self.began[0], time.process_time() - self.began[1]),)

    clock = Clock()
    model.fit(data, steps_per_epoch=options.steps + 2, verbose=0, callbacks=[clock])
    step, cpu = min(clock.steps[2:])
    memory = max([tf.config.experimental.get_memory_info(f"GPU:{n}")["peak"] for n in range(len(gpus))], default=0)
    return {"trace": first - max(calls), "first": first, "step": step, "cpu": cpu, "loss": clock.loss, "memory": memory}


def report(options, best):
    """A table of ratios to plain Keras."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.blocks} encoder blocks, {options.stages} stages, {options.micro_batches} micro-batches"
    )
    headings = (
        "",
        "step",
        "of Keras",
        "CPU seconds",
        "of Keras",
        "busy",
        "tracing",
        "of Keras",
        "first step",
        "of Keras",
        "loss",
        "GPU memory",
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    keras = best["keras"]
    for run, found in best.items():
        table.add_row(
            run, f"{found['step']:.3f} s", f"{found['step'] / keras['step']:.2f}",
            f"{found['cpu']:.3f}", f"{found['cpu'] / keras['cpu']:.3f}",
            f"{found['cpu'] / found['step'] / options.stages:.1%}",
            f"{found['trace']:.1f} s", f"{found['trace'] / keras['trace']:.2f}",
            f"{found['first']:.1f} s", f"{found['first'] / keras['first']:.2f}",
            f"{found['loss']:.6f}", f"{found['memory'] / 2**30:.2f} GiB" if found["memory"] else "",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

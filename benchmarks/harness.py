"""What benchmarks share: models, rounds of processes, and the measurement of `fit`."""

import contextlib
import json
import os
import subprocess
import sys
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main(file, options, measure, report):
    """One run in this process, or all of them in processes of their own and a table."""
    if options.run:
        print(json.dumps(measure(options)))
    else:
        report(options, best_of_rounds(file, options))


def best_of_rounds(file, options):
    """The smallest of each number over rounds; every run is a process, and runs alternate, as the machine is shared."""
    results = {}
    for _ in range(options.rounds):
        for run in options.runs:
            command = [sys.executable, file, *sys.argv[1:], "--run", run]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{run} failed: {done.stderr[-2000:]}", file=sys.stderr)
            else:
                results.setdefault(run, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {run: {key: min(r[key] for r in found) for key in found[0]} for run, found in results.items()}


def print_table(title, headings, rows, width):
    """A table of numbers, of which the first column names the run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def gibibytes(found):
    """The largest memory of a GPU; nothing without one."""
    return f"{found['memory'] / 2**30:.2f} GiB" if found["memory"] else ""


def add_options(p, runs):
    p.add_argument("--blocks", type=int, default=8)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--policy", default="float32", help="the dtype policy")
    p.add_argument("--steps", type=int, default=8, help="timed steps in each process")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--runs", nargs="+", choices=runs, default=runs)
    p.add_argument("--run", choices=runs, help="one run in this process, its numbers as JSON")


def add_device_options(p):
    p.add_argument("--devices", type=int, default=2)
    p.add_argument("--split", action="store_true", help="make the devices of one GPU")
    p.add_argument("--memory", type=int, default=36000, help="MiB of each device of a GPU that is split")


def started(options, one):
    """The GPUs, and the names of the devices to use; without GPUs each is a core, of which `one` uses the first."""
    import tensorflow as tf

    from tfpar.testing import logical_cpus

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        logical_cpus(options.devices, threads=1 if one else options.devices)
    elif options.split:
        parts = [tf.config.LogicalDeviceConfiguration(memory_limit=options.memory)] * options.devices
        tf.config.set_logical_device_configuration(gpus[0], parts)
    return gpus, [f"{'GPU' if gpus else 'CPU'}:{n}" for n in range(options.devices)]


def encoder(options):
    """Transformer encoder blocks, after Vaswani et al., normalised after each part."""
    import keras
    from keras import layers

    x = h = layers.Input((options.tokens, options.width))
    for _ in range(options.blocks):
        attention = layers.MultiHeadAttention(16, options.width // 16)
        h = layers.LayerNormalization()(layers.add([h, attention(h, h)]))
        f = layers.Dense(options.width)(layers.Dense(4 * options.width, activation="gelu")(h))
        h = layers.LayerNormalization()(layers.add([h, f]))
    return keras.Model(x, layers.Dense(options.width, dtype="float32")(h))


def measured_fit(options, strategy, build, x, y, gpus, loss="mse", jit_compile="auto", optimizer=None):
    """Seconds of tracing, of the first step, of the fastest, CPU seconds, the loss, the largest memory of any GPU."""
    import keras
    import tensorflow as tf
    from tensorflow.python.eager import context

    keras.utils.set_random_seed(0)
    data = tf.data.Dataset.from_tensors((tf.constant(x), tf.constant(y))).cache().repeat()
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build(options)
        model.compile(optimizer or keras.optimizers.SGD(0.01), loss, jit_compile=jit_compile)
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

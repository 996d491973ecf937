"""What benchmarks share: models, rounds of processes, and the measurement of `fit`."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BEGAN = time.time()


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
        for runs in [options.runs] if options.side_by_side else [[run] for run in options.runs]:
            for run, (code, out, err) in started_together(file, runs).items():
                if code:
                    print(f"{run} failed: {err[-2000:]}", file=sys.stderr)
                else:
                    results.setdefault(run, []).append(json.loads(out.splitlines()[-1]))
    return {run: {key: min(r[key] for r in found) for key in found[0]} for run, found in results.items()}


def started_together(file, runs):
    """For each run, its exit code and what it wrote: all at once, but for what they measure in `turn`."""
    with tempfile.TemporaryDirectory() as folder:
        files, running = {}, {}
        for n, run in enumerate(runs):
            files[run] = [open(f"{folder}/{n}.{kind}", "w+") for kind in ("out", "err")]  # noqa: SIM115
            command = [sys.executable, file, *sys.argv[1:], "--run", run]
            environment = {**os.environ, "TURN": f"{folder}/{n}.turn"}
            running[run] = subprocess.Popen(command, stdout=files[run][0], stderr=files[run][1], env=environment)
        waiting = [f"{folder}/{n}.turn" for n in range(len(runs))]
        while any(p.poll() is None and not os.path.exists(w) for p, w in zip(running.values(), waiting, strict=True)):
            time.sleep(0.05)
        for process, mine in zip(running.values(), waiting, strict=True):
            open(f"{mine}.begin", "w").close()
            process.wait()
        found = {}
        for run, (out, err) in files.items():
            out.seek(0), err.seek(0)
            found[run] = running[run].returncode, out.read(), err.read()
            out.close(), err.close()
        return found


def turn():
    """Waits until all runs that began together are here, and those before this one have ended."""
    mine = os.environ.get("TURN")
    if mine:
        open(mine, "w").close()
        while not os.path.exists(f"{mine}.begin"):
            time.sleep(0.05)


def print_table(title, headings, rows):
    """A table in Markdown, of which the first column names the run."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(box=MARKDOWN)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print(title)
    Console(width=1000).print(table)


def resident(peak=False):
    """Bytes of memory that this process has; or the most it had since it was last asked without `peak`."""
    name = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as status:
        found = next(int(line.split()[1]) for line in status if line.startswith(name))
    if not peak:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return found * 1024


def gibibytes(found, key="memory"):
    """The largest memory of a GPU, or what is said of it; nothing without one."""
    return f"{found[key] / 2**30:.2f} GiB" if found[key] else ""


def add_options(p, runs):
    p.add_argument("--model", choices=tuple(MODELS), default="encoder")
    add_size_options(p)
    add_run_options(p, runs)


def add_size_options(p):
    p.add_argument("--blocks", type=int, default=8)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--policy", default="float32", help="the dtype policy")


def add_run_options(p, runs):
    p.add_argument("--steps", type=int, default=8, help="timed steps in each process")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--side-by-side", action="store_true", help="start all runs at once, and time them in turn")
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


def mlp(options):
    """Four layers, small enough for overhead to show."""
    import keras
    from keras import layers

    inner = [layers.Dense(options.width, activation="relu") for _ in range(3)]
    return keras.Sequential([layers.Input((options.width,)), *inner, layers.Dense(options.width)])


def tokens(options):
    """The encoder between an embedding and a classifier: little data for much work."""
    import keras
    from keras import layers

    x = layers.Input((options.tokens,), dtype="int32")
    h = encoder(options)(layers.Embedding(1000, options.width)(x))
    return keras.Model(x, layers.Dense(1000, "softmax", dtype="float32")(layers.GlobalAveragePooling1D()(h)))


def floats(options, *shape):
    """Random inputs and targets."""
    import numpy as np

    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(options.batch, *shape, options.width)).astype("float32") for _ in range(2))


def words(options):
    """Random words, and a class for each of the texts."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, 1000, (options.batch, options.tokens), "int32"), rng.integers(0, 1000, options.batch)


MODELS = {  # how to build it, its data, its loss
    "encoder": (encoder, lambda options: floats(options, options.tokens), "mse"),
    "mlp": (mlp, floats, "mse"),
    "tokens": (tokens, words, "sparse_categorical_crossentropy"),
}


def measured(options, strategy, gpus, **more):
    """The numbers of a run of one of `MODELS`; see `measured_fit`."""
    build, data, loss = MODELS[options.model]
    return measured_fit(options, strategy, build, *data(options), gpus, loss, **more)


def planned(strategy, model):
    """The bytes of weights, gradients, slots and activations on the fullest device, by the plan."""
    plan = strategy.explain(model) if hasattr(strategy, "explain") else None
    return max(map(plan.bytes, range(plan.partition.stages))) if plan else 0


def measured_fit(options, strategy, build, x, y, gpus, loss="mse", jit_compile="auto", optimizer=None):
    """The numbers of a run.

    Returns:
        Seconds until the first step begins, of tracing in it, of all of it, and of the fastest; its CPU seconds; the
        loss; the largest memory of any GPU, what the plan says of it, and that of the process beyond what it had
        before; and the number of weights.
    """
    import keras
    import tensorflow as tf
    from tensorflow.python.eager import context

    before = resident()
    keras.utils.set_random_seed(0)
    data = tf.data.Dataset.from_tensors(keras.tree.map_structure(tf.constant, (x, y))).cache().repeat()
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

    start, begin = time.time() - BEGAN, time.perf_counter()
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

    turn()
    clock = Clock()
    model.fit(data, steps_per_epoch=options.steps + 2, verbose=0, callbacks=[clock])
    step, cpu = min(clock.steps[2:])
    memory = max([tf.config.experimental.get_memory_info(f"GPU:{n}")["peak"] for n in range(len(gpus))], default=0)
    return {
        "start": start, "trace": first - max(calls, default=first), "first": first, "step": step, "cpu": cpu,
        "loss": clock.loss, "memory": memory, "planned": planned(strategy, model), "host": resident(peak=True) - before,
        "weights": sum(math.prod(w.shape) for w in model.trainable_weights),
    }  # fmt: skip


def measured_on_jax(options, build, data):
    """The numbers of a run under Keras on JAX; the batch of the options is for each GPU.

    Args:
        build: makes the compiled model.
        data: makes what it is trained on, of the options.
    """
    import jax
    import numpy as np

    began = time.time()
    model = build(options)
    options.batch *= jax.device_count() if options.run == "DataParallel" else 1
    x, y = data(options)
    model.train_on_batch(x, y)
    first, steps = time.time() - began, []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = float(np.ravel(model.train_on_batch(x, y))[0])  # waits for the step
        steps.append(time.perf_counter() - began)
    memory = most_memory_on_jax()
    return {"step": min(steps), "first": first, "loss": loss, "memory": memory, "batch": options.batch}


def most_memory_on_jax():
    """The most memory of a GPU, of what JAX has had."""
    import jax

    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())


def distribution_on_jax(run, layout_map):
    """That of `keras.distribution` over all devices.

    Args:
        layout_map: makes that of ModelParallel, of a mesh of which the axis "model" has all devices.
    """
    import keras

    devices = keras.distribution.list_devices()
    if run == "DataParallel":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    return keras.distribution.ModelParallel(layout_map=layout_map(mesh), batch_dim_name="batch")

"""How much host memory does it take to load and to save a model that is larger than a device, and how long?

Each run is a process of its own, on the GPUs of this machine. Without GPUs, devices are logical ones of the CPU, whose
memory is the host's: what a process has at most beyond the weights is what the host held of them, with TensorFlow's
code and plans. `--run pause` trains a language model, and saves it with its slots at once and in the background.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

STRATEGIES = ("tensor", "pipeline", "zero 3")
WIDTH = 4096


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=10)
    p.add_argument("--shard", type=float, default=1, help="GB of a file")
    p.add_argument("--folder", default="/tmp/preset")
    p.add_argument("--strategy", choices=STRATEGIES)
    p.add_argument("--run", choices=("save", "load", "pause"), help="one run in this process, its numbers as JSON")
    return p


def backbone(options, dtype="bfloat16"):
    """A Llama of about this size in bfloat16."""
    import keras_hub

    block = 2 * (WIDTH * WIDTH * 2.5 + 3 * WIDTH * 11008)
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32000, num_layers=max(1, round(options.gigabytes * 1e9 / block)), hidden_dim=WIDTH,
        num_query_heads=32, num_key_value_heads=8, intermediate_dim=11008, dtype=dtype,
    )  # fmt: skip


def measure(options):
    """Seconds to make or load a model and to save it, and bytes of memory."""
    import keras_hub
    import tensorflow as tf

    strategy, gpus = started(options)
    before = harness.resident()
    begin = time.perf_counter()
    with strategy.scope():
        if options.run == "save":
            model = backbone(options)
            for variable in model.variables:
                variable.assign(tf.fill(variable.shape, tf.cast(0.01, variable.dtype)))
        else:
            model = keras_hub.models.LlamaBackbone.from_preset(options.folder)
    found = {"seconds": time.perf_counter() - begin, "weights": sum(math.prod(v.shape) * 2 for v in model.variables)}
    in_host = 0 if gpus else found["weights"]
    found["most"] = harness.resident(peak=True) - before - in_host
    found["share"], found["devices"] = share(model), len(gpus) or 4
    if options.run == "save":
        begin = time.perf_counter()
        model.save_to_preset(options.folder, max_shard_size=options.shard)
        found["seconds"] = time.perf_counter() - begin
        found["most"] = harness.resident(peak=True) - before - in_host
    return found


def started(options):
    """The strategy, and the GPUs of this machine."""
    import tensorflow as tf

    import tfpar
    from tfpar.testing import logical_cpus

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        logical_cpus(4)
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    strategies = {
        "tensor": lambda: tfpar.TensorParallelStrategy(),
        "pipeline": lambda: tfpar.PipelineStrategy(micro_batches=1),
        "zero 3": lambda: tfpar.DataParallelStrategy(zero=3),
    }
    return strategies[options.strategy](), gpus


def pause(options):
    """Seconds that training waits for a file of weights and slots, and of a step meanwhile."""
    import keras
    import keras_hub

    strategy, _ = started(options)
    x = {name: np.ones((8, 128), "int32") for name in ("token_ids", "padding_mask")}
    with strategy.scope():
        model = keras_hub.models.LlamaCausalLM(backbone=backbone(options, "mixed_bfloat16"), preprocessor=None)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.steps, self.last = [], time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])  # waits for the step
            now = time.perf_counter()
            self.steps.append(now - self.last)
            self.last = now

    def trained(steps):
        clock = Clock()
        model.fit(*repeated(x, steps), batch_size=8, verbose=0, callbacks=[clock])
        return clock.steps

    file = pathlib.Path(options.folder).with_suffix(".weights.h5")
    trained(2)
    found = {"step": sorted(trained(9))[4]}
    found["bytes"] = sum(
        math.prod(v.shape) * v.value.dtype.size for v in [*model.variables, *model.optimizer.variables]
    )
    for name in ("at once", "in the background"):
        begin = time.perf_counter()
        saved = model.save_weights(file, asynchronous=name == "in the background")
        found[name] = time.perf_counter() - begin
        found["meanwhile"] = []
        while saved and not saved.done():
            found["meanwhile"] += trained(2)[1:]
        found["until the file is there"] = time.perf_counter() - begin
    found["meanwhile"] = sorted(found["meanwhile"])[len(found["meanwhile"]) // 2] if found["meanwhile"] else None
    file.unlink()
    return found


def repeated(x, steps):
    """So many batches of the same."""
    x = {name: np.concatenate([value] * steps) for name, value in x.items()}
    return x, x["token_ids"]


def share(model):
    """The share of the weights on the fullest device."""
    from tfpar.compat import _keras

    on = {}
    for variable in model.variables:
        for copy in _keras.stored(variable).copies:
            on[copy.device] = on.get(copy.device, 0) + math.prod(copy.shape)
    return max(on.values()) / sum(math.prod(v.shape) for v in model.variables)


def report(options):
    """A table of what a model took that was saved, and then loaded."""
    rows = []
    for run in ("save", "load"):
        for strategy in STRATEGIES if run == "load" else STRATEGIES[:1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--run", run, "--strategy", strategy]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            size, most = found["weights"] / 1e9, found["most"] / 1e9
            cells = f"{size:.1f} GB", f"{found['seconds']:.0f} s", f"{found['share']:.3f}", f"{most:.2f} GB"
            rows.append((f"{run}, {strategy}", *cells))
    headings = ("", "weights", "time", "share on the fullest device", "most memory beyond the weights")
    harness.print_table(f"a Llama on {found['devices']} devices, shards of {options.shard} GB", headings, rows)


if __name__ == "__main__":
    options = parser().parse_args()
    if options.run:
        print(json.dumps(pause(options) if options.run == "pause" else measure(options)))
    else:
        report(options)

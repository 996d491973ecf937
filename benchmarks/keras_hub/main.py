"""What of each backbone of KerasHub does each strategy divide, are its numbers those of one device, what does it cost?

Each model is a process of its own, with logical devices of the CPU; `--folder` keeps what was found, to go on later.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).parent.parent.parent / "tests"))
import harness


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="*", default=[], help="names of the table; all, if not given")
    p.add_argument("--optimizers", nargs="+", default=["sgd", "adam"])
    p.add_argument("--folder", default="/tmp/keras_hub", help="of what was found")
    p.add_argument("--run", help="one model in this process")
    return p


def measure(name, optimizer):
    """What each strategy does with a model, and how its numbers differ from those of one device."""
    from test_keras_hub import OPTIMIZERS, STRATEGIES, strategy_for, use
    from training import compiled

    import tfpar
    from tfpar.testing import named_values

    def trained(strategy):
        model = compiled(strategy, OPTIMIZERS[optimizer], lambda: zoo.model(name))
        return model, [use(model, name), named_values(model)]

    zoo, whole = started(name), None
    found = {}
    for run in (None, *STRATEGIES):
        try:
            strategy = strategy_for(name, run) if run else None
            model, numbers = trained(strategy)
            if run is None:
                whole = numbers
                found["weights"] = model.count_params()
                found["work"] = work(model, name, zoo)
                continue
            found[run] = {
                "differs": largest(whole, numbers),
                "work": work(model, name, zoo),
                **divided(strategy, model),
            }
        except tfpar.TfparError as error:
            found[run] = {"error": str(error)}
    return found


def started(name):
    """KerasHub's models, on eight logical devices, in the dtype in which this one is compared."""
    import keras

    from tfpar.testing import logical_cpus

    logical_cpus(8, threads=1)
    import keras_hub_zoo as zoo

    keras.config.set_floatx(zoo.dtype(name))
    keras.config.set_dtype_policy(zoo.dtype(name))
    return zoo


def largest(one, other):
    """The largest difference of any result, weight or slot, relative to the largest magnitude in it or absolute."""
    import keras

    from tfpar.testing import difference, distance

    pairs = zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True)
    return max(min(difference(a, b), 100 * distance(a, b)) for a, b in pairs)


def work(model, name, zoo):
    """CPU seconds of a training step of 8 samples, on all devices: the smallest of ten."""
    import keras

    class Clock(keras.callbacks.Callback):
        steps = ()

        def on_train_batch_begin(self, batch, logs=None):
            self.began = time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])  # waits for the step
            self.steps += (time.process_time() - self.began,)

    clock = Clock()
    model.fit(*zoo.data(name, 8), batch_size=8, epochs=12, verbose=0, callbacks=[clock])
    return min(clock.steps[2:])


def divided(strategy, model):
    """The share of the weights on the fullest device, and the matrices that no rank divides, with the reasons."""
    plan = strategy.explain(model)
    whole = sum(v.bytes for v in plan.partition.graph.variables)
    share = max(map(plan.parameter_bytes, range(plan.partition.stages))) / whole
    kept = {}
    for v, weight in enumerate(plan.weights):
        if len(weight.shape) > 1 and math.prod(weight.shape) > 1 and not plan.sharding(v, zero=4).divides:
            kept.setdefault(weight.why, []).append(weight.path)
    return {"share": share, "whole": kept}


def report(options):
    """A table with a row for each model, and below it what no rank divides."""
    import keras_hub_zoo as zoo
    from test_keras_hub import NAMES, STRATEGIES

    names = [name for name in NAMES if not options.models or name in options.models]
    folder, rows, kept = pathlib.Path(options.folder), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = [result(folder, name, optimizer) for optimizer in options.optimizers]
        cells = []
        for strategy in STRATEGIES:
            each = [f.get(strategy, {"error": f.get("error", "")}) for f in found]
            wrong = next((e["error"] for e in each if "error" in e), None)
            if wrong is None:
                cells.append(
                    f"{each[0]['share']:.2f}, {max(e['differs'] for e in each):.0e}, "
                    f"{each[0]['work'] / found[0]['work']:.1f}"
                )
                for why, paths in each[0]["whole"].items() if strategy == "tensor" else ():
                    kept.setdefault(why, {})[name] = len(paths)
            else:
                cells.append("fails")
                kept.setdefault(f"{strategy} fails: {wrong}", {})[name] = 1
        exact = "float32" if zoo.dtype(name) == "float32" else "inside" if name in zoo.FLOAT32_INSIDE else ""
        rows.append((name, f"{found[0].get('weights', 0):,}", exact, *cells))
    harness.print_table("backbones of KerasHub", ("", "weights", "float32", *STRATEGIES), rows)
    print()
    for why, those in kept.items():
        print(f"* {why}: {', '.join(f'{name} ({n})' for name, n in those.items())}")


def result(folder, name, optimizer):
    """What is known of a model, or is found out now."""
    path = folder / f"{name} {optimizer}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--run", name, "--optimizers", optimizer]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            error = done.stderr[-2000:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            done, error = None, "it took more than 15 minutes"
        path.write_text(json.dumps({"error": error}) if error else done.stdout.splitlines()[-1])
        print(name, optimizer, error, file=sys.stderr, flush=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    options = parser().parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.run:
        print(json.dumps(measure(options.run, options.optimizers[0])))
    else:
        report(options)

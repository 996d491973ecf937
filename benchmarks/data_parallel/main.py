"""How much faster is data parallelism than one device, and than tf.distribute's own?

Each run is a process of its own; rounds of all runs alternate, so that a noisy machine is noisy for all of them.
Without GPUs, each device is one core: intra_op=1, and as many threads for operations as devices.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

RUNS = ("keras", "keras, all cores", "stock", "tfpar, one device", "tfpar")


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, RUNS)
    p.add_argument("--weak", action="store_true", help="one device gets its share of the batch, not all of it")
    p.add_argument("--reduce", choices=("default", "nccl", "copies"), default="default", help="how tfpar adds up")
    harness.add_device_options(p)
    p.add_argument("--buckets", type=int, help="into how many parts tfpar divides the gradients")
    return p


def measure(options):
    """The numbers of one run."""
    import keras
    import tensorflow as tf

    import tfpar

    gpus, devices = harness.started(options, one=options.run in ("keras", "tfpar, one device"))
    keras.config.set_dtype_policy(options.policy)
    ops = {
        "default": None,
        "nccl": tf.distribute.NcclAllReduce(num_packs=0),
        "copies": tf.distribute.ReductionToOneDevice(),
    }
    tfpar_options = {"buckets": options.buckets, "cross_device_ops": ops[options.reduce]}
    strategy = {
        "stock": lambda: tf.distribute.MirroredStrategy(devices),
        "tfpar, one device": lambda: tfpar.DataParallelStrategy(devices[:1]),
        "tfpar": lambda: tfpar.DataParallelStrategy(devices, **tfpar_options),
    }.get(options.run, lambda: None)()
    alone = options.run in ("keras", "keras, all cores", "tfpar, one device")
    rows = options.batch // options.devices if options.weak and alone else options.batch
    options.batch = rows
    jit_compile = False if options.run == "stock" else "auto"  # it cannot be compiled
    found = harness.measured(options, strategy, devices if gpus else (), jit_compile=jit_compile)
    return {**found, "sample": found["step"] / rows}


def report(options, best):
    """A table of ratios to plain Keras."""
    title = f"{options.model}, width {options.width}, batch {options.batch}, {options.devices} devices"
    headings = "", "step", "of Keras", "speed", "CPU", "of Keras", "first step", "of Keras", "loss", "GPU memory"
    keras = best["keras"]
    rows = [
        (
            run, f"{found['step'] * 1e3:.2f} ms", f"{found['step'] / keras['step']:.3f}",
            f"{keras['sample'] / found['sample']:.2f}",
            f"{found['cpu'] * 1e3:.2f} ms", f"{found['cpu'] / keras['cpu']:.3f}",
            f"{found['first']:.1f} s", f"{found['first'] / keras['first']:.2f}",
            f"{found['loss']:.6f}", harness.gibibytes(found),
        )
        for run, found in best.items()
    ]  # fmt: skip
    harness.print_table(title, headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

"""How much faster is a step when the weights of each layer are divided between devices?

Each run is a process of its own; rounds of all runs alternate, so that a noisy machine is noisy for all of them.
Without GPUs, each device is one core: intra_op=1, and as many threads for operations as devices.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

RUNS = ("keras", "keras, all cores", "tfpar, one device", "tfpar", "tfpar, sequence parallel")


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, RUNS)
    harness.add_device_options(p)
    return p


def measure(options):
    """The numbers of one run."""
    import keras

    import tfpar

    gpus, devices = harness.started(options, one=options.run in ("keras", "tfpar, one device"))
    keras.config.set_dtype_policy(options.policy)
    strategy = {
        "tfpar, one device": lambda: tfpar.TensorParallelStrategy(devices[:1]),
        "tfpar": lambda: tfpar.TensorParallelStrategy(devices),
        "tfpar, sequence parallel": lambda: tfpar.TensorParallelStrategy(devices, sequence_parallel=True),
    }.get(options.run, lambda: None)()
    return harness.measured(options, strategy, devices if gpus else ())


def report(options, best):
    """A table of ratios to plain Keras."""
    title = f"encoder, {options.blocks} blocks, width {options.width}, batch {options.batch}, {options.devices} devices"
    headings = "", "step", "of Keras", "CPU", "of Keras", "first step", "of Keras", "loss", "GPU memory"
    keras = best["keras"]
    rows = [
        (
            run, f"{found['step'] * 1e3:.2f} ms", f"{found['step'] / keras['step']:.3f}",
            f"{found['cpu'] * 1e3:.2f} ms", f"{found['cpu'] / keras['cpu']:.3f}",
            f"{found['first']:.1f} s", f"{found['first'] / keras['first']:.2f}",
            f"{found['loss']:.6f}", harness.gibibytes(found),
        )
        for run, found in best.items()
    ]  # fmt: skip
    harness.print_table(title, headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

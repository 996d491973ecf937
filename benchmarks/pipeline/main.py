"""How much faster is a pipeline than one device, and what does it cost?

Each run is a process of its own; rounds of all runs alternate, so that a noisy machine is noisy for all of them.
Without GPUs, each device is one core: intra_op=1, and as many threads for operations as devices.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

RUNS = ("keras", "keras, all cores", "tfpar, one device", "layers", "gpipe", "1f1b")


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, RUNS)
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--micro-batches", type=int, default=8)
    return p


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
    """The numbers of one run."""
    import keras
    import tensorflow as tf

    from tfpar.testing import logical_cpus

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        one = options.run in ("keras", "tfpar, one device")
        logical_cpus(options.stages, threads=1 if one else options.stages)
    keras.config.set_dtype_policy(options.policy)
    return harness.measured(options, strategy_of(options, gpus), gpus)


def report(options, best):
    """A table of ratios to plain Keras."""
    title = f"{options.blocks} encoder blocks, {options.stages} stages, {options.micro_batches} micro-batches"
    headings = (
        "", "step", "of Keras", "CPU seconds", "of Keras", "busy", "tracing", "of Keras", "first step", "of Keras",
        "loss", "GPU memory",
    )  # fmt: skip
    keras = best["keras"]
    rows = [
        (
            run, f"{found['step']:.3f} s", f"{found['step'] / keras['step']:.2f}",
            f"{found['cpu']:.3f}", f"{found['cpu'] / keras['cpu']:.3f}",
            f"{found['cpu'] / found['step'] / options.stages:.1%}",
            f"{found['trace']:.1f} s", f"{found['trace'] / keras['trace']:.2f}",
            f"{found['first']:.1f} s", f"{found['first'] / keras['first']:.2f}",
            f"{found['loss']:.6f}", harness.gibibytes(found),
        )
        for run, found in best.items()
    ]  # fmt: skip
    harness.print_table(title, headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

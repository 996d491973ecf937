"""How much memory does each replica need when replicas divide what they would all have, and what does it cost?

Each run is a process of its own; rounds of all runs alternate, so that a noisy machine is noisy for all of them.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

ZERO = {"replicas": {}, "zero 1": {"zero": 1}, "zero 2": {"zero": 2}, "zero 3": {"zero": 3}}
ZERO["slots on the host"] = {"offload": "optimizer"}
RUNS = ("keras", *ZERO)


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, RUNS)
    harness.add_device_options(p)
    p.add_argument("--buckets", type=int, help="segments of the model")
    return p


def measure(options):
    """The numbers of one run; each replica has a batch of its own."""
    import keras

    import tfpar

    gpus, devices = harness.started(options, one=options.run == "keras")
    keras.config.set_dtype_policy(options.policy)
    rows, strategy = options.batch, None
    if options.run != "keras":
        rows *= len(devices)
        strategy = tfpar.DataParallelStrategy(devices, buckets=options.buckets, **ZERO[options.run])
    options.batch = rows
    return harness.measured(options, strategy, devices if gpus else (), optimizer="adam")


def report(options, best):
    """A table of memory and time."""
    title = f"encoder, {options.blocks} blocks, width {options.width}, {options.devices} replicas, Adam"
    rows = [
        (run, f"{found['step'] * 1e3:.1f} ms", f"{found['first']:.0f} s", harness.gibibytes(found))
        for run, found in best.items()
    ]
    harness.print_table(title, ("", "step", "first step", "most memory of a device"), rows)


if __name__ == "__main__":
    options = parser().parse_args()
    harness.main(__file__, options, measure, report)

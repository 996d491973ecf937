"""What does each strategy cost over plain Keras with XLA, when all its devices are parts of one GPU?

The devices share one GPU's time, so 1.00 would be the best; memory is that of the fullest device. All runs compile side
by side, and are timed one after the other.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

RUNS = {  # the number of devices, and the strategy on them
    "keras": (1, lambda tfpar, devices: None),
    "one device": (1, lambda tfpar, devices: tfpar.DataParallelStrategy(devices)),
    "8 micro-batches": (1, lambda tfpar, devices: tfpar.PipelineStrategy(devices, micro_batches=8)),
    "data 2": (2, lambda tfpar, devices: tfpar.DataParallelStrategy(devices)),
    "data 4": (4, lambda tfpar, devices: tfpar.DataParallelStrategy(devices)),
    "ZeRO 3, data 2": (2, lambda tfpar, devices: tfpar.DataParallelStrategy(devices, zero=3)),
    "tensor 2": (2, lambda tfpar, devices: tfpar.TensorParallelStrategy(devices)),
    "tensor 4": (4, lambda tfpar, devices: tfpar.TensorParallelStrategy(devices)),
    "pipeline 2": (2, lambda tfpar, devices: tfpar.PipelineStrategy(devices, micro_batches=8)),
    "pipeline 4": (4, lambda tfpar, devices: tfpar.PipelineStrategy(devices, micro_batches=8)),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, tuple(RUNS))
    p.set_defaults(model="tokens", width=1024, tokens=512, policy="mixed_bfloat16")
    p.add_argument("--memory", type=int, default=14000, help="MiB of the GPU for a run, divided between its devices")
    return p


def measure(options):
    """The numbers of one run."""
    import keras

    import tfpar

    options.devices, strategy = RUNS[options.run]
    options.split, options.memory = True, options.memory // options.devices
    gpus, devices = harness.started(options, one=False)
    keras.config.set_dtype_policy(options.policy)
    return harness.measured(options, strategy(tfpar, devices), devices if gpus else ())


def report(options, best):
    """A table of ratios to plain Keras."""
    keras = best.get("keras", next(iter(best.values())))
    rows = [
        (run, f"{found['step'] * 1e3:.1f} ms", f"{found['step'] / keras['step']:.2f}", f"{found['cpu'] * 1e3:.1f} ms",
         f"{found['first']:.0f} s", harness.gibibytes(found), f"{found['loss']:.5f}")
        for run, found in best.items()
    ]  # fmt: skip
    title = f"{options.blocks} encoder blocks of width {options.width}, {options.tokens} tokens, batch {options.batch}"
    headings = "", "step", "of Keras", "CPU work", "first step", "most memory of a device", "loss"
    harness.print_table(f"{title}, {options.policy}", headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

"""How much faster are several GPUs than one, and how large a model do they train?

Speed is samples per second, of plain Keras' on one GPU with XLA. `--runs large` trains, with Adam, what `--blocks` and
`--width` make too large for one GPU. Memory is that of the fullest GPU, and what the plan says of weights, gradients,
slots and activations.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

PEAK = 989e12  # products of an H100 or H200 in bfloat16, per second, by NVIDIA's data sheet
INSIDE = {"collectives": "inside"}
RUNS = {  # the batch, of one GPU's, and the strategy on n GPUs with m micro-batches
    "keras": (lambda n: 1, lambda tfpar, n, m: None),
    "one device": (lambda n: 1, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh())),
    "data": (lambda n: n, lambda tfpar, n, m: tfpar.DataParallelStrategy()),
    "data, bfloat16 sums": (lambda n: n, lambda tfpar, n, m: tfpar.DataParallelStrategy(reduce_dtype="bfloat16")),
    "stage": (lambda n: 1, lambda tfpar, n, m: tfpar.PipelineStrategy(micro_batches=8, schedule="eager-1f1b")),
    "stage, 1f1b": (lambda n: 1, lambda tfpar, n, m: tfpar.PipelineStrategy(micro_batches=8)),
    "stage, 4 batches": (
        lambda n: 4,
        lambda tfpar, n, m: tfpar.PipelineStrategy(micro_batches=m, schedule="eager-1f1b"),
    ),
    "tensor": (lambda n: 1, lambda tfpar, n, m: tfpar.TensorParallelStrategy()),
    "tensor, in turns": (lambda n: 1, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(tensor=n), 2, **INSIDE)),
    "tensor, cut": (lambda n: 1, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(tensor=n), collectives="between")),
    "zero 3": (lambda n: n, lambda tfpar, n, m: tfpar.DataParallelStrategy(zero=3, reduce_dtype="bfloat16")),
    "data, cut": (lambda n: n, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(data=n), collectives="between")),
    "data x stage": (lambda n: 2, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(data=2, stage=n // 2), 8)),
    "data x tensor": (lambda n: 2, lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(data=2, tensor=n // 2))),
    "data x tensor, in turns": (
        lambda n: 2,
        lambda tfpar, n, m: tfpar.MeshStrategy(tfpar.Mesh(2, 1, n // 2), 2, **INSIDE),
    ),
    "large": (lambda n: 2, lambda tfpar, n, m: tfpar.PipelineStrategy(micro_batches=m)),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, tuple(RUNS))
    p.add_argument("--micro-batches", type=int, default=16, help="of the runs with several batches")
    p.set_defaults(model="tokens", blocks=16, width=2048, tokens=512, policy="mixed_bfloat16", rounds=1)
    p.set_defaults(runs=("keras", "data", "stage", "stage, 4 batches", "tensor"))
    return p


def measure(options):
    """The numbers of one run."""
    import keras
    import tensorflow as tf

    import tfpar

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    keras.config.set_dtype_policy(options.policy)
    batches, strategy = RUNS[options.run]
    options.batch *= batches(len(gpus))
    strategy, large = strategy(tfpar, len(gpus), options.micro_batches), options.run == "large"
    found = harness.measured(options, strategy, gpus, optimizer="adam" if large else None)
    products = 6 * found["weights"] + 12 * options.blocks * options.tokens * options.width  # for a token, PaLM, app. B
    used = strategy.mesh.size if strategy else 1
    rate = products * options.batch * options.tokens / found["step"] / used / PEAK
    return {**found, "sample": found["step"] / options.batch, "batch": options.batch, "rate": rate}


def report(options, best):
    """A table of speeds."""
    keras = best.get("keras")
    rows = [
        (run, f"{found['batch']:.0f}", f"{found['step'] * 1e3:.1f} ms",
         f"{keras['sample'] / found['sample']:.2f}" if keras else "", f"{found['rate']:.0%}", f"{found['first']:.0f} s",
         harness.gibibytes(found), harness.gibibytes(found, "planned"), f"{found['loss']:.5f}")
        for run, found in best.items()
    ]  # fmt: skip
    weights = max(found["weights"] for found in best.values()) / 1e6
    headings = "", "batch", "step", "speed", "of the peak rate", "first step", "most memory", "planned", "loss"
    harness.print_table(f"{weights:.0f} million weights, {options.tokens} tokens, {options.policy}", headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

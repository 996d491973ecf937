"""How fast is a language model of KerasHub trained, and how fast does it generate, on several GPUs?

A Llama without weights of its own: in bfloat16 for generating, and mixed with float32 for training, with Adam.
`with_jax.py` is the same under Keras on JAX, to be run on the same machine.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness
import models

RUNS = {  # the batch for training, of one GPU's, and the strategy on n GPUs
    "keras": (lambda n: 1, lambda tfpar, n: None),
    "one device": (lambda n: 1, lambda tfpar, n: tfpar.MeshStrategy(tfpar.Mesh())),
    "data": (lambda n: n, lambda tfpar, n: tfpar.DataParallelStrategy()),
    "tensor": (lambda n: 1, lambda tfpar, n: tfpar.TensorParallelStrategy()),
    "data x tensor": (lambda n: 2, lambda tfpar, n: tfpar.MeshStrategy(tfpar.Mesh(data=2, tensor=n // 2))),
    "zero 3": (lambda n: n, lambda tfpar, n: tfpar.DataParallelStrategy(zero=3)),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    models.add_options(p)
    harness.add_run_options(p, tuple(RUNS))
    p.set_defaults(steps=10, rounds=1)
    return p


def measure(options):
    """The numbers of one run."""
    import keras
    import tensorflow as tf

    import tfpar

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    batches, strategy = RUNS[options.run]
    strategy = strategy(tfpar, len(gpus))
    if options.task == "generate":
        return generated(options, strategy, len(gpus))
    options.batch *= batches(len(gpus))
    x, y = models.texts(options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = harness.measured_fit(options, strategy, models.causal_lm, x, y, gpus, loss, optimizer="adam")
    return {**found, "batch": options.batch, "tokens": options.batch * options.tokens / found["step"]}


def generated(options, strategy, gpus):
    """New tokens in a second, at each number of prompts."""
    import tensorflow as tf

    model = models.filled(options, strategy.scope() if strategy else None)
    begin = time.perf_counter()
    found = {f"at {n}": models.tokens_in_a_second(options, model, n) for n in options.prompts}
    found["first"] = time.perf_counter() - begin
    found["memory"] = max((tf.config.experimental.get_memory_info(f"GPU:{n}")["peak"] for n in range(gpus)), default=0)
    return found


def report(options, best):
    """A table of speeds."""
    if options.task == "generate":
        prompts = [f"at {n}" for n in options.prompts]
        rows = [(run, *(f"{f[n]:,.0f}" for n in prompts), harness.gibibytes(f)) for run, f in best.items()]
        harness.print_table("new tokens in a second", ("", *prompts, "most memory"), rows)
        return
    rows = [
        (run, f"{found['batch']:.0f}", f"{found['step'] * 1e3:.1f} ms", f"{found['tokens']:,.0f}",
         f"{found['first']:.0f} s", harness.gibibytes(found), harness.gibibytes(found, "planned"),
         f"{found['loss']:.4f}")
        for run, found in best.items()
    ]  # fmt: skip
    weights = max(found["weights"] for found in best.values()) / 1e6
    headings = "", "texts", "step", "tokens in a second", "first step", "most memory", "planned", "loss"
    harness.print_table(f"{weights:.0f} million weights, texts of {options.tokens} tokens", headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

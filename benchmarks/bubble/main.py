"""Is the predicted bubble the measured one, when stages are uneven?

The same encoder as in `benchmarks/pipeline`, cut after some of its blocks. Predicted twice: from the plan's estimates
of cost, and from the measured duration of each stage's actions. Each device is one core.
"""

import argparse
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness
import keras
import numpy as np
from rich.console import Console

import tfpar
from tfpar.measure import measured
from tfpar.testing import logical_cpus


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_size_options(p)
    p.add_argument("--micro-batches", type=int, default=8)
    p.add_argument("--steps", type=int, default=8, help="measured steps, of which the fastest counts")
    p.add_argument("--draw", action="store_true", help="print the timelines")
    return p


def duration(timeline, stage, kind):
    """The mean duration of a stage's actions of a kind."""
    return statistics.mean(s.stop - s.start for s in timeline.spans if s.action[:2] == (stage, kind))


def main():
    options = parser().parse_args()
    logical_cpus(2, threads=2)
    shape = options.batch, options.tokens, options.width
    x, y = (np.random.default_rng(n).normal(size=shape).astype("float32") for n in range(2))
    rows = []
    for first in (options.blocks // 2, options.blocks // 2 - 1, options.blocks // 4):
        # a block is four additions and normalisations: the next one begins with its attention
        attention = "multi_head_attention" + (f"_{first}" if first else "")
        keras.utils.clear_session(free_memory=False)
        strategy = tfpar.PipelineStrategy(micro_batches=options.micro_batches, placement=[attention])
        with strategy.scope():
            model = harness.encoder(options)
            model.compile(keras.optimizers.SGD(0.01), "mse")
        found = measured(model, x, y, repeat=options.steps)
        plan = strategy.explain(model)
        costs = [tuple(duration(found, s, kind) for s in range(2)) for kind in tfpar.Kind]
        predicted = tfpar.simulate(plan.schedule, tfpar.StageCost(*costs)).bubble
        bubbles = found.bubble, predicted, plan.timeline.bubble
        rows.append((f"{first} + {options.blocks - first}", *(f"{bubble:.1%}" for bubble in bubbles)))
        if options.draw:
            Console(width=110).print(f"{rows[-1][0]} blocks, measured and predicted:", found, plan.timeline)
    title = f"{options.blocks} encoder blocks of width {options.width}, {options.micro_batches} micro-batches"
    harness.print_table(
        title, ("blocks on each stage", "measured idle share", "from measured durations", "from estimates"), rows
    )


if __name__ == "__main__":
    main()

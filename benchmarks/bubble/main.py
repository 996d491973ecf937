"""Is the predicted bubble the measured one, when stages are uneven?

The same encoder as in `benchmarks/pipeline`, cut after some of its blocks. Predicted twice: from the plan's estimates
of cost, and from the measured duration of each stage's actions. Each device is one core.
"""

import os
import pathlib
import statistics
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "pipeline"))

import keras
import numpy as np
from main import encoder, parser
from rich.console import Console
from rich.table import Table

import tfpar
from tfpar.measure import measured
from tfpar.testing import logical_cpus


def duration(timeline, stage, kind):
    """The mean duration of a stage's actions of a kind."""
    return statistics.mean(s.stop - s.start for s in timeline.spans if s.action[:2] == (stage, kind))


def main():
    options = parser().parse_args()
    logical_cpus(2, threads=2)
    shape = options.batch, options.tokens, options.width
    x, y = (np.random.default_rng(n).normal(size=shape).astype("float32") for n in range(2))
    console = Console(width=110)
    table = Table("blocks on each stage", "measured", "from measured durations", "from estimates")
    for first in (options.blocks // 2, options.blocks // 2 - 1, options.blocks // 4):
        # a block is four additions and normalisations: the next one begins with its attention
        attention = "multi_head_attention" + (f"_{first}" if first else "")
        keras.utils.clear_session(free_memory=False)
        strategy = tfpar.PipelineStrategy(micro_batches=options.micro_batches, placement=[attention])
        with strategy.scope():
            model = encoder(options)
            model.compile(keras.optimizers.SGD(0.01), "mse")
        found = measured(model, x, y, repeat=options.steps)
        plan = strategy.explain(model)
        costs = [tuple(duration(found, s, kind) for s in range(2)) for kind in tfpar.Kind]
        predicted = tfpar.simulate(plan.schedule, tfpar.StageCost(*costs)).bubble
        table.add_row(
            f"{first} + {options.blocks - first}",
            f"{found.bubble:.1%}",
            f"{predicted:.1%}",
            f"{plan.timeline.bubble:.1%}",
        )
        console.print(f"{first} + {options.blocks - first} blocks, measured and predicted:", found, plan.timeline)
    console.print(table)


if __name__ == "__main__":
    main()

"""Where does the time of a step go? The timeline that was predicted, and the one that was measured."""

import keras
import numpy as np
from keras import layers
from rich.console import Console

import tfpar
from tfpar.measure import measured
from tfpar.testing import logical_cpus


def build():
    x = h = layers.Input((32, 128))
    for _ in range(4):
        h = layers.LayerNormalization()(layers.add([h, layers.MultiHeadAttention(4, 32)(h, h)]))
        f = layers.Dense(128)(layers.Dense(512, activation="gelu")(h))
        h = layers.LayerNormalization()(layers.add([h, f]))
    return keras.Model(x, layers.Dense(128)(h))


def main():
    logical_cpus(2, threads=2)  # each device is a core
    x = np.random.rand(64, 32, 128).astype("float32")
    console = Console()
    for micro_batches in (2, 8):
        strategy = tfpar.PipelineStrategy(micro_batches=micro_batches)
        with strategy.scope():
            model = build()
            model.compile("sgd", "mse")
        timeline = measured(model, x, x, repeat=5)
        plan = strategy.explain(model)
        console.print(f"{micro_batches} micro-batches, predicted: {plan.timeline.bubble:.0%} idle", plan.timeline)
        console.print(f"measured: {timeline.bubble:.0%} idle, {timeline.makespan:.3f} s", timeline)


if __name__ == "__main__":
    main()

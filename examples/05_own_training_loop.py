"""How do I train on several devices with a loop of my own?

As with MirroredStrategy: the step runs once for each replica, and divides its loss by the size of the whole batch.
Clipping sees the sum of all gradients, so the result is that of one device.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfpar
from tfpar.testing import difference, logical_cpus

BATCH = 32


def build():
    keras.utils.set_random_seed(0)
    inner = [keras.layers.Dense(32, activation="tanh"), keras.layers.BatchNormalization()]
    return keras.Sequential([keras.Input((16,)), *inner, keras.layers.Dense(1)])


def gradient_step(model, optimizer, x, y):
    """One replica's part of a step: its share of the loss."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(x, training=True) - y)) / BATCH
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    return loss


def main():
    if not tf.config.list_physical_devices("GPU"):
        logical_cpus(2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 16)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, np.sin(x.sum(1, keepdims=True)))).batch(BATCH)

    one = build()
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.5)
    for batch in data:
        gradient_step(one, optimizer, *batch)

    strategy = tfpar.DataParallelStrategy()
    with strategy.scope():
        model = build()
        optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.5)

    @tf.function
    def step(*batch):
        losses = strategy.run(gradient_step, args=(model, optimizer, *batch))
        return strategy.reduce("SUM", losses, axis=None)

    for batch in strategy.experimental_distribute_dataset(data):
        loss = step(*batch)

    worst = max(difference(a, b) for a, b in zip(one.get_weights(), model.get_weights(), strict=True))
    print(
        f"{strategy.num_replicas_in_sync} replicas, last loss {float(loss):.4f}, differs from one device by {worst:.0e}"
    )
    assert worst < 1e-4


if __name__ == "__main__":
    main()

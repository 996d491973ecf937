"""Trains on three meshes models whose last stage fails; prints each error."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfpar
from tfpar.testing import logical_cpus


class Fails(layers.Layer):
    """Raises where it runs."""

    def call(self, x):
        return tf.ensure_shape(tf.numpy_function(self.fail, [x], x.dtype), x.shape)

    def fail(self, x):
        """Not while it is tried out."""
        raise ValueError("fails")


logical_cpus(8, threads=1)
for strategy in (
    tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=4),
    tfpar.MeshStrategy(tfpar.Mesh(2, 2, 2), micro_batches=2, zero=3),
    tfpar.DataParallelStrategy(),
):
    with strategy.scope():
        x = layers.Input((4,))
        model = keras.Model(x, layers.Dense(3)(Fails()(layers.Dense(4)(layers.Dense(4)(x)))))
        model.compile("sgd", "mse")
    try:
        model.fit(np.zeros((16, 4)), np.zeros((16, 3)), batch_size=16, verbose=0)
    except Exception as error:
        print(type(error).__name__, error)

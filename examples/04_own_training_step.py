"""Does my own `train_step` work? Yes: inside it, calling the model runs the pipeline, forward and backward."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import tfpar
from tfpar.testing import assert_same, logical_cpus


class SmoothModel(keras.Model):
    """Wants close outputs for close inputs, and outputs close to their mean over the batch."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            noisy = self(x + 0.01, training=True)
            loss = self.compute_loss(x, y, y_pred) + ops.mean(ops.square(noisy - y_pred)) + 0.1 * ops.var(y_pred)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss}


def build():
    keras.utils.set_random_seed(0)
    x = h = layers.Input((16,))
    for _ in range(4):
        h = layers.Dense(32, activation="tanh")(h)
    model = SmoothModel(x, layers.Dense(1)(h))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def main():
    logical_cpus(2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 16)).astype("float32"), rng.normal(size=(256, 1)).astype("float32")
    one = build()
    with tfpar.PipelineStrategy(micro_batches=4).scope():
        other = build()
    for model in (one, other):
        model.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=2)
    assert_same(one, other, rtol=1e-5, atol=1e-7)
    print("every weight is that of one device")


if __name__ == "__main__":
    main()

"""Small models, one for each thing that makes splitting hard, with data for them."""

import keras
import numpy as np
from keras import layers, ops

T, V, D = 6, 11, 12  # tokens, vocabulary, width: no batch is 12 rows, Keras takes (n, n) + (n, 1) for adding a bias


class Zoo:
    """A model: how to build it, what it is fed, its loss."""

    def __init__(self, build, data, loss="mse", loss_weights=None, metrics=None, exact=True, per_token=False):
        self.build, self.data, self.loss, self.loss_weights, self.metrics = build, data, loss, loss_weights, metrics
        self.exact = exact  # whether micro-batches leave the numbers as they are
        self.per_token = per_token  # whether the loss has a value for each token


def floats(*shape):
    return lambda rng, rows: rng.normal(size=(rows, *shape)).astype(keras.config.floatx())


def ints(high, *shape, low=0):
    return lambda rng, rows: rng.integers(low, high, size=(rows, *shape))


def pair(x, y):
    return lambda rng, rows: (x(rng, rows), y(rng, rows))


def skips():
    """Skip connections over several stages, and operations that are not layers."""
    x = h = layers.Input((D,))
    h = first = layers.Dense(D, activation="relu")(h)
    h = second = ops.gelu(layers.Dense(D)(h)) * 2.0 + ops.mean(x, axis=-1, keepdims=True)
    h = layers.Lambda(lambda v: ops.square(v) * 0.1)(layers.add([h, first]))
    left, right = ops.split(layers.Dense(D)(h), 2, axis=-1)
    h = ops.concatenate([ops.tanh(left), right, first, second], axis=-1)
    return keras.Model(x, layers.Dense(3)(layers.multiply([layers.Dense(D)(h), first])))


def branches():
    a, b = layers.Input((D,), name="a"), layers.Input((4,), name="b")
    h = layers.concatenate([layers.Dense(D, activation="relu")(a), layers.Dense(D, activation="relu")(b)])
    early = layers.Dense(2, name="early")(h)
    h = layers.Dense(D, activation="relu")(h)
    late = layers.Dense(3, activation="softmax", name="late")(layers.concatenate([h, b]))
    return keras.Model({"a": a, "b": b}, {"early": early, "late": late})


def branches_data(rng, rows):
    x = {"a": floats(D)(rng, rows), "b": floats(4)(rng, rows)}
    return x, {"early": floats(2)(rng, rows), "late": ints(3)(rng, rows)}


@keras.saving.register_keras_serializable()
class Unembedding(layers.Layer):
    """Multiplies by the transposed weights of an embedding."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.embedding.embeddings))


def gpt():
    """Attention, and one weight at both ends."""
    tokens = layers.Input((T,), dtype="int32")
    embedding = layers.Embedding(V, D)
    h = embedding(tokens)
    a = layers.MultiHeadAttention(2, D // 2)(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(layers.add([h, a]))
    f = layers.Dense(D)(layers.Dense(2 * D, activation="gelu")(h))
    h = layers.LayerNormalization()(layers.add([h, f]))
    return keras.Model(tokens, Unembedding(embedding)(h))


def recurrent():
    """A mask that begins in the first layer and reaches the loss."""
    tokens = layers.Input((T,), dtype="int32")
    h = layers.Embedding(V, 4, mask_zero=True)(tokens)
    h = layers.LSTM(5, return_sequences=True)(layers.TimeDistributed(layers.Dense(5))(h))
    return keras.Model(tokens, layers.Dense(V, activation="softmax")(h))


def convolutional():
    x = h = layers.Input((8, 8, 3))
    h = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(h)
    for _ in range(2):
        r = layers.SeparableConv2D(6, 3, padding="same")(h)
        r = layers.DepthwiseConv2D(3, padding="same", activation="relu")(layers.GroupNormalization(2)(r))
        h = layers.add([h, r])
    h = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(h))
    return keras.Model(x, layers.Dense(4, activation="softmax")(h))


def nested():
    """Models in models, one of them called twice, and a layer that is used on two stages."""
    inner_x = layers.Input((D,))
    inner = keras.Model(inner_x, layers.add([inner_x, layers.Dense(D, activation="relu")(inner_x)]), name="block")
    tail = keras.Sequential([layers.Input((D,)), layers.Dense(D, activation="tanh"), layers.Dense(3)], name="tail")
    twice = layers.Dense(D, activation="tanh", name="twice")
    x = layers.Input((D,))
    h = layers.Dense(D)(inner(twice(x)))
    return keras.Model(x, tail(twice(inner(layers.Dense(D)(h)))))


def sequential():
    return keras.Sequential([layers.Dense(D, activation="relu"), layers.Dense(D), layers.Dense(3)])


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    """A model with a `call` of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [layers.Dense(D, activation="relu") for _ in range(3)]
        self.norm, self.head = layers.LayerNormalization(), layers.Dense(3)

    def call(self, x, training=None):
        h = x
        for block in self.blocks:
            h = h + block(h, training=training)
        return self.head(ops.tanh(self.norm(h)))


@keras.saving.register_keras_serializable()
class Penalty(layers.Layer):
    """Adds a mean and a sum over its input to the loss."""

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        self.add_loss(0.01 * ops.sum(ops.abs(x)))
        return x


def regularized():
    x = layers.Input((D,))
    h = layers.Dense(D, kernel_regularizer="l2", activity_regularizer="l2", activation="tanh")(x)
    h = Penalty()(layers.Dense(D, bias_constraint="non_neg", kernel_constraint=keras.constraints.MaxNorm(1.0))(h))
    return keras.Model(x, layers.Dense(3, kernel_regularizer=keras.regularizers.L1(0.01))(h))


def normalized():
    x = h = layers.Input((D,))
    for _ in range(2):
        h = layers.BatchNormalization()(layers.Dense(D)(h))
        h = layers.Activation("relu")(h)
    return keras.Model(x, layers.Dense(3)(h))


def dropped():
    x = h = layers.Input((D,))
    for seed in range(2):
        h = layers.Dropout(0.4, seed=seed)(layers.Dense(D, activation="relu")(h))
    return keras.Model(x, layers.Dense(3)(h))


CROSSENTROPY = "sparse_categorical_crossentropy"
ZOO = {
    "skips": Zoo(skips, pair(floats(D), floats(3)), metrics=["mae"]),
    "branches": Zoo(
        branches, branches_data, {"early": "mse", "late": CROSSENTROPY}, {"early": 0.3, "late": 1.5},
        {"late": "accuracy"},
    ),
    "gpt": Zoo(
        gpt, pair(ints(V, T), ints(V, T)),
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0), None, ["accuracy"],
        per_token=True,
    ),
    "recurrent": Zoo(recurrent, pair(ints(V, T), ints(V, T)), CROSSENTROPY, None, ["accuracy"], per_token=True),
    "convolutional": Zoo(convolutional, pair(floats(8, 8, 3), ints(4)), CROSSENTROPY, None, ["accuracy"]),
    "nested": Zoo(nested, pair(floats(D), floats(3))),
    "sequential": Zoo(sequential, pair(floats(D), floats(3)), "huber"),
    "subclassed": Zoo(Subclassed, pair(floats(D), floats(3))),
    "regularized": Zoo(regularized, pair(floats(D), floats(3))),
    "normalized": Zoo(normalized, pair(floats(D), floats(3)), exact=False),
    "dropped": Zoo(dropped, pair(floats(D), floats(3)), exact=False),
}  # fmt: skip

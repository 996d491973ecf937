"""Small models, one for each thing that makes splitting hard, with data for them."""

import keras
from keras import layers, ops

T, V, D = 6, 11, 12  # tokens, vocabulary, width: no batch is 12 rows, Keras takes (n, n) + (n, 1) for adding a bias


class Zoo:
    """A model: how to build it, what it is fed, its loss."""

    def __init__(
        self, build, data, loss="mse", loss_weights=None, metrics=None, splits="data micro tensor", per_token=False
    ):
        self.build, self.data, self.loss, self.loss_weights, self.metrics = build, data, loss, loss_weights, metrics
        self.splits = splits  # what leaves the numbers as they are: replicas, micro-batches, ranks
        self.per_token = per_token  # whether the loss has a value for each token


def floats(*shape):
    return lambda rng, rows: rng.normal(size=(rows, *shape)).astype(keras.config.floatx())


def ints(high, *shape, low=0):
    return lambda rng, rows: rng.integers(low, high, size=(rows, *shape))


def pair(x, y):
    return lambda rng, rows: (x(rng, rows), y(rng, rows))


def branches():
    """Two inputs and two outputs in dicts, skips over several stages, and operations that are not layers."""
    a, b = layers.Input((D,), name="a"), layers.Input((4,), name="b")
    first = layers.Dense(D, activation="relu")(a)
    h = second = ops.gelu(layers.Dense(D)(b)) * 2.0 + ops.mean(a, axis=-1, keepdims=True)
    h = layers.Lambda(lambda v: ops.square(v) * 0.1)(layers.add([h, first]))
    early = layers.Dense(2, name="early")(h)
    left, right = ops.split(layers.Dense(D)(h), 2, axis=-1)
    h = layers.Dense(D)(ops.concatenate([ops.tanh(left), right, first, second], axis=-1))
    late = layers.Dense(3, activation="softmax", name="late")(layers.concatenate([layers.multiply([h, first]), b]))
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
    r = layers.SeparableConv2D(6, 3, padding="same")(h)
    r = layers.DepthwiseConv2D(3, padding="same", activation="relu")(layers.GroupNormalization(2)(r))
    h = layers.add([h, r])
    h = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(h))
    return keras.Model(x, layers.Dense(4, activation="softmax")(h))


@keras.saving.register_keras_serializable()
class Penalty(layers.Layer):
    """Adds a mean and a sum over its input to the loss."""

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        self.add_loss(0.01 * ops.sum(ops.abs(x)))
        return x


def nested():
    """Models in models, one called twice; a layer used on two stages; all that adds to the loss; constraints."""
    inner_x = layers.Input((D,))
    inner_h = layers.Dense(D, activation="relu", kernel_regularizer="l2", activity_regularizer="l2")(inner_x)
    inner = keras.Model(inner_x, layers.add([inner_x, inner_h]), name="block")
    last = layers.Dense(3, kernel_regularizer=keras.regularizers.L1(0.01))
    tail = keras.Sequential([layers.Input((D,)), layers.Dense(D, activation="tanh"), last], name="tail")
    twice = layers.Dense(D, bias_constraint="non_neg", kernel_constraint=keras.constraints.MaxNorm(1.0), name="twice")
    x = layers.Input((D,))
    h = Penalty()(layers.Dense(D)(inner(twice(x))))
    return keras.Model(x, tail(twice(inner(layers.Dense(D)(h)))))


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    """A model with a `call` of its own, and a Sequential part that learns its input's shape from the data."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [layers.Dense(D, activation="relu") for _ in range(3)]
        self.tail = keras.Sequential([layers.LayerNormalization(), layers.Dense(5, activation="tanh"), layers.Dense(3)])

    def call(self, x, training=None):
        h = x
        for block in self.blocks:
            h = h + block(h, training=training)
        return self.tail(ops.tanh(h))


def normalized():
    """Batch statistics of images and of vectors, behind branches; no bias just before: it would have no gradient."""
    x = h = layers.Input((6, 6, 3))
    h = layers.Conv2D(4, 3, use_bias=False)(h)
    h = r = layers.Activation("relu")(layers.BatchNormalization(momentum=0.7)(h))
    h = layers.BatchNormalization(scale=False)(layers.Conv2D(4, 3, padding="same", use_bias=False)(h))
    r = layers.BatchNormalization(center=False)(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(r))
    h = layers.GlobalAveragePooling2D()(ops.tanh(layers.add([h, r])))
    return keras.Model(x, layers.Dense(4, activation="softmax")(layers.BatchNormalization()(h)))


def stateful():
    """Layers that change with every batch they see."""
    x = h = layers.Input((D,))
    for seed in range(2):
        h = layers.BatchNormalization()(layers.Dense(D)(h))
        h = layers.Dropout(0.4, seed=seed)(layers.Activation("relu")(h))
    return keras.Model(x, layers.Dense(3)(h))


CROSSENTROPY = "sparse_categorical_crossentropy"
ZOO = {
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
    "nested": Zoo(nested, pair(floats(D), floats(3)), metrics=["mae"]),
    "subclassed": Zoo(Subclassed, pair(floats(D), floats(3)), "huber"),
    "normalized": Zoo(
        normalized, pair(floats(6, 6, 3), ints(4)), CROSSENTROPY, None, ["accuracy"], splits="data tensor",
    ),
    "stateful": Zoo(stateful, pair(floats(D), floats(3)), splits=""),
}  # fmt: skip

"""What of my model is on each device, how do I say it myself, and what is exchanged?"""

import keras
import numpy as np
from keras import layers, ops

import tfpar
from tfpar.testing import assert_same, logical_cpus, planned_exchanges, traced_exchanges

TOKENS, WORDS, WIDTH, HEADS = 16, 100, 32, 4


class Block(layers.Layer):
    """A transformer block, written as a layer of layers; tfpar opens it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norms = layers.LayerNormalization(), layers.LayerNormalization()
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        self.up, self.down = layers.Dense(4 * WIDTH, "gelu", name="up"), layers.Dense(WIDTH, name="down")

    def build(self, shape):
        for layer in (*self.norms, self.up):
            layer.build(shape)
        self.attention.build(shape, shape)
        self.down.build((*shape[:-1], 4 * WIDTH))

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.down(self.up(self.norms[1](x)))


def trained(x, y, strategy=None):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else keras.name_scope("one"):
        tokens = layers.Input((TOKENS,), dtype="int32")
        embedding = layers.ReversibleEmbedding(WORDS, WIDTH)
        h = embedding(tokens) + layers.Embedding(TOKENS, WIDTH)(ops.arange(TOKENS))
        for _ in range(2):
            h = Block()(h)
        model = keras.Model(tokens, embedding(layers.LayerNormalization()(h), reverse=True))
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=32, verbose=0, shuffle=False)
    return model


def main():
    logical_cpus(4)
    x = np.random.default_rng(0).integers(WORDS, size=(64, TOKENS))
    y = np.roll(x, -1, axis=1)
    one = trained(x, y)
    by_hand = {r"up/kernel": (None, "tensor"), r"down/kernel": ("tensor", None)}
    for title, options in (
        ("found by itself", {}),
        ("along the sequence, too", {"sequence_parallel": True}),
        ("the two layers of each block that I name", {"layout": by_hand}),
    ):
        strategy = tfpar.TensorParallelStrategy(**options)
        model = trained(x, y, strategy)
        assert_same(one, model, rtol=1e-5, atol=1e-7)
        plan = strategy.explain(model)
        assert traced_exchanges(model, x, y) == planned_exchanges(plan)
        print(title, plan, sep="\n")


if __name__ == "__main__":
    main()

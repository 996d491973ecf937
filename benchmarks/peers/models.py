"""The models that every framework trains: here in Keras, in `torch_models.py` the same in PyTorch."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

BLOCKS, WIDTH, TOKENS, HEADS = 8, 256, 64, 16  # the encoder
LAYERS, CONTEXT, VOCABULARY = 6, 128, 4096  # the decoder
FILTERS = (32, 64, 128)  # the ResNet: two blocks of each
HUGE = 16384  # the MLP's layer


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        build: makes the Keras model.
        data: `(rng, rows) -> x, y`.
        loss: by its Keras name.
        batch: samples in a step.
        cuts: of the PyTorch model, where its two and its four stages begin.
    """

    build: Any
    data: Any
    loss: str
    batch: int
    cuts: tuple[tuple[int, ...], tuple[int, ...] | None]


def encoder():
    """Transformer blocks, normalised after each part."""
    import harness

    return harness.encoder(SimpleNamespace(blocks=BLOCKS, width=WIDTH, tokens=TOKENS))


def gpt():
    """A decoder: normalised before each part, causal attention, a product with the vocabulary at the end."""
    import keras
    from keras import layers, ops

    x = layers.Input((CONTEXT,), dtype="int32")
    places = layers.Embedding(CONTEXT, WIDTH)(ops.cumsum(ops.ones_like(x), axis=1) - 1)
    h = layers.add([layers.Embedding(VOCABULARY, WIDTH)(x), places])
    for _ in range(LAYERS):
        n = layers.LayerNormalization()(h)
        h = layers.add([h, layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(n, n, use_causal_mask=True)])
        n = layers.LayerNormalization()(h)
        h = layers.add([h, layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(n))])
    return keras.Model(x, layers.Dense(VOCABULARY)(layers.LayerNormalization()(h)))


def resnet():
    """Residual blocks of convolutions with batch normalisation (He et al.), for images of 32 x 32."""
    import keras
    from keras import layers

    def convolved(h, filters, size, strides):
        h = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(h)
        return layers.BatchNormalization()(h)

    x = layers.Input((32, 32, 3))
    h = layers.ReLU()(convolved(x, FILTERS[0], 3, 1))
    for n, filters in enumerate(FILTERS):
        for strides in (2 if n else 1, 1):
            short = h if strides == 1 else convolved(h, filters, 1, strides)
            inner = layers.ReLU()(convolved(h, filters, 3, strides))
            h = layers.ReLU()(layers.add([short, convolved(inner, filters, 3, 1)]))
    return keras.Model(x, layers.Dense(10)(layers.GlobalAveragePooling2D()(h)))


def mlp():
    """A layer that is far larger than the others."""
    import keras
    from keras import layers

    inner = [layers.Dense(512, activation="relu"), layers.Dense(HUGE, activation="relu")]
    return keras.Sequential([layers.Input((512,)), *inner, layers.Dense(512)])


def floats(*shape):
    def data(rng, rows):
        return tuple(rng.normal(size=(rows, *shape)).astype("float32") for _ in range(2))

    return data


def tokens(rng, rows):
    words = rng.integers(0, VOCABULARY, (rows, CONTEXT + 1), "int32")
    return words[:, :-1], words[:, 1:].astype("int64")


def images(rng, rows):
    return rng.normal(size=(rows, 32, 32, 3)).astype("float32"), rng.integers(0, 10, rows)


MODELS = {
    "encoder": Model(encoder, floats(TOKENS, WIDTH), "mse", 32, ((0, 4), (0, 2, 4, 6))),
    "gpt": Model(gpt, tokens, "logits", 16, ((0, 5), (0, 3, 5, 7))),
    "resnet": Model(resnet, images, "logits", 64, ((0, 4), (0, 2, 4, 6))),
    "mlp": Model(mlp, floats(512), "mse", 256, ((0, 2), None)),
}

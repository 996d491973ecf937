"""Softmax cross-entropy of logits that ranks have parts of, without gathering them (loss parallel).

The loss of a token depends on two numbers: the logit of its class, and the logarithm of the sum of the exponentials of
all others. Ranks find these together, of the size of the tokens, and Keras' own loss computes from them as if there
were two classes, with its weights, masks and ignored class.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_parts
from tfpar.graph.keras_graph import Ref
from tfpar.planning.sharding import REPLICATED, Layout, bounds
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder


class CrossEntropy(NamedTuple):
    """A `SparseCategoricalCrossentropy` of a model with one output.

    Args:
        from_logits: whether the model's output are logits, else their softmax.
        ignored: the class that does not count, if there is one.
        dtype: in which the loss is computed.
        y: shape and dtype of the targets.
    """

    from_logits: bool
    ignored: int | None
    dtype: str
    y: tuple[Sequence[int | None], str]

    @property
    def own_class(self) -> int:
        """Which of the two classes stands for a token's own."""
        return 1 if self.ignored == 0 else 0

    def targets(self, y: tf.Tensor) -> tf.Tensor:
        """The targets, as if there were two classes."""
        own = tf.fill(tf.shape(y), tf.cast(self.own_class, y.dtype))
        return own if self.ignored is None else tf.where(y == tf.cast(self.ignored, y.dtype), y, own)

    def prediction(self, logits: tf.Tensor) -> tf.Tensor:
        """What the loss takes for the model's output."""
        if self.from_logits:
            return logits
        probabilities = tf.nn.softmax(logits)
        _keras.set_logits(probabilities, logits)
        return probabilities


def crossentropy_of(model: keras.Model, y: Any) -> CrossEntropy | None:
    """The cross-entropy that a model is compiled with, if that is its one loss."""
    loss = _keras_parts.only_loss(model)
    if type(loss) is not keras.losses.SparseCategoricalCrossentropy or not hasattr(y, "shape"):
        return None
    if _keras_parts.loss_options(loss).get("axis", -1) != -1 or len(_keras_parts.flat_outputs(model)) != 1:
        return None
    symbol = _keras.symbolic(y)
    return CrossEntropy(loss.from_logits, loss.ignore_class, loss.dtype, (symbol.shape, symbol.dtype))


def add_loss(local: RankGraphBuilder, logits: int, loss: CrossEntropy, y: int) -> int:
    """Add what ranks find of the loss to what they run.

    Args:
        logits: of this rank, divided along the last dim.
        y: the targets.

    Returns:
        The logits of two classes.
    """
    local.name, local.flops = "loss", 0.0
    lead, classes = local.full[logits][:-1], local.full[logits][-1]
    part = Layout(len(lead))
    found = local.make(largest(loss.dtype), Ref(logits), shape=(*lead, local.ranks), dtype=loss.dtype, layout=part)
    maximum = local.exchange(found, "maximum", "identity", REPLICATED)
    rank = local.rank()
    terms = local.make(
        Terms(loss, classes, local.ranks), Ref(rank), Ref(logits), Ref(maximum), Ref(y),
        shape=(*lead, 2), dtype=loss.dtype,
    )  # fmt: skip
    terms = local.reduced(terms)
    return local.make(TwoClasses(loss), Ref(terms), Ref(maximum), shape=(*lead, 2), dtype=loss.dtype)


def largest(dtype: str):
    """The largest of a rank's logits for each token."""

    def largest_logit(logits):
        return tf.stop_gradient(tf.reduce_max(tf.cast(logits, dtype), -1, keepdims=True))

    return largest_logit


class Terms:
    """What a rank knows of each token: the exponentials of others, summed, and the logit of its own class, or 0.

    A class that there is not makes the loss NaN.
    """

    __name__, variables = "terms", ()

    def __init__(self, loss: CrossEntropy, classes: int, ranks: int):
        self.loss, self.classes, self.ranks = loss, classes, ranks

    def __call__(self, rank, logits, maximum, y):
        logits_in, logits = logits, tf.cast(logits, self.loss.dtype)
        if len(y.shape) == len(logits.shape):
            y = y[..., 0]
        first = tf.stack(bounds(self.classes, self.ranks))[rank]
        y = tf.cast(y, "int32")
        own = tf.range(tf.shape(logits)[-1]) == y[..., None] - first
        zero = tf.zeros((), logits.dtype)
        others = tf.reduce_sum(tf.where(own, zero, tf.exp(logits - maximum)), -1)
        wrong = (y < 0) | (y >= self.classes)
        if self.loss.ignored is not None:
            wrong &= y != self.loss.ignored
        picked = tf.where(wrong, tf.cast(float("nan"), logits.dtype), tf.reduce_sum(tf.where(own, logits, zero), -1))
        terms = tf.stack([others, picked], -1)
        return _keras.with_mask_of(logits_in, terms)


class TwoClasses:
    """The logits of two classes, a token's own and all others."""

    __name__, variables = "two_classes", ()

    def __init__(self, loss: CrossEntropy):
        self.loss = loss

    def __call__(self, terms, maximum):
        tiny = tf.as_dtype(terms.dtype).as_numpy_dtype(1e-37)
        others = maximum[..., 0] + tf.math.log(tf.maximum(terms[..., 0], tiny))
        both = [terms[..., 1], others]
        return _keras.with_mask_of(terms, tf.stack(both[::-1] if self.loss.own_class else both, -1))

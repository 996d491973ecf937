"""Normalisation: of channels that are divided, of what is divided along other dims."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras import layers, ops

from tfpar.compat import _keras, _keras_parts
from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.elementwise import along_each_dim, but


@rule(layers.BatchNormalization)
def batch_normalization(site: Site) -> Iterator[Option]:
    """Each channel on its own."""
    layer, rank = site.layer, len(site.inputs[0])
    at = layer.axis % rank
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    if at and site.divides(site.inputs[0][at]) and not layer.renorm:
        weights = [(getattr(layer, name, None), 0) for name in names]
        yield site.option("channels", [Layout(at)], [Layout(at)], weights)


def axes_of(site: Site) -> list[int]:
    """The dims over which a layer normalises."""
    axis = site.layer.axis
    return [a % len(site.inputs[0]) for a in (axis if isinstance(axis, list | tuple) else [axis])]


@rule(layers.LayerNormalization, layers.RMSNormalization)
def layer_normalization(site: Site) -> Iterator[Option]:
    """Along dims that it does not normalise; along the one that it does with an exchange of each rank's statistics."""
    layer, axes, last = site.layer, axes_of(site), len(site.inputs[0]) - 1
    yield from but(along_each_dim(site, "normalisation of other dims"), axes)
    if axes == [last] and site.divides(site.inputs[0][last]) and not getattr(layer, "rms_scaling", False):
        scale = layer.scale if isinstance(layer, layers.RMSNormalization) else layer.gamma
        weights = [(scale, 0), (getattr(layer, "beta", None), 0)]
        moved = 4.0 * site.bytes(site.op.outputs[0]) / site.inputs[0][last] * site.ranks
        yield site.option(
            "normalisation, statistics gathered", [site.last()], [site.last()], weights, moved, by_parts(site)
        )


def by_parts(site: Site):
    """What each rank runs where it has some of the features: its statistics, and the whole's for its part."""
    layer, shape = site.layer, site.inputs[0]
    dtype = "float64" if site.graph.symbols[site.op.inputs[0]].dtype == "float64" else "float32"

    def build(local: RankGraphBuilder, inputs: list[int]) -> int:
        part = Layout(len(shape))
        found = local.make(
            Statistics(layer), Ref(inputs[0]), shape=(*shape[:-1], 3, site.ranks), dtype=dtype, layout=part
        )
        whole = local.all_gather(found, split=True)
        normalize = NormalizePart(layer)
        return local.run(normalize, Ref(inputs[0]), Ref(whole), like=site.op.outputs, layouts=[site.last()])

    return build


class Statistics:
    """Mean, mean squared distance from it, and number of a rank's features: shape (..., 3, 1)."""

    __name__ = "statistics"
    variables = ()

    def __init__(self, layer: Any):
        self.centred = not isinstance(layer, layers.RMSNormalization)

    def __call__(self, x):
        x = tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)
        mean = tf.reduce_mean(x, -1, keepdims=True) * (1.0 if self.centred else 0.0)
        variance = tf.reduce_mean(tf.square(x - mean), -1, keepdims=True)
        count = tf.ones_like(mean) * tf.cast(tf.shape(x)[-1], x.dtype)
        return tf.stack([mean, variance, count], -2)


class NormalizePart:
    """A rank's features, normalised with the statistics of all: shape (..., 3, ranks)."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.scale = layer.scale if isinstance(layer, layers.RMSNormalization) else layer.gamma
        self.offset = getattr(layer, "beta", None)
        self.variables = [v for v in (self.scale, self.offset) if v is not None]

    def __call__(self, x, statistics):
        mean, variance, count = tf.unstack(statistics, axis=-2)
        total = tf.reduce_sum(count, -1, keepdims=True)
        whole = tf.reduce_sum(mean * count, -1, keepdims=True) / total
        spread = tf.reduce_sum((variance + tf.square(mean - whole)) * count, -1, keepdims=True) / total
        y = (tf.cast(x, whole.dtype) - whole) * tf.math.rsqrt(spread + self.layer.epsilon)
        if self.scale is not None:
            y = y * ops.cast(self.scale, y.dtype)
        if self.offset is not None:
            y = y + ops.cast(self.offset, y.dtype)
        return _keras.masked_by(self.layer, x, tf.cast(y, self.layer.compute_dtype))


@rule(layers.GroupNormalization)
def group_normalization(site: Site) -> Iterator[Option]:
    """Whole groups of channels."""
    layer, at = site.layer, site.layer.axis % len(site.inputs[0])
    if at and not layer.groups % site.ranks:
        call = site.graph.calls[site.index]

        def build(local: RankGraphBuilder, inputs: list[int]) -> int:
            return local.run(OfGroups(call, site.ranks), Ref(inputs[0]), like=site.op.outputs, layouts=[Layout(at)])

        weights = [(layer.gamma, 0), (layer.beta, 0)]
        yield site.option("groups", [Layout(at)], [Layout(at)], weights, build=build)


class OfGroups:
    """A GroupNormalization's call for this rank's groups."""

    _call_context_args = ("training",)

    def __init__(self, call: Any, ranks: int):
        self.call, self.groups, self.variables = call, call.operation.groups // ranks, call.variables

    def __call__(self, x, training=None):
        layer = self.call.operation
        with _keras_parts.unchecked(layer), _keras_parts.replaced(layer, groups=self.groups):
            return _keras.call_operation(layer, (x,), {}, training, self.call.explicit)

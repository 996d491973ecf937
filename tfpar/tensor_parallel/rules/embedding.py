"""Embeddings: by parts of the vocabulary, or of the features."""

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import layers, ops

from tfpar.compat import _keras
from tfpar.compat._keras_layers import ToldTraining, table
from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout, bounds
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule


class OfVocabulary(ToldTraining):
    """Looks up what is in this rank's part of the vocabulary; zeros for the rest."""

    def __init__(self, call: Any, ranks: int):
        self.call, self.ranks, self.variables = call, ranks, call.variables

    def __call__(self, rank, inputs, training=None):
        layer = self.call.operation
        edges = tf.stack(bounds(layer.input_dim, self.ranks))
        start, stop = edges[rank], edges[rank + 1]
        indices = ops.cast(inputs, "int32")
        indices = tf.where(indices < 0, indices + layer.input_dim, indices)  # as Keras does
        inside = (indices >= start) & (indices < stop)
        known = (indices >= 0) & (indices < layer.input_dim)
        # what no rank has is an error, or zeros, as it is on one device
        mine = tf.where(inside, indices - start, tf.where(known, 0, layer.input_dim))
        found = _keras.call_operation(layer, (mine,), {}, training, self.call.explicit)
        found = tf.where(inside[..., None], found, tf.zeros((), found.dtype))
        mask = layers.Embedding.compute_mask(layer, inputs)
        if mask is not None:
            _keras.set_keras_mask(found, mask)
        return found


@rule(layers.Embedding)
def embedding(site: Site, also: Sequence[tuple[Any, int]] = ()) -> Iterator[Option]:
    """Of the table `(vocabulary, features)` each rank holds some words, or some features of every word.

    Args:
        also: what else the layer has that is divided with the vocabulary.
    """
    layer, call = site.layer, site.graph.calls[site.index]
    if layer.lora_enabled:
        return

    def build(layout: Layout):
        def of_vocabulary(local: RankGraphBuilder, inputs: list[int]) -> int:
            x = local.run(
                OfVocabulary(call, site.ranks), Ref(local.rank()), Ref(inputs[0]),
                like=site.op.outputs, layouts=[REPLICATED],
            )  # fmt: skip
            return local.reduced(x, layout)

        return of_vocabulary

    if site.divides(layer.input_dim):
        for left in site.sequences():
            moved = site.bytes(site.op.outputs[0])
            weights = [(table(layer), 0), *also]
            yield site.option("vocabulary-parallel", None, [left], weights, moved, build(left))
    if site.divides(layer.output_dim) and not also:
        yield site.option("feature-parallel", outputs=[site.last()], weights=[(table(layer), 1)])


@rule(layers.ReversibleEmbedding)
def reversible_embedding(site: Site) -> Iterator[Option]:
    """As an embedding; reversed, as a Dense with its table for a kernel."""
    layer = site.layer
    also = [] if layer.tie_weights else [(layer.reverse_embeddings, 1)]
    if not site.arguments.get("reverse"):
        yield from embedding(site, also)
    elif not layer.lora_enabled and site.divides(layer.input_dim):
        weights = [(table(layer), 0), *also]
        yield site.option("column-parallel", outputs=[site.last()], weights=weights)

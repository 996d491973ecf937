"""How results of a batch follow from those of its parts."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfpar.errors import ModelError
from tfpar.graph.batch_probe import Combine, Probe, combination
from tfpar.graph.keras_graph import graph_from
from tfpar.graph.mixing import check_independence

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3))
PARTS = X[:3], X[3:]


@pytest.mark.parametrize(
    "function, kind",
    [
        (lambda x: x * 2, Combine.ROWS),
        (lambda x: x.mean(), Combine.MEAN),
        (lambda x: x.sum(0), Combine.SUM),
        (lambda x: np.ones(2), Combine.SAME),
        (lambda x: x.max(), None),
        (lambda x: x.mean() ** 2, None),
        (lambda x: x - x.mean(0), None),
        (lambda x: x @ x.T, None),
    ],
)
def test_combination(function, kind):
    assert combination(function(X), [function(p) for p in PARTS]) is kind


def test_a_sum_of_changes():
    assert combination(5.0 + X.sum(), [5.0 + p.sum() for p in PARTS], base=5.0) is Combine.SUM


class Counter(layers.Layer):
    """Keeps what happened to it in all ways that there are, and one more."""

    def build(self, shape):
        zeros = {"shape": (), "initializer": "zeros", "trainable": False}
        self.calls, self.samples = self.add_weight(name="calls", **zeros), self.add_weight(name="samples", **zeros)
        self.average, self.largest = self.add_weight(name="average", **zeros), self.add_weight(name="largest", **zeros)

    def call(self, x):
        self.calls.assign_add(1.0)
        self.samples.assign_add(ops.cast(ops.shape(x)[0], "float32"))
        self.average.assign(0.9 * self.average + 0.1 * ops.mean(x))
        self.largest.assign(ops.maximum(self.largest, ops.max(x)))
        self.add_loss(ops.mean(ops.square(x)))
        self.add_loss(ops.sum(x))
        self.add_loss(ops.mean(x) ** 2)
        return x + 0.0


def test_losses_and_state():
    counter = Counter()
    x = layers.Input((4,))
    graph = graph_from(keras.Model(x, counter(x)))
    found = Probe(graph).of(0, True)
    assert found.outputs == (Combine.ROWS,)
    assert found.losses == (Combine.MEAN, Combine.SUM, None)
    state = [found.state[id(v)] for v in (counter.calls, counter.samples, counter.average, counter.largest)]
    assert state == [Combine.SAME, Combine.SUM, Combine.MEAN, None]
    assert not counter.losses


def checked(*outputs, inputs):
    graph = graph_from(keras.Model(inputs, list(outputs)))
    check_independence(graph, Probe(graph))


def test_operations_that_mix_samples():
    x = layers.Input((4,))
    for name, mixed in {
        "mean": ops.subtract(x, ops.mean(x, axis=0)),
        "transpose": ops.matmul(x, ops.transpose(x)),
        "centred": layers.Lambda(lambda v: v - ops.mean(v, axis=0), name="centred")(x),
        "softmax": layers.Softmax(axis=0)(x),
    }.items():
        with pytest.raises(ModelError, match=f"{name}.*mixes the samples of a batch.*micro_batches=1"):
            checked(mixed, inputs=x)


def test_operations_that_do_not():
    x, tokens = layers.Input((4, 6)), layers.Input((None,), dtype="int32")
    a = layers.MultiHeadAttention(2, 3)(x, x)
    b = ops.reshape(layers.Lambda(lambda v: v * 2)(a), (-1, 24))
    c = layers.BatchNormalization()(layers.Dense(2)(b))
    checked(c, layers.Embedding(5, 3)(tokens) * 2.0, inputs=[x, tokens])


def test_one_that_cannot_be_tried():
    x = layers.Input((4,), dtype="int32")
    table = np.arange(5.0, dtype="float32")

    class Pick(layers.Layer):
        def call(self, x):
            if not keras.backend.is_keras_tensor(x) and not hasattr(x, "op"):
                raise ValueError("only in a graph")
            return ops.take(table, x)

    with pytest.warns(
        UserWarning, match="could not check that pick treats the samples .* one by one \\(.*only in a graph"
    ):
        checked(Pick(name="pick")(x), inputs=x)


def test_look_ups_of_alike_layers_are_traced_once(monkeypatch):
    x, traced, original = layers.Input((4,), dtype="int32"), [], Probe.traced_rows
    tables = [layers.Embedding(5, 3), layers.Embedding(5, 3), layers.Embedding(5, 3)]
    tables[2].trainable = False
    other = layers.Embedding(5, 3, name="other")
    h = layers.Concatenate()([table(x) for table in (*tables, other)])
    y = layers.Dense(12)(layers.Dense(12)(h))
    graph = graph_from(keras.Model(x, y))
    counted = lambda self, index, *args: traced.append(index) or original(self, index, *args)  # noqa: E731
    monkeypatch.setattr(Probe, "traced_rows", counted)
    probe = Probe(graph)
    found = {op.name: [probe.rows(i, graph.variables[v]) for v in op.variables] for i, op in enumerate(graph.graph.ops)}
    assert [found[table.name] for table in (*tables, other)] == [[Combine.ROWS], [Combine.ROWS], [None], [Combine.ROWS]]
    assert all(kinds == [None, None] for name, kinds in found.items() if name.startswith("dense"))
    assert set(traced) == {0, 2, 5}  # a table, one that is not trained, and a layer


class Positions(layers.Layer):
    """Learned positions of exactly so many tokens, or of the frames that follow each other in dim 0."""

    def __init__(self, count, of_frames=False):
        super().__init__()
        self.table, self.of_frames, self.count = layers.Embedding(count, 3), of_frames, count

    def call(self, x):
        found = self.table(ops.arange(self.count))
        if not self.of_frames:
            return ops.expand_dims(x, -1) + found
        return ops.reshape(ops.reshape(x, (-1, self.count, 3)) + found, (-1, 3))


@pytest.mark.parametrize("layer, shape", [(Positions(11), (None,)), (Positions(7, of_frames=True), (3,))])
def test_look_ups_that_take_only_some_sizes(layer, shape):
    x = layers.Input(shape)
    graph = graph_from(keras.Model(x, layer(x)))
    assert Probe(graph).rows(0, graph.variables[0]) == Combine.SAME


class Table(layers.Embedding):
    """Looks up places, or what is there: that is not in its configuration."""

    def __init__(self, *sizes, by_place=False, **kwargs):
        super().__init__(*sizes, **kwargs)
        self.by_place = by_place

    def call(self, ids):
        return super().call(ops.broadcast_to(ops.arange(4), (4,)) if self.by_place else ids)


def test_layers_of_others_are_asked_one_by_one():
    x = layers.Input((4,), dtype="int32")
    tables = [Table(7, 3, by_place=True), Table(7, 3)]
    graph = graph_from(keras.Model(x, tables[0](x) + tables[1](x)))
    probe = Probe(graph)
    assert [probe.rows(i, table.embeddings) for i, table in enumerate(tables)] == [Combine.SAME, Combine.ROWS]

"""Finding out how operations treat samples costs little, whatever the size of the model's tensors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfpar
from tfpar.errors import Caught
from tfpar.graph import mixing, samples
from tfpar.graph.alike import config_of
from tfpar.graph.batch_probe import Probe
from tfpar.graph.keras_graph import graph_from
from tfpar.graph.mixing import check_independence, followed
from tfpar.graph.samples import GUESSES, SMALL, candidates, first_that_works
from tfpar.planning import progress

pytestmark = pytest.mark.fast

T, D = 1024, 512


class Block(layers.Layer):
    """Residuals and products written as sums and products."""

    def __init__(self, width=D, raw=False, **options):
        super().__init__(**options)
        self.width, self.raw = width, raw
        self.normalize = layers.LayerNormalization()
        self.up, self.gate, self.down = layers.Dense(8), layers.Dense(8, "silu"), layers.Dense(width)

    def get_config(self):
        return {**super().get_config(), "width": self.width, "raw": self.raw}

    def call(self, x):
        h = self.normalize(x)
        h = self.up(h) * self.gate(h)
        if self.raw:
            h = tf.identity(tf.convert_to_tensor(h))  # it cannot be followed
        return x + self.down(h)


def blocks(count=4, **options):
    x = h = layers.Input((T, D))
    for _ in range(count):
        h = Block(**options)(h)
        h = ops.gelu(h) * 2.0 + ops.roll(h, 1, axis=2)
    return graph_from(keras.Model(x, h))


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of elements of all random samples that are drawn from now on."""
    found, original = [], samples.sample

    def recording(*args, **options):
        value = original(*args, **options)
        found.append(value.shape.num_elements())
        return value

    monkeypatch.setattr("tfpar.graph.samples.sample", recording)
    monkeypatch.setattr("tfpar.graph.batch_probe.sample", recording)
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_samples_are_small_and_blocks_that_are_alike_are_asked_once(raw, drawn, monkeypatch):
    asked, original = [], mixing.mixes
    monkeypatch.setattr(mixing, "mixes", lambda *args: asked.append(args[2]) or original(*args))
    mixing.VERDICTS.clear()
    for _ in range(2):  # what was found for explain is not asked again for fit
        graph = blocks(raw=raw)
        check_independence(graph, Probe(graph))
    assert len(asked) == 1 and max(drawn, default=0) < 8 * 32 * D
    assert bool(drawn) == raw


def test_a_block_that_mixes_is_seen_through(drawn):
    class Mixes(Block):
        def call(self, x):
            return super().call(x) - ops.mean(x, axis=0)

    x = layers.Input((T, D))
    graph = graph_from(keras.Model(x, Mixes(name="mixes")(x)))
    with pytest.raises(tfpar.ModelError, match="mixes mixes the samples"):
        check_independence(graph, Probe(graph))
    assert max(drawn) < 8 * 32 * D


def test_a_block_is_opened_without_samples(drawn):
    strategy = tfpar.TensorParallelStrategy(2)
    with strategy.scope():
        x = layers.Input((T, D))
        model = keras.Model(x, Block()(Block()(x)))
    plan = strategy.explain(model)
    assert sum(w.layout.dim is not None for w in plan.weights) >= 6 and not drawn


def test_a_subclassed_model_is_opened_at_small_sizes(monkeypatch):
    seen, original = [], layers.Dense.call

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(8), layers.Dense(2)

        def call(self, x):
            return self.last(self.first(x))

    def call(self, x, *args, **options):
        if isinstance(x, tf.__internal__.EagerTensor):
            seen.append(x.shape[1])
        return original(self, x, *args, **options)

    monkeypatch.setattr(layers.Dense, "call", call)
    with tfpar.DataParallelStrategy(2).scope():
        model = Model()
        model.compile("sgd", "mse")
    model.fit(np.zeros((4, T, 8), "float32"), np.zeros((4, T, 2), "float32"), verbose=0)
    assert seen and max(seen) <= 2 * SMALL


def test_losses_of_large_outputs_are_tried_small(drawn):
    x = layers.Input((T, 4))
    with tfpar.DataParallelStrategy(2).scope():
        model = keras.Model(x, layers.Dense(D)(x))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(np.zeros((4, T, 4), "float32"), np.zeros((4, T), "int32"), verbose=0)
    assert 0 < max(drawn) < 10_000


# ---- which sizes


def test_candidates():
    found = list(candidates([(None, 1024, 512), (None, 512), (512, 4)], [True, True, False]))
    assert found[0] == [(None, 10, 9), (None, 9), (9, 4)]  # equal sizes stay equal
    assert found[1] == [(None, 10, 512), (None, 512), (9, 4)] and found[-1] == [
        (None, 1024, 512),
        (None, 512),
        (512, 4),
    ]
    assert list(candidates([(None, 16, 3)], [True])) == [[(None, 16, 3)]]
    assert list(candidates([(None, 16)], [True], own=False)) == []
    assert [shapes[0][1] for shapes in candidates([(None, None)], [True])] == list(GUESSES)


def test_the_first_that_works():
    assert first_that_works(iter([0, 2, 1]), lambda n: 4 // n) == 2
    with pytest.raises(ZeroDivisionError):
        first_that_works(iter([0, 0]), lambda n: 1 // n)


class Positions(layers.Layer):
    """As KerasHub's: a table of a length that a longer sequence exceeds."""

    def build(self, shape):
        self.table = self.add_weight(shape=(12, shape[-1]))

    def call(self, x):
        length = tf.shape(x)[1]
        return tf.broadcast_to(tf.slice(self.table, [0, 0], [length, 4]), tf.shape(x))


def test_a_sequence_of_unknown_length_that_must_be_short(recwarn):
    x = layers.Input((None, 4))
    graph = graph_from(keras.Model(x, x + Positions(name="position_embedding")(x)))
    check_independence(graph, Probe(graph))
    assert not [w for w in recwarn if "could not check" in str(w.message)]


def test_what_cannot_be_followed_is_logged(caplog):
    with caplog.at_level("DEBUG", Caught.log.name):
        assert followed(blocks(1, raw=True), 0) is None
    assert "cannot be followed" in caplog.text


def test_what_takes_long_is_told(capfd, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress.announced("planning gpt on Mesh(stage=4)"):
        progress.threading.Event().wait(0.3)
    with progress.announced("nothing"):
        pass
    assert capfd.readouterr().err == "tfpar: planning gpt on Mesh(stage=4) ...\n"


class Centred(layers.Dense):
    """Whether it is told to subtract the mean of the batch is not in the configuration that it inherits."""

    def __init__(self, units, centred=False, **kwargs):
        super().__init__(units, **kwargs)
        self.centred = centred

    def call(self, x):
        y = super().call(x)
        return y - ops.mean(y, 0, keepdims=True) if self.centred else y


class Told(Centred):
    def get_config(self):
        return {**super().get_config(), "centred": self.centred}


@pytest.mark.parametrize("kind", [Centred, Told])
def test_layers_that_differ_in_a_flag(kind):
    x = layers.Input((4,))
    model = keras.Model(x, kind(4, centred=True)(kind(4)(x)))
    graph = graph_from(model)
    assert list(mixing.mixing(graph, Probe(graph))) == [1]
    assert isinstance(config_of(model.layers[1]), dict) == (kind is Told)

"""What is caught is the user's; a mistake of tfpar's own is never taken for it."""

import logging

import keras
import pytest
import tensorflow as tf
from keras import layers
from training import WIDTH, compiled, data, history

import tfpar
from tfpar.errors import Caught, brief
from tfpar.graph import mixing, samples
from tfpar.graph.batch_probe import Probe
from tfpar.graph.keras_graph import graph_from

pytestmark = pytest.mark.fast

X, Y = data()


class Graphs(layers.Layer):
    """Runs in graphs only."""

    def call(self, x):
        if not hasattr(x, "op"):
            raise RuntimeError("only in a graph")
        return x * 1.0


def build():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(Graphs(name="graphs")(x)))


def test_what_a_user_raises_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, "tfpar"), pytest.warns(UserWarning, match="could not check that graphs"):
        history(X, Y)(compiled(tfpar.DataParallelStrategy(2), build=build))
    records = [r for r in caplog.records if "graphs on random samples failed" in r.message]
    assert records and "only in a graph" in str(records[0].exc_info[1])


def test_strict(monkeypatch):
    class Others(Graphs):  # a class that was tried is not tried again
        pass

    def build():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Others()(x)))

    monkeypatch.setattr(Caught, "strict", True)
    with pytest.raises(RuntimeError, match="only in a graph"):
        history(X, Y)(compiled(tfpar.DataParallelStrategy(2), build=build))


def test_a_mistake_of_our_own_is_raised(monkeypatch):
    """In the place of a layer that cannot be tried, which would run for the whole batch."""
    monkeypatch.setattr(samples, "SIZES", None)
    x = layers.Input((WIDTH,))
    graph = graph_from(keras.Model(x, layers.Lambda(lambda v: tf.reverse(v, [1]))(x)))
    with pytest.raises(TypeError, match="NoneType"):
        list(mixing.mixing(graph, Probe(graph)))


def test_errors_that_are_meant_are_caught():
    for error in (tfpar.ModelError("this"), ValueError("that")):
        try:
            raise error
        except ValueError as caught:
            Caught.theirs(caught, "nothing")


def test_brief():
    assert brief(ValueError("one\n\nArguments received by Dense.call():")) == "one"

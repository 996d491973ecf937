"""Layers that are alike, and those that are not."""

import keras
import pytest
from keras import layers

from tfpar.graph import mixing
from tfpar.graph.alike import attributes, config_of
from tfpar.graph.batch_probe import Probe, key_of
from tfpar.graph.keras_graph import graph_from

pytestmark = pytest.mark.fast


class WithoutConfig(layers.Layer):
    """Keras cannot say how it was made, as of some of KerasHub."""

    def __init__(self, axis=-1):
        super().__init__()
        self.along, self.dense = axis, layers.Dense(4)

    def call(self, x):
        return self.dense(x) - keras.ops.mean(x, self.along, keepdims=True)

    def get_config(self):
        return {"axis": self.no_such_attribute}


def model(*axes):
    x = inputs = keras.Input((4,))
    for axis in axes:
        x = WithoutConfig(axis)(x)
    return graph_from(keras.Model(inputs, x))


def test_attributes_tell_what_a_configuration_does_not():
    first, second, other = (call.operation for call in model(-1, -1, 0).calls)
    assert not isinstance(config_of(first), dict)
    assert str(attributes(first)) == str(attributes(second)) != str(attributes(other))


def test_of_layers_that_are_alike_one_is_asked(monkeypatch):
    asked, original = [], mixing.mixes

    def mixes(graph, probe, index):
        asked.append(index)
        return original(graph, probe, index)

    monkeypatch.setattr(mixing, "mixes", mixes)
    graph = model(-1, -1, 0, -1, 0)
    assert list(mixing.mixing(graph, Probe(graph))) == [2, 4]
    assert asked == [0, 2]
    assert key_of(graph, 0) == key_of(graph, 1) != key_of(graph, 2)

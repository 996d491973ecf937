"""Private parts of Keras' layers are where they were."""

import pathlib
import re

import pytest
from keras import layers, ops

from tfpar.compat import _keras_layers

pytestmark = pytest.mark.fast


def test_every_name_is_tested():
    names = re.findall(r"^(?:def|class) (\w+)", pathlib.Path(_keras_layers.__file__).read_text(), re.MULTILINE)
    assert [n for n in names if n not in pathlib.Path(__file__).read_text()] == []


def test_told_training():
    class Own(_keras_layers.ToldTraining):
        pass

    assert _keras_layers.is_told_training(Own()) and _keras_layers.is_told_training(layers.Dropout(0.1))
    assert not _keras_layers.is_told_training(ops.add)


def test_kernel_and_table():
    for layer in (layers.Dense(3), layers.EinsumDense("ab,bc->ac", 3), layers.Conv1D(3, 2)):
        layer.build((None, 4, 2) if isinstance(layer, layers.Conv1D) else (None, 4))
        assert _keras_layers.kernel(layer) is layer.kernel
    embedding = layers.Embedding(5, 2)
    embedding.build()
    assert _keras_layers.table(embedding) is embedding.embeddings


@pytest.mark.parametrize("make", [lambda: layers.MultiHeadAttention(2, 3), lambda: layers.GroupQueryAttention(3, 4, 2)])
def test_attention(make):
    layer = make()
    x = ops.ones((1, 4, 6))
    expected = layer(x, x)
    inward = list(_keras_layers.input_projections(layer, "query", "key", "value", "gate"))
    outward = _keras_layers.output_projection(layer)
    assert len(inward) == 3 and {id(v) for d in [*inward, outward] for v in d.variables} == {
        id(v) for v in layer.variables
    }
    name, function = _keras_layers.compute_attention(layer)
    seen = []
    setattr(layer, name, lambda *args, **kwargs: seen.append(1) or function(layer, *args, **kwargs))
    assert ops.all(layer(x, x) == expected) and seen == [1]
    if isinstance(layer, layers.MultiHeadAttention):
        assert _keras_layers.heads(layer) == 2

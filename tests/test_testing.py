"""The judge: what `assert_same` compares, and what it must not let through."""

import keras
import numpy as np
import pytest
from keras import layers

from tfpar.testing import assert_same, difference, different

pytestmark = pytest.mark.fast


def model(width=3):
    made = keras.Sequential([layers.Input((2,)), layers.Dense(width, kernel_initializer="ones")])
    made.compile("adam", "mse")
    made.optimizer.build(made.trainable_variables)
    return made


def planted(value):
    other = model()
    kernel = other.layers[0].kernel
    kernel.assign(np.where(np.arange(6).reshape(2, 3) == 4, value, kernel.numpy()))
    return other


def test_same_models():
    assert_same(model(), model(), 0.0)
    assert_same(planted(np.nan), planted(np.nan), 0.0)
    assert_same(planted(np.inf), planted(np.inf), 0.0)
    assert_same(model(), planted(1.0 + 1e-6), 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.001, 1e30])
def test_one_wrong_number(value):
    for pair in ((model(), planted(value)), (planted(value), model())):
        with pytest.raises(AssertionError, match=r"0 .*/kernel: (inf|\d)"):
            assert_same(*pair, 1e-5, 1e-4)


def test_a_nan_in_place_of_an_infinity():
    with pytest.raises(AssertionError, match="kernel: inf"):
        assert_same(planted(np.nan), planted(np.inf), 1e-5)


def test_a_nan_in_a_slot():
    other = model()
    other.optimizer.variables[-1].assign(np.full(3, np.nan))
    with pytest.raises(AssertionError, match="adam.*_bias_velocity: inf"):
        assert_same(model(), other, 1e-5)


def test_shapes_that_broadcast():
    with pytest.raises(AssertionError, match=r"kernel: \(2, 3\), not \(2, 1\)"):
        assert_same(model(3), model(1), 1e-5)
    assert different(["y"], [np.ones(3)], [np.ones((3, 1))], 1.0, 1.0) == ["y: (3,), not (3, 1)"]


def test_another_number_of_variables():
    other = model()
    other.compile("sgd", "mse")
    with pytest.raises(AssertionError, match="variables against"):
        assert_same(model(), other, 1e-5)


def test_difference():
    assert difference([], []) == difference(np.nan, np.nan) == 0.0
    assert difference([np.nan, 2.0], [np.nan, 1.0]) == 0.5
    assert difference([0.0], [np.inf]) == difference([np.nan], [0.0]) == difference([1, 2], [[1, 2]]) == np.inf

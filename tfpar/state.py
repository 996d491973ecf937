"""What layers keep from batch to batch: which of it a call reads and changes, without changing it."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfpar import _keras


@_keras.passed_through
class UnknownVariables(Exception):
    """A call used variables that do not belong to its layer, such as the global random seed."""

    graph: Any = None  # in which the call is

    def __init__(self, call: int, variables: Sequence[keras.Variable]):
        super().__init__(f"call {call} uses {[v.path for v in variables]}")
        self.call, self.variables = call, tuple(variables)


class RecordingScope(keras.StatelessScope):
    """A stateless scope that also tells which variables were written, and by which call.

    Args:
        values: pairs of a variable and its value.
        strict: whether to refuse variables without a value.
    """

    def __init__(self, values: Sequence[tuple[keras.Variable, Any]], strict: bool = False):
        super().__init__(values, collect_losses=True)
        self.known = {id(v) for v, _ in values} if strict else None
        self.call = 0
        self.written: dict[int, keras.Variable] = {}
        self.writers: dict[int, int] = {}

    def check(self, variable):
        if self.known is not None and id(variable) not in self.known:
            raise UnknownVariables(self.call, [variable])

    def add_update(self, update):
        variable, _ = update
        self.check(variable)
        self.written[id(variable)] = variable
        self.writers[id(variable)] = self.call
        super().add_update(update)

    def get_current_value(self, variable):
        self.check(variable)
        return super().get_current_value(variable)


def whole_moments(parts: Sequence[_keras.Moments]) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of a batch from those of its parts (Chan et al., "Updating formulae …", 1979)."""
    parts = [_keras.Moments(*(tf.math.multiply_no_nan(x, tf.cast(p.count > 0, x.dtype)) for x in p)) for p in parts]
    count = tf.add_n([p.count for p in parts])
    mean = tf.add_n([p.mean * p.count for p in parts]) / count
    variance = tf.add_n([(p.variance + tf.square(p.mean - mean)) * p.count for p in parts]) / count
    return mean, variance

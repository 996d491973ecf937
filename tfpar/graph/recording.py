"""What layers keep from batch to batch: which of it a call reads and changes, without changing it."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras


@_keras.passed_through
class Discovered(Exception):
    """While a step was traced, something about the model came to light; with that known, it is traced again."""

    is_expected = True


class UnknownVariables(Discovered):
    """A call used variables that do not belong to its layer, such as the global random seed."""

    graph: Any = None  # in which the call is

    def __init__(self, call: int, variables: Sequence[keras.Variable]):
        super().__init__(f"call {call} uses {[v.path for v in variables]}")
        self.call, self.variables = call, tuple(variables)


class RecordingScope(keras.StatelessScope):
    """A stateless scope that also tells which variables were written, and by which call.

    Args:
        values: pairs of a variable and its value, or a part of it.
        strict: whether to refuse variables without a value.
    """

    def __init__(self, values: Sequence[tuple[keras.Variable, Any]], strict: bool = False):
        super().__init__(collect_losses=True)
        # the scope itself refuses a part of a variable, which has another shape
        self.state_mapping.update((id(v), tf.convert_to_tensor(value)) for v, value in values)
        self.known = {id(v) for v, _ in values} if strict else None
        self.call = 0
        self.written: dict[int, keras.Variable] = {}
        self.writers: dict[int, int] = {}

    def check(self, variable):
        if self.known is not None and id(variable) not in self.known:
            raise UnknownVariables(self.call, [variable])

    def add_update(self, update):
        variable, value = update
        self.check(variable)
        self.written[id(variable)] = variable
        self.writers[id(variable)] = self.call
        if variable.trainable and id(variable) in self.state_mapping:
            # the gradient of a weight is that of all that was read of it, not of what was assigned
            before = tf.cast(self.state_mapping[id(variable)], value.dtype)
            value = tf.stop_gradient(value) + (before - tf.stop_gradient(before))
        else:
            value = tf.stop_gradient(value)  # what is read of a state has no gradient either
        super().add_update((variable, value))

    def get_current_value(self, variable):
        self.check(variable)
        return super().get_current_value(variable)


class NeedsWholeBatch(Discovered):
    """What an operation adds to the loss, or keeps, does not follow from what it makes of the parts of a batch."""

    def __init__(self, name: str, graph: Any):
        super().__init__(name)
        self.name, self.graph = name, graph


class UnusedResults(Discovered):
    """Some of what a program makes leads to no loss: from now on its backward pass does without."""

    def __init__(self, graph: Any):
        super().__init__("unused results")
        self.graph = graph


class UpdatesApart(Discovered):
    """A program cannot end with the update: from now on that is one of its own."""

    def __init__(self, graph: Any):
        super().__init__("updates apart")
        self.graph = graph


class HasMask(Discovered):
    """An output of the model has a mask, by which the loss depends on more than the sizes of the batch's parts."""

"""The order on each device: an action begins when the one before it has ended."""

# s: segment, m: micro-batch of a lane

from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tfpar.compat._tf import awaited
from tfpar.engine.engine import MicroBatch, each, now, tensors_of
from tfpar.planning.mesh import Coordinate
from tfpar.planning.schedule import Kind

Emitted = tuple[int, Kind, MicroBatch]


@dataclass
class DeviceOrder:
    """Control edges between the actions of a device.

    Without them TensorFlow would run what it likes first, and hold the activations of all micro-batches.

    Args:
        clock: whether to note when each action starts and stops.
    """

    clock: bool = False
    last: dict[Coordinate, list[Any]] = field(default_factory=dict)  # what tells that a device is free
    before: dict[Coordinate, list[Any]] = field(default_factory=dict)  # the same, an action earlier
    starts: dict[Emitted, tf.Tensor] = field(default_factory=dict)
    stops: dict[Emitted, tf.Tensor] = field(default_factory=dict)

    def started(self, action: Emitted, at: Coordinate, values: Any) -> Any:
        """The values on this device, once its previous action is done; their transfer does not wait for that."""
        values = each(tf.identity, values)
        before = self.last.get(at, [])
        if self.clock:
            self.starts[action] = now([*before, *tensors_of(values)])
            before = [self.starts[action]]
        with tf.control_dependencies(before):
            return each(tf.identity, values)

    def stopped(self, action: Emitted, at: Coordinate, values: Any):
        """The next action on this device will wait for all of these."""
        done = tf.group(*map(awaited, tensors_of(values)))
        if self.clock:
            done = self.stops[action] = now([done])
        self.before[at], self.last[at] = self.last.get(at, []), [done]

"""One logical variable, wherever its value lives."""

import weakref

import numpy as np
import tensorflow as tf

from tfpar import _keras
from tfpar._tf import LogicalReplica, MirroredVariable, ResourceVariable, replica_of

HOST = "CPU:0"


class LogicalVariable(MirroredVariable):
    """A variable that keeps its identity wherever its value lives: on one device, or as a copy on each replica's.

    One that belongs to a stage is created in host memory and waits there until a plan says where it belongs, so that a
    model larger than one device never touches one. To `tf.distribute`, Keras, checkpoints and SavedModel it is a
    `MirroredVariable`. Outside of replicas, reading gives the first copy and writing writes all; it needs no scope.

    Args:
        strategy: the strategy in whose scope it was created.
        values: the `tf.Variable`s that hold the value, one for each replica or one for all.
        aggregation: what becomes of the values that replicas assign in `strategy.run`.
    """

    def __init__(self, strategy, values, aggregation=tf.VariableAggregation.NONE, var_policy=None):
        super().__init__(strategy, values, aggregation, var_policy)
        self._key = self._primary._unique_id
        self._followers: list[weakref.ref[LogicalVariable]] = []
        self._settled = len(values) > 1

    @property
    def _unique_id(self):
        return self._key

    @property
    def copies(self) -> tuple:
        """The variables that hold the value, by replica."""
        return self._values

    def _get(self):
        replica = replica_of(self._distribute_strategy)
        bound = getattr(replica, "bound", None)
        if bound:
            return bound[id(self)]
        if not tf.executing_eagerly() and not _keras.in_program():
            self._settled = True  # a function holds on to the value where it is
        return self._values[replica._replica_id if replica and len(self._values) > 1 else 0]

    _get_cross_replica = _get_on_device_or_primary = _get

    @property
    def handle(self):
        return self._get().handle

    def read_value(self):
        return self._get().read_value()

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        return tf.convert_to_tensor(self._get(), dtype=dtype, name=name)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype)

    def __int__(self):
        return int(self.numpy())

    def __float__(self):
        return float(self.numpy())

    def __complex__(self):
        return complex(self.numpy())

    def __bool__(self):
        return bool(self.numpy())

    def _update(self, update_fn, value, **kwargs):
        replica = replica_of(self._distribute_strategy)
        if replica is not None and not isinstance(replica, LogicalReplica):
            return super()._update(update_fn, value, **kwargs)
        if len(self._values) == 1 or (replica is not None and replica.copy is not None):
            return update_fn(self._get(), value, **kwargs)
        updates = []
        for copy in self._values:
            with tf.device(copy.device):
                updates.append(update_fn(copy, value, **kwargs))
        return updates[0]

    def followed_by(self, other: "LogicalVariable"):
        """From now on `other`, an optimizer's slot for instance, moves along."""
        self._followers.append(weakref.ref(other))

    def place(self, device: str):
        """Move the value, and that of each follower, to `device`, for good.

        Once it has its place, or a function has been traced that reads it, it stays: the function would go on with
        the old value. Another model that uses the variable reads it from there.
        """
        with tf.init_scope(), tf.device(device):
            old = self._get()
            settled, self._settled = self._settled, True
            here = tf.DeviceSpec.from_string(tf.identity(0).device)
            if not settled and tf.DeviceSpec.from_string(old.device) != here:
                new = ResourceVariable(
                    old.read_value(), trainable=old.trainable, name=self._common_name, dtype=old.dtype
                )
                new.handle._distributed_container = weakref.ref(self)
                self._values = (new,)
        for follower in self._followers:
            if (variable := follower()) is not None:
                variable.place(device)


def follower_bytes(variable: LogicalVariable) -> int:
    """Bytes of the slots that an optimizer keeps for a variable."""
    followers = [f() for f in getattr(variable, "_followers", ())]
    return sum(f.shape.num_elements() * f.dtype.size for f in followers if f is not None)

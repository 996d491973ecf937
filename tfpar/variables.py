"""One logical variable, wherever its value lives."""

import weakref

import numpy as np
import tensorflow as tf

from tfpar import _keras
from tfpar._tf import MirroredVariable, ResourceVariable

HOST = "CPU:0"


class LogicalVariable(MirroredVariable):
    """A variable that keeps its identity when its value moves to another device.

    It is created in host memory and waits there until a plan says where it belongs, so that a model larger than one
    device never touches one. To `tf.distribute`, Keras, checkpoints and SavedModel it is a `MirroredVariable` with a
    single piece; reading and writing it needs no scope and no replica context.

    Args:
        strategy: the strategy in whose scope it was created.
        values: the one `tf.Variable` that holds the value.
    """

    def __init__(self, strategy, values, aggregation=tf.VariableAggregation.NONE, var_policy=None):
        super().__init__(strategy, values, aggregation, var_policy)
        self._key = self._primary._unique_id
        self._followers: list[weakref.ref[LogicalVariable]] = []
        self._settled = False

    @property
    def _unique_id(self):
        return self._key

    def _get(self):
        if not tf.executing_eagerly() and not _keras.in_program():
            self._settled = True  # a function holds on to the value where it is
        return self._values[0]

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
        return update_fn(self._get(), value, **kwargs)

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

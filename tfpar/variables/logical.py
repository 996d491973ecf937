"""One logical variable, wherever its value lives."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfpar.compat import _keras
from tfpar.compat._tf import (
    LogicalReplica,
    MirroredVariable,
    ResourceVariable,
    number_of,
    record_gradient,
    replica_of,
    saveable,
    set_container,
    unrecorded,
)
from tfpar.errors import ModelError, ScopeError
from tfpar.planning.mesh import AXES, FIRST, Coordinate, dividing
from tfpar.planning.sharding import UNSHARDED, Sharding

HOST = "CPU:0"


class AsNumber:
    """What has a `numpy()`, as NumPy and Python take it for a number."""

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


class LogicalVariable(AsNumber, MirroredVariable):
    """A variable that keeps its identity wherever its value lives: on one device, or copied or divided over several.

    One whose place depends on the plan is created in host memory and waits there, so that a model larger than one
    device never touches one. To `tf.distribute`, Keras and checkpoints it is a `MirroredVariable`. Outside of replicas
    and ranks, reading gives the whole value and writing writes all of it; it needs no scope.

    Args:
        strategy: the strategy in whose scope it was created.
        values: the `tf.Variable`s that hold the value, one for each lane, or one for all.
        aggregation: what becomes of the values that replicas assign in `strategy.run`.
        sharding: how the value is divided over `values`.
    """

    def __init__(
        self, strategy, values, aggregation=tf.VariableAggregation.NONE, var_policy=None, sharding=UNSHARDED, shape=None
    ):
        self._sharding, self._whole_shape = sharding, values[0].shape if shape is None else tf.TensorShape(shape)
        super().__init__(strategy, values, aggregation, var_policy)
        self._key = self._primary._unique_id
        self._followers: list[weakref.ref[LogicalVariable]] = []
        self._follow = Home((), sharding)
        self._settled = len(values) > 1

    @property
    def _unique_id(self):
        return self._key

    @property
    def common_name(self) -> str:
        """The name, without the number of an output."""
        return self._common_name

    @property
    def copies(self) -> tuple:
        """The variables that hold the value or a part of it, by lane."""
        return self._values

    @property
    def sharding(self) -> Sharding:
        """How the value is divided."""
        return self._sharding

    @property
    def is_divided(self) -> bool:
        """Whether the value, or that of a slot of an optimizer that follows it, is in parts."""
        return self._sharding.divides or self.slot_sharding.divides

    @property
    def slot_sharding(self) -> Sharding:
        """How a slot of an optimizer for this variable is divided."""
        return self._follow.sharding if self._follow.devices else self._sharding

    @property
    def follow(self) -> "Home":
        """Where a slot of an optimizer for this variable is to be."""
        return self._follow if self._follow.devices else Home(tuple(c.device for c in self._values), self._sharding)

    @property
    def shape(self):
        return self._whole_shape

    @property
    def _is_gathered(self) -> bool:
        """Whether reading puts parts together: the value is divided, and no rank reads its own."""
        replica = replica_of(self._distribute_strategy)
        return self._sharding.divides and (replica is None or getattr(replica, "copy", None) is None)

    def _get(self):
        return self.read_value() if self._is_gathered else self._copy()

    def _copy(self):
        """The variable that a replica or rank reads and writes; outside of them, the first."""
        replica = replica_of(self._distribute_strategy)
        bound = getattr(replica, "bound", None)
        if bound:
            return bound[id(self)]
        if not tf.executing_eagerly() and not _keras.in_program():
            self._settled = True  # a function holds on to the value where it is
        return self.copy_of(self._sharding.replica(number_of(replica), len(self._values)) if replica else FIRST)

    _get_cross_replica = _get_on_device_or_primary = _get

    @property
    def handle(self):
        return self._copy().handle

    def read_value(self):
        if not self._is_gathered:
            return self._copy().read_value()
        self._copy()
        first = self._values[0].read_value()
        with tf.device(HOST) if tf.executing_eagerly() else contextlib.nullcontext():
            whole = unrecorded(lambda: tf.identity(of_shards([v.read_value() for v in self._values], self._sharding)))
        # to a tape, the first part stands for the variable: its gradient is that of the whole
        return record_gradient([whole], [first], lambda gradient: [gradient])[0]

    def value(self):
        return self.read_value() if self._is_gathered else super().value()

    def sparse_read(self, indices, name=None):
        return tf.gather(self.read_value(), indices) if self._is_gathered else super().sparse_read(indices, name)

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        return tf.convert_to_tensor(self._get(), dtype=dtype, name=name)

    def _update(self, update_fn, value, **kwargs):
        replica = replica_of(self._distribute_strategy)
        if replica is not None and not isinstance(replica, LogicalReplica):
            return super()._update(update_fn, value, **kwargs)
        if len(self._values) == 1 or (replica is not None and replica.copy is not None):
            return update_fn(self._copy(), value, **kwargs)
        updates = []
        for copy, given in zip(self._values, self.divided(value), strict=True):
            with tf.device(copy.device):
                updates.append(update_fn(copy, given, **kwargs))
        return updates[0]

    def divided(self, value: Any) -> list[Any]:
        """A value for all as what each copy is given of it."""
        if self._sharding.divides and isinstance(value, tf.IndexedSlices):
            shape = self.shape.as_list()
            return [sparse_part(value, self._sharding.region(shape, at)) for at in self.lanes]
        if self._sharding.divides:  # what a gradient of an unknown number of rows made of it has no known shape
            value = tf.ensure_shape(tf.convert_to_tensor(value), self.shape)
        return parts_of(value, self._sharding, len(self._values))

    def copy_of(self, at: Coordinate) -> tf.Variable:
        """The variable that holds the value, or a part of it, for a lane."""
        return self._values[self._sharding.number(at) if len(self._values) > 1 else 0]

    @property
    def lanes(self) -> list[Coordinate]:
        """Whose each copy or part is."""
        return self._sharding.lanes(len(self._values))

    def of_lane(self, at: Coordinate) -> tf.Tensor:
        """The value, or the part of a rank, for a lane, on the current device."""
        shards = {lane: copy_on_device(self.copy_of(lane)) for lane in self._sharding.group(at)}
        return self._sharding.joined(shards, tf.concat, *dividing("samples"))

    def _export_to_saved_model_graph(self, *args, **kwargs):
        if self._sharding.divides:
            raise ModelError(
                f"{self._common_name} is divided between devices, and a SavedModel holds whole variables: use "
                "model.export, which puts them together"
            )
        return super()._export_to_saved_model_graph(*args, **kwargs)

    def _gather_saveables_for_checkpoint(self):
        if not self._sharding.divides:
            return super()._gather_saveables_for_checkpoint()
        return saveable(self.read_value, self.assign, self.dtype, self._common_name)

    @property
    def followers(self) -> list["LogicalVariable"]:
        """What moves along."""
        return [variable for follower in self._followers if (variable := follower()) is not None]

    def followed_by(self, other: "LogicalVariable"):
        """From now on `other`, an optimizer's slot for instance, moves along."""
        self._followers.append(weakref.ref(other))

    def hold(self, values: tuple, sharding: Sharding):
        """From now on these variables hold the value."""
        self._values, self._sharding = values, sharding

    def hand_over(self, strategy: tf.distribute.Strategy):
        """Move the value to host memory, where it waits for the plan of another strategy."""
        self.hold((on_host(self),), UNSHARDED)
        self._distribute_strategy, self._follow, self._settled = strategy, Home((), UNSHARDED), False

    def place(self, devices: Sequence[str], sharding: Sharding = UNSHARDED, follow: "Home | None" = None):
        """Move the value, and that of each follower, to these devices, for good: a copy or a part for each.

        Once it has its place, or a function has been traced that reads it, it stays: the function would go on with
        the old value. Another model that uses the variable reads it from there.

        Args:
            follow: where slots of optimizers go, if not to the same places.

        Raises:
            ScopeError: such a function was traced before several devices got their copies or parts.
        """
        with tf.init_scope():
            old = self._copy()
            settled, self._settled = self._settled, True
            if not settled:
                if len(devices) > 1 or not is_on(old, devices[0]):
                    self.hold(copies_of(self, old, devices, sharding), sharding)
                self._follow = follow or Home(tuple(devices), sharding)
            elif not self._follow.devices and len(devices) > len(self._values) == 1:
                raise ScopeError(
                    f"a tf.function read {self._common_name} before its model was used, and would go on with the value "
                    f"that it saw, while {len(devices)} devices are to have it: call fit, evaluate or predict first"
                )
        for variable in self.followers:
            variable.place(*self.follow.of(variable.shape == self.shape))


@contextlib.contextmanager
def as_host_variables(variables: Sequence[LogicalVariable]) -> Iterator[None]:
    """Inside, these are ordinary variables with all of their value in host memory, for those that look closely."""
    before = [(v._values, v._sharding, v._settled) for v in variables]
    try:
        for variable in variables:
            variable.hold((on_host(variable),), UNSHARDED)
        yield
    finally:
        for variable, (values, sharding, settled) in zip(variables, before, strict=True):
            variable.hold(values, sharding)
            variable._settled = settled


def on_host(variable: LogicalVariable) -> tf.Variable:
    """A new variable in host memory with all of the value of another."""
    old = variable.copies[0]
    with tf.init_scope(), tf.device(HOST):
        new = ResourceVariable(
            variable.read_value(), trainable=old.trainable, name=variable.common_name, dtype=old.dtype
        )
    set_container(new, variable)
    return new


class Home(NamedTuple):
    """Where copies or parts of a variable live.

    Args:
        devices: one for each.
        sharding: which part each has.
    """

    devices: tuple[str, ...]
    sharding: Sharding

    def of(self, alike: bool) -> "Home":
        """The same for a variable that has this shape or, if not, another: it is copied."""
        return self if alike else Home(self.devices, UNSHARDED)


def of_shards(parts: Sequence[tf.Tensor], sharding: Sharding) -> tf.Tensor:
    """The value of which lanes have these parts."""
    return sharding.joined(dict(zip(sharding.lanes(len(parts)), parts, strict=True)), tf.concat, *AXES)


def copy_on_device(variable: tf.Variable) -> tf.Tensor:
    """A variable's value on the current device; TensorFlow reads it only where it lives."""
    with tf.device(variable.device):
        value = unrecorded(lambda: tf.convert_to_tensor(variable))
    return tf.identity(value)


def is_on(variable: tf.Variable, device: str) -> bool:
    """Whether a variable lives on this device."""
    with tf.device(device):
        return tf.DeviceSpec.from_string(variable.device) == tf.DeviceSpec.from_string(tf.identity(0).device)


def copies_of(variable: LogicalVariable, old: tf.Variable, devices: Sequence[str], sharding: Sharding) -> tuple:
    """New variables with the value of an old one, or with a part of it each."""
    with tf.device(old.device):
        value = old.read_value()
        parts = parts_of(value, sharding, len(devices))
    found = []
    for number, (device, part) in enumerate(zip(devices, parts, strict=True)):
        name = f"{variable.common_name}/rank_{number}" if number else variable.common_name
        with tf.device(device):
            found.append(ResourceVariable(part, trainable=old.trainable, name=name, dtype=old.dtype))
        set_container(found[-1], variable)
    return tuple(found)


def parts_of(value: Any, sharding: Sharding, lanes: int) -> list[Any]:
    """What each of so many lanes has of a value."""
    if not sharding.divides:
        return [value] * lanes
    value = tf.convert_to_tensor(value)
    return [region_of(value, sharding.region(value.shape.as_list(), at)) for at in sharding.lanes(lanes)]


def region_of(value: Any, region: Sequence[tuple[int, int]]) -> Any:
    """A part of a tensor."""
    return value[tuple(slice(start, stop) for start, stop in region)]


def sparse_part(value: tf.IndexedSlices, region: Sequence[tuple[int, int]]) -> tf.IndexedSlices:
    """A part of rows to scatter."""
    (start, stop), *inside = region
    here = tf.where((value.indices >= start) & (value.indices < stop))[:, 0]
    rows = tf.gather(value.indices, here) - tf.cast(start, value.indices.dtype)
    values = region_of(tf.gather(value.values, here), [(0, None), *inside])
    return tf.IndexedSlices(values, rows, tf.constant([stop - start for start, stop in region]))


def follower_bytes(variable: LogicalVariable) -> int:
    """Bytes of the slots that an optimizer keeps for a variable, all parts together."""
    return sum(f.shape.num_elements() * f.dtype.size for f in getattr(variable, "followers", ()))

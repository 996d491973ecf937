"""Where the value of a variable is, and where it goes."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfpar.compat._tf import MirroredVariable, ResourceVariable, empty_variable, set_container
from tfpar.errors import ScopeError
from tfpar.planning.sharding import UNSHARDED, Sharding
from tfpar.variables.parts import HOST, Home, is_on, parts_of


class PlacedVariable(MirroredVariable):
    """A variable that can be moved, with what follows it, and need not have a value before it is read.

    Args:
        strategy, values, aggregation, sharding, initial: as for `LogicalVariable`.
    """

    def __init__(self, strategy, values, aggregation, var_policy, sharding: Sharding, initial: Callable | None):
        self._initial = initial
        self._sharding = sharding
        super().__init__(strategy, values, aggregation, var_policy)
        self._followers: list[weakref.ref[PlacedVariable]] = []
        self._follow = Home((), sharding)
        self._settled = len(values) > 1

    @property
    def copies(self) -> tuple:
        """The variables that hold the value or a part of it, by lane."""
        self._begin()
        return self._values

    @property
    def is_waiting(self) -> bool:
        """Whether there is no value yet."""
        return self._initial is not None

    @property
    def is_settled(self) -> bool:
        """Whether the value stays where it is."""
        return self._settled

    def _begin(self):
        """Make the value, if there is none yet."""
        if self._initial is not None:
            with tf.init_scope(), tf.device(HOST):
                self._fill(self._initial())

    def _fill(self, value: Any):
        """Give each copy what it has of the first value; it is still waiting if this is interrupted."""
        with tf.init_scope():
            for copy, part in zip(self._values, parts_of(value, self._sharding, len(self._values)), strict=True):
                with tf.device(copy.device):
                    copy.assign(part)
        self._initial = None

    @property
    def is_divided(self) -> bool:
        """Whether the value, or that of a slot of an optimizer that follows it, is in parts."""
        return self._sharding.divides or self.slot_sharding.divides

    @property
    def slot_sharding(self) -> Sharding:
        """How a slot of an optimizer for this variable is divided."""
        return self._follow.sharding if self._follow.devices else self._sharding

    @property
    def follow(self) -> Home:
        """Where a slot of an optimizer for this variable is to be."""
        return self._follow if self._follow.devices else Home(tuple(c.device for c in self._values), self._sharding)

    @property
    def followers(self) -> list["PlacedVariable"]:
        """What moves along."""
        return [variable for follower in self._followers if (variable := follower()) is not None]

    def followed_by(self, other: "PlacedVariable"):
        """From now on `other`, an optimizer's slot for instance, moves along."""
        self._followers.append(weakref.ref(other))

    def hold(self, values: tuple, sharding: Sharding):
        """From now on these variables hold the value."""
        self._values, self._sharding = values, sharding

    def hand_over(self, strategy: tf.distribute.Strategy):
        """Move the value to host memory, where it waits for the plan of another strategy."""
        self.hold((on_host(self),), UNSHARDED)
        self._distribute_strategy, self._follow, self._settled = strategy, Home((), UNSHARDED), False

    def place(
        self,
        devices: Sequence[str],
        sharding: Sharding = UNSHARDED,
        follow: Home | None = None,
        settle: bool = True,
    ):
        """Move the value, and that of each follower, to these devices: a copy or a part for each.

        Once it has its place for good, or a function has been traced that reads it, it stays: the function would go on
        with the old value. Another model that uses the variable reads it from there.

        Args:
            follow: where slots of optimizers go, if not to the same places.
            settle: whether the place is for good.

        Raises:
            ScopeError: such a function was traced before several devices got their copies or parts.
        """
        settled, self._settled = self._settled, self._settled or settle
        if not settled:
            if not self._is_at(devices, sharding):
                with tf.init_scope():
                    self.hold(copies_of(self, devices, sharding), sharding)
            self._follow = follow or Home(tuple(devices), sharding)
            if settle:
                self._begin()
        elif not self._follow.devices and len(devices) > len(self._values) == 1:
            raise ScopeError(
                f"a tf.function read {self._common_name} before its model was used, and would go on with the value "
                f"that it saw, while {len(devices)} devices are to have it: call fit, evaluate or predict first"
            )
        for variable in self.followers:
            variable.place(*self.follow.of(variable.shape == self.shape), None, settle)

    def _is_at(self, devices: Sequence[str], sharding: Sharding) -> bool:
        """Whether the value is on these devices, in these parts."""
        same = len(self._values) == len(devices) and (sharding == self._sharding or len(devices) == 1)
        return same and all(map(is_on, self._values, devices))


def on_host(variable: PlacedVariable) -> tf.Variable:
    """A new variable in host memory with all of the value of another."""
    with tf.init_scope():
        with tf.device(HOST):
            value = variable.read_value()
        return new_copy(variable, 0, HOST, value, variable.shape)


def copies_of(variable: PlacedVariable, devices: Sequence[str], sharding: Sharding) -> tuple:
    """New variables with the value of another, or with a part of it each; without one, if it has none yet."""
    parts: Sequence[Any] = [None] * len(devices)
    if not variable.is_waiting:
        old = variable.copies[0]
        with tf.device(HOST if len(variable.copies) > 1 else old.device):
            parts = parts_of(variable.read_value(), sharding, len(devices))
    shapes = [sharding.shape(variable.shape.as_list(), at) for at in sharding.lanes(len(devices))]
    return tuple(
        new_copy(variable, number, device, part, shape)
        for number, (device, part, shape) in enumerate(zip(devices, parts, shapes, strict=True))
    )


def new_copy(variable: PlacedVariable, number: int, device: str, value: Any, shape: Sequence[int]) -> tf.Variable:
    """One of the variables that hold the value of another; empty without a value."""
    name = f"{variable.common_name}/rank_{number}" if number else variable.common_name
    like = dict(trainable=variable.trainable, name=name, dtype=variable.dtype)
    with tf.device(device):
        new = empty_variable(shape, **like) if value is None else ResourceVariable(value, **like)
    set_container(new, variable)
    return new

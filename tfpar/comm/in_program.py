"""Collectives as operations of a program, seen from the lane that runs it.

All lanes run the same program at once, each on its own device. On GPUs the collectives are compiled into it; without
XLA they are TensorFlow's own.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from math import prod
from typing import Any

import tensorflow as tf

from tfpar.comm.collectives import LOCAL, Collective
from tfpar.comm.gradients import rows_of_shard
from tfpar.compat import _keras, _xla
from tfpar.compat._tf import loops_of_functions
from tfpar.planning.mesh import AXES, Mesh, number_of

KEYS: dict[tuple, int] = {}  # of groups of devices that meet in programs
NUMBERS = count(1)  # of collectives in programs
# what orders a device's collectives that are not in a program of their own: a resource of the device, if there is one
ORDER: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("order", default=[])  # noqa: B039


@contextlib.contextmanager
def ordered(token: tf.Variable) -> Iterator[None]:
    """Inside, TensorFlow's own collectives wait for one another; in loops, too.

    Args:
        token: a variable of the device.
    """
    before = ORDER.set([token.handle])
    try:
        with loops_of_functions():
            yield
    finally:
        ORDER.reset(before)


def key_of(*group: Any) -> int:
    """A number for a group of devices, in this process always the same."""
    return KEYS.setdefault(group, 70001 + len(KEYS))


@dataclass(frozen=True)
class Gang:
    """The devices that run a program at once.

    Args:
        devices: one for each lane.
        mesh: of the lanes.
        compiled: whether XLA compiles the program.
    """

    devices: tuple[str, ...]
    mesh: Mesh
    compiled: bool
    key: int = field(init=False)
    number: int = field(init=False, compare=False)  # of this one, among those of the same devices

    def __post_init__(self):
        object.__setattr__(self, "number", next(NUMBERS))
        object.__setattr__(self, "key", key_of("gang", *self.devices))

    def meet(self):
        """Say at the beginning of a compiled program which others it meets."""
        if self.compiled:
            _xla.gather_gang(len(self.devices), self.key)

    @cached_property
    def groups(self) -> dict[str, list[list[int]]]:
        """For each axis, the numbers of the lanes of each group along it."""
        shape = self.mesh.lane_shape
        return {axis: [[number_of(at, shape) for at in group] for group in self.mesh.groups(axis)] for axis in AXES}

    def index_along(self, axis: str, lane: tf.Tensor) -> tf.Tensor:
        """The place of a lane, given by its number, along an axis."""
        after = self.mesh.lane_shape[list(AXES).index(axis) + 1 :]
        return lane // prod(after) % getattr(self.mesh, axis)

    def exchanged(
        self, kind: str, axis: str, x: tf.Tensor, lane: tf.Tensor, which: Any, dim: int = 0
    ) -> tf.Tensor:  # fmt: skip
        """A collective along an axis; `kind` as in `comm.collectives.EXCHANGES`, but for what is local.

        Args:
            which: tells it from all others; the same on all lanes, whose programs may be traced apart.
        """
        groups = self.groups[axis]
        if len(groups[0]) == 1:
            return x
        if self.compiled:
            return _xla.exchanged(kind, [x], groups, dim)[0]
        keys = [key_of(*(self.devices[lane] for lane in group)) for group in groups]
        of_lane = [keys[n] for lane in range(len(self.devices)) for n, group in enumerate(groups) if lane in group]
        options = {
            "group_size": len(groups[0]), "group_key": tf.gather(of_lane, lane), "ordering_token": ORDER.get(),
            "instance_key": instance_of(x, key_of(self.number, which)),
        }  # fmt: skip
        if kind == "all-gather":
            whole = tf.raw_ops.CollectiveGatherV2(input=rows_first(wide(x), dim), **options)
            found = tf.cast(rows_back(whole, dim), x.dtype)
            found.set_shape([n and n * len(groups[0]) if d == dim else n for d, n in enumerate(x.shape.as_list())])
            return found
        merge = "Max" if kind == "maximum" else "Add"
        found = tf.cast(tf.raw_ops.CollectiveReduceV2(input=wide(x), merge_op=merge, final_op="Id", **options), x.dtype)
        return self.own_part(axis, found, lane, dim) if kind == "reduce-scatter" else found

    def added_up(self, axis: str, values: dict[Any, tf.Tensor], lane: tf.Tensor) -> dict[Any, tf.Tensor]:
        """The sums along an axis of tensors of one dtype, by their names; compiled, in one collective."""
        if self.compiled and len(self.groups[axis][0]) > 1:
            return dict(
                zip(values, _xla.exchanged("all-reduce", list(values.values()), self.groups[axis]), strict=True)
            )
        return {which: self.exchanged("all-reduce", axis, x, lane, (axis, which)) for which, x in values.items()}

    def gathered(
        self, axis: str, parts: dict[Any, tuple[tf.Tensor, int]], lane: tf.Tensor
    ) -> dict[Any, tf.Tensor]:  # fmt: skip
        """What lanes along an axis have equal parts of, along a dim each, by names; compiled, in one collective.

        Args:
            parts: of one dtype.
        """
        if not self.compiled or len(parts) == 1:
            given = parts.items()
            return {which: self.exchanged("all-gather", axis, x, lane, which, dim) for which, (x, dim) in given}
        flat = tf.concat([tf.reshape(rows_first(x, dim), [-1]) for x, dim in parts.values()], 0)
        rows = tf.reshape(self.exchanged("all-gather", axis, flat, lane, None), [getattr(self.mesh, axis), -1])
        found = zip(parts.items(), tf.split(rows, [x.shape.num_elements() for x, _ in parts.values()], 1), strict=True)
        return {which: rows_back(tf.reshape(x, [-1, *others(part, dim)]), dim) for (which, (part, dim)), x in found}

    def scattered(
        self, axis: str, values: dict[Any, tuple[tf.Tensor, int]], lane: tf.Tensor
    ) -> dict[Any, tf.Tensor]:  # fmt: skip
        """Of sums along an axis, to each lane its equal parts; the other way round."""
        if not self.compiled or len(values) == 1:
            given = values.items()
            return {which: self.exchanged("reduce-scatter", axis, x, lane, which, dim) for which, (x, dim) in given}
        count = getattr(self.mesh, axis)
        flat = tf.concat([tf.reshape(rows_first(x, dim), [count, -1]) for x, dim in values.values()], 1)
        row = tf.reshape(self.exchanged("reduce-scatter", axis, flat, lane, None), [-1])
        sizes = [x.shape.num_elements() // count for x, _ in values.values()]
        found = zip(values.items(), tf.split(row, sizes), strict=True)
        return {which: rows_back(tf.reshape(x, [-1, *others(whole, dim)]), dim) for (which, (whole, dim)), x in found}

    def after(self, values: Sequence[tf.Tensor], others: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The same values, once others are there."""
        if not (values and others):
            return list(values)
        if self.compiled:
            return _xla.after("later", values, others, [x.shape.as_list() for x in values])
        with tf.control_dependencies(list(others)):
            return [tf.identity(x) for x in values]

    def can_wait(self, x: tf.Tensor) -> bool:
        """Whether `after` takes a tensor."""
        return not self.compiled or (x.dtype in _xla.TYPES and x.shape.is_fully_defined())

    def held(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The same values, in a compiled program once what it exchanged last had been computed."""
        return _xla.held(values) if self.compiled else list(values)

    def own_part(self, axis: str, x: tf.Tensor, lane: tf.Tensor, dim: int) -> tf.Tensor:
        """Of what all have, a lane's part of equal ones along `dim`."""
        rows = (tf.shape(x)[dim] if x.shape[dim] is None else x.shape[dim]) // getattr(self.mesh, axis)
        first = [self.index_along(axis, lane) * rows if d == dim else 0 for d in range(x.shape.rank)]
        return tf.slice(x, first, [rows if d == dim else -1 if n is None else n for d, n in enumerate(x.shape)])

    def own_rows(
        self, axis: str, x: tf.IndexedSlices, lane: tf.Tensor, dim: int, shape: Sequence[int]
    ) -> tf.IndexedSlices:  # fmt: skip
        """Of the gradient of some rows that all have, what belongs to a lane's part, of this shape, along `dim`."""
        values, indices = x.values, x.indices
        if dim:
            values = self.own_part(axis, values, lane, dim)
        else:
            values, indices = rows_of_shard(values, indices, self.index_along(axis, lane) * shape[0], shape[0])
        return tf.IndexedSlices(values, indices, tf.constant(list(shape), x.dense_shape.dtype))


def rows_first(x: tf.Tensor, dim: int) -> tf.Tensor:
    """A tensor with one of its dims before the others."""
    return x if dim == 0 else tf.transpose(x, [dim, *(d for d in range(x.shape.rank) if d != dim)])


def rows_back(x: tf.Tensor, dim: int) -> tf.Tensor:
    """A tensor with its first dim where it was."""
    return x if dim == 0 else tf.transpose(x, [*range(1, dim + 1), 0, *range(dim + 1, x.shape.rank)])


def others(x: tf.Tensor, dim: int) -> list[int]:
    """The sizes of a tensor but for one dim."""
    return [n for d, n in enumerate(x.shape.as_list()) if d != dim]


def instance_of(x: tf.Tensor, key: int) -> tf.Tensor:
    """A number for one of TensorFlow's own collectives; it is another for each size, as TensorFlow wants it."""
    number = key * 1000003 + tf.size(x, tf.int64)
    return tf.cast(number % (2**31 - 1), tf.int32)


def wide(x: tf.Tensor) -> tf.Tensor:
    """A tensor in a dtype that TensorFlow's own collectives take."""
    return tf.cast(x, WIDER.get(x.dtype, x.dtype))


SMALL = (tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16)
WIDER = {**dict.fromkeys(SMALL, tf.int32), tf.bfloat16: tf.float32}


HELD = ("identity", "slice", "all-reduce", "maximum", "all-gather", "reduce-scatter")  # what programs can hold
DIVIDING = ("all-gather", "slice", "reduce-scatter")  # for equal parts only


class InProgram:
    """A `Collective` as an operation of a program, on what a lane has and the lane's number.

    Args:
        collective: what is exchanged.
        gang: the devices.
    """

    variables = ()
    exchanges_forward = property(lambda self: self.collective.forward not in LOCAL, doc="Whether it waits for others.")
    exchanges_backward = property(lambda self: self.collective.backward not in LOCAL, doc="The same, on the way back.")

    def __init__(self, collective: Collective, gang: Gang):
        self.collective, self.gang, self.number = collective, gang, next(NUMBERS)

    def __call__(self, *args: tf.Tensor) -> tf.Tensor:
        *given, lane = args
        if not given:
            return self.gang.index_along(self.collective.axis, lane)
        (x,) = given
        y = self.exchanged(x, lane, "values")
        logits, activation = _keras.logits_of(x)
        if logits is not None and activation is None:
            _keras.set_logits(y, self.exchanged(logits, lane, "logits"))
        elif logits is not None:
            y = activation(self.exchanged(logits, lane, "logits"))
        mask, kind = _keras.get_keras_mask(x), self.collective.kind_of_masks
        if mask is not None:
            if self.collective.dim < mask.shape.rank:
                mask = self.emit(kind, mask, lane, "mask")
            _keras.set_keras_mask(y, mask)
        return y

    def exchanged(self, x: tf.Tensor, lane: tf.Tensor, what: str) -> tf.Tensor:
        """What the lane has afterwards, with the transpose as its gradient."""

        @tf.custom_gradient
        def forward(x):
            y = self.emit(self.collective.forward, x, lane, what)
            return y, lambda g: self.emit(self.collective.backward, tf.ensure_shape(g, y.shape), lane, f"of {what}")

        return forward(tf.convert_to_tensor(x))

    def emit(self, kind: str, x: tf.Tensor, lane: tf.Tensor, what: str) -> tf.Tensor:
        """One direction of the exchange."""
        gang, axis, dim = self.gang, self.collective.axis, self.collective.dim
        if kind in LOCAL:
            return tf.identity(x) if kind == "identity" else gang.own_part(axis, x, lane, dim)
        return gang.exchanged(kind, axis, x, lane, (self.number, what), dim)


def fits(collective: Collective, parts: int) -> str | None:
    """Why a collective between so many devices cannot be in a program; `None` if it can."""
    kinds = {collective.forward, collective.backward}
    if not kinds <= {*HELD, "rank"}:
        return f"{', '.join(sorted(kinds - {*HELD}))} is exchanged between programs"
    if kinds & {*DIVIDING} and (collective.extent is None or collective.extent % parts):
        return f"{collective.extent or 'an unknown number of'} elements make no equal parts for {parts} devices"
    return None


def of_equal_parts(collectives: Sequence[Collective], mesh: Mesh) -> str | None:
    """Why one of these cannot be in a program; `None` if all can."""
    return next((why for c in collectives if (why := fits(c, mesh.count(c.axis)))), None)

"""What `tf.distribute` asks of a strategy: where variables are, and what `strategy.run` and its relatives do."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfpar.compat import _keras
from tfpar.compat._keras_run import running_replicas
from tfpar.compat._tf import (
    LogicalReplica,
    MirroredExtended,
    PerReplica,
    empty_variable,
    replica_of,
    select_replica,
    update_regroup,
)
from tfpar.planning.mesh import Mesh
from tfpar.planning.sharding import UNSHARDED
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import HOST, Home, parts_of


class Extended(MirroredExtended):
    """The `tf.distribute` side of a strategy: its variables, and what `strategy.run` and `strategy.reduce` do."""

    def __init__(
        self, strategy: tf.distribute.Strategy, mesh: Mesh, cross_device_ops: Any = None, on_all: bool = False
    ):
        self.mesh = mesh
        self.replicas = tuple(map(mesh.device, mesh.replicas))
        ops = cross_device_ops or tf.distribute.ReductionToOneDevice()
        super().__init__(strategy, devices=list(self.replicas), cross_device_ops=ops)
        # variables of stages and ranks wait in host memory until a plan says where they belong
        self.has_copies = on_all
        self.new_variables_on = self.replicas if on_all else (HOST,)
        self.before_loading: Callable[[LogicalVariable], None] = lambda variable: None

    @property
    def strategy(self) -> tf.distribute.Strategy:
        """Whose this is."""
        return self._container_strategy()

    @contextlib.contextmanager
    def creating_on(self, device: str) -> Iterator[None]:
        """Inside, new variables are on this device alone."""
        before, self.new_variables_on = self.new_variables_on, (device,)
        try:
            yield
        finally:
            self.new_variables_on = before

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """Inside, one replica stands for all."""
        with self.strategy.scope(), LogicalReplica(self.strategy):
            yield

    def run_as_one(self, fn: Callable, *args: Any) -> Any:
        """`fn` in one replica that stands for all."""
        with self.as_one():
            return fn(*args)

    @property
    def is_one(self) -> bool:
        """Whether there is one replica, here."""
        return len(self.replicas) == 1 or isinstance(replica_of(self.strategy), LogicalReplica)

    @property
    def _num_replicas_in_sync(self):
        return 1 if self.is_one else len(self.replicas)

    def _use_merge_call(self):
        return not self.is_one

    def _create_variable(self, next_creator, **kwargs):
        if len(self.replicas) > 1 and kwargs.get("synchronization") == tf.VariableSynchronization.ON_READ:
            with tf.init_scope():
                return super()._create_variable(next_creator, **kwargs)
        if kwargs.get("synchronization") in (None, tf.VariableSynchronization.AUTO):
            kwargs["synchronization"] = tf.VariableSynchronization.ON_WRITE
        reference = kwargs.pop("colocate_with", None)
        follows = isinstance(reference, LogicalVariable)
        devices, sharding = reference.follow if follows else Home(self.new_variables_on, UNSHARDED)
        aggregation = kwargs.get("aggregation") or tf.VariableAggregation.NONE
        known = None if follows or devices != (HOST,) else _keras.initial_shape(kwargs["initial_value"])
        if known is not None:
            with tf.device(HOST):
                empty = empty_variable(known, kwargs["dtype"], kwargs["trainable"], kwargs["name"])
            return LogicalVariable(self.strategy, [empty], aggregation, initial=kwargs["initial_value"])
        copies, shape = [], None
        with tf.init_scope():
            if len(devices) > 1 and callable(kwargs["initial_value"]):
                with tf.device(HOST):
                    kwargs["initial_value"] = kwargs["initial_value"]()  # once: the copies begin alike
            if len(devices) > 1 and follows:
                with tf.device(HOST):
                    whole = tf.convert_to_tensor(kwargs["initial_value"])
                    (devices, sharding), shape = reference.follow.of(whole.shape == reference.shape), whole.shape
                    parts = parts_of(whole, sharding, len(devices))
            for number, device in enumerate(devices):
                with tf.device(device):
                    if copies:
                        kwargs["name"] = f"{copies[0].name.split(':')[0]}/replica_{number}/"
                    if sharding.divides:
                        kwargs.update(initial_value=parts[number], shape=None)
                    copies.append(next_creator(**kwargs))
            variable = LogicalVariable(self.strategy, copies, aggregation, None, sharding, shape)
        if follows:
            reference.followed_by(variable)
        return variable

    @contextlib.contextmanager
    def colocate_vars_with(self, colocate_with_variable: tf.Variable) -> Iterator[None]:
        """Inside, new variables live where this one does and move along; needs no scope, as an optimizer has none."""
        with self.strategy.planning(), super().colocate_vars_with(colocate_with_variable):
            yield

    def _validate_colocate_with_variable(self, colocate_with_variable):
        """Any variable will do."""

    def _call_for_each_replica(self, fn, args, kwargs):
        if not self.is_one:
            with running_replicas():
                return super()._call_for_each_replica(fn, args, kwargs)
        with LogicalReplica(self.strategy):
            return fn(*args, **kwargs)

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        return value if self.is_one else super()._replica_ctx_all_reduce(reduce_op, value, options)

    def _reduce_to(self, reduce_op, value, destinations, options):
        return value if self.is_one else super()._reduce_to(reduce_op, value, places(destinations), options)

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        if self.is_one:
            return [value for value, _ in value_destination_pairs]
        pairs = [(value, places(destinations)) for value, destinations in value_destination_pairs]
        return super()._batch_reduce_to(reduce_op, pairs, options)

    def _broadcast_to(self, tensor, destinations):
        return tensor  # an update on a device fetches it there

    def _gather_to_implementation(self, value, destinations, axis, options):
        return value if self.is_one else super()._gather_to_implementation(value, destinations, axis, options)

    def _update(self, var, fn, args, kwargs, group):
        replica = replica_of(self.strategy)
        if isinstance(replica, LogicalReplica) and replica.copy is not None:
            piece = var._get() if isinstance(var, LogicalVariable) else var
            with tf.device(piece.device) if piece.device else contextlib.nullcontext():
                return fn(piece, *args, **kwargs)
        if isinstance(var, LogicalVariable) and (self.mesh.tensor > 1 or var.is_divided):
            return fn(var, *args, **kwargs)  # all ranks as one: it reads and writes the whole value
        copies = var.copies if isinstance(var, LogicalVariable) else getattr(var, "values", (var,))
        updates = []
        for number, copy in enumerate(copies):
            with tf.device(copy.device), LogicalReplica(self.strategy, number):
                updates.append(fn(copy, *select_replica(number, args), **select_replica(number, kwargs)))
        return updates[0] if self.is_one else update_regroup(self, updates, group)

    def _replica_ctx_update(self, var, fn, args, kwargs, group):
        if self.is_one:
            return self._update(var, fn, args, kwargs, group)
        return super()._replica_ctx_update(var, fn, args, kwargs, group)

    def _experimental_distribute_dataset(self, dataset, options):
        return dataset if self.is_one else super()._experimental_distribute_dataset(dataset, options)

    def _local_results(self, value):
        return (value,) if self.is_one else super()._local_results(value)


def places(destinations: Any) -> Any:
    """Where a sum should go; of a variable, where its copies are, for TensorFlow would ask for its value."""
    return PerReplica(destinations.copies) if isinstance(destinations, LogicalVariable) else destinations

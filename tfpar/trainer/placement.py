"""From a model and a first batch to an engine, with every variable on its device."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Set
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_parts
from tfpar.engine.description import Description
from tfpar.engine.engine import Engine
from tfpar.errors import Caught, ScopeError, TfparError
from tfpar.planning.plan import Plan
from tfpar.planning.sharding import UNSHARDED
from tfpar.trainer.planner import planned
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import HOST, Home

FEW_BYTES = 2**28  # of weights, which may as well wait in host memory


def prepared(
    strategy: Description, model: keras.Model, data: Any, rows: int, before: Plan | None, global_batch: Set[str]
) -> Engine:
    """Create what Keras would create in its first step but for slots, plan, and move every variable to its device.

    Args:
        strategy: as for `planned`; gives `zero` and `offload` too.
        data, rows, before, global_batch: as for `planned`.
    """
    _keras.build(model, data)
    engine = planned(strategy, model, data, rows, before, global_batch)
    place_variables(strategy, engine)
    return engine


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits: a model of which some variables have moved could not be used again."""
    before, caught = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *signal: caught.append(signal))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(*caught[0])


def place_before_loading(strategy: Description, model: keras.Model, rows: int):
    """Give the weights of a model that have no values yet a place, so that what is loaded goes there at once.

    Not for good: another model of which this one is a part may have better ones.

    Args:
        rows: samples of a batch, as they are expected.
    """
    waiting = [v for v in map(_keras.stored, model.variables) if isinstance(v, LogicalVariable) and v.is_waiting]
    if strategy.mesh.size == 1 or sum(v.shape.num_elements() * v.dtype.size for v in waiting) < FEW_BYTES:
        return
    symbols = _keras_parts.input_symbols(model)
    if symbols is None:  # it takes what its `call` takes, which is not known yet
        return
    try:
        engine = planned(strategy, model, (symbols, None, None), rows)
    except TfparError as error:  # it will be said when the model is used
        Caught.log.debug("planning %s before its weights are loaded failed", model.name, exc_info=error)
        return
    for v, variable in enumerate(engine.graph.variables):
        move(variable, *homes(strategy, engine, v), settle=False)


@uninterrupted()
def place_variables(strategy: Description, engine: Engine):
    """Move the model's variables, its metrics' and its optimizer's, if that has some."""
    model, plan = engine.model, engine.plan
    for v, variable in enumerate(engine.graph.variables):
        check_scope(strategy, variable)
        move(variable, *homes(strategy, engine, v))
    if model.compiled:
        for variable in model.metrics_variables:
            move(variable, Home((plan.device(plan.partition.stages - 1),), UNSHARDED))
        if model.optimizer is not None:
            _keras.give_strategy(model.optimizer, strategy)
            if model.optimizer.built:
                place_optimizer(strategy, engine)


@uninterrupted()
def build_optimizer(strategy: Description, engine: Engine):
    """Create the variables of the model's optimizer where they belong, if there are none, outside of any function."""
    model = engine.model
    if model.compiled and model.optimizer is not None and not model.optimizer.built:
        with strategy.planning():
            model.optimizer.build(model.trainable_variables)
            place_optimizer(strategy, engine)


def place_optimizer(strategy: Description, engine: Engine):
    """Move the variables of the model's optimizer."""
    optimizer, mesh = engine.model.optimizer, strategy.mesh
    if mesh.size > 1 or strategy.offload:
        of = {id(slot): weight for slot, weight in _keras_parts.slots_of(optimizer)}
        home = Home((HOST,) * mesh.size if strategy.offload else engine.plan.mesh.devices, UNSHARDED)
        for variable in optimizer.variables:
            replicate(strategy, variable, of.get(id(variable)))
            if id(variable) not in of:
                move(variable, home)


def homes(strategy: Description, engine: Engine, v: int) -> tuple[Home, Home]:
    """Where a variable goes, and where an optimizer's slots for it do: in parts over replicas, as ZeRO has them."""
    mesh, stage = strategy.mesh, engine.plan.partition.home(v)
    lanes = tuple(engine.plan.device(stage, lane) for lane in mesh.lanes)
    slots = (HOST,) * len(lanes) if strategy.offload else lanes
    return Home(lanes, engine.plan.sharding(v)), Home(slots, engine.plan.sharding(v, zero=1))


def build_losses(strategy: Description, engine: Engine, data: Any):
    """Create the variables of compiled losses and metrics on the last stage, outside of any function."""
    model, plan = engine.model, engine.plan
    if not model.compiled or _keras.is_compiled_built(model):
        return
    _, y, _ = _keras.unpack_x_y_sample_weight(data)
    overridden = _keras.overrides(model, "train_step", "test_step", *_keras.LOSSES)
    if y is not None and not overridden:
        with strategy.planning(), strategy.extended.creating_on(plan.device(plan.partition.stages - 1)):
            _keras.build(model, data, engine.graph.output_symbols)


def replicate(strategy: Description, variable: keras.Variable, weight: keras.Variable | None):
    """Take over a variable of an optimizer, a slot of a weight or not, that does not belong here or there yet."""
    stored, of = _keras.stored(variable), None if weight is None else _keras.stored(weight)
    if isinstance(stored, LogicalVariable):
        if isinstance(of, LogicalVariable) and all(follower is not stored for follower in of.followers):
            of.followed_by(stored)
            stored.place(*of.follow.of(stored.shape == of.shape))
        return
    with strategy.planning(), contextlib.ExitStack() as stack:
        if isinstance(of, LogicalVariable):
            stack.enter_context(strategy.extended.colocate_vars_with(of))
        value = stored.read_value()
        _keras.set_value(variable, tf.Variable(value, trainable=False, name=variable.name))


def move(variable: keras.Variable, home: Home, follow: Home | None = None, settle: bool = True):
    """Place a variable that has no place for good, and later what follows it."""
    stored = _keras.stored(variable)
    if isinstance(stored, LogicalVariable) and (not stored.is_settled or len(stored.copies) == 1):
        stored.place(*home, follow, settle)


def check_scope(strategy: Description, variable: keras.Variable):
    """Refuse a variable that was created elsewhere: it would stay there.

    Raises:
        ScopeError: says which, and what to write.
    """
    ours = (
        isinstance(_keras.stored(variable), LogicalVariable) and _keras.stored(variable).distribute_strategy is strategy
    )
    if not ours and not _keras.is_seed(variable):
        raise ScopeError(
            f"{variable.path} was created outside of this strategy's scope. Create the layers inside:\n"
            "    with strategy.scope():\n        model = ...\n"
            "and call enable_lora and the like, which create weights, in the scope too"
        )

"""Where a step failed: its forward passes are run again, action by action and then layer by layer."""

# s: segment of a stage, m: micro-batch of a lane, i: operation

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfpar.engine import micro_batch
from tfpar.engine.engine import MicroBatch
from tfpar.engine.executor import Execution, scope, several
from tfpar.engine.program import Edge, Program, selected
from tfpar.engine.reading import value_of
from tfpar.errors import Caught, StageError
from tfpar.planning.mesh import AXES
from tfpar.planning.schedule import Kind
from tfpar.trainer.training_step import NOT_FINITE, TrainingStep

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks

ACTION = re.compile(  # as `executor.scope` names it
    r"(?P<lane>(?:[a-z]+\d+/)*?)stage(?P<stage>\d+)/(?:segment(?P<segment>\d+)/)?mb(?P<mb>\d+)/(?P<kind>\w+)"
)
MEMBER = re.compile(r"([a-z]+)(\d+)/")


def explained(
    error: tf.errors.OpError, hooks: "KerasHooks", data: micro_batch.Batch, parts: micro_batch.Parts, training: bool
) -> Exception:
    """The error of a step as one that says where it happened, as far as that can be found out.

    Args:
        hooks: the `KerasHooks` of the model.
        data: what the step was given.
    """
    finite = NOT_FINITE in error.message
    where, cause = of_weights(hooks) if finite else None, error
    with hooks.strategy.extended.as_one():
        try:
            step = TrainingStep(hooks, data, parts, training)
            run = step.execution(step.is_scheduled(), alone=True)
            if where is None:
                where, found = located(run, hooks.engine.schedule(hooks.strategy, parts, run.route), finite)
                if isinstance(error, tf.errors.CancelledError):  # that of a device which another's error stopped
                    cause = found or error
        except Exception as again:  # it cannot be run again
            Caught.log.debug("a step that failed could not be repeated", exc_info=again)
            where = None
    if finite:
        return StageError(f"{NOT_FINITE}; it comes from {where or 'the loss itself: what the model makes is finite'}")
    return StageError(f"{where or at_node(error, hooks.engine, training)} failed: {reason(cause)}")


def located(run: Execution, schedule: Any, finite: bool) -> tuple[str | None, Exception | None]:
    """The first action that fails, or with `finite` makes something that is not finite, the layer in it, and how."""
    for (s, kind, m), emit in run.actions(schedule, Kind.FORWARD):
        with tf.device(run.device(s, m.lane)):
            again = None
            try:
                emit()
                made = [run.values[n][t] for n in run.together(s, m) for t in run.partition.edges(s)]
                wrong = finite and not all(is_finite(edge) for edge in made)
            except Exception as error:
                Caught.theirs(error, scope(run, s, kind, m))
                wrong, again = True, error
            if wrong:
                return described(run, s, m, layer(run, s, m, finite)), again
    return None, None


def layer(run: Execution, s: int, m: MicroBatch, finite: bool) -> str:
    """The first layer of a segment that fails, or makes something that is not finite; all of them, if none does."""
    ops, values = run.graph.ops, dict(run.values[m])
    for i in run.partition.ops(s) if s not in run.route.collectives else ():
        program = Program(
            run.route.graph, [i], ops[i].outputs, run.engine.model, run.training, False, True
        )  # fmt: skip
        try:
            variables = [value_of(run, s, m, v) for v in program.variables]
            found = program(variables, selected(values, ops[i].inputs)).edges
        except Exception as error:
            Caught.theirs(error, ops[i].name)
            return ops[i].name
        if finite and not all(is_finite(edge) for edge in found.values()):
            return ops[i].name
        values.update(found)
    return ", ".join(run.route.names(s))


def described(run: Execution, s: int, m: MicroBatch, name: str) -> str:
    """An action in words."""
    lane = {AXES[axis].member: getattr(m.lane, axis) for axis in several(run.lanes)}
    where = in_words({"stage": run.route.stages[s], "micro-batch": m.micro_batch, **lane})
    return f"{where} on {run.device(s, m.lane)}, in {name}"


def in_words(places: dict[str, Any]) -> str:
    """Where an action belongs, in words; `None` for what there is one of."""
    return ", ".join(f"{name} {number}" for name, number in places.items() if number is not None)


def is_finite(edge: Edge) -> bool:
    """Whether a tensor has no NaN and no infinity, or is of another kind."""
    value = edge.value
    return not getattr(value, "dtype", tf.int32).is_floating or bool(tf.reduce_all(tf.math.is_finite(value)))


def of_weights(hooks: "KerasHooks") -> str | None:
    """The first weight that was not finite before the step."""
    for variable in hooks.model.weights:
        value = variable.numpy()
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            return f"{variable.path}, which was not finite before this step"
    return None


def reason(error: Exception) -> str:
    """What TensorFlow says, in one line."""
    message = str(getattr(error, "message", error))
    lines = [line.strip() for line in message.split("[[{{node")[0].splitlines() if line.strip()]
    return f"{type(error).__name__}: {re.sub(r'^.*?[A-Z_]+: +', '', lines[-1])}" if lines else type(error).__name__


def at_node(error: tf.errors.OpError, engine: Any, training: bool) -> str:
    """The action or the layer that TensorFlow names, and the device that it ran out of memory on."""
    node, device = re.search(r"{{node (.*?)}}", error.message), re.search(r"device:((?:GPU|CPU):\d+)", error.message)
    on = f" on {device[1]}" if device else ""
    if node and (action := ACTION.match(node[1])):
        lane = dict(MEMBER.findall(action["lane"]))
        where = in_words({"stage": action["stage"], "micro-batch": action["mb"], **lane})
        names = engine.route(training).names(int(action["segment"] or action["stage"]))
        return f"{where}{on}, {action['kind'].replace('_', ' and ')} in {', '.join(names)}"
    unknown, cut = "the backward pass or the update", engine.plan.partition
    if node:
        ops = {op.layer.split("/")[-1]: (stage, op) for op, stage in zip(cut.graph.ops, cut.stage_of, strict=True)}
        name = node[1].split("/")[0]
        stage, op = ops.get(name) or ops.get(re.sub(r"_\d+$", "", name), (None, None))
        return f"{unknown} ({f'stage {stage}, {op.name}' if op else f'operation {node[1]}'}{on})"
    return f"{unknown}{on}"

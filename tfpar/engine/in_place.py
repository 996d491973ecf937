"""Gradients of micro-batches, added up by the programs that find them: XLA writes the sums in place."""

# s: segment, m: micro-batch of a lane, v: variable of the graph

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from tfpar.comm.gradients import add
from tfpar.compat._tf import ResourceVariable, awaited, independent
from tfpar.engine.engine import MicroBatch
from tfpar.engine.program import Program

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


class Sums(NamedTuple):
    """Where the gradients of a segment are added up on a lane.

    Args:
        of: a `tf.Variable` for each variable of the program that has one.
        first: whether this is the first micro-batch, whose gradient takes the place of what is there.
    """

    of: dict[int, tf.Variable]
    first: tf.Tensor | None


def sums_for(run: "Execution", s: int, m: MicroBatch, program: Program, variables: Sequence[Any]) -> Sums:
    """Where to add up the gradients of a micro-batch; nowhere if that is not for a compiled program to do.

    Args:
        variables: what the program is called with. Those of which rows are looked up have sparse gradients.
    """
    several = run.parts.micro_batches > 1 and not run.takes_turns
    wanted = several and run.engine.jit_compile and run.route.loss and not run.scatters
    found = {}
    for v, value in zip(program.variables, variables, strict=True) if wanted else ():
        variable = run.engine.graph.variables[v]
        if v in run.engine.trainable and not run.route.rows(s, v, variable):
            key = s, m.lane, v
            if key not in run.engine.sums_in_place:
                with tf.init_scope(), tf.device(run.device(s, m.lane)):
                    zeros = tf.zeros(value.shape, variable.dtype)
                    run.engine.sums_in_place[key] = ResourceVariable(zeros, trainable=False)
            found[v] = run.engine.sums_in_place[key]
    return Sums(found, tf.constant((s, m.lane) not in run.added) if found else None)


def added(
    program: Program, found: dict[int, Any], sums: dict[int, tf.Variable], first: tf.Tensor
) -> tuple[dict[int, Any], tf.Tensor | None]:  # fmt: skip
    """In a program: add gradients to these sums; returns the others, and what is there once that is done."""
    dense = {v: sums[v] for v, gradient in found.items() if v in sums and isinstance(gradient, tf.Tensor)}
    for v, total in dense.items():
        gradient = tf.cast(found[v], total.dtype)
        total.assign(tf.where(first, gradient, total + gradient))
    program.added.update(dense)
    return {v: x for v, x in found.items() if v not in dense}, tf.zeros([]) if sums else None


def note(run: "Execution", s: int, m: MicroBatch, program: Program, sums: Sums, done: tf.Tensor | None):
    """Keep in mind what was added up, and when that is done."""
    if done is not None:
        run.added[s, m.lane] = {v: total for v, total in sums.of.items() if v in program.added}, done
        independent([done])


def read(run: "Execution"):
    """Count the sums, once all micro-batches are through, among the gradients of a run."""
    for (s, lane), (totals, done) in run.added.items():
        with tf.device(run.device(s, lane)), tf.control_dependencies([awaited(done)]):
            for v, total in totals.items():
                found, others = total.read_value(), run.gradients.get((s, lane, v))
                run.gradients[s, lane, v] = found if others is None else add(others, found)

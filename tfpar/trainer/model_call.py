"""A model's call, run by the engine inside a step that is not scheduled: Keras' own, or the user's."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from keras import tree

from tfpar.comm.collectives import on_each
from tfpar.comm.gradients import SharedRows, folded, is_sparse, of_parts, plain, sum_of
from tfpar.compat import _keras, _keras_calls
from tfpar.compat._tf import record_gradient, recorded, tape_watches, unrecorded
from tfpar.engine import batch_results, micro_batch
from tfpar.engine.batch_results import structured
from tfpar.engine.combination import shares_rows
from tfpar.engine.device_order import DeviceOrder
from tfpar.engine.engine import copy_of, device_of, layout_of, read
from tfpar.engine.executor import Execution
from tfpar.engine.program import Component, Edge
from tfpar.errors import ModelError
from tfpar.planning.mesh import FIRST, Coordinate
from tfpar.planning.schedule import Kind
from tfpar.planning.sharding import REPLICATED

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks


def call(
    hooks: "KerasHooks",
    parts: micro_batch.Parts,
    likely: int,
    losses: list[tf.Tensor],
    is_open: bool,
    inputs: Any = None,
    *others: Any,
    training: bool | None = None,
    mask: Any = None,
    **more: Any,
) -> Any:
    """What the model makes of a batch; one that takes more than one input, or is in a program, runs as it is.

    Args:
        hooks: of the model; gives `model`, `strategy` and `prepared(data, rows, learns)`.
        parts: how to divide the batch.
        likely: samples that the model is planned for, where it gets an unknown number of them.
        losses: is set to what the step reads as `model.losses`.
        is_open: whether the data leaves the number of samples open. Keras weights the reported losses of batches of a
            known size only, so that outputs then must not have one, as they would in compiled programs.
    """
    model, training = hooks.model, _keras_calls.told() if training is None else training
    if _keras.in_program() or others or more:
        args = others if inputs is None else (inputs, *others)
        given = more if mask is None else {**more, "mask": mask}
        return _keras_calls.own_call(model, *args, training=training, **given)
    rows = micro_batch.count(inputs)
    engine = hooks.prepared((inputs,), rows if isinstance(rows, int) else likely, learns=training is not False)
    flat = _keras.graph_inputs(model, inputs)
    parts = parts.fit(rows) if isinstance(rows, int) else parts
    masks = [None] * len(flat) if mask is None else tree.flatten(mask)
    edges = [Edge(x, m) for x, m in zip(flat, masks, strict=True)]
    route = engine.route(training)
    schedule = engine.schedule(hooks.strategy, parts, route)
    run = forward_with_pullback if hooks.strategy.mesh.stage == hooks.strategy.mesh.size > 1 else forward_on_tape
    weights = micro_batch.shares([stop - start for start, stop in pairwise(micro_batch.bounds(rows, parts.count))])
    finished, outputs, added = run(engine, schedule, parts, edges, weights, training, route)
    batch_results.write_state(finished)
    if added:
        losses[:] = _keras.added_losses(model, list(added.values()))
    if is_open and isinstance(rows, int):
        outputs = {
            t: Edge(of_open_size(e.value), e.mask, of_open_size(e.logits)) if finished.route.graph.is_batched(t) else e
            for t, e in outputs.items()
        }
    return structured(finished.route.graph, outputs)


def of_open_size(value: Any) -> Any:
    """A tensor with as many rows as before, which TensorFlow does not know while it traces; a sparse one as it is."""
    if not isinstance(value, tf.Tensor) or not value.shape.rank:
        return value
    return tf.compat.v1.placeholder_with_default(value, [None, *value.shape[1:]])


def forward_on_tape(
    engine: Any, schedule: Any, parts: micro_batch.Parts, edges: list[Edge], weights: Any, training: Any, route: Any
):
    """All parts forward, each operation recorded: every tape can go back, as often as it likes."""
    sources: dict[int, tf.Tensor] = {}
    copies: dict[tuple[int, int], dict[Coordinate, tf.Tensor]] = {}

    def copied(s: int, v: int) -> dict[Coordinate, tf.Tensor]:
        variable = engine.graph.variables[v]
        if v not in sources:
            with tf.device(device_of(variable)):
                sources[v] = tf.convert_to_tensor(copy_of(variable))
        lanes = engine.mesh.lanes
        values = on_each([device_of(variable, lane) for lane in lanes], lambda n: read(variable, lanes[n]))
        # the copies are one source
        found = recorded(values, [sources[v]], lambda *found: [of_lanes(run, s, v, found)])
        return dict(zip(lanes, found, strict=True))

    def value(s: int, v: int, lane: Coordinate) -> tf.Tensor:
        if (s, v) not in copies:
            copies[s, v] = copied(s, v)
        return copies[s, v][lane]

    run = Execution(engine, parts, micro_batch.split(edges, parts.count), weights, training, read=value, route=route)
    run.run(schedule, Kind.FORWARD)
    return run, batch_results.outputs(run), batch_results.added_losses(run)


def of_lanes(run: Execution, s: int, v: int, found: Sequence[Any]) -> Any:
    """A variable's gradient in a segment from those of all lanes, of which each has the part of its own outputs."""
    variable, mesh = run.engine.graph.variables[v], run.mesh
    layout = layout_of(variable)
    found = [SharedRows(g.values, g.indices, g.dense_shape) if isinstance(g, tf.IndexedSlices) else g for g in found]
    sparse = any(map(is_sparse, found))
    replicas = []
    for replica in mesh.replicas:
        of_replica = [g for lane, g in zip(mesh.lanes, found, strict=True) if lane.replica == replica]
        of_ranks = [g for g in of_replica if is_sparse(g) or not sparse]  # a tape fills gaps with zeros
        if not of_ranks:
            continue
        if layout != REPLICATED:
            replicas.append(of_parts(list(map(plain, of_ranks)), layout, variable.shape))
        else:  # all look up the same rows, unless each has a part of the samples' dims
            replicas.append(plain(sum_of(map(plain, of_ranks) if v in run.engine.partial else of_ranks)))
    if sparse and shares_rows(run, s, v, replicas[0]):
        return plain(sum_of(folded(g, run.parts.micro_batches) for g in replicas))
    return sum_of(replicas)


def forward_with_pullback(
    engine: Any, schedule: Any, parts: micro_batch.Parts, edges: list[Edge], weights: Any, training: Any, route: Any
):
    """All parts forward; a tape that asks for the gradient gets it from the stages, each on its device."""
    graph = engine.graph.graph
    flat = [e.value for e in edges]
    hidden = [e._replace(value=None if e.value is None else unrecorded(lambda: e.value)) for e in edges]  # noqa: B023
    trainable = [(v, device_of(engine.graph.variables[v])) for v in sorted(engine.trainable)]
    sources = []
    for v, device in trainable:
        with tf.device(device):
            sources.append(tf.convert_to_tensor(_keras.stored(engine.graph.variables[v])))
    inside = [t for t, x in zip(graph.inputs, flat, strict=True) if x is not None and tape_watches([x])]
    differentiate = bool(inside) or tape_watches(sources)
    run = Execution(
        engine, parts, micro_batch.split(hidden, parts.count), weights, training,
        differentiate=differentiate, watch_inputs=bool(inside), route=route,
    )  # fmt: skip
    run.run(schedule, Kind.FORWARD)
    outputs, added = batch_results.outputs(run), batch_results.added_losses(run)
    if not differentiate:
        return run, outputs, added
    sources += [x for t, x in zip(graph.inputs, flat, strict=True) if t in inside]
    keys = [Component(t) for t in outputs] + [
        Component(t, "logits") for t, e in outputs.items() if e.logits is not None
    ]
    targets = [*(key.of(outputs) for key in keys), *added.values()]

    def backward(*cotangents: tf.Tensor | None) -> list[Any]:
        back = copy.copy(run)  # the same forward passes, for another backward pass
        back.cotangents, back.gradients, back.order = {m: {} for m in run.all}, {}, DeviceOrder()
        back.pullbacks = dict(run.pullbacks)
        for key, cotangent in zip(keys, cotangents[: len(keys)], strict=True):
            for m, (piece,) in zip(back.firsts, micro_batch.split([cotangent], parts.count), strict=True):
                back.cotangents[m][key] = [piece]
        back.loss_cotangent = dict(zip(added, cotangents[len(keys) :], strict=True))
        back.run(schedule, Kind.BACKWARD)
        of = batch_results.gradients(back)
        found = [
            *(plain(batch_results.summed(back, v, FIRST, [g[FIRST] for g in of.get(v, ())])) for v, _ in trainable),
            *(batch_results.input_gradient(back, t) for t in inside),
        ]
        dense = [n for n, g in enumerate(found) if isinstance(g, tf.Tensor)]
        given = [*sources, *(c for c in cotangents if c is not None)]
        for n, g in zip(dense, record_gradient([found[n] for n in dense], given, refused), strict=True):
            found[n] = g
        return found

    def refused(*_):
        raise ModelError(
            f"a gradient of a gradient of {engine.model.name}: stages are differentiated once. Build this model "
            "outside of the strategy's scope"
        )

    copies = record_gradient(targets, sources, backward)
    for (t, field), y in zip(keys, copies, strict=False):
        outputs[t] = outputs[t]._replace(**{field: y})
    return run, outputs, dict(zip(added, copies[len(keys) :], strict=True))

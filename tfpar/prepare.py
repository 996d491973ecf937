"""From a model and a first batch to an engine: build, open, cut, place, check."""

import warnings
from collections.abc import Sequence, Set
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar import _keras, _moments, batch
from tfpar.cost import HARDWARE, Hardware
from tfpar.crossentropy import crossentropy_of
from tfpar.divide import divided
from tfpar.engine import Engine, Route, layout_of
from tfpar.errors import ModelError, ScopeError
from tfpar.layout import REPLICATED, Layout
from tfpar.local import LocalGraph, segments
from tfpar.model import KerasGraph, graph_from, one_call
from tfpar.opening import opened, with_opened_layers
from tfpar.partition import Partition, partition
from tfpar.plan import Plan
from tfpar.probe import Probe, check_independence, mixing, sample
from tfpar.schedule import in_turn
from tfpar.variables import HOST, LogicalVariable
from tfpar.whole import replica_segments, with_shared_statistics
from tfpar.written import layouts_of

SAMPLES = 3  # of the first batch, with which an opened model is checked


def prepared(strategy: Any, model: keras.Model, data: Any, rows: int, before: Plan | None, whole: Set[str]) -> Engine:
    """Create all that Keras would create in its first step, plan, and move every variable to its device.

    Args:
        strategy: gives `mesh`, `parts`, `placement`, `batch_norm`, `buckets` and `schedule(micro_batches)`.
        data: a batch, `(x, y, sample_weight)`.
        rows: its samples.
        before: the plan that the model had; its variables are there already.
        whole: names of operations that were found to need the whole batch.
    """
    x, _, _ = _keras.unpack_x_y_sample_weight(data)
    _keras.build(model, data)
    extra = {}
    if strategy.mesh.tensor > 1:
        plan, training, inference, extra = ranked(strategy, model, data, rows)
    elif strategy.mesh.data > 1:
        plan, training, inference = replicated(strategy, model, x, rows, whole)
    else:
        graph, in_inference = graphs_of(model, x, strategy.schedule(strategy.parts.fit(rows).micro_batches).stages)
        plan = planned(strategy, graph, rows, before)
        training, inference = Route(graph, plan.partition), Route(in_inference or graph, plan.partition)
        if strategy.parts.count > 1:
            check_outputs(graph)
            check_stateless(model)
            check_independence(graph, training.probe)
    engine = Engine(plan, model, training, inference, bool(model.jit_compile), model.run_eagerly, **extra)
    place(strategy, engine)
    return engine


def replicated(strategy: Any, model: keras.Model, x: Any, rows: int, whole: Set[str]) -> tuple[Plan, Route, Route]:
    """The plan and the ways through a model of which each replica has a copy: what needs the whole batch gets it."""
    graphs = replica_graphs(model, x)
    distinct = {id(graph): graph for graph in graphs}  # mostly one: it is probed once
    found = {key: {graph.graph.ops[i].name for i in needs_whole(graph)} for key, graph in distinct.items()}
    ways = []
    for graph, training in zip(graphs, (True, False), strict=True):
        shares = training and strategy.batch_norm == "global"
        names = whole | found[id(graph)] | (hidden_normalizations(graph) if shares else set())
        names, shared = sharing_state(graph, names), frozenset()
        if shares:
            graph, shared = with_shared_statistics(graph, names)
        if training:
            warn_of(names)
        micro_rows = -(-rows // strategy.parts.fit(rows).count)
        buckets = strategy.buckets if training else 1
        ways.append(
            Route(graph, *replica_segments(graph.graph, names | shared, buckets, hardware(strategy), micro_rows))
        )
    cut, stages = ways[0].partition, ways[0].whole
    plan = Plan(cut, strategy.mesh, in_turn(cut.stages, 1), hardware(strategy), rows, whole=stages)
    return plan, *ways


def ranked(strategy: Any, model: keras.Model, data: Any, rows: int) -> tuple[Plan, Route, Route, dict]:
    """The plan and the ways through a model of which each rank has a part, and what the engine must know besides."""
    count, checked = strategy.mesh.tensor, set()
    x, y, _ = _keras.unpack_x_y_sample_weight(data)
    graphs = [with_opened_layers(g, t, checked) for g, t in zip(replica_graphs(model, x), (True, False), strict=True)]
    plain = graphs[0].graph
    asked = layouts_of(strategy.layout, plain.variables, [op.variables for op in plain.ops], count) or {}
    given = {id(graphs[0].variables[v]): layout for v, layout in asked.items()}
    given.update({id(v): layout_of(v) for v in graphs[0].variables if is_placed(v)})
    found = {}
    for graph in graphs:
        if id(graph) not in found:
            asked = {v: given[id(variable)] for v, variable in enumerate(graph.variables) if id(variable) in given}
            found[id(graph)] = divided(graph, count, hardware(strategy), strategy.sequence_parallel, asked)
            layouts = found[id(graph)][0].layouts
            given.update({id(v): layouts.get(n, REPLICATED) for n, v in enumerate(graph.variables)})
    training, inference = (route_of(local) for local, _ in (found[id(g)] for g in graphs))
    local, weights = found[id(graphs[0])]
    layouts = found[id(graphs[1])][0].layouts | local.layouts
    weights = tuple(
        w if v in local.layouts else o for v, (w, o) in enumerate(zip(weights, found[id(graphs[1])][1], strict=True))
    )  # fmt: skip
    loss = crossentropy_of(model, y) if model.compiled else None
    called = None
    if loss is not None:
        asked = {v: given[id(variable)] for v, variable in enumerate(graphs[0].variables)}
        local, _ = divided(graphs[0], count, hardware(strategy), strategy.sequence_parallel, asked, loss)
        if local.loss is not None:
            called = training
            training = route_of(local)
    plan = Plan(
        training.partition, strategy.mesh, in_turn(training.partition.stages, 1), hardware(strategy), rows,
        weights=weights, exchanges=local.exchanges,
    )  # fmt: skip
    extra = {"layouts": layouts, "partial": local.partial, "reduce": strategy.cross_device_ops, "called": called}
    return plan, training, inference, extra


def route_of(local: LocalGraph) -> Route:
    """The way of every rank."""
    return Route(local.graph, segments(local.graph), drawn=local.drawn, learned=local.learned, loss=local.loss)


def replica_graphs(model: keras.Model, x: Any) -> tuple[KerasGraph, KerasGraph]:
    """The model's graphs in training and inference; a model that cannot be opened is one operation."""
    if _keras.is_graph(model):
        return (graph_from(_keras.graph_of(model)),) * 2
    inputs = _keras.converted_inputs(model, tree.map_structure(few, x))
    try:
        with tf.device(HOST):
            training, inference = opened(model, inputs, True), opened(model, inputs, False)
        every = (*training.variables, *(v for v in inference.variables if all(v is not k for k in training.variables)))
        return training.over(every), inference.over(every)
    except ModelError:
        return (one_call(model, inputs),) * 2


def needs_whole(graph: KerasGraph) -> set[int]:
    """Operations that mix the samples of a batch, or keep something for each of them."""
    stateful = {i for i, call in enumerate(graph.calls) if any(map(is_stateful, _keras.layers_in(call.operation)))}
    return stateful | set(mixing(graph, Probe(graph)))


def sharing_state(graph: KerasGraph, names: Set[str]) -> Set[str]:
    """These operations, and those that change the same variables: a state is kept for the whole batch or for parts."""
    ops = graph.graph.ops
    state = {v for op in ops if op.name in names for v in op.variables if not graph.variables[v].trainable}
    return {*names, *(op.name for op in ops if state.intersection(op.variables))}


def hidden_normalizations(graph: KerasGraph) -> set[str]:
    """Operations that normalise batches somewhere inside, where the statistics cannot be taken out."""
    return {
        op.name
        for op, call in zip(graph.graph.ops, graph.calls, strict=True)
        if _moments.batch_normalizations(call.operation) and not _moments.is_batch_normalization(call.operation)
    }


def warn_of(names: Set[str]):
    """Say what will not be divided."""
    if names:
        warnings.warn(
            f"{', '.join(sorted(names))}: computed for the whole batch on one device, because what comes of a batch is "
            "not what comes of its parts. The numbers are right; this work is not divided",
            stacklevel=2,
        )


def hardware(strategy: Any) -> Hardware:
    """What the estimates of cost assume."""
    return HARDWARE["GPU" if strategy.mesh.on_gpus else "CPU"]


def planned(strategy: Any, graph: KerasGraph, rows: int, before: Plan | None = None) -> Plan:
    """The plan for batches of so many rows; a model that had a plan keeps its cut, its variables are already there."""
    schedule = strategy.schedule(strategy.parts.fit(rows).micro_batches)
    if before is not None and [op.name for op in before.partition.graph.ops] == [op.name for op in graph.graph.ops]:
        cut = Partition(graph.graph, before.partition.stage_of)
    else:
        micro_rows = -(-rows // schedule.micro_batches)
        cut = partition(graph.graph, schedule.stages, strategy.placement, hardware(strategy), micro_rows)
    return Plan(cut, strategy.mesh, schedule, hardware(strategy), rows)


def place(strategy: Any, engine: Engine):
    """Move the model's variables, its metrics' and its optimizer's, creating the latter where they belong."""
    model, plan = engine.model, engine.plan
    for v, variable in enumerate(engine.graph.variables):
        check_scope(strategy, variable)
        if strategy.mesh.tensor > 1:
            move(variable, plan.mesh.devices, engine.layouts.get(v, REPLICATED))
        else:
            move(variable, [plan.home(v)])
    if model.compiled:
        for variable in model.metrics_variables:
            move(variable, [plan.device(plan.partition.stages - 1)])
        if model.optimizer is not None:
            _keras.give_strategy(model.optimizer, strategy)
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            if strategy.mesh.data * strategy.mesh.tensor > 1:
                for variable in model.optimizer.variables:
                    replicate(strategy, variable)
                    if strategy.mesh.tensor > 1:
                        move(variable, plan.mesh.devices)


def build_losses(strategy: Any, engine: Engine, data: Any):
    """Create the variables of compiled losses and metrics on the last stage, outside of any function."""
    model, plan = engine.model, engine.plan
    if not model.compiled or _keras.is_compiled_built(model):
        return
    _, y, _ = _keras.unpack_x_y_sample_weight(data)
    overridden = _keras.overrides(model, "train_step", "test_step", "compute_loss", "_compute_loss")
    if y is not None and not overridden:
        with strategy.planning(), strategy.extended.creating_on(plan.device(plan.partition.stages - 1)):
            _keras.build(model, data, tree.map_structure(lambda t: engine.graph.symbols[t], engine.graph.outputs))


def replicate(strategy: Any, variable: keras.Variable):
    """Give each replica a copy of a variable of an optimizer that was made outside of the scope."""
    if not isinstance(_keras.stored(variable), LogicalVariable):
        with strategy.planning():
            _keras.set_value(
                variable, tf.Variable(_keras.stored(variable).read_value(), trainable=False, name=variable.name)
            )


def move(variable: keras.Variable, devices: Sequence[str], layout: Layout = REPLICATED):
    """Place a variable that is still waiting, as a copy or a part on each of these devices."""
    if isinstance(_keras.stored(variable), LogicalVariable) and len(_keras.stored(variable).copies) == 1:
        _keras.stored(variable).place(devices, layout)


def is_placed(variable: keras.Variable) -> bool:
    """Whether ranks have copies or parts of a variable already."""
    return isinstance(_keras.stored(variable), LogicalVariable) and len(_keras.stored(variable).copies) > 1


def check_scope(strategy: Any, variable: keras.Variable):
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
            "    with strategy.scope():\n        model = ..."
        )


def graphs_of(model: keras.Model, x: Any, stages: int) -> tuple[KerasGraph, KerasGraph | None]:
    """The model's graph, and one for inference if it calls its layers with other arguments there.

    Raises:
        ModelError: a subclassed model that cannot be opened.
    """
    if _keras.is_graph(model):
        return graph_from(_keras.graph_of(model)), None
    inputs = _keras.converted_inputs(model, tree.map_structure(few, x))
    if stages == 1:
        return one_call(model, inputs), None
    with tf.device(HOST):
        graph, inference = opened(model, inputs, True), opened(model, inputs, False)
    if graph.graph != inference.graph:
        raise ModelError(
            f"{type(model).__name__}.call runs other layers in training than in inference; tfpar cuts a model once. "
            "Let the layers decide by their own `training` argument"
        )
    return graph, inference


def few(array: Any) -> tf.Tensor:
    """The first samples of an array; random ones for a tensor that is only a symbol yet."""
    if isinstance(array, tf.Tensor) and not hasattr(array, "numpy"):
        return sample((None, *array.shape[1:]), array.dtype.name, np.random.default_rng(0))
    return batch.sliced(batch.tensor(array), 0, SAMPLES)


def check_stateless(model: keras.Model):
    """Check that no recurrent layer hands its state on from sample n of a batch to sample n of the next.

    Raises:
        ModelError: names the layer.
    """
    for layer in _keras.layers_in(model):
        if is_stateful(layer):
            raise ModelError(
                f"{layer.name} keeps a state for each sample of a batch (stateful=True), which micro-batches would mix "
                "up; use micro_batches=1 (LayerPlacementStrategy)"
            )


def is_stateful(layer: Any) -> bool:
    """Whether a layer hands its state on from sample n of a batch to sample n of the next."""
    return isinstance(layer, keras.layers.RNN) and layer.stateful


def check_outputs(graph: KerasGraph):
    """Check that the outputs of micro-batches can be put together.

    Raises:
        ModelError: an output without a batch dimension.
    """
    for t in graph.graph.outputs:
        if not graph.is_batched(t):
            raise ModelError(
                f"an output of shape {tuple(graph.symbols[t].shape)} has no batch dimension, so that of a batch does "
                "not follow from those of micro-batches; use micro_batches=1 (LayerPlacementStrategy)"
            )

"""From a model to its plan and the ways through it: open, cut, take out what needs the whole batch, divide."""

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar.comm.devices import each_gpu_is_one_device, inter_op_threads, largest_fused_head
from tfpar.compat import _keras, _keras_calls, _keras_hub, _moments
from tfpar.engine import micro_batch
from tfpar.engine.description import Description
from tfpar.engine.engine import Engine, ExecutionGraph, layout_of
from tfpar.engine.global_batch import with_global_batch, with_shared_statistics
from tfpar.errors import ModelError, user_level
from tfpar.graph.batch_probe import Probe
from tfpar.graph.inline_model import opened
from tfpar.graph.keras_graph import KerasGraph, graph_from, one_call
from tfpar.graph.mixing import check_independence, mixing
from tfpar.graph.samples import sample
from tfpar.planning.cost import HARDWARE, Hardware
from tfpar.planning.layout_map import layouts_of
from tfpar.planning.partition import Partition, balanced, partition, segmented
from tfpar.planning.plan import Plan, Weight
from tfpar.planning.schedule import Schedule
from tfpar.planning.sharding import REPLICATED
from tfpar.tensor_parallel.inline_layers import inline_layers
from tfpar.tensor_parallel.loss_parallel import CrossEntropy, crossentropy_of
from tfpar.tensor_parallel.parallelize import divided
from tfpar.tensor_parallel.rank_graph import RankGraph, exchanges, is_collective
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import HOST

SAMPLES = 3  # of the first batch, with which an opened model is checked


def planned(
    strategy: Description,
    model: keras.Model,
    data: Any,
    rows: int,
    before: Plan | None = None,
    global_batch: Set[str] = frozenset(),
) -> Engine:
    """The engine for a model that is built; its variables stay where they are.

    Args:
        strategy: gives `mesh`, `parts`, `placement`, `layout`, `sequence_parallel`, `batch_norm`, `buckets` and
            `schedule(micro_batches)`.
        data: a batch, `(x, y, sample_weight)`.
        rows: its samples.
        before: the plan that the model had; its variables are there already.
        global_batch: names of operations that were found to need the whole batch.
    """
    mesh, schedule = strategy.mesh, strategy.schedule(strategy.parts.fit(rows).micro_batches)
    replicas = mesh.count("samples")
    x, y, _ = _keras.unpack_x_y_sample_weight(data)
    graphs = graphs_of(model, x, schedule.stages, mesh.size)
    cut = cut_of(strategy, graphs[0], schedule, rows, before)
    if schedule.stages > 1:
        graphs = of_distinct(graphs, lambda graph: graph.in_stages(cut.stage_of))
    probes, closed = of_distinct(graphs, Probe), {}  # by operation, why it is not opened
    names = of_distinct(graphs, lambda graph: global_batch | batch_wide(strategy, graph))
    if replicas > 1 and strategy.batch_norm == "global":
        names[0] = names[0] | hidden_normalizations(graphs[0])
    if strategy.parts.micro_batches > 1:
        check_independence(graphs[0], probes[0])
    fused_head = largest_fused_head(mesh.devices) if model.jit_compile and not model.run_eagerly else 0
    if mesh.tensor > 1:
        ways = zip(graphs, told_in_steps(model), names, strict=True)
        with _keras_hub.fused(fused_head):
            graphs = [inline_layers(graph, training, closed, whole) for graph, training, whole in ways]
        probes = of_distinct(graphs, Probe)
    names = [sharing_state(graph, found) for graph, found in zip(graphs, names, strict=True)]
    warn_of(names[0])
    finals = [with_global_batch(graph, found) for graph, found in zip(graphs, names, strict=True)]
    if replicas > 1 and strategy.batch_norm == "global":
        finals[0] = with_shared_statistics(finals[0], names[0], replicas)
    shapes = [tuple(symbol.shape) for symbol in finals[0].symbols]
    between = {"exchanges": tuple(exchanges(finals[0], shapes))}
    if mesh.tensor > 1:
        loss = crossentropy_of(model, y) if model.compiled else None
        finals, between = between_ranks(strategy, finals, names, closed, loss)
    of = zip(finals, (*probes, probes[0]), (*names, names[0]), strict=False)  # with the loss, training comes twice
    training, inference, *with_loss = (route_of(strategy, *way, rows) for way in of)
    if strategy.parts.micro_batches > 1:
        check_outputs(graphs[0])
        check_stateless(model)
    plan = Plan(
        cut, mesh, schedule, hardware(strategy), rows, global_batch=tuple(sorted(names[0])),
        segments=training.partition.stages, zero=strategy.zero,
        weights=between.pop("weights", ()), exchanges=between.pop("exchanges", ()),
    )  # fmt: skip
    return Engine(
        plan, model, training, inference, bool(model.jit_compile), model.run_eagerly,
        loss_parallel=(loss, with_loss[0]) if with_loss else None,
        cross_device_ops=strategy.cross_device_ops, cut_because=cut_because(strategy, model),
        fused_head=fused_head, reduce_dtype=strategy.reduce_dtype, buckets=strategy.buckets, **between,
    )  # fmt: skip


def cut_because(strategy: Description, model: keras.Model) -> str | None:
    """Why programs end at collectives, whatever these are; `None` if they can hold them."""
    mesh = strategy.mesh
    if len(mesh.lanes) == 1:
        return "there is nothing to exchange"
    together = mesh.tensor > 1 and strategy.collectives == "inside" and strategy.parts.micro_batches == 2
    if mesh.stage > 1 or (strategy.parts.micro_batches > 1 and not together):
        why = "programs of several stages or micro-batches would meet others that exchange tensors at the same time"
        two = '; with collectives="inside", exactly two take turns in one'
        return why + two if mesh.stage == 1 < mesh.tensor else why
    if model.run_eagerly:
        return "the model runs eagerly"
    if strategy.collectives == "auto" and not (mesh.on_gpus and model.jit_compile and each_gpu_is_one_device()):
        return "only programs that XLA compiles, each for a GPU of its own, hold them"
    if model.jit_compile and inter_op_threads() <= len(mesh.lanes):
        few = f"{inter_op_threads()} inter-op threads for {len(mesh.lanes)} devices"
        return f"{few} are too few: programs would wait for each other; python -m tfpar run sets more"
    return 'collectives="between" was asked for' if strategy.collectives == "between" else None


def of_distinct(graphs: Sequence[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What `make` gives for each graph; if the same graph is there twice, it is asked once."""
    made = {key: make(graph) for key, graph in {id(graph): graph for graph in graphs}.items()}
    return [made[id(graph)] for graph in graphs]


def between_ranks(
    strategy: Description,
    graphs: Sequence[KerasGraph],
    names: Sequence[Set[str]],
    closed: Mapping[str, str],
    loss: CrossEntropy | None,
) -> tuple[list[RankGraph], dict[str, Any]]:
    """What each rank runs in training and inference, and with the loss if ranks find it together; what is divided."""
    count, plain = strategy.mesh.tensor, graphs[0].graph
    asked = layouts_of(strategy.layout, plain.variables, [op.variables for op in plain.ops], count) or {}
    given = {id(graphs[0].variables[v]): layout for v, layout in asked.items()}
    given.update({id(v): layout_of(v) for v in graphs[0].variables if is_placed(v)})

    def local(n: int, loss: CrossEntropy | None = None) -> tuple[RankGraph, tuple[Weight, ...]]:
        graph = graphs[n]
        asked = {v: given[id(variable)] for v, variable in enumerate(graph.variables) if id(variable) in given}
        sequence, undivided = strategy.sequence_parallel, names[n]
        found = divided(graph, count, hardware(strategy), sequence, asked, loss, undivided, closed)
        given.update({id(v): found[0].layouts.get(n, REPLICATED) for n, v in enumerate(graph.variables)})
        return found

    training, weights = local(0, loss)
    inference, others = (training, weights) if graphs[0] is graphs[1] else local(1)
    weights = tuple(w if v in training.layouts else o for v, (w, o) in enumerate(zip(weights, others, strict=True)))
    found = [training, inference, *([training.with_terms] if training.with_terms else [])]
    return found, {
        "weights": weights,
        "exchanges": found[-1].exchanges if len(found) > 2 else training.exchanges,
        "partial": training.partial,
    }


def route_of(
    strategy: Description, final: KerasGraph | RankGraph, probe: Probe, names: Set[str], rows: int
) -> ExecutionGraph:
    """The way through what was made of a graph, in segments: of a stage, of a bucket, alone where lanes meet."""
    known = {}
    if isinstance(final, RankGraph):
        known, final = {"drawn": final.drawn}, final.graph
    ops, micro_rows = final.graph.ops, -(-rows // strategy.parts.fit(rows).count)
    buckets = balanced(final.graph, min(strategy.buckets, len(ops)), hardware(strategy), micro_rows).stage_of
    alone = {i for i, call in enumerate(final.calls) if is_collective(call)}
    labels = [(op.stage, bucket, op.name in names) for op, bucket in zip(ops, buckets, strict=True)]
    cut = segmented(final.graph, labels, alone)
    global_batch = frozenset(cut.stage_of[i] for i, op in enumerate(ops) if op.name in names)
    return ExecutionGraph(final, cut, probe, global_batch, **known)


def graphs_of(model: keras.Model, x: Any, stages: int, devices: int) -> list[KerasGraph]:
    """The model's graphs in training and inference; a model that need not be opened, or cannot, is one operation.

    Raises:
        ModelError: a subclassed model that cannot be opened, and must be, to be cut into stages.
    """
    if _keras.is_graph(model):
        return [graph_from(_keras.graph_of(model))] * 2
    inputs = _keras.converted_inputs(model, tree.map_structure(few, x))
    if devices == 1:
        return [one_call(model, inputs)] * 2
    try:
        with tf.device(HOST):
            training, inference = (opened(model, inputs, told) for told in told_in_steps(model))
    except ModelError:
        if stages > 1:
            raise
        return [one_call(model, inputs)] * 2
    if stages == 1:
        every = (*training.variables, *(v for v in inference.variables if all(v is not k for k in training.variables)))
        return [training.over(every), inference.over(every)]
    if training.graph != inference.graph:
        raise ModelError(
            f"{type(model).__name__}.call runs other layers in training than in inference; tfpar cuts a model once. "
            "Let the layers decide by their own `training` argument"
        )
    return [training, inference]


def told_in_steps(model: keras.Model) -> tuple[bool | None, bool | None]:
    """What layers are told of training in a step that trains, and in others.

    Keras' steps tell nothing to a `call` that has no such argument; a user's `train_step` may.
    """
    tells = _keras_calls.training_argument(model, True) or _keras.overrides(model, "train_step")
    return (True, False) if tells else (None, None)


def cut_of(strategy: Description, graph: KerasGraph, schedule: Schedule, rows: int, before: Plan | None) -> Partition:
    """The cut into stages; a model that had a plan keeps its cut, its variables are already there."""
    if before is not None and [op.name for op in before.partition.graph.ops] == [op.name for op in graph.graph.ops]:
        return Partition(graph.graph, before.partition.stage_of)
    if schedule.stages == 1:
        return Partition(graph.graph, (0,) * len(graph.calls))
    micro_rows = -(-rows // strategy.parts.fit(rows).count)
    return partition(graph.graph, schedule.stages, strategy.placement, hardware(strategy), micro_rows)


def batch_wide(strategy: Description, graph: KerasGraph) -> set[str]:
    """Operations that mix the samples of a batch, or keep something for each: every replica computes all of it."""
    if strategy.mesh.count("samples") == 1 or strategy.parts.micro_batches > 1:
        return set()
    stateful = {i for i, call in enumerate(graph.calls) if any(map(is_stateful, _keras.layers_in(call.operation)))}
    return {graph.graph.ops[i].name for i in stateful | set(mixing(graph, Probe(graph)))}


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
            f"{', '.join(sorted(names))}: computed for the whole batch on every replica, because what comes of a batch "
            "is not what comes of its parts. The numbers are right; this work is not divided",
            stacklevel=user_level(),
        )


def hardware(strategy: Description) -> Hardware:
    """What the estimates of cost assume."""
    return HARDWARE["GPU" if strategy.mesh.on_gpus else "CPU"]


def is_placed(variable: keras.Variable) -> bool:
    """Whether lanes have copies or parts of a variable already, for good."""
    stored = _keras.stored(variable)
    return isinstance(stored, LogicalVariable) and stored.is_settled and len(stored.copies) > 1


def few(array: Any) -> tf.Tensor:
    """The first samples of an array; random ones for a tensor that is only a symbol yet."""
    if isinstance(array, keras.KerasTensor) or (isinstance(array, tf.Tensor) and not hasattr(array, "numpy")):
        kind = keras.backend.standardize_dtype(array.dtype)
        return sample((None, *array.shape[1:]), kind, np.random.default_rng(0))
    return micro_batch.sliced(micro_batch.tensor(array), 0, SAMPLES)


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

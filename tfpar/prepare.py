"""From a model and a first batch to an engine: build, open, cut, place, check."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar import _keras
from tfpar.cost import HARDWARE
from tfpar.engine import Engine
from tfpar.errors import ModelError, ScopeError
from tfpar.model import KerasGraph, graph_from, one_call, opened
from tfpar.partition import Partition, partition
from tfpar.plan import Plan
from tfpar.probe import check_independence, sample
from tfpar.variables import LogicalVariable

SAMPLES = 3  # of the first batch, with which an opened model is checked


def prepared(strategy: Any, model: keras.Model, data: Any, rows: int, before: Plan | None) -> Engine:
    """Create all that Keras would create in its first step, plan, and move every variable to its device.

    Args:
        strategy: gives `mesh`, `micro_batches`, `placement` and `schedule(micro_batches)`.
        data: a batch, `(x, y, sample_weight)`.
        rows: its samples.
        before: the plan that the model had; its variables are there already.
    """
    x, _, _ = _keras.unpack_x_y_sample_weight(data)
    _keras.build(model, data)
    graph, inference = graphs_of(model, x, strategy.schedule(min(strategy.micro_batches, rows)).stages)
    engine = Engine(
        planned(strategy, graph, rows, before), model, graph, inference, bool(model.jit_compile), model.run_eagerly
    )
    if strategy.micro_batches > 1:
        check_outputs(graph)
        check_stateless(model)
        check_independence(graph, engine.probe)
    place(strategy, engine)
    return engine


def planned(strategy: Any, graph: KerasGraph, rows: int, before: Plan | None = None) -> Plan:
    """The plan for batches of so many rows; a model that had a plan keeps its cut, its variables are already there."""
    hardware = HARDWARE["GPU" if all("GPU" in d for d in strategy.mesh.devices) else "CPU"]
    schedule = strategy.schedule(min(strategy.micro_batches, rows))
    if before is not None and [op.name for op in before.partition.graph.ops] == [op.name for op in graph.graph.ops]:
        cut = Partition(graph.graph, before.partition.stage_of)
    else:
        micro_rows = -(-rows // schedule.micro_batches)
        cut = partition(graph.graph, schedule.stages, strategy.placement, hardware, micro_rows)
    return Plan(cut, strategy.mesh, schedule, hardware, rows)


def place(strategy: Any, engine: Engine):
    """Move the model's variables, its metrics' and its optimizer's, creating the latter where they belong."""
    model, plan = engine.model, engine.plan
    for v, variable in enumerate(engine.graph.variables):
        check_scope(strategy, variable)
        move(variable, plan.home(v))
    if model.compiled:
        for variable in model.metrics_variables:
            move(variable, plan.device(plan.partition.stages - 1))
        if model.optimizer is not None:
            _keras.give_strategy(model.optimizer, strategy)
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)


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


def move(variable: keras.Variable, device: str):
    """Place a variable that is still waiting."""
    if isinstance(variable.value, LogicalVariable):
        variable.value.place(device)


def check_scope(strategy: Any, variable: keras.Variable):
    """Refuse a variable that was created elsewhere: it would stay there.

    Raises:
        ScopeError: says which, and what to write.
    """
    ours = isinstance(variable.value, LogicalVariable) and variable.value.distribute_strategy is strategy
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
    with tf.device("CPU:0"):
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
    return tf.convert_to_tensor(array[:SAMPLES])


def check_stateless(model: keras.Model):
    """Check that no recurrent layer hands its state on from sample n of a batch to sample n of the next.

    Raises:
        ModelError: names the layer.
    """
    for layer in _keras.layers_in(model):
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ModelError(
                f"{layer.name} keeps a state for each sample of a batch (stateful=True), which micro-batches would mix "
                "up; use micro_batches=1 (LayerPlacementStrategy)"
            )


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

"""Private names of Keras that models, layers and optimizers need. Checked against Keras 3.15.1."""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.backend.common.variables import AutocastScope
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses.loss import Loss, apply_mask
from keras.src.models.functional import Functional, operation_fn
from keras.src.models.sequential import Sequential
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight
from keras.src.trainers.trainer import Trainer, model_supports_jit

from tfpar.compat import _keras_hub

__all__ = ["get_keras_mask", "set_keras_mask", "unpack_x_y_sample_weight"]

# ---- models: construction, what of Keras they override, what Keras does before it calls them


def set_strategy(model: keras.Model, strategy: Any):
    """What the model takes for the strategy of its scope."""
    model._distribute_strategy = strategy


def set_functions(model: keras.Model, auto_jit: Callable, build: Callable):
    """What the model calls to choose whether to compile with XLA, and to be built by its first batch."""
    vars(model).update(_resolve_auto_jit_compile=auto_jit, _maybe_symbolic_build=build)


LOSSES = "compute_loss", "_compute_loss"  # the methods that find a model's loss


def overrides(model: Any, *methods: str) -> str | None:
    """The first of these methods of Keras' trainer that a model, or a class of models, replaces."""
    keras_own, found = {**vars(Trainer), **vars(TensorFlowTrainer)}, {m: getattr(model, m) for m in methods}
    return next((m for m, method in found.items() if getattr(method, "__func__", method) is not keras_own[m]), None)


def is_graph(model: Any) -> bool:
    """Whether calling this layer is running its graph of layers and nothing else."""
    return (
        graph_of(model) is not None
        and type(model).call in (Functional.call, Sequential.call)
        and _keras_hub.is_plain(type(model).__call__)
        and not model.supports_masking
        and model.activity_regularizer is None
        and model._remat_mode is None
        and model.dtype_policy.quantization_mode is None
    )


def graph_of(model: Any) -> Functional | None:
    """The Functional model that a model is, or a Sequential one has once it has seen an input; `None` of others."""
    if isinstance(model, Sequential):
        return model._functional
    return model if isinstance(model, Functional) else None


def output_structure(function: Any) -> Any:
    """The structure in which a Functional model returns its outputs."""
    outputs = function._outputs_struct
    return outputs[0] if isinstance(outputs, list | tuple) and len(outputs) == 1 else outputs


def nodes_in_order(function: Any) -> list[Any]:
    """The calls of a Functional model or a `keras.Function`, in the order in which it runs them."""
    by_depth = function._nodes_by_depth
    return [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth] if n.operation and not n.is_input]


def converted_inputs(model: keras.Model, inputs: Any) -> Any:
    """What `Layer.__call__` makes of its inputs before `call`: checked against the input spec, floats autocast."""
    if model._convert_input_args:
        inputs = tree.map_structure(
            lambda x: model.dtype_policy.convert_input(x, model.autocast, model.input_dtype), inputs
        )
    model._assert_input_compatibility(inputs)
    return inputs


def graph_inputs(model: keras.Model, inputs: Any) -> list[Any]:
    """The flat inputs of the graph behind `model`, as its `call` makes them of its argument."""
    function = graph_of(model)
    return function._standardize_inputs(inputs) if function is not None else tree.flatten(inputs)


def call_operation(operation: Callable, args: Any, kwargs: Any, training: bool | None, explicit: bool) -> Any:
    """Call a layer or an op as a Functional model does: `training` reaches all that take it.

    Args:
        explicit: a `training` that the call itself was given wins, as in a subclassed model. In a Functional model it
            does not: Keras' own `operation_fn` overrides it.
    """
    if explicit and kwargs.get("training") is not None:
        return operation(*args, **kwargs)
    return operation_fn(operation, training=training)(*args, **kwargs)


@contextlib.contextmanager
def autocast_of(model: keras.layers.Layer) -> Iterator[None]:
    """The scope in which `Layer.__call__` runs `call`: variables read in it have the layer's compute dtype."""
    cast = model.compute_dtype != model.variable_dtype
    with AutocastScope(model.compute_dtype) if cast else contextlib.nullcontext():
        yield


def uncast() -> contextlib.AbstractContextManager:
    """Inside, variables are read in their own dtype."""
    return AutocastScope(None)


def read_as(variable: keras.Variable, operations: Sequence[Any]) -> str | None:
    """The dtype in which all of these operations read a weight to train, if it is not its own."""
    layers = [layers_in(operation) for operation in operations]
    dtypes = {layer.compute_dtype for found in layers for layer in found}
    if not variable.trainable or not variable._autocast or not all(layers) or len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    floats = all(tf.as_dtype(d).is_floating for d in (dtype, variable.dtype))
    return dtype if floats and dtype != variable.dtype else None


# ---- state: what a call reads and changes, without changing it


def passed_through(error: type[Exception]) -> type[Exception]:
    """Let Keras raise errors of this class as they are, without what it adds about a layer's arguments."""
    error._keras_call_info_injected = True
    return error


def logits_of(tensor: Any) -> tuple[Any, Callable | None]:
    """The logits from which Keras' crossentropies would compute in place of these probabilities, if there are any.

    Returns:
        The logits, and the TensorFlow function that made the probabilities of them; `None` for one of Keras' own, which
        attach the logits.
    """
    if hasattr(tensor, "_keras_logits"):
        return tensor._keras_logits, None
    if not tf.executing_eagerly() and getattr(getattr(tensor, "op", None), "type", None) in ACTIVATIONS:
        return tensor.op.inputs[0], ACTIVATIONS[tensor.op.type]
    return None, None


ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}


def set_logits(tensor: Any, logits: Any):
    """Attach to probabilities the logits that they were made of, as Keras' activations do."""
    tensor._keras_logits = logits


def with_mask_of(source: Any, x: Any) -> Any:
    """A tensor with the mask of another, unless it has one."""
    mask = get_keras_mask(source)
    if mask is not None and get_keras_mask(x) is None:
        set_keras_mask(x, mask)
    return x


def masked_by(layer: keras.layers.Layer, source: Any, x: Any) -> Any:
    """What a layer made of a tensor: with its mask, if the layer hands masks on."""
    return with_mask_of(source, x) if layer.supports_masking else tf.identity(x)


def in_program() -> bool:
    """Whether a stateless scope is open: layers are being run with values given for their variables."""
    return in_stateless_scope()


def in_symbolic_call() -> bool:
    """Whether Keras runs a layer for the shapes and dtypes of its outputs, in a graph that is never run."""
    return in_symbolic_scope()


def stored(variable: keras.Variable) -> tf.Variable:
    """What a Keras variable holds; `value` is a tensor where a layer's autocast scope is open."""
    return variable._value


def set_value(variable: keras.Variable, value: tf.Variable):
    """Let a Keras variable hold another TensorFlow variable."""
    variable._value = value


def initial_shape(make: Any) -> tuple[int, ...] | None:
    """The shape of a variable's first value, if Keras makes the same at whatever time: of a seed that is a number."""
    try:
        given = inspect.getclosurevars(make).nonlocals
    except TypeError:
        return None
    variable, initializer = given.get("self"), given.get("initializer")
    if not isinstance(variable, keras.Variable) or not type(initializer).__module__.startswith(INITIALIZERS):
        return None
    return tuple(variable.shape) if isinstance(getattr(initializer, "seed", 0), int) else None


INITIALIZERS = "keras.src.initializers."


def clear_losses(operation: Any):
    """Forget the added losses of a layer, which Keras keeps by `id`."""
    if isinstance(operation, keras.layers.Layer):
        operation._clear_losses()


def is_seed(variable: keras.Variable) -> bool:
    """Whether this is the state of a `keras.random.SeedGenerator`."""
    return variable.name == "seed_generator_state"


def nth_seed(seed: tf.Tensor, number: int) -> tf.Tensor:
    """The seed for a part or a replica of this number; the first has the seed itself, the others are far apart."""
    return seed + tf.constant([number * SEED_STRIDE, 0], seed.dtype) if number else seed


SEED_STRIDE = 0x9E3779B9  # 2**32 over the golden ratio


@contextlib.contextmanager
def discarded_writes() -> Iterator[None]:
    """Inside, layers read what they would, and what they write and add to the loss is forgotten."""
    outer = get_stateless_scope() if in_stateless_scope() else None
    with keras.StatelessScope(collect_losses=True) as scope:
        if outer is not None:
            scope.get_current_value = outer.get_current_value
        yield


def layers_in(operation: Any) -> list[keras.layers.Layer]:
    """A layer and all layers in it; none for an operation that is no layer."""
    return list(operation._flatten_layers()) if isinstance(operation, keras.layers.Layer) else []


# ---- steps: the parts of Keras' train_step


output_spec = keras.src.backend.compute_output_spec


def without_optionals(model: keras.Model, batch: Any) -> Any:
    """The batch with TensorFlow's empty optionals as `None`, as Keras makes it."""
    return model._autoconvert_optionals(lambda data: data)(batch)


def symbolic(value: Any) -> keras.KerasTensor | None:
    """A `KerasTensor` like an array of a batch, of any number of rows."""
    if value is None:
        return None
    return keras.KerasTensor((None, *value.shape[1:]), keras.backend.standardize_dtype(value.dtype))


def converts_inputs(layer: keras.layers.Layer) -> bool:
    """Whether a layer casts what it is given to its own dtype."""
    return layer._convert_input_args


def compilation(model: keras.Model) -> tuple:
    """The compiled loss and metrics of a model; the loss is `None` if it has none."""
    return model._compile_loss, model._compile_metrics


def is_compiled_built(model: keras.Model) -> bool:
    """Whether the compiled losses and metrics have created all that they will."""
    return all(part is None or part.built for part in (model._compile_loss, model._compile_metrics))


def build(model: keras.Model, batch: Any, y_pred: Any = None):
    """Create, from shapes alone, what Keras would create in its first step: layers, loss, metrics.

    Args:
        batch: `(x, y, sample_weight)` of tensors.
        y_pred: symbolic outputs, which save running the model again.
    """
    x, y, sample_weight = tree.map_structure(symbolic, unpack_x_y_sample_weight(batch))
    if y_pred is None:
        if not all(layer.built for layer in layers_in(model)):
            output_spec(model, x, training=False)
        return
    loss, metrics = model._compile_loss, model._compile_metrics
    if metrics is not None and not metrics.built:
        output_spec(model.compute_metrics, x, y, y_pred, sample_weight)
    if loss is not None and not loss.built:
        output_spec(loss, y, y_pred, sample_weight)


class LossCall(NamedTuple):
    """One of the compiled losses with the arguments that Keras resolved for it."""

    loss: Loss
    weight: float | None
    y_true: Any
    y_pred: Any
    sample_weight: Any


def loss_calls(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> list[LossCall]:
    """What the compiled losses would be called with, found by Keras' own matching of names and structures."""
    compiled = model._compile_loss
    if compiled is None:
        return []
    found: list[LossCall] = []

    def recording(loss, weight):
        def record(y_true, y_pred, sample_weight):
            found.append(LossCall(loss, weight, y_true, y_pred, sample_weight))
            return tf.zeros(())

        return record

    flat, metrics = compiled._flat_losses, compiled._metrics
    compiled._flat_losses = [f._replace(loss=recording(f.loss, f.loss_weights)) for f in flat]
    compiled._metrics = [None] * len(metrics)  # they are updated once, with the loss of the whole batch
    try:
        with keras.StatelessScope():
            compiled(y, y_pred, sample_weight)
    finally:
        compiled._flat_losses, compiled._metrics = flat, metrics
    return found


def evaluate_loss(call: LossCall) -> tuple[tf.Tensor, tf.Tensor]:
    """A loss as Keras computes it, and the number that its reduction divided by (1 for a sum).

    The mean over a batch is the mean of its parts weighted by these numbers: rows, valid entries, sums of weights.
    """
    loss, _, y_true, y_pred, sample_weight = call
    seen = []

    def capture(*args):
        seen.append(type(loss).call(loss, *args))
        return seen[0]

    vars(loss)["call"] = capture
    try:
        value = loss(y_true, y_pred, sample_weight)
    finally:
        del vars(loss)["call"]
    masks = [m for m in (get_keras_mask(y_pred), get_keras_mask(seen[0])) if m is not None]
    mask = functools.reduce(operator.and_, masks) if masks else None
    if loss.reduction == "sum":
        count = tf.ones(())
    elif loss.reduction == "mean_with_sample_weight" and (sample_weight is not None or masks):
        count = tf.reduce_sum(apply_mask(sample_weight, mask, value.dtype, loss.reduction))
    elif masks:
        count = tf.reduce_sum(tf.cast(mask, value.dtype))
    else:
        count = tf.size(seen[0])
    return value, tf.cast(count, value.dtype)


def has_plain_reduction(loss: Loss) -> bool:
    """Whether the loss reduces as `keras.losses.Loss` does, so that `evaluate_loss` knows by what it divides."""
    return type(loss).__call__ is Loss.__call__ and loss.reduction not in (None, "none")


def loss_trackers(model: keras.Model) -> Sequence[Any]:
    """The metrics that report each output's loss; empty for a model with one."""
    return model._compile_loss.metrics if model._compile_loss is not None else ()


def loss_dtype(model: keras.Model) -> str:
    """The dtype in which Keras adds up the losses."""
    return model._compile_loss.dtype if model._compile_loss is not None else keras.config.floatx()


def track_loss(model: keras.Model, loss: tf.Tensor, rows: tf.Tensor):
    """Report the loss of a batch, as `train_step` does."""
    model._loss_tracker.update_state(loss, sample_weight=rows)


def added_losses(model: keras.Model, losses: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """`model.losses` of a step: what layers added, then the regularization of weights."""
    return [*losses, *model._get_regularization_losses()]


def give_strategy(optimizer: Any, strategy: tf.distribute.Strategy):
    """Let an optimizer that was made outside of the scope create its variables beside the model's."""
    for inner in (getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())):
        if inner is not None:
            give_strategy(inner, strategy)
    optimizer._distribution_strategy = strategy


def auto_jit(model: keras.Model) -> bool:
    """Whether XLA can compile the model's layers."""
    return model_supports_jit(model)

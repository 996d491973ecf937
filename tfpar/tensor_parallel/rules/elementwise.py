"""What computes each element from the elements at its place: activations, sums, dropout."""

import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import activations, layers

from tfpar.errors import Caught
from tfpar.graph.keras_graph import Ref
from tfpar.graph.tf_graph import traced
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rules import Site, rule

ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "swish", "sigmoid", "hard_sigmoid",
    "hard_silu", "hard_tanh", "hard_shrink", "soft_shrink", "tanh_shrink", "threshold", "softplus", "softsign",
    "squareplus", "sparse_plus", "sparse_sigmoid", "log_sigmoid", "tanh", "exponential", "linear", "mish",
)  # fmt: skip
OPERATIONS = (
    "Absolute", "Abs", "Add", "Arccos", "Arccosh", "Arcsin", "Arcsinh", "Arctan", "Arctan2", "Arctanh", "Cast", "Cbrt",
    "Ceil", "Celu", "Clip", "Cos", "Cosh", "Divide", "DivideNoNan", "Elu", "Equal", "Erf", "Exp", "Exp2", "Expm1",
    "Floor", "FloorDivide", "Gelu", "Greater", "GreaterEqual", "HardShrink", "HardSigmoid", "HardSilu", "HardTanh",
    "LeakyRelu", "Less", "LessEqual", "Log", "Log10", "Log1p", "Log2", "LogSigmoid", "Logaddexp", "LogicalAnd",
    "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Mod", "Multiply", "Negative", "NotEqual", "OnesLike", "Power",
    "Reciprocal", "Relu", "Relu6", "Round", "Rsqrt", "Selu", "Sigmoid", "Sign", "Silu", "Sin", "Sinh", "SoftShrink",
    "Softplus", "Softsign", "SparsePlus", "SparseSigmoid", "Sqrt", "Square", "Squareplus", "StopGradient", "Subtract",
    "Tan", "Tanh", "TanhShrink", "Threshold", "TrueDivide", "Trunc", "Where", "ZerosLike",
)  # fmt: skip

ELEMENTWISE = (
    "Abs", "Add", "AddN", "AddV2", "Atan2", "BitwiseAnd", "BitwiseOr", "Cast", "Ceil", "ClipByValue", "Cos", "Cosh",
    "Div", "DivNoNan", "Elu", "Equal", "Erf", "Erfc", "Exp", "Expm1", "Floor", "FloorDiv", "FloorMod", "Greater",
    "GreaterEqual", "Identity", "Inv", "IsFinite", "IsNan", "LeakyRelu", "Less", "LessEqual", "Log", "Log1p",
    "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Mod", "Mul", "Neg", "NotEqual", "OnesLike", "Pow",
    "RealDiv", "Reciprocal", "Relu", "Relu6", "Rint", "Round", "Rsqrt", "SelectV2", "Selu", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Square", "SquaredDifference", "StopGradient", "Sub", "Tan", "Tanh",
    "TruncateDiv", "Xdivy", "Xlogy", "ZerosLike", "silu",
)  # fmt: skip


def is_elementwise(activation: Any) -> bool:
    """Whether an activation, of Keras or a function of a user's, treats elements one by one."""
    if activation is None:
        return True
    name = getattr(activation, "__name__", "")
    if name in ACTIVATIONS and getattr(activations, name, None) is activation:
        return True
    if not inspect.isfunction(activation) or activation in (activations.softmax, activations.log_softmax):
        return False
    if activation not in FOUND:
        FOUND[activation] = is_made_of_elementwise(activation)
    return FOUND[activation]


FOUND: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # of functions of users


def is_made_of_elementwise(function: Any) -> bool:
    """Whether a function of a tensor is made of operations of TensorFlow that treat elements one by one."""
    shape = (3, 5, 7)
    try:
        graph = traced(function, [keras.KerasTensor(shape, "float32")])
    except Exception as error:
        Caught.theirs(error, f"tracing the activation {function}")
        return False
    sizes = [np.shape(a) for call in graph.calls for a in call.args if not isinstance(a, Ref)]
    return (
        not graph.variables
        and all(getattr(call.operation, "type", None) in ELEMENTWISE for call in graph.calls)
        and all(symbol.shape == shape for symbol in graph.symbols)
        and all(int(np.prod(size)) == 1 for size in sizes)
    )


def aligned(shape: tuple, rank: int, dim: int) -> Layout | None:
    """How an input of this shape is divided where the output, of so many dims, is along `dim`; `None` if it is not."""
    at = dim - (rank - len(shape))
    if at < 0 or shape[at] == 1:
        return REPLICATED
    return Layout(at) if at > 0 else None


def along_each_dim(site: Site, name: str = "elementwise") -> Iterator[Option]:
    """Divided along any dim but the batch's, inputs as their broadcasting demands."""
    rank = len(site.outputs[0])
    if any(len(shape) != rank for shape in site.outputs):
        return
    arrays = [tuple(a.shape) for a in keras.tree.flatten(site.arguments) if hasattr(a, "shape")]
    for dim in range(1, rank):
        inputs = [aligned(shape, rank, dim) for shape in site.inputs]
        if any(aligned(shape, rank, dim) != REPLICATED for shape in arrays):
            continue  # every rank would need another part of it
        if site.divides(site.outputs[0][dim]) and None not in inputs and any(y.dim is not None for y in inputs):
            yield site.option(name, inputs, [Layout(dim)] * len(site.outputs))


rule(
    *OPERATIONS, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity, layers.Add, layers.Subtract,
    layers.Multiply, layers.Average, layers.Maximum, layers.Minimum, layers.GaussianDropout,
    layers.GaussianNoise, layers.Rescaling,
)(along_each_dim)  # fmt: skip


@rule(layers.Dropout)
def dropout(site: Site) -> Iterator[Option]:
    """Along dims that have a mask of their own."""
    shape = site.layer.noise_shape or (None,) * len(site.outputs[0])
    yield from but(along_each_dim(site), [d for d, size in enumerate(shape) if size is not None])


@rule(layers.Activation)
def activation(site: Site) -> Iterator[Option]:
    """Along every dim, or but the last for a softmax."""
    if is_elementwise(site.layer.activation):
        yield from along_each_dim(site)
    elif site.layer.activation in (activations.softmax, activations.log_softmax):
        yield from but(along_each_dim(site, "softmax of other dims"), [len(site.outputs[0]) - 1])


@rule(layers.Softmax, "Softmax", "LogSoftmax")
def softmax(site: Site) -> Iterator[Option]:
    """Along the dims over which it does not normalise."""
    axes = [a % len(site.outputs[0]) for a in np.ravel(site.layer.axis)]
    yield from but(along_each_dim(site, "softmax of other dims"), axes)


@rule(layers.PReLU)
def prelu(site: Site) -> Iterator[Option]:
    """Its slopes along with the input, where they are not shared."""
    shared = [] if site.layer.shared_axes is None else list(site.layer.shared_axes)
    for dim in range(1, len(site.outputs[0])):
        if site.divides(site.outputs[0][dim]):
            weights = [] if dim in shared else [(site.layer.alpha, dim - 1)]
            yield site.option("elementwise", [Layout(dim)], [Layout(dim)], weights)


def but(found: Iterator[Option], dims: list[int]) -> Iterator[Option]:
    """The options that divide along other dims."""
    return (option for option in found if option.outputs[0].dim not in dims)

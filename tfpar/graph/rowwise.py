"""Operations of `keras.ops` that treat the samples of a batch one by one, known by what they are told of dim 0."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

ELEMENTWISE = """
    Absolute Abs Add Angle Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh BitwiseAnd BitwiseInvert BitwiseNot
    BitwiseOr BitwiseXor Cast Cbrt Ceil Celu Clip Conjugate Copy Cos Cosh Deg2rad Divide DivideNoNan Elu Equal Erf Erfc
    Erfinv Exp Exp2 Expm1 Fabs Floor FloorDivide Fmax Fmin Fmod FullLike Gelu Greater GreaterEqual HardShrink
    HardSigmoid HardSilu HardTanh Heaviside Hypot Imag Isclose Isfinite Isinf Isnan LeakyRelu Less LessEqual Log Log10
    Log1p Log2 LogSigmoid Logaddexp Logaddexp2 LogicalAnd LogicalNot LogicalOr LogicalXor Maximum Minimum Mod Multiply
    NanToNum Negative NotEqual OnesLike Power Rad2deg Real Reciprocal Relu Relu6 Round Rsqrt SaturateCast Selu Sigmoid
    Sign Signbit Silu Sin Sinc Sinh SoftShrink Softplus Softsign SparsePlus SparseSigmoid Sqrt Square Squareplus
    StopGradient Subtract Tan Tanh TanhShrink Threshold TrueDivide Trunc Where ZerosLike
""".split()  # noqa: SIM905
REDUCTIONS = """
    All Amax Amin Any Average CountNonzero Logsumexp Max Mean Median Min Nanmax Nanmean Nanmin Nansum Norm Prod Ptp Std
    Sum Var Argmax Argmin
""".split()  # noqa: SIM905
ALONG = """
    Argsort Concatenate Cumprod Cumsum Diff ExpandDims Flip Glu LayerNorm LogSoftmax Normalize RMSNorm Repeat Roll
    Softmax Sort Sparsemax Split Squeeze Stack
""".split()  # noqa: SIM905
LAST = ("OneHot", "TopK", "Tril", "Triu")  # of the last dims, of tensors that have more

Shapes = Sequence[Sequence[int | None]]


def is_rowwise(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Whether an operation is known to make of each sample what it would make of it alone.

    Args:
        operation: of `keras.ops`; of others nothing is known here.
        inputs, outputs: shapes, with the batch.
        batched: for each input, whether dim 0 is the batch.
        arguments: positional arguments and keywords of the call.
    """
    rule = RULES.get(type(operation).__name__)
    ours = type(operation).__module__.startswith("keras.src.ops.")
    return bool(ours and rule and any(batched) and rule(operation, inputs, batched, outputs, arguments))


def aligned(inputs: Shapes, batched: Sequence[bool], outputs: Shapes) -> bool:
    """Whether dim 0 of what is batched is dim 0 of the outputs, and nothing else meets it."""
    rank = len(outputs[0])
    return all(
        len(shape) == rank if is_batched else len(shape) < rank or shape[0] == 1
        for shape, is_batched in zip(inputs, batched, strict=True)
    )


def elementwise(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """The batch is dim 0 of all."""
    return aligned(inputs, batched, outputs) and all(np.ndim(a) < len(outputs[0]) for a in constants(arguments))


def constants(arguments: Any) -> list[Any]:
    """The arrays among the arguments of a call that are not tensors of the graph."""
    args, kwargs = arguments
    return [a for a in (*args, *kwargs.values()) if hasattr(a, "shape") and hasattr(a, "dtype")]


def is_tensor(argument: Any) -> bool:
    """Whether an argument is a tensor of the graph, not a constant or a variable."""
    return hasattr(argument, "tensor")


def axes_of(operation: Any, rank: int, default: Any = None) -> set[int] | None:
    """The dims that an operation is told of; `None` for all of them."""
    axis = getattr(operation, "axis", default)
    return None if axis is None else {int(a) % rank for a in np.ravel(axis)}


def reduction(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Over other dims than the batch."""
    axes = axes_of(operation, len(inputs[0]))
    return axes is not None and 0 not in axes


def along(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Along another dim than the batch."""
    rank = max(len(inputs[0]), len(outputs[0]))
    axes = axes_of(operation, rank, -1)
    return axes is not None and 0 not in axes and all(batched)


def last(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Of the last two dims at most."""
    return len(outputs[0]) > 2 and axes_of(operation, len(outputs[0]), -1) == {len(outputs[0]) - 1}


def reshape(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """With as many elements for each sample."""
    before, after = inputs[0], outputs[0]
    known = len(before) > 0 and len(after) > 0 and None not in (*before[1:], *after[1:])
    return known and before[0] == after[0] and prod(before[1:]) == prod(after[1:])


def transpose(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """With the batch where it was."""
    rank = len(inputs[0])
    moved = {
        "Transpose": lambda: 0 if operation.axes and operation.axes[0] % rank == 0 else None,
        "Swapaxes": lambda: 0 if 0 not in (operation.axis1 % rank, operation.axis2 % rank) else None,
        "Moveaxis": lambda: 0 if all(a % rank for a in (*operation.source, *operation.destination)) else None,
    }
    return moved[type(operation).__name__]() == 0


def item(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Of all samples."""
    args, kwargs = arguments
    key = kwargs.get("key", args[1] if len(args) > 1 else None)
    first = key[0] if isinstance(key, tuple) and key else key
    plain = all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in np.atleast_1d(np.array(key, object)))
    whole = first == slice(None) if isinstance(first, slice) else first is Ellipsis
    rest = [k for k in key if k is not None and k is not Ellipsis] if isinstance(key, tuple) else []
    return bool(plain and whole and (first is not Ellipsis or len(rest) < len(inputs[0])))


def matmul(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Of each sample with its own, or with what all have."""
    if len(inputs) == 1:
        return len(inputs[0]) > 1 and all(np.ndim(a) <= 2 for a in constants(arguments)) and is_tensor(arguments[0][0])
    one, other = inputs
    both = all(batched) and len(one) == len(other) > 2
    return both or (batched[0] and not batched[1] and len(one) > 1 and len(other) <= 2)


def einsum(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """With one letter for the batch, the first of what has it and of the output, and no other's."""
    equation = operation.subscripts.replace(" ", "")
    if "->" not in equation or "..." in equation:
        return False
    sources, target = equation.split("->")
    terms = sources.split(",")
    if len(terms) != len(inputs) or not target:
        return False
    return all(
        (term[0] == target[0] and target[0] not in term[1:]) if is_batched else target[0] not in term
        for term, is_batched in zip(terms, batched, strict=True)
    )


def take(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Along another dim than the batch, by indices that all have; or rows of what all have."""
    if len(inputs) == 1:
        table = not is_tensor(arguments[0][0])
        axes = axes_of(operation, len(inputs[0]))
        return (table and operation.axis == 0) or (not table and axes is not None and 0 not in axes)
    return operation.axis == 0 and not batched[0] and batched[1]


def attention(operation: Any, inputs: Shapes, batched: Sequence[bool], outputs: Shapes, arguments: Any) -> bool:
    """Of (batch, tokens, heads, size)."""
    return all(batched[:3]) and all(len(shape) == 4 for shape, b in zip(inputs, batched, strict=True) if b)


RULES: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise), **dict.fromkeys(REDUCTIONS, reduction), **dict.fromkeys(ALONG, along),
    **dict.fromkeys(LAST, last), "Reshape": reshape, "Transpose": transpose, "Swapaxes": transpose,
    "Moveaxis": transpose, "GetItem": item, "Matmul": matmul, "Einsum": einsum, "Take": take,
    "DotProductAttention": attention,
}  # fmt: skip

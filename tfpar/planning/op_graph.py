"""A model as plain data: its operations in order, the tensors between them, the variables they use."""

from dataclasses import dataclass, field
from functools import cached_property

from tfpar.errors import ModelError


@dataclass(frozen=True)
class Tensor:
    """A value between operations.

    Args:
        shape: of one sample, without the batch, which is dim 0.
        itemsize: bytes of an element.
        differentiable: whether it can have a gradient.
    """

    shape: tuple[int, ...]
    itemsize: int = 4
    differentiable: bool = True

    @property
    def bytes(self) -> int:
        """Bytes of one sample of the tensor."""
        size = self.itemsize
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True)
class Variable:
    """A weight or a piece of state.

    Args:
        path: as Keras gives it.
        bytes, shape: of all of it.
        read_bytes: bytes of it in the dtype in which layers read it, if that is another one; else 0.
    """

    path: str
    bytes: int
    trainable: bool = True
    shape: tuple[int, ...] = ()
    read_bytes: int = 0


@dataclass(frozen=True)
class Op:
    """One call of a layer or of a `keras.ops` function.

    Args:
        name: unique, the path of layer names from the model down: `encoder/dense`, a second call `encoder/dense:1`.
        inputs, outputs: indices into `OpGraph.tensors`.
        variables: indices into `OpGraph.variables`.
        flops: floating-point operations of the forward pass of one sample.
        stage: where it runs; 0 until the model is cut into stages.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    variables: tuple[int, ...] = ()
    flops: float = 0.0
    stage: int = 0

    @property
    def layer(self) -> str:
        """The name without the number of the call."""
        return self.name.split(":")[0]

    @property
    def scope(self) -> str:
        """The name as TensorFlow takes it for a scope."""
        return self.name.replace(":", "_")


@dataclass(frozen=True)
class OpGraph:
    """A model's operations in an order in which they can run.

    Args:
        inputs, outputs: of the model, as indices into `tensors`.
        producer: no argument: for each tensor that an operation makes, the index of the operation.

    Raises:
        ModelError: an operation uses a tensor before it exists.

    Example:
        >>> graph = OpGraph((Op("a", (0,), (1,)), Op("b", (1,), (2,))), (Tensor((4,)),) * 3, (), (0,), (2,))
        >>> graph.producer[2]
        1
    """

    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    variables: tuple[Variable, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    producer: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        producer: dict[int, int] = {}
        for index, op in enumerate(self.ops):
            missing = [t for t in op.inputs if t not in self.inputs and t not in producer]
            if missing:
                raise ModelError(f"operation {op.name} uses tensor {missing[0]} before anything produces it")
            producer.update(dict.fromkeys(op.outputs, index))
        object.__setattr__(self, "producer", producer)

    @cached_property
    def consumers(self) -> dict[int, tuple[int, ...]]:
        """For each tensor, the indices of the operations that use it."""
        found: dict[int, list[int]] = {t: [] for t in range(len(self.tensors))}
        for index, op in enumerate(self.ops):
            for t in dict.fromkeys(op.inputs):
                found[t].append(index)
        return {t: tuple(ops) for t, ops in found.items()}

    @cached_property
    def learned(self) -> frozenset[int]:
        """The tensors that depend on weights to train, so that their gradients are wanted."""
        found: set[int] = set()
        for op in self.ops:
            if found.intersection(op.inputs) or any(self.variables[v].trainable for v in op.variables):
                found.update(t for t in op.outputs if self.tensors[t].differentiable)
        return frozenset(found)

"""How ranks can divide an operation between them: a registry of rules, one for each kind of layer or operation.

A rule is a function from a `Site`, an operation in its model, to the `Option`s that there are beside computing all of
it on every rank. Register one for a layer of your own:

    @tfpar.rules.rule(MyLayer)
    def my_layer(site):
        yield site.option("column-parallel", outputs=[site.last()], weights=[(site.layer.kernel, 1)])
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tfpar.compat import _keras_parts
from tfpar.graph.keras_graph import KerasGraph
from tfpar.graph.tf_graph import Kept, Read, TensorFlowOp
from tfpar.planning.layout_search import Option, replicated
from tfpar.planning.sharding import REPLICATED, Layout

Rule = Callable[["Site"], Iterable[Option]]
RULES: dict[type | str, Rule] = {}
HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__dict__", "__weakref__", "get_config", "from_config"}
BUILT_IN = (
    "attention", "convolution", "dense", "elementwise", "embedding", "normalization", "pooling", "reshaping",
    "tensorflow_moves", "tensorflow_ops",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """An operation in its model, as a rule sees it.

    Shapes are those of undivided tensors, with the batch as dim 0 and `None` for an unknown size; tensors are indices
    into the graph's.

    Args:
        graph: the model.
        index: of the operation in the graph.
        ranks: how many divide it between them.
        sequence: whether tensors may be divided along dim 1 (sequence parallelism).

    Example:
        >>> def columns(site):  # a rule for a layer that makes its outputs from columns of its kernel
        ...     if site.divides(site.outputs[0][-1]):
        ...         yield site.option("column-parallel", outputs=[site.last()], weights=[(site.layer.kernel, 1)])
    """

    graph: KerasGraph
    index: int
    ranks: int
    sequence: bool = False

    @property
    def op(self) -> Any:
        """The operation as plain data, a `tfpar.planning.op_graph.Op`."""
        return self.graph.graph.ops[self.index]

    @property
    def layer(self) -> Any:
        """The layer or `keras.ops` operation that is called."""
        return self.graph.calls[self.index].operation

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the call by name; a tensor is a `tfpar.graph.keras_graph.Ref`."""
        return self.graph.calls[self.index].named_arguments

    def shape(self, tensor: int) -> tuple:
        """The shape of a tensor."""
        return tuple(self.graph.symbols[tensor].shape)

    @property
    def inputs(self) -> list[tuple]:
        """The shapes of the inputs."""
        return [self.shape(t) for t in self.op.inputs]

    @property
    def outputs(self) -> list[tuple]:
        """The shapes of the outputs."""
        return [self.shape(t) for t in self.op.outputs]

    def last(self, output: int = 0) -> Layout:
        """The layout that divides an output, given by its position, along its last dim."""
        return Layout(len(self.outputs[output]) - 1)

    def divides(self, size: int | None) -> bool:
        """Whether each rank gets at least one of `size` elements; not of an unknown number."""
        return size is not None and size >= self.ranks

    def sequences(self) -> list[Layout]:
        """The layouts in which a sum over ranks can be left: replicated, or divided along the sequence.

        The first is an all-reduce, the second a reduce-scatter.
        """
        shape = self.outputs[0]
        return [REPLICATED, *([Layout(1)] if self.sequence and len(shape) > 2 and self.divides(shape[1]) else [])]

    def bytes(self, tensor: int) -> float:
        """Bytes that each rank sends for one sample in an all-gather or a reduce-scatter of a tensor.

        An all-reduce is both.
        """
        return self.graph.graph.tensors[tensor].bytes * (self.ranks - 1) / self.ranks

    def option(
        self,
        name: str,
        inputs: Sequence[Layout] | None = None,
        outputs: Sequence[Layout] | None = None,
        weights: Sequence[tuple[Any, int]] = (),
        moved: float = 0.0,
        build: Callable | None = None,
        exchanges: int = 2,
    ) -> Option:
        """A way in which ranks can run the operation, each a part of it; what is not given is replicated.

        Args:
            name: the field's word for it, as `explain` shows it.
            inputs, outputs: a layout for each.
            weights: Keras variables, and the dim along which each is divided; `None` in the place of one is ignored.
            moved: bytes of one sample that each rank sends within the operation, forward and backward.
            exchanges: in how many exchanges it does; an all-reduce is two.
            build: `(local, inputs) -> outputs` adds what each rank runs to `local`, see
                `tfpar.tensor_parallel.rank_graph.RankGraphBuilder`; if not given, the operation runs on what each rank
                has.

        Raises:
            KeyError: one of `weights` is no variable of the model.
        """
        places = self.graph.places
        layouts = {places[id(v)]: Layout(d % len(v.shape)) for v, d in weights if v is not None}
        given = list(inputs or ())
        given += [REPLICATED] * (len(self.op.inputs) - len(given))  # a mask, which follows the inputs
        return Option(
            name,
            tuple(given),
            tuple(outputs) if outputs is not None else (REPLICATED,) * len(self.op.outputs),
            layouts, True, moved, build, exchanges,
        )  # fmt: skip


def rule(*kinds: type | str) -> Callable[[Rule], Rule]:
    """Register a rule for these layers, or for `keras.ops` operations by the name of their class.

    It takes the place of a rule that there was for them.

    Args:
        kinds: classes of layers, or names such as `"Identity"`.

    Returns:
        A decorator for a function from a `Site` to its options, beside that of computing all of it on every rank.

    Example:
        >>> @rule("Identity")
        ... def identity(site):
        ...     return []
        >>> del RULES["Identity"]
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def rule_of(operation: Any) -> Rule | None:
    """The rule for a layer or an operation of `keras.ops`; `None` if there is none.

    A layer has the rule of its class, or of a base class of which it overrides nothing; none if it is quantized or
    rematerialised, regularises its activity, or overrides `__call__`.
    """
    if isinstance(operation, TensorFlowOp | Read | Kept):
        return RULES.get(f"tf.{operation.type}")
    if not isinstance(operation, keras.layers.Layer):
        ours = type(operation).__module__.startswith(("keras.src.ops", "keras.ops"))
        return RULES.get(type(operation).__name__) if ours else None
    changed: set[str] = set()
    for kind in type(operation).__mro__:
        if kind in RULES:
            same = not any(hasattr(kind, name) for name in changed - HARMLESS)
            return RULES[kind] if same and _keras_parts.is_plain_layer(operation) else None
        changed |= set(vars(kind))
    return None


def options(site: Site) -> Iterator[Option]:
    """The options for an operation; the first is to compute all of it on every rank."""
    yield replicated(site.graph.graph, site.index)
    found = rule_of(site.layer)
    if found is not None:
        yield from found(site)


for module in BUILT_IN:
    importlib.import_module(f"tfpar.tensor_parallel.rules.{module}")

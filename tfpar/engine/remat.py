"""A program and its backward pass as two functions, with few bytes between them: what is cheap is computed again.

After "Transcending runtime-memory tradeoffs in checkpointing by being fusion aware" (He and Yu, MLSys 2023), as
PyTorch's AOTAutograd does it: both ways are one graph, which is cut where the least has to be kept.
"""

from collections.abc import Container, Iterable, Sequence
from math import prod
from typing import Any

import tensorflow as tf

from tfpar.compat._tf import copied, without_device
from tfpar.engine import in_place
from tfpar.engine.engine import tensors_of
from tfpar.engine.program import Component, Function, Program, Result, components, kind_of, packed
from tfpar.planning.min_cut import smallest_cut

# What XLA can compute while it reads the operands of what uses it. No comparisons and no steps: in another program,
# where sums are rounded in another order, they could come out otherwise.
CHEAP = """
    Abs Add AddV2 BiasAdd BroadcastTo Cast ConcatV2 Cos Div DivNoNan Elu Erf Erfc Exp ExpandDims Expm1 Fill
    Identity IdentityN LeakyRelu Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg
    OnesLike Pack Pad PadV2 Pow PreventGradient RealDiv Reciprocal Relu Relu6 Reshape Rsqrt Select SelectV2 Selu
    Sigmoid Sin Slice Softmax Softplus Softsign Split SplitV Sqrt Square SquaredDifference Squeeze StopGradient
    StridedSlice Sub Tanh Transpose Unpack Xdivy Xlogy ZerosLike
""".split()  # noqa: SIM905
SHAPES = ("Shape", "ShapeN")
PURE = ("ReadVariableOp", "XlaCallModule")  # though TensorFlow says that they have state
SAME = ("Identity", "PreventGradient", "StopGradient")


class SplitProgram:
    """A program and its backward pass, for one kind of arguments.

    Args:
        program: whose.
        variables, edges: arguments of this kind.
        inside, outside: the places of variables, and what of the edges, of which gradients are wanted.

    Attributes:
        targets: what the backward pass takes cotangents of: components of edges, and added losses `(i, k)`.
        splittable: whether the program can be divided. It cannot if it has loops or state.
    """

    def __init__(
        self,
        program: Program,
        variables: Sequence[Any],
        edges: dict[int, Any],
        inside: list[int],
        outside: list[Component],
    ):
        self.program, self.inside, self.outside = program, inside, outside
        kinds = tf.nest.map_structure(kind_of, (list(variables), edges))
        with without_device():
            self.trace = tf.function(self.joint, autograph=False).get_concrete_function(*kinds)
        constants, self.outputs = len(self.trace.captured_inputs), list(self.trace.outputs)
        self.inputs = self.trace.inputs[: len(self.trace.inputs) - constants]
        names = [x.name for x in self.trace.inputs[len(self.inputs) :]]
        self.constants = dict(zip(names, self.trace.captured_inputs, strict=True))
        self.found = tensors_of(self.gradients)
        made = makers([*self.outputs, *self.found])
        state = any(op.op_def.is_stateful and op.type not in PURE for op in self.trace.graph.get_operations())
        self.splittable = bool(self.found) and not state and not any(map(is_bound, made))
        if self.splittable:
            self.divide(made)
            self.forward, self.backward = Function(self.run_forward, True), Function(self.run_backward, True)

    def joint(self, variables: list[tf.Tensor], edges: dict[int, Any]) -> Result:
        """The program, and in the same graph its backward pass."""
        result = self.program.run(variables, edges)
        edges_of = components(result.edges, self.program.graph.graph)
        ends: dict[Any, Any] = {key: x for key, x in edges_of.items() if key.tensor not in self.program.unused}
        ends.update({(i, k): x for i, losses in result.losses.items() for k, x in enumerate(losses)})
        known = self.program.targets
        ends = {key: x for key, x in ends.items() if known is None or key in known}
        self.targets = list(ends)
        self.cotangents = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in ends.values()]
        sources = [*(variables[n] for n in self.inside), *(key.of(edges) for key in self.outside)]
        self.gradients = tf.gradients(list(ends.values()), sources, self.cotangents) if ends and sources else []
        return result

    def divide(self, made: list[tf.Operation]):
        """Find what to keep for the backward pass: of all that it takes, whatever is smallest together."""
        later = {x.op.name for x in self.cotangents}
        for op in made:
            if any(x.op.name in later for x in op.inputs):
                later.add(op.name)
        taken = [*self.found, *(x for op in made if op.name in later for x in op.inputs)]
        taken = [x for x in taken if x.op.name not in later]
        weights = [x.name for x in self.inputs[: len(self.program.variables)] if x.dtype.is_floating]
        free = {*self.constants, *weights}  # they are there anyway
        found = fewest_bytes(taken, [x for x in self.inputs if x.name not in free])
        kept = {x.name: x for x in map(same, found)}
        reached = {x.name for op in makers(self.found, kept) for x in op.outputs}
        self.needs = [n for n, x in enumerate(self.inputs) if x.name in kept or x.name in reached]
        given = {x.name for x in self.inputs}
        known = {same(x).name: n for n, x in enumerate(self.outputs)}
        self.known = {name: known[name] for name in kept if name in known and name not in given}
        self.kept = [x for name, x in kept.items() if name not in known and name not in given]
        self.taken = [*(self.inputs[n].name for n in self.needs), *self.known, *(x.name for x in self.kept)]

    def run_forward(self, variables: list[tf.Tensor], edges: dict[int, Any]) -> tuple[Result, list[tf.Tensor]]:
        """The program's result, and what is kept for the backward pass."""
        given = {x.name: value for x, value in zip(self.inputs, tensors_of((variables, edges)), strict=True)}
        found = emitted([*self.outputs, *self.kept], {**self.constants, **given})
        return packed(self.trace.structured_outputs, found[: len(self.outputs)]), found[len(self.outputs) :]

    def run_backward(
        self, taken: list[tf.Tensor], cotangents: list[tf.Tensor], sums: dict[int, tf.Variable], first: tf.Tensor
    ) -> tuple[dict[int, Any], dict[Component, Any], tf.Tensor | None]:
        """The gradients of variables that are not added up in place, those of edges, and what tells that sums are done.

        Args:
            taken: what `for_backward` gives.
            cotangents: of the targets.
            sums, first: where to add up gradients; see `in_place.Sums`.
        """
        given = dict(zip(self.taken, taken, strict=True))
        ends = {x.name: value for x, value in zip(self.cotangents, cotangents, strict=True)}
        found = packed(self.gradients, emitted(self.found, {**self.constants, **given, **ends}))
        variables = [self.program.variables[n] for n in self.inside]
        of_weights, done = in_place.added(self.program, present(variables, found), sums, first)
        return of_weights, present(self.outside, found[len(variables) :]), done

    def for_backward(self, needed: list[tf.Tensor], result: Result, kept: list[tf.Tensor]) -> list[tf.Tensor]:
        """What the backward pass takes: the arguments that it needs, and what the way forward returned."""
        outputs = tensors_of(result)
        return [*needed, *(outputs[n] for n in self.known.values()), *kept]


def fewest_bytes(
    taken: Sequence[tf.Tensor], sources: Iterable[tf.Tensor], there: Iterable[str] = ()
) -> list[tf.Tensor]:  # fmt: skip
    """The tensors with the fewest bytes of which cheap operations can make some others, in their order.

    Args:
        taken: the others.
        sources: what they are made of, and what is not there anyway.
        there: names of tensors that are, where it ends.
    """
    named = {x.name: x for x in sources}
    sizes, ways, first = {name: row_bytes(x) for name, x in named.items()}, [], list(named)
    for op in makers(taken, {*named, *there}):
        inputs = [x.name for x in inputs_of(op) if x.name in sizes]
        if inputs:
            named.update({x.name: x for x in op.outputs})
            sizes.update({x.name: row_bytes(x) for x in op.outputs})
            if op.type in CHEAP:
                ways += [(x, y.name) for x in inputs for y in op.outputs]
            else:
                first += [x.name for x in op.outputs]
    cut = smallest_cut(sizes, ways, first, [x.name for x in taken if x.name in sizes])
    return [x for name, x in named.items() if name in cut]


def makers(targets: Iterable[tf.Tensor], given: Container[str] = ()) -> list[tf.Operation]:
    """The operations that make these tensors, in their order, but for what leads to tensors that are given."""
    found, waiting = {}, [x.op for x in targets if x.name not in given]
    while waiting:
        op = waiting.pop()
        if op.name not in found:
            found[op.name] = op
            waiting += [x.op for x in inputs_of(op) if x.name not in given]
    return [op for op in next(iter(found.values())).graph.get_operations() if op.name in found] if found else []


def emitted(targets: Sequence[tf.Tensor], given: dict[str, tf.Tensor]) -> list[tf.Tensor]:
    """These tensors, made in the present graph of those that are given."""
    made = dict(given)
    for op in makers(targets, given):
        if op.type in SHAPES:
            new = [tf.constant(x.shape.as_list(), y.dtype) for x, y in zip(op.inputs, op.outputs, strict=True)]
        else:
            new = copied(op, [made[x.name] for x in op.inputs]).outputs
        for x, y in zip(op.outputs, new, strict=True):
            made.setdefault(x.name, y)
    return [made[x.name] for x in targets]


def inputs_of(op: tf.Operation) -> Sequence[tf.Tensor]:
    """What has to be there for an operation; for one that asks for known shapes, nothing."""
    return () if op.type in SHAPES else op.inputs


def is_bound(op: tf.Operation) -> bool:
    """Whether an operation cannot be copied by itself; gradients make others wait that need not."""
    functions = any(a.HasField("func") or a.list.func for a in op.node_def.attr.values())
    strange = any(x.dtype in (tf.resource, tf.variant, tf.string) for x in (*op.inputs, *op.outputs))
    dynamic = op.type in SHAPES and not all(x.shape.is_fully_defined() for x in op.inputs)  # XLA would wait for it
    stateful = any(x.op_def.is_stateful and x.type not in PURE for x in (op, *op.control_inputs))
    return bool(functions or strange or dynamic or stateful)


def same(x: tf.Tensor) -> tf.Tensor:
    """The tensor that this one is a copy of."""
    while x.op.type in SAME:
        x = x.op.inputs[0]
    return x


def row_bytes(x: tf.Tensor) -> int:
    """Bytes, for each row if that many are not known."""
    return prod(n or 1 for n in x.shape.as_list()) * x.dtype.size if x.shape.rank is not None else x.dtype.size


def present(keys: Iterable[Any], values: Sequence[Any]) -> dict[Any, Any]:
    """The values that are not `None`, by their keys."""
    return {key: value for key, value in zip(keys, values, strict=False) if value is not None}

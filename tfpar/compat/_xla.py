"""Private names of TensorFlow's XLA bridge: collectives in compiled programs. Checked against 2.21.0, on GPUs.

A program that XLA compiles for one GPU may exchange tensors with those of other GPUs of the process. Which they are
tells one `CollectiveReduceV2` in each of them; after that, any StableHLO collective over groups of them will do.
"""

from collections.abc import Sequence

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

STABLEHLO = 5  # the version of serialisation in which text is taken, with no platforms named
LAST, GIVEN = "tfpar/last_exchange", "tfpar/last_given"  # of a graph, collections: what came of it, and went in
TYPES = {
    tf.bool: "i1", tf.int32: "i32", tf.int64: "i64", tf.uint8: "ui8", tf.uint32: "ui32", tf.bfloat16: "bf16",
    tf.float16: "f16", tf.float32: "f32", tf.float64: "f64",
}  # fmt: skip


def gather_gang(size: int, key: int):
    """Tell TensorFlow that so many programs with this key run at once, one on each device."""
    tf.raw_ops.CollectiveReduceV2(
        input=tf.zeros([1]), group_size=size, group_key=key, instance_key=key, ordering_token=[], merge_op="Add",
        final_op="Id", communication_hint="nccl",
    )  # fmt: skip


def exchanged(
    kind: str, values: Sequence[tf.Tensor], groups: Sequence[Sequence[int]], dim: int = 0
) -> list[tf.Tensor]:  # fmt: skip
    """A collective over groups of a gang, as a part of the program that XLA compiles.

    Each program of a gang is compiled on its own, and collectives that do not depend on each other could get into
    different orders, which would never end: each waits for the one before.

    Args:
        kind: `"all-reduce"` and `"maximum"` are everywhere, `"all-gather"` and `"reduce-scatter"` along `dim`.
        values: of known shapes and one dtype; several for reductions only.
        groups: the places in the gang, each once; of one size.

    Source:
        The StableHLO specification: all_reduce, all_gather, reduce_scatter, optimization_barrier.
    """
    size, element, count = len(groups[0]), mlir([], values[0].dtype), len(values)
    made = [x.shape.as_list() for x in values]
    if kind == "all-gather":
        made[0][dim] *= size
    if kind == "reduce-scatter":
        made[0][dim] //= size
    graph = tf.compat.v1.get_default_graph()
    before = graph.get_collection_ref(LAST)
    groups_ = f"replica_groups = dense<{[list(g) for g in groups]}> : tensor<{len(groups)}x{size}xi64>"
    reduce = "maximum" if kind == "maximum" else "add"
    region = (
        f"({{ ^bb0(%x: {element}, %y: {element}): %z = stablehlo.{reduce} %x, %y : {element} "
        f"stablehlo.return %z : {element} }})"
    )
    arguments = ", ".join(f"%b#{n}" for n in range(count))
    call = {
        "all-gather": f'"stablehlo.all_gather"({arguments}) {{all_gather_dim = {dim} : i64, {groups_}}}',
        "reduce-scatter": f'"stablehlo.reduce_scatter"({arguments}) {region} {{scatter_dimension = {dim} : i64, '
        f"{groups_}}}",
    }.get(kind, f'"stablehlo.all_reduce"({arguments}) {region} {{{groups_}}}')
    found = after("exchange", values, before, made, call)
    before[:] = found[:1]
    graph.get_collection_ref(GIVEN)[:] = values[:1]
    return found


def held(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The same values, which wait until what was exchanged last had been computed, not until it is exchanged.

    XLA would make one operation of those of several micro-batches, and so let them wait for each other's exchanges.

    Args:
        values: of known shapes.
    """
    given = tf.compat.v1.get_default_graph().get_collection_ref(GIVEN)
    if not given or not values:
        return list(values)
    return after("held", values, given, [x.shape.as_list() for x in values])


def after(
    name: str, values: Sequence[tf.Tensor], others: Sequence[tf.Tensor], made: Sequence[Sequence[int]], call: str = ""
) -> list[tf.Tensor]:  # fmt: skip
    """An operation of StableHLO on values, `%b`, or else the values, once these and others are there.

    Args:
        name: of the module.
        made: the shapes of what it returns, one for each value, of its dtype.
        call: the operation, without its type.
    """
    inputs, count = [*values, *others], len(values)
    given = [mlir(x.shape.as_list(), x.dtype) for x in inputs]
    results = ", ".join(mlir(shape, x.dtype) for shape, x in zip(made, values, strict=True))
    names = [f"%a{n}" for n, _ in enumerate(inputs)]
    arguments = ", ".join(f"{n}: {t}" for n, t in zip(names, given, strict=True))
    called = f"%c:{count} = {call} : ({', '.join(given[:count])}) -> ({results}) " if call else ""
    ends = ", ".join(f"%{'c' if call else 'b'}#{n}" for n in range(count))
    text = (
        f"module @{name} {{ func.func public @main({arguments}) "
        f"-> ({results}) {{ %b:{len(inputs)} = stablehlo.optimization_barrier {', '.join(names)} : {', '.join(given)} "
        f"{called}return {ends} : {results} }} }}"
    )
    dtypes = [x.dtype for x in values]
    return list(xla.call_module(inputs, version=STABLEHLO, module=text, Tout=dtypes, Sout=made, platforms=()))


def mlir(shape: Sequence[int], dtype: tf.DType) -> str:
    """A type of tensors as StableHLO writes it."""
    return f"tensor<{'x'.join([*map(str, shape), TYPES[dtype]])}>"

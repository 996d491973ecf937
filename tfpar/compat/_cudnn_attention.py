"""cuDNN's fused attention in programs that XLA compiles; TensorFlow has no operation for it. Checked on H100 and H200.

The call is StableHLO in `XlaCallModule`; its configuration is a protocol buffer of XLA's, `CudnnfMHABackendConfig`, as
JSON. After Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
"""

# B: batch, T: queries, S: keys, N: heads, H: size of a head

import json
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from tfpar.compat._xla import STABLEHLO, mlir

TYPES = {tf.bfloat16: "BF16", tf.float16: "F16"}
PRODUCTS = {  # contracted dims of both sides, batch dims of both sides
    "bmm1": ((3, 3), ((0, 2), (0, 2))),
    "bmm2": ((3, 1), ((0, 1), (0, 2))),
    "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),
}


def forward(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor | None, scale: float, causal: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Attention, and the statistics of its softmax, which the backward pass takes.

    Args:
        query: (B, T, N, H), in bfloat16 or float16.
        key, value: (B, S, K, H), N a multiple of K.
        bias: (B or 1, N or 1, T, S), in the same dtype; is added to the scaled products.
        scale: of the products of queries and keys.
        causal: whether query `t` sees the keys up to `t` only.

    Returns:
        (B, T, N, H), and (B, N, T) in float32.
    """
    (b, t, n, h), inputs = query.shape.as_list(), [query, key, value, *([] if bias is None else [bias])]
    results = [((b, n, t, h), query.dtype, (3, 1, 2, 0)), ((b, n, t), tf.float32, None)]
    name = "__cudnn$fmhaSoftmax" if bias is None else "__cudnn$fmhaScaleBiasSoftmax"
    config = configuration(query, key, scale, causal, ("bmm1", "bmm2"))
    output, statistics = custom_call(name, inputs, results, config, transposed=1)
    return output, statistics


def backward(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor | None, statistics: tf.Tensor,
    output: tf.Tensor, gradient: tf.Tensor, scale: float, causal: bool, of_bias: bool,
) -> list[tf.Tensor]:  # fmt: skip
    """The gradients of query, key and value, and of the bias if that is wanted; arguments as of `forward`."""
    (b, t, n, h), (_, s, k, _) = query.shape.as_list(), key.shape.as_list()
    inputs = [query, key, value, statistics, gradient, *([] if bias is None else [bias]), output]
    results = [((b, heads, rows, h), query.dtype, (3, 1, 2, 0)) for heads, rows in ((n, t), (k, s), (k, s))]
    if of_bias:
        results.append((tuple(bias.shape.as_list()), bias.dtype, None))
    name = "__cudnn$fmhaSoftmaxBackward" if bias is None else "__cudnn$fmhaScaleBiasSoftmaxBackward"
    config = configuration(query, key, scale, causal, [name for name in PRODUCTS if "grad" in name])
    return custom_call(name, inputs, results, config, transposed=3)


def configuration(query: tf.Tensor, key: tf.Tensor, scale: float, causal: bool, products: Sequence[str]) -> str:
    """How cuDNN is to compute it, as the text of an attribute."""
    (b, t, n, _), s = query.shape.as_list(), key.shape[1]
    dims = {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(left)], "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": list(map(str, lefts)), "rhs_batch_dimensions": list(map(str, rights)),
        }
        for name, ((left, right), (lefts, rights)) in PRODUCTS.items() if name in products
    }  # fmt: skip
    shape = {
        "element_type": TYPES[query.dtype], "dimensions": [str(d) for d in (b, n, t, s)], "tuple_shapes": [],
        "layout": {
            "dim_level_types": [], "dim_unique": [], "dim_ordered": [], "minor_to_major": ["3", "2", "1", "0"],
            "tiles": [], "element_size_in_bits": "0", "memory_space": "0",
            "index_primitive_type": "PRIMITIVE_TYPE_INVALID", "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
            "dynamic_shape_metadata_prefix_bytes": "0",
        },
        "is_dynamic_dimension": [False] * 4,
    }  # fmt: skip
    algorithm = {
        "algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True, "workspace_size": "0",
    }  # fmt: skip
    config: dict[str, Any] = {
        "algorithm": algorithm, "fmha_scale": scale, "intermediate_tensor_shape": shape, "is_flash_attention": True,
        "mask_type": "CAUSAL" if causal else "NO_MASK", **dims, "dropout_rate": 0.0, "seed": 42,
        "sliding_window_length": 0, "max_seg_per_batch": 1, "is_paged_attention": False,
    }  # fmt: skip
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config}).replace('"', "\\22")


def custom_call(
    name: str, inputs: Sequence[tf.Tensor], results: Sequence[tuple], config: str, transposed: int
) -> list[tf.Tensor]:
    """A call of cuDNN.

    Args:
        results: shape, dtype and layout of each; a layout of `None` is the usual one.
        transposed: so many results, the first, are (B, N, T, H), and returned as (B, T, N, H).
    """
    given = [mlir(x.shape.as_list(), x.dtype) for x in inputs]
    made = [mlir(shape, dtype) for shape, dtype, _ in results]
    layouts = [layout or tuple(range(len(shape)))[::-1] for shape, _, layout in results]
    usual = [shape for shape, *_ in results]
    shapes = [[s[0], s[2], s[1], s[3]] if n < transposed else list(s) for n, s in enumerate(usual)]
    final = [mlir(shape, dtype) for shape, (_, dtype, _) in zip(shapes, results, strict=True)]
    body = [
        f"%t{n} = stablehlo.transpose %0#{n}, dims = [0, 2, 1, 3] : ({made[n]}) -> {final[n]}"
        for n in range(transposed)
    ]
    names = [f"%t{n}" if n < transposed else f"%0#{n}" for n, _ in enumerate(results)]
    arguments = ", ".join(f"%a{n}: {kind}" for n, kind in enumerate(given))
    text = (
        f"module @attention {{ func.func public @main({arguments}) -> ({', '.join(final)}) {{\n"
        f"%0:{len(results) + 1} = stablehlo.custom_call @{name}({', '.join(f'%a{n}' for n, _ in enumerate(given))}) "
        f'{{backend_config = "{config}", api_version = 2 : i32, '
        f"operand_layouts = [{', '.join(index(range(x.shape.rank)[::-1]) for x in inputs)}], "
        f"result_layouts = [{', '.join(map(index, layouts))}, {index([0])}]}} : ({', '.join(given)}) -> "
        f"({', '.join(made)}, tensor<0xui8>)\n"
        + "\n".join(body)
        + f"\nreturn {', '.join(names)} : {', '.join(final)} }} }}"
    )
    dtypes = [dtype for _, dtype, _ in results]
    found = xla.call_module(list(inputs), version=STABLEHLO, module=text, Tout=dtypes, Sout=shapes, platforms=())
    return list(found)


def index(values: Sequence[int]) -> str:
    """Whole numbers as a constant of MLIR."""
    return f"dense<{list(values)}> : tensor<{len(values)}xindex>"

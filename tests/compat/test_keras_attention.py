"""Attention by cuDNN: what it is asked for, with a formula in its place; `tests/on_gpus.py` runs cuDNN itself."""

import concurrent.futures

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src.backend.tensorflow import nn
from training import check, history, mostly

from tfpar import TensorParallelStrategy
from tfpar.comm.devices import largest_fused_head
from tfpar.compat import _cudnn_attention, _keras_attention, _keras_hub
from tfpar.compat._keras_attention import ATTENTION, fused
from tfpar.trainer import planner

pytestmark = pytest.mark.fast


def formula(query, key, value, bias, scale, causal):
    """What cuDNN computes, in float32: its bias may be that of one sample or head for all."""
    q, k, v = (tf.cast(x, tf.float32) for x in (query, key, value))
    groups = q.shape[2] // k.shape[2]
    logits = tf.einsum("btnh,bsnh->bnts", q, tf.repeat(k, groups, 2)) * scale
    logits = logits if bias is None else logits + tf.cast(bias, tf.float32)
    if causal:
        seen = tf.linalg.band_part(tf.ones(logits.shape[2:], tf.bool), -1, 0)
        logits = tf.where(seen, logits, -1e30)
    return tf.cast(tf.einsum("bnts,bsnh->btnh", tf.nn.softmax(logits), tf.repeat(v, groups, 2)), query.dtype)


class Calls(list):
    """Of cuDNN: what kind each is, and how many heads of queries they have."""

    def __init__(self):
        super().__init__()
        self.heads = set()


@pytest.fixture(autouse=True)
def in_place_of_cudnn(monkeypatch):
    calls = Calls()

    def forward(query, key, value, bias, scale, causal):
        calls.heads.add(query.shape[2])
        calls.append("causal" if causal else "bias" if bias is not None else "plain")
        return formula(query, key, value, bias, scale, causal), tf.zeros(query.shape[:3])

    def backward(query, key, value, bias, statistics, output, gradient, scale, causal, of_bias):
        sources = [query, key, value, *([bias] if of_bias else [])]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            y = formula(*sources[:3], bias if bias is None or not of_bias else sources[3], scale, causal)
        return tape.gradient(y, sources, gradient)

    monkeypatch.setattr(_cudnn_attention, "forward", forward)
    monkeypatch.setattr(_cudnn_attention, "backward", backward)
    monkeypatch.setattr(_keras_attention, "SHORT", 0)
    return calls


def random(*shape, seed=0, dtype="bfloat16"):
    return tf.cast(np.random.default_rng(seed).normal(size=shape), dtype)


def both(call, *sources):
    """What a call gives by the formula and by cuDNN, and the gradients of its sources; why it is not by cuDNN."""
    found, told = [], []
    for inside in (False, True):
        with fused(256 if inside else 0, told.append), tf.GradientTape() as tape:
            tape.watch(sources)
            y = tf.cast(call(*sources), tf.float32)
            loss = tf.reduce_sum(y * tf.cast(random(*y.shape, seed=9), tf.float32))
        found.append([y, *tape.gradient(loss, sources)])
    return found, told


def assert_alike(found):
    for a, b in zip(*found, strict=True):
        a, b = (np.asarray(tf.cast(x, tf.float32)) for x in (a, b))
        assert np.abs(a - b).max() < 0.02 * max(1.0, np.abs(a).max())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("mask", [None, (2, 1, 6, 8), (1, 1, 6, 8), (2, 4, 6, 8), (2, 1, 1, 8)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_grouped_heads(heads, mask, causal, in_place_of_cudnn):
    n, k = heads
    given = None if mask is None else tf.cast(np.random.default_rng(1).integers(0, 3, mask), tf.bool)
    found, told = both(
        lambda q, k, v: ops.dot_product_attention(q, k, v, mask=given, is_causal=causal),
        random(2, 6, n, 16), random(2, 8, k, 16, seed=1), random(2, 8, k, 16, seed=2),
    )  # fmt: skip
    kind = "plain" if mask is None else "bias"
    assert told == [None] and in_place_of_cudnn == ["causal" if causal and mask is None else kind]
    assert_alike(found)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 4, 6, 6), (1, 1, 6, 6), (4, 6, 6), (1, 4, 1, 6)], ids=str)
def test_learned_biases_have_gradients(shape):
    mask = tf.linalg.band_part(tf.ones([6, 6], tf.bool), -1, 0)
    found, told = both(
        lambda q, k, v, b: ops.dot_product_attention(q, k, v, bias=b, mask=mask, scale=0.3),
        *(random(2, 6, 4, 16, seed=n) for n in range(3)), random(*shape, seed=3),
    )  # fmt: skip
    assert told == [None]
    assert_alike(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_without_keys_see_all_alike(dtype):
    """As by the formula: what masks everything masks nothing."""
    mask = np.ones((2, 1, 6, 6), bool)
    mask[:, :, 2] = False
    found, _ = both(
        lambda q, k, v: ops.dot_product_attention(q, k, v, mask=tf.constant(mask)),
        *(random(2, 6, 4, 16, seed=n, dtype=dtype) for n in range(3)),
    )
    assert_alike(found)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"dtype": "float32"}, "float32, not bfloat16"),
        ({"head": 12}, "heads of 12"),
        ({"head": 264}, "up to 256"),
        ({"tokens": 5, "mask": True}, "not even numbers"),
        ({"asked": False}, "disabled"),
    ],
)
def test_what_cudnn_cannot_is_computed_by_the_formula(options, why, in_place_of_cudnn):
    tokens, head = options.get("tokens", 6), options.get("head", 16)
    q = random(2, tokens, 4, head, dtype=options.get("dtype", "bfloat16"))
    mask = tf.ones([tokens, tokens], tf.bool) if "mask" in options else None
    found, told = both(
        lambda q: ops.dot_product_attention(q, q, q, mask=mask, flash_attention=options.get("asked")), q
    )  # fmt: skip
    assert why in told[0] and not in_place_of_cudnn
    assert_alike(found)


def test_few_tokens_are_left_to_the_formula(monkeypatch):
    monkeypatch.undo()
    (_, told) = both(lambda q: ops.dot_product_attention(q, q, q), random(2, 6, 4, 16))
    assert "are few" in told[0]


def test_switches_of_keras():
    q = random(2, 6, 4, 16)
    keras.config.disable_flash_attention()
    try:
        assert "disabled" in both(lambda q: ops.dot_product_attention(q, q, q), q)[1][0]
    finally:
        keras.config.enable_flash_attention()
    with fused(256, lambda why: None):  # Keras alone refuses it on TensorFlow
        ops.dot_product_attention(q, q, q, flash_attention=True)


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: layers.MultiHeadAttention(4, 16, dtype="bfloat16"), "plain"),
        (lambda: layers.GroupQueryAttention(16, 4, 2, dtype="bfloat16"), "plain"),
    ],
    ids=["multi-head", "grouped"],
)
@pytest.mark.parametrize("options", [{}, {"use_causal_mask": True}], ids=str)
def test_layers(make, kind, options, in_place_of_cudnn):
    layer = make()
    x = random(2, 6, 32)
    layer(x, x)
    found, told = both(lambda x: layer(x, x, **options), x)
    assert told == [None] and in_place_of_cudnn == (["causal"] if options else [kind])
    assert_alike(found)


def test_keras_is_touched_only_inside():
    original = nn.dot_product_attention
    with fused(256, print):
        assert nn.dot_product_attention is not original and ATTENTION.users == 1
    assert nn.dot_product_attention is original
    assert largest_fused_head(["CPU:0"]) == 0


def test_planted_bug_is_caught(monkeypatch):
    monkeypatch.setattr(_keras_attention, "LARGE", {tf.bfloat16: -1.0})
    mask = tf.linalg.band_part(tf.ones([6, 6], tf.bool), -1, 0)
    found, _ = both(lambda q: ops.dot_product_attention(q, q, q, mask=mask), random(2, 6, 4, 16))
    with pytest.raises(AssertionError):
        assert_alike(found)


def test_stablehlo_is_what_it_says(monkeypatch):
    """The text, without running it: that takes GPUs."""
    monkeypatch.undo()

    @tf.function
    def program(q, k, bias):
        with tf.GradientTape() as tape:
            tape.watch([q, k, bias])
            with fused(256, lambda why: None):
                y = ops.dot_product_attention(q, k, k, bias=bias, is_causal=True, flash_attention=True)
        return y, tape.gradient(y, [q, k, bias])

    specs = [tf.TensorSpec(shape, tf.bfloat16) for shape in ([2, 6, 4, 16], [2, 8, 2, 16], [1, 4, 6, 8])]
    traced = program.get_concrete_function(*specs)
    there, back = (op for op in traced.graph.get_operations() if op.type == "XlaCallModule")
    assert [x.shape.as_list() for x in there.outputs] == [[2, 6, 4, 16], [2, 4, 6]]
    assert [x.shape.as_list() for x in back.outputs] == [[2, 6, 4, 16], [2, 8, 2, 16], [2, 8, 2, 16], [1, 4, 6, 8]]
    text = there.get_attr("module").decode()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text and "CAUSAL" in text and "tensor<2x4x6x16xbf16>" in text


GROUPS = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 32}
QWEN_MOE = {
    "moe_intermediate_dim": 32, "shared_expert_intermediate_dim": 32, "head_dim": 8, "num_experts": 2, "top_k": 1,
    "norm_top_k_prob": True,
}  # fmt: skip
NOT_OPENED = "Mixtral", "QwenMoe"  # they add losses
MODELS = {  # of KerasHub: the class, and what it is made with
    "llama": ("Llama", GROUPS),
    "mistral": ("Mistral", GROUPS),
    "mixtral": ("Mixtral", {**GROUPS, "num_experts": 2, "top_k": 1}),
    "phi3": ("Phi3", GROUPS),
    "gpt neo x": ("GPTNeoX", {"num_heads": 4, "hidden_dim": 32, "intermediate_dim": 32}),
    "qwen": ("Qwen", GROUPS),
    "qwen, window": ("Qwen", {**GROUPS, "use_sliding_window_attention": True, "sliding_window_size": 2}),
    "qwen3": ("Qwen3", {**GROUPS, "head_dim": 8}),
    "qwen3, window": ("Qwen3", {**GROUPS, "head_dim": 8, "sliding_window_size": 2}),
    "qwen moe": ("QwenMoe", {**GROUPS, **QWEN_MOE}),
    "qwen moe, window": (
        "QwenMoe", {**GROUPS, **QWEN_MOE, "use_sliding_window_attention": True, "sliding_window_size": 2},
    ),
    "gemma": ("Gemma", {**GROUPS, "head_dim": 8}),
    "gemma2, window": (
        "Gemma", {**GROUPS, "head_dim": 8, "use_sliding_window_attention": True, "sliding_window_size": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, made_with", MODELS.values(), ids=MODELS)
def test_models_of_keras_hub(name, made_with, in_place_of_cudnn, monkeypatch):
    """In float32: what they compute in bfloat16 differs by its rounding."""
    monkeypatch.setattr(_keras_attention, "LARGE", {tf.float32: -1e9})
    for of in ("gemma", "mixtral", "qwen_moe"):
        monkeypatch.setattr(f"keras_hub.src.models.{of}.{of}_attention.running_on_gpu", lambda: True)
    model = getattr(keras_hub.models, f"{name}Backbone")(vocabulary_size=50, num_layers=2, **made_with)
    x = {"token_ids": np.arange(24).reshape(2, 12), "padding_mask": np.arange(12) < np.array([[12], [9]])}
    found, told = [], []
    for head in (0, 256):
        with fused(head, told.append), tf.GradientTape() as tape:
            y = model(x)
            loss = tf.reduce_sum(y * tf.cast(random(*y.shape, seed=9), tf.float32))
        gradients = tape.gradient(loss, model.trainable_variables)  # the head has none
        found.append([y, *(tf.convert_to_tensor(g) for g in gradients if g is not None)])
    for a, b in zip(*found, strict=True):
        assert np.abs(a - b).max() < 1e-4 * max(1.0, np.abs(a).max())
    assert len(told) == 2 and not any(told)
    assert len(in_place_of_cudnn) == len(told)


@pytest.mark.parametrize("name, made_with", mostly(list(MODELS.values()), [MODELS["llama"]]))
@pytest.mark.parametrize("keys", mostly([2, 1], [2]))
def test_models_whose_layers_are_opened(name, made_with, keys, in_place_of_cudnn, monkeypatch):
    """Ranks have cuDNN compute their own heads."""
    monkeypatch.setattr(_keras_attention, "LARGE", {tf.float32: -1e9})
    for of in ("gemma", "mixtral", "qwen_moe"):
        monkeypatch.setattr(f"keras_hub.src.models.{of}.{of}_attention.running_on_gpu", lambda: True)
    monkeypatch.setattr(planner, "largest_fused_head", lambda devices: 256)
    if "num_key_value_heads" in made_with:
        made_with = {**made_with, "num_key_value_heads": keys}

    def build():
        backbone = getattr(keras_hub.models, f"{name}Backbone")(vocabulary_size=50, num_layers=2, **made_with)
        return keras.Model(backbone.inputs, layers.Dense(50)(backbone.output))

    x = {"token_ids": np.arange(72).reshape(6, 12) % 50, "padding_mask": np.arange(12) < np.array([[12], [9]] * 3)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    strategy = TensorParallelStrategy(["CPU:0", "CPU:1"])
    _, model = check(
        strategy, history(x, x["token_ids"], batch_size=3, epochs=2), 1e-4, 1e-4,
        build=build, loss=loss, jit_compile=True,
    )  # fmt: skip
    told = dict(strategy.explain(model).attention)
    opened = [at for at in told if at.endswith("dot_product_attention")]
    assert len(told) == 2 and not any(told.values()) and opened == ([] if name in NOT_OPENED else list(told))
    assert in_place_of_cudnn.heads == {2} or keys == 1 or not opened


def test_other_threads_are_left_alone(in_place_of_cudnn):
    """Programs are traced in one thread while another may run a model eagerly."""
    x, told = random(2, 4, 2, 8), []
    with fused(256, told.append):
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            other.submit(ops.dot_product_attention, x, x, x).result()
        assert not told and not in_place_of_cudnn
        ops.dot_product_attention(x, x, x)
        assert told == [None] and len(in_place_of_cudnn) == 1
    ops.dot_product_attention(x, x, x)
    assert len(told) == 1


@pytest.mark.fast
def test_a_cache_that_is_updated_from_a_place_that_is_a_tensor():
    @tf.function
    def place(index):
        return _keras_hub.within(lambda layer, **kwargs: _keras_hub.CALL.get()[1], None, cache_update_index=index)

    assert place(tf.constant(3)) == 3

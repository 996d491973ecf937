"""Models that are tuned: LoRA, frozen parts and weights of int8, under each strategy as on one device."""

import contextlib

import keras
import numpy as np
import pytest
from keras_hub import models
from training import mostly

import tfpar
from tfpar import Mesh
from tfpar.testing import assert_same, difference

TOKENS, WORDS = 6, 13
STRATEGIES = {
    "data": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "data x tensor": lambda: tfpar.MeshStrategy(Mesh(data=2, tensor=2)),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
    "zero 3": lambda: tfpar.MeshStrategy(Mesh(data=2), zero=3),
}
SIZE = dict(vocabulary_size=WORDS, num_layers=2, hidden_dim=8, intermediate_dim=16)
BACKBONES = {
    "llama": lambda: models.Llama3Backbone(**SIZE, num_query_heads=4, num_key_value_heads=2),
    "gpt2": lambda: models.GPT2Backbone(**SIZE, num_heads=4, max_sequence_length=TOKENS, dropout=0.0),
}
X = np.random.default_rng(0).integers(1, WORDS, (12, TOKENS))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def scope_of(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()


def made(name, strategy):
    """The backbone, and a language model of it."""
    keras.utils.set_random_seed(2)
    with scope_of(strategy):
        backbone = BACKBONES[name]()
        model = keras.Model(backbone.input, backbone.token_embedding(backbone.output, reverse=True))
        model.compile(keras.optimizers.Adam(0.01), LOSS)
    return backbone, model


def fit(model):
    model.fit({"token_ids": X, "padding_mask": np.ones_like(X)}, X, batch_size=6, verbose=0, shuffle=False)


def adapted(name, strategy, change, before=True):
    """A model that was trained, if asked for, then changed by a function of its backbone, and trained on."""
    backbone, model = made(name, strategy)
    if before:
        fit(model)
    with scope_of(strategy):
        change(backbone)
        model.compile(keras.optimizers.Adam(0.01), LOSS)
    fit(model)
    return model


def with_lora(backbone):
    backbone.enable_lora(2)
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=layer.lora_kernel_b.shape))


def frozen(backbone):
    backbone.token_embedding.trainable = False
    backbone.transformer_layers[0].trainable = False


def with_int8(backbone):
    backbone.quantize("int8")
    with_lora(backbone)


CHANGES = {"lora": with_lora, "frozen": frozen, "int8 with lora": with_int8}
CASES = [(change, name, strategy) for change in CHANGES for name in BACKBONES for strategy in STRATEGIES]
SAMPLE = [
    ("frozen", "llama", "pipeline"), ("lora", "gpt2", "zero 3"),
]  # fmt: skip
SOME = mostly(list(STRATEGIES), ["tensor"])


@pytest.mark.parametrize("change, name, strategy", mostly(CASES, SAMPLE))
def test_tuned_as_on_one_device(change, name, strategy):
    """After training, so that weights have their places; slots are there for weights that are trained."""
    one = adapted(name, None, CHANGES[change])
    other = adapted(name, STRATEGIES[strategy](), CHANGES[change])
    assert_same(one, other, 1e-4, 1e-5)
    assert len(other.optimizer.variables) == 2 + 2 * len(one.trainable_weights)


@pytest.mark.parametrize("strategy", SOME)
def test_slots_in_the_plan(strategy):
    """`explain` counts two slots of each adapter, and none of what is frozen."""
    strategy = STRATEGIES[strategy]()
    model = adapted("llama", strategy, with_lora, before=False)
    plan = strategy.explain(model)
    assert sum(plan.slot_bytes) == 2 * 4 * sum(int(np.prod(w.shape)) for w in model.trainable_weights)


@pytest.mark.parametrize("strategy", SOME)
def test_int8_predicts_as_on_one_device(strategy):
    results = []
    for each in (None, STRATEGIES[strategy]()):
        backbone, model = made("llama", each)
        with scope_of(each):
            backbone.quantize("int8")
        results.append(model.predict({"token_ids": X, "padding_mask": np.ones_like(X)}, verbose=0))
    assert difference(*results) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_int8_has_nothing_to_train(strategy):
    """And says so, with what to do."""
    strategy = STRATEGIES[strategy]()
    with strategy.scope():
        x = keras.Input((4,))
        h = keras.layers.Dense(5, use_bias=False)(x)
        model = keras.Model(x, keras.layers.Dense(3, use_bias=False)(h))
        model.quantize("int8")
        model.compile("sgd", "mse")
    with pytest.raises(tfpar.ModelError, match="enable_lora"):
        model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)

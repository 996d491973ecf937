"""Text that is generated under a strategy is that of one device, token by token."""

import contextlib

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import tfpar
from tfpar import Mesh
from tfpar.comm.in_program import Gang
from tfpar.compat import _keras_hub
from tfpar.errors import BatchError
from tfpar.tensor_parallel import layer_calls
from tfpar.trainer import generating
from tfpar.trainer.generating import Work, sized

ROWS, LENGTH, WORDS = 11, 14, 50
GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
HEADS = {"num_heads": 4, "hidden_dim": 16, "intermediate_dim": 32}
MODELS = {
    "Llama": ("CausalLM", GROUPED),
    "GPT2": ("CausalLM", {**HEADS, "max_sequence_length": LENGTH}),
    "Gemma": ("CausalLM", {**GROUPED, "head_dim": 4}),
    "Mixtral": ("CausalLM", {**GROUPED, "num_experts": 4, "top_k": 2}),
    "GPTNeoX": ("CausalLM", {**HEADS, "rotary_percentage": 0.5}),
    "Bart": ("Seq2SeqLM", {**HEADS, "max_sequence_length": LENGTH}),
}
STRATEGIES = {
    "data": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "zero 3": lambda: tfpar.MeshStrategy(Mesh(data=2), zero=3),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
    "data x tensor": lambda: tfpar.MeshStrategy(Mesh(data=2, tensor=2)),
    "stage x tensor": lambda: tfpar.MeshStrategy(Mesh(stage=2, tensor=2), micro_batches=2),
}
SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3),
    "random": lambda: keras_hub.samplers.RandomSampler(seed=3),
    "top k": lambda: keras_hub.samplers.TopKSampler(k=5, seed=3),
    "top p": lambda: keras_hub.samplers.TopPSampler(p=0.9, seed=3),
}


def build(name="Llama", sampler="greedy", strategy=None, jit_compile=False):
    kind, options = MODELS[name]
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        backbone = getattr(keras_hub.models, f"{name}Backbone")(vocabulary_size=WORDS, num_layers=2, **options)
        model = getattr(keras_hub.models, name + kind)(backbone=backbone, preprocessor=None)
        model.compile(optimizer="sgd", sampler=SAMPLERS[sampler](), jit_compile=jit_compile)
    for n, weight in enumerate(model.weights):
        if weight.dtype == "float32":
            weight.assign(weight.numpy() + 0.3 * np.random.default_rng(n).normal(size=weight.shape))
    return model


def prompts(name="Llama"):
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < rng.integers(2, 9, (ROWS, 1))
    tokens = rng.integers(1, WORDS, (ROWS, LENGTH)) * mask
    if name != "Bart":
        return {"token_ids": tokens, "padding_mask": mask}
    decoder = {"decoder_token_ids": tokens[::-1].copy(), "decoder_padding_mask": mask[::-1].copy()}
    return {"encoder_token_ids": tokens, "encoder_padding_mask": mask, **decoder}


def generated(model, name="Llama", times=2, **options):
    """What a model generates, in several calls: random states go on; zeros for what comes after a stop token."""
    found = []
    for _ in range(times):
        results = model.generate(prompts(name), **{"stop_token_ids": None, **options})
        tokens, mask = (
            next(x for key, x in results.items() if kind in key and "encoder" not in key.replace("decoder", ""))
            for kind in ("token_ids", "mask")
        )
        found.append(np.where(mask, tokens, 0))
    return np.stack(found)


@pytest.mark.parametrize(
    "strategy, sampler",
    [
        ("data", "random"), ("tensor", "top k"), ("zero 3", "greedy"), ("pipeline", "top p"),
        *(pytest.param(*case, marks=pytest.mark.every) for case in (
            ("data", "beam"), ("data", "contrastive"), ("tensor", "greedy"), ("tensor", "beam"),
            ("tensor", "contrastive"),
            ("data x tensor", "random"), ("data x tensor", "beam"), ("stage x tensor", "greedy"), ("pipeline", "beam"),
        )),
    ],
)  # fmt: skip
def test_tokens_are_those_of_one_device(strategy, sampler):
    expected = generated(build(sampler=sampler))
    np.testing.assert_array_equal(generated(build(sampler=sampler, strategy=STRATEGIES[strategy]())), expected)


@pytest.mark.parametrize(
    "name, strategy",
    [
        ("Bart", "tensor"),
        *(pytest.param(*case, marks=pytest.mark.every) for case in (
            ("Gemma", "tensor"), ("GPT2", "tensor"), ("Mixtral", "tensor"), ("Mixtral", "data"), ("Bart", "data"),
            ("Bart", "pipeline"), ("GPTNeoX", "data"),
            ("GPTNeoX", "tensor"), ("Gemma", "data x tensor"),
        )),
    ],
)  # fmt: skip
def test_models(name, strategy):
    expected = generated(build(name), name, 1)
    np.testing.assert_array_equal(generated(build(name, strategy=STRATEGIES[strategy]()), name, 1), expected)


@pytest.mark.parametrize("strategy", [pytest.param("data", marks=pytest.mark.every), "tensor"])
def test_stop_tokens_after_training(strategy):
    def run(model):
        x = prompts()
        model.fit(x, x["token_ids"], batch_size=ROWS, verbose=0)
        return generated(model, stop_token_ids=[3, 7, 11])

    expected = run(build(sampler="random"))
    assert (expected == 0).any()
    np.testing.assert_array_equal(run(build(sampler="random", strategy=STRATEGIES[strategy]())), expected)


def test_compiled_for_few_numbers_of_prompts():
    model = build(sampler="random", strategy=STRATEGIES["data"](), jit_compile=True)
    np.testing.assert_array_equal(generated(model), generated(build(sampler="random", jit_compile=True)))
    assert len(model.make_generate_function().functions) == 2  # six prompts on each, and six of which five are real


def test_each_rank_has_its_heads_of_the_cache():
    model = build(strategy=STRATEGIES["tensor"]())
    generated(model, times=1)
    (function,) = model.make_generate_function().functions.values()
    graphs = [function.graph, *(f.graph for f in function.graph._functions.values() if hasattr(f, "graph"))]
    caches = [op.outputs[0].shape for g in graphs for op in g.get_operations() if op.type == "XlaDynamicUpdateSlice"]
    caches = {tuple(shape[1:]) for shape in caches if shape.rank == 4}
    assert caches == {(LENGTH, 1, 4)}  # of two heads


@pytest.mark.parametrize("bug", ["other rows", "lost sum"])
def test_planted_bugs_are_caught(bug, monkeypatch):
    expected, strategy = generated(build(sampler="random")), "data" if bug == "other rows" else "tensor"
    if bug == "other rows":
        original = generating.Place
        monkeypatch.setattr(
            generating,
            "Place",
            lambda rows, *rest: original(rows * 0 + rows[:1], *rest) if tf.is_tensor(rows) else original(rows, *rest),
        )
    else:
        monkeypatch.setattr(Gang, "exchanged", lambda self, kind, axis, x, *rest, **options: x)
    monkeypatch.setattr(layer_calls, "of_equal_parts", lambda *args: None)
    with contextlib.suppress(ValueError, tf.errors.InvalidArgumentError):
        found = generated(build(sampler="random", strategy=STRATEGIES[strategy]()))
        assert (found != expected).any()


@pytest.mark.fast
def test_shares_follow_speeds():
    lengths = np.arange(60) % 7

    def shares(speeds, compiled=False, order=(0, 1) * 20):
        work = Work(lengths, 2, speeds, compiled)
        taken = [(r, rows) for r in order if (rows := work.take(r)) is not None]
        assert sorted(np.concatenate([rows for _, rows in taken])) == list(range(60))
        assert list(lengths[taken[0][1]]) == sorted(lengths)[: len(taken[0][1])]
        return [[len(rows) for r, rows in taken if r == replica] for replica in range(2)]

    assert shares({0: 2.0, 1: 1.0}) == [[40], [20]]
    assert shares({0: 1.1, 1: 1.0}) == [[30], [30]]
    assert shares({}, compiled=True) == [[30], [30]]
    unknown = shares({})
    assert max(unknown[0]) <= 15 and len(unknown[0]) > 3  # whoever is free takes more
    assert [sized(n) for n in (1, 2, 3, 5, 6, 7, 12, 13, 100)] == [1, 2, 3, 6, 6, 8, 12, 16, 128]


@pytest.mark.parametrize(
    "change, options, why",
    [
        (lambda x: {k: v[:0] for k, v in x.items()}, {}, "no prompts"),
        (lambda x: {**x, "padding_mask": x["padding_mask"] & (np.arange(ROWS) != 4)[:, None]}, {}, "prompt 4 has no"),
        (lambda x: {k: np.pad(v, [[0, 0], [0, 3]]) for k, v in x.items()}, {}, "takes 14 tokens; received.* 17"),
        (lambda x: x, {"stop_token_ids": [50]}, "stop_token_ids has 50; the tokens of .* are 0 to 49"),
    ],
)
def test_bad_input(change, options, why):
    model = build("GPT2", strategy=STRATEGIES["data"]())
    with pytest.raises(BatchError, match=why):
        model.generate(change(prompts()), **{"stop_token_ids": None, **options})


@pytest.mark.fast
def test_private_names_of_keras_hub():
    assert keras_hub.samplers.Sampler.run_loop and keras_hub.models.CausalLM.make_generate_function
    logits = tf.constant(np.random.default_rng(0).normal(size=(6, 9)), tf.float32)
    expected = keras.random.categorical(logits, 1, seed=5)
    rows = tf.constant([4, 1, 1])
    with _keras_hub.DRAWS.inside((rows, tf.constant(6))):
        found = keras.random.categorical(tf.gather(logits, rows), 1, seed=5)
    np.testing.assert_array_equal(found, tf.gather(expected, rows))

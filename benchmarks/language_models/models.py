"""The Llama that both sides run, its texts, and how generating is timed."""

import contextlib
import time


def add_options(p):
    p.add_argument("--task", choices=("train", "generate"), default="train")
    for name, default in (
        ("blocks", 22), ("width", 2048), ("inner", 5632), ("heads", 32), ("key-value-heads", 4), ("words", 32000),
        ("batch", 16), ("tokens", 1024), ("new", 128),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=int, default=default, help="for each GPU" if name == "batch" else None)
    p.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 256], help="generated for at once")


def causal_lm(options, dtype="mixed_bfloat16"):
    """A Llama, after Touvron et al. (2023); of 1.1 billion weights by default, as TinyLlama (Zhang et al., 2024)."""
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=options.words, num_layers=options.blocks, hidden_dim=options.width, dtype=dtype,
        num_query_heads=options.heads, num_key_value_heads=options.key_value_heads, intermediate_dim=options.inner,
    )  # fmt: skip
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def texts(options):
    """Random words, and the word after each."""
    import numpy as np

    ids = np.random.default_rng(0).integers(1, options.words, (options.batch, options.tokens + 1), "int32")
    return {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}, ids[:, 1:]


def filled(options, scope=None):
    """A model that generates, with random weights that are made on a device."""
    import keras

    with scope or contextlib.nullcontext():
        model = causal_lm(options, "bfloat16")
        model.compile(sampler="greedy")
    for seed, weight in enumerate(model.weights):
        if len(weight.shape) > 1:
            weight.assign(0.02 * keras.random.normal(weight.shape, dtype=weight.dtype, seed=seed))
    return model


def tokens_in_a_second(options, model, prompts):
    """New tokens in a second for so many prompts of as many tokens as are made; the fastest of three times."""
    import numpy as np

    ids = np.random.default_rng(0).integers(1, options.words, (prompts, 2 * options.new), "int32")
    mask = np.broadcast_to(np.arange(2 * options.new) < options.new, ids.shape)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        made = model.generate({"token_ids": ids * mask, "padding_mask": mask}, stop_token_ids=None)
        np.asarray(made["token_ids"])
        times.append(time.perf_counter() - begin)
    return prompts * options.new / min(times[1:])

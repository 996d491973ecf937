"""What a user is told."""

import re

import keras
import numpy as np
import pytest
from keras import layers
from training import compiled, data, history
from zoo import ZOO, Subclassed

import tfpar
from tfpar import ModelError
from tfpar.planning.plan_report import in_units
from tfpar.testing import difference

FOUR = [f"CPU:{n}" for n in range(4)]


def chain():
    x = h = layers.Input((6,))
    for n in range(8):
        h = layers.Dense(500, activation="relu", name=f"layer_{n}")(h)
    return keras.Model(x, layers.Dense(3, activation="softmax", name="last")(h))


def test_explain():
    strategy = tfpar.PipelineStrategy(FOUR, micro_batches=8)
    model = compiled(strategy, build=chain, optimizer="adam")
    plan = strategy.explain(model, batch_size=64)
    assert [plan.device(s) for s in range(4)] == FOUR
    assert sum(map(plan.parameter_bytes, range(4))) == sum(np.asarray(w).nbytes for w in model.weights)
    assert plan.micro_rows == 8
    assert difference(plan.timeline.bubble, tfpar.simulate(plan.schedule, plan.cost).bubble) == 0.0
    text = str(plan)
    lines = text.splitlines()
    assert "4 stages, 8 micro-batches" in lines[0] and "of 64 samples" in text
    for s, first in enumerate(plan.partition.graph.ops[plan.partition.ops(s)[0]].name for s in range(4)):
        assert any(line.split()[:3] == [str(s), FOUR[s], first] for line in lines if line.split())
    assert f"predicted bubble {plan.timeline.bubble:.0%}" in text and "⁰" in text and "?" not in text

    history(*data(64), batch_size=64)(model)
    after = strategy.explain(model)
    assert after.rows == 64 and after.partition.stage_of == plan.partition.stage_of
    assert sum(map(after.optimizer_bytes, range(4))) == 2 * sum(map(plan.parameter_bytes, range(4)))
    assert "?" not in str(after)


@pytest.mark.fast
@pytest.mark.parametrize("policy, read", [("float32", 4), ("mixed_bfloat16", 2)])
def test_gradients(policy, read):
    """Their sums, those of a micro-batch beside them, and in mixed precision the weights as layers read them."""
    keras.config.set_dtype_policy(policy)
    strategies = tfpar.PipelineStrategy(FOUR, micro_batches=8), tfpar.LayerPlacementStrategy(FOUR)
    for strategy, each in zip(strategies, (4 + read + (read if read < 4 else 0), 4), strict=True):
        plan = strategy.explain(compiled(strategy, build=chain), 64)
        count = sum(map(plan.parameter_bytes, range(4))) / 4
        assert sum(map(plan.gradient_bytes, range(4))) == each * count
        parts = plan.parameter_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.activation_bytes
        assert plan.bytes(1) == sum(of(1) for of in parts) and in_units(plan.gradient_bytes(1)) in str(plan)


@pytest.mark.fast
def test_activations_follow_the_schedule():
    """1F1B holds `stages - s` micro-batches, GPipe all of them."""

    def held(schedule):
        strategy = tfpar.PipelineStrategy(FOUR, micro_batches=8, schedule=schedule)
        plan = strategy.explain(compiled(strategy, build=chain), 64)
        return [plan.activation_bytes(s) for s in range(4)]

    assert np.allclose(np.divide(held("1f1b"), held("gpipe")), [4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_explain_needs_to_know_the_layers():
    strategy = tfpar.PipelineStrategy(FOUR[:2])
    with strategy.scope():
        model = Subclassed()
        model.compile("sgd", "mse")
    with pytest.raises(ModelError, match="known when it has seen data: call fit, evaluate or predict"):
        strategy.explain(model)
    model.predict(ZOO["subclassed"].data(np.random.default_rng(0), 4)[0], verbose=0)
    assert "dense" in str(strategy.explain(model))


@pytest.mark.fast
def test_explain_replicas():
    """What each holds, before and after training; what is computed for all of them at once."""

    def build():
        x = layers.Input((6,))
        h = layers.BatchNormalization(name="normalize")(layers.Dense(50)(x))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    strategy = tfpar.DataParallelStrategy(FOUR[:3])
    model = compiled(strategy, build=build, optimizer="adam")
    plan = strategy.explain(model, batch_size=64)
    weights = sum(np.asarray(w).nbytes for w in model.weights)
    assert sum(map(plan.parameter_bytes, range(plan.partition.stages))) == weights and plan.micro_rows == 22
    text = str(plan)
    rows = [line.split()[:3] for line in text.splitlines() if "CPU:" in line]
    assert rows == [["0", "CPU:0", "21"], ["1", "CPU:1", "21"], ["2", "CPU:2", "22"]]
    moments = [(e.kind, e.where, e.backward, e.bytes) for e in plan.exchanges]
    assert moments == [
        ("all-gather", "normalize/moments", False, 3 * (50 + 50 + 1) * 4),
        ("reduce-scatter", "normalize/moments", True, 3 * (50 + 50 + 1) * 4),
    ]
    assert re.search(r"all-gather +data +forward", text) and "?" not in text
    history(*data(64), batch_size=64)(model)
    after = strategy.explain(model)
    assert after.rows == 64 and sum(after.slot_bytes) == 2 * sum(np.asarray(w).nbytes for w in model.trainable_weights)


@pytest.mark.fast
def test_size():
    texts = ["0 B", "999 B", "1.5 kB", "2.5 MB", "3 GB", "4 TB"]
    assert [in_units(n) for n in (0, 999, 1500, 2.5e6, 3e9, 4e12)] == texts


# ---- how it looks


@pytest.mark.fast
def test_as_a_notebook_shows_it():
    strategy = tfpar.DataParallelStrategy(2)
    plan = strategy.explain(compiled(strategy, build=chain))
    assert repr(plan) == str(plan) and len(repr(plan)) < 2000 and "2 replicas" in repr(plan)
    assert "added up over replicas, from 1 program " in str(plan)
    html = plan._repr_html_()
    assert html.startswith("<pre") and "2 replicas" in html and "CPU:1" in html


@pytest.mark.fast
def test_names_are_listed():
    assert {*tfpar.__all__} <= {*dir(tfpar)} and "PipelineStrategy" in dir(tfpar)


@pytest.mark.parametrize(
    "make", [keras.optimizers.Adam, keras.optimizers.Adafactor, keras.optimizers.Muon, keras.optimizers.SGD,
             lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(use_ema=True))],
)  # fmt: skip
def test_what_the_optimizer_will_hold_is_known_after_compile(make):
    strategy = tfpar.DataParallelStrategy(2, zero=1)
    model = compiled(strategy, make)
    before = strategy.explain(model)
    history(*data(16))(model)
    assert before.slot_bytes == strategy.explain(model).slot_bytes
    with strategy.scope():
        never = chain()
    assert strategy.explain(never).slot_bytes == () and "?" in str(strategy.explain(never))


@pytest.mark.fast
def test_why_a_layer_is_not_opened():
    class Hides(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense, self.seed = layers.Dense(6), keras.random.SeedGenerator(1)

        def call(self, x):
            return self.dense(x) + keras.random.normal((6,), seed=self.seed)

    def build():
        x = layers.Input((6,))
        return keras.Model(x, Hides(name="hides")(x))

    strategy = tfpar.TensorParallelStrategy(2)
    plan = strategy.explain(compiled(strategy, build=build))
    why = next(w.why for w in plan.weights if "dense" in w.path)
    assert why.startswith("no rule divides Hides, and what it runs is not divided: it changes seed_generator/")
    assert "draws random numbers, beside its layers" in why

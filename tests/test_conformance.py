"""Every strategy, every model, every hard case: through `model.fit`, each equals one device."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from zoo import ZOO

import tfpar
from tfpar.testing import different, named_values

STRATEGIES = {
    "layer_placement": lambda: tfpar.LayerPlacementStrategy(["CPU:0", "CPU:1", "CPU:2"]),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1", "CPU:2"], micro_batches=3),
    "data_parallel": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1", "CPU:2"]),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1", "CPU:2"], sequence_parallel=True),
}
MESHES = [(d, s, t) for d, s, t in itertools.product((1, 2, 4, 8), repeat=3) if d * s * t in (2, 4, 8)]
OPTIONS = [  # of a mesh, one after the other
    {},
    {"micro_batches": 2},
    {"zero": 1},
    {"zero": 2, "micro_batches": 2},
    {"zero": 3},
    {"sequence_parallel": True, "micro_batches": 2, "schedule": "gpipe"},
    {"zero": 3, "micro_batches": 3},
    {"offload": "optimizer"},
]
BATCHES = {"even": [8, 8], "uneven last": [8, 8, 3], "one-row last": [8, 1], "uneven first": [5, 8]}

PREDICTED = "uneven last"


class Config:
    """A way to train: in float64 where the optimizer divides by tiny numbers."""

    def __init__(self, optimizer, floatx="float32", masks=False, weights=False, **compile):
        self.optimizer, self.floatx, self.masks, self.weights, self.compile = optimizer, floatx, masks, weights, compile

    @property
    def tolerance(self):
        return dict(rtol=1e-5, atol=1e-7) if self.floatx == "float32" else dict(rtol=1e-9, atol=1e-10)


def sgd(**kwargs):
    return keras.optimizers.SGD(0.05, momentum=0.9, **kwargs)


CONFIGS = {
    "sgd": Config(sgd),
    "adamw clipnorm": Config(lambda: keras.optimizers.AdamW(0.01, clipnorm=0.1), "float64"),
    "accumulation": Config(lambda: sgd(gradient_accumulation_steps=2, global_clipnorm=0.5)),
    "sample weights, steps_per_execution": Config(sgd, weights=True, steps_per_execution=2),
    "masks": Config(sgd, masks=True),
}


@keras.saving.register_keras_serializable()
class MaskBySign(layers.Layer):
    """Masks the samples, or the tokens, in which the first feature of the output is negative."""

    def call(self, y):
        return y + 0.0

    def compute_mask(self, y, previous_mask=None):
        valid = y[..., 0] < ops.mean(y, axis=-1)
        return valid if previous_mask is None else valid & previous_mask


def with_masks(model):
    if not hasattr(model, "inputs") or not model.built:
        return model
    masked = [MaskBySign(name=f"mask_{n}")(y) for n, y in enumerate(model.outputs)]
    return keras.Model(model._inputs_struct, keras.tree.pack_sequence_as(model._outputs_struct, masked))


def built(zoo, config):
    """A compiled model with all its variables, the same at every call."""
    keras.utils.set_random_seed(1)
    model = zoo.build()
    if config.masks and model.built:
        model = with_masks(model)
    weighted = {"weighted_metrics": zoo.metrics} if config.weights else {"metrics": zoo.metrics}
    loss, loss_weights = zoo.loss() if callable(zoo.loss) else zoo.loss, zoo.loss_weights
    if config.masks and isinstance(loss, dict):
        loss, loss_weights = list(loss.values()), None
    model.compile(config.optimizer(), loss, loss_weights=loss_weights, **weighted, **config.compile)
    return model


def batches_of(zoo, config, sizes):
    rng = np.random.default_rng(7)
    result = []
    for rows in sizes:
        batch = zoo.data(rng, rows)
        if config.weights:
            like = batch[1] if zoo.per_token else np.zeros(rows)
            batch = (*batch, rng.uniform(0.2, 3.0, like.shape).astype(keras.config.floatx()))
        result.append(batch)
    return result


def dataset(batches):
    """These batches, as one dataset that leaves their size open."""
    parts = [tf.data.Dataset.from_tensors(b) for b in batches]
    spec = tf.nest.map_structure(lambda s: tf.TensorSpec([None, *s.shape[1:]], s.dtype), parts[0].element_spec)

    def generate():
        for part in parts:
            yield from part

    # of unknown length, Keras on one device counts an iteration too many at the end of each epoch
    data = tf.data.Dataset.from_generator(generate, output_signature=spec)
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def run_all(model, zoo, config, patterns=tuple(BATCHES)):
    """Fit from the same start for each pattern of batches: the history and all variables after each, then predict."""
    start, results = None, {}
    for name in patterns:
        batches = batches_of(zoo, config, BATCHES[name])
        if start is None:
            model(batches[0][0])  # creates the variables of a model that waits for an input
            model.optimizer.build(model.trainable_variables)
            variables = [*model.variables, *model.optimizer.variables]
            start = [v.numpy() for v in variables]
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        history = model.fit(dataset(batches), epochs=2, verbose=0).history
        results[name] = [*history.items(), *named_values(model).items()]
        if name == PREDICTED:
            predictions = model.predict(dataset(batches), verbose=0)
            results["predictions"] = [*enumerate(keras.tree.flatten(predictions))]
    return results


REFERENCES = {}


def reference(model_name, config_name):
    key = model_name, config_name
    if key not in REFERENCES:
        REFERENCES.clear()
        zoo, config = ZOO[model_name], CONFIGS[config_name]
        REFERENCES[key] = run_all(built(zoo, config), zoo, config)
    return REFERENCES[key]


# which kind of split must leave the numbers
NEEDS = {"layer_placement": "", "pipeline": "micro", "data_parallel": "data", "tensor": "tensor"}
FEWER = {  # how to train, where a mesh does the same: models take turns
    "layer_placement": ["accumulation", "sgd"],
    "pipeline": ["masks", "accumulation"],
    "data_parallel": ["accumulation", "masks"],
    "tensor": ["adamw clipnorm"],
}

DEEP = ("branches", "gpt", "nested", "normalized", "convolutional")  # enough layers for eight stages


def splits(mesh, options):
    """What a mesh splits so that some models have other numbers."""
    data, _, tensor = mesh
    parts = {"data": data > 1, "micro": options.get("micro_batches", 1) > 1, "tensor": tensor > 1}
    return {kind for kind, split in parts.items() if split}


def on_meshes():
    """Every model on every mesh, each time with other options and trained in another way; some only by `-m every`."""
    turn = itertools.count()
    for (at, (m, zoo)), (place, mesh) in itertools.product(enumerate(ZOO.items()), enumerate(MESHES)):
        n = next(turn)
        options = [OPTIONS[(n + k) % len(OPTIONS)] for k in range(len(OPTIONS))]
        fit = [o for o in options if splits(mesh, o) <= {*zoo.splits.split()}]
        in_turn = (at + place) % {2: 5, 4: 11, 8: 31}[math.prod(mesh)] == 0
        if fit and (mesh[1] < 8 or m in DEEP):
            yield m, list(CONFIGS)[n % len(CONFIGS)], (mesh, fit[0]), in_turn


def on_strategies():
    """Every model under every strategy, trained in one of its ways or the other; four of five only by `-m every`."""
    for (at, (m, zoo)), (place, (s, ways)) in itertools.product(enumerate(ZOO.items()), enumerate(FEWER.items())):
        if NEEDS[s] in zoo.splits:
            yield from ((m, c, s, (at + n) % len(ways) == 0 and (at + place) % 5 == 0) for n, c in enumerate(ways))


FAST = [
    ("branches", "sgd", ((1, 1, 2), {})),
    ("stateful", "adamw clipnorm", ((1, 2, 1), {})),
]  # fmt: skip
CASES = [
    pytest.param(
        m, c, s, id=f"{m}-{c}-{s}",
        marks=[
            pytest.mark.xdist_group(f"{m} {c}"),
            *([pytest.mark.every] if not in_turn else [pytest.mark.fast] if (m, c, s) in FAST else []),
        ],
    )
    for m, c, s, in_turn in sorted([*on_strategies(), *on_meshes()], key=lambda case: case[:2])
]  # fmt: skip


def made(strategy):
    """A strategy by its name, or on a mesh."""
    if isinstance(strategy, str):
        return STRATEGIES[strategy]()
    mesh, options = strategy
    return tfpar.MeshStrategy(tfpar.Mesh(*mesh), **options)


@pytest.mark.parametrize("model_name, config_name, strategy", CASES)
def test_equals_one_device(model_name, config_name, strategy):
    zoo, config = ZOO[model_name], CONFIGS[config_name]
    keras.config.set_floatx(config.floatx)
    keras.config.set_dtype_policy(config.floatx)
    expected = reference(model_name, config_name)
    patterns = BATCHES if isinstance(strategy, str) else [PREDICTED]  # a mesh is traced long
    strategy = made(strategy)
    with strategy.scope():
        model = built(zoo, config)
        found = run_all(model, zoo, config, patterns)
    wrong = []
    for name in found:
        values = expected[name]
        names, one = zip(*values, strict=True)
        _, other = zip(*found[name], strict=True)
        assert any(np.any(a) for a in one)
        wrong += different([f"{name}: {n}" for n in names], one, other, **config.tolerance)
    assert not wrong, "\n".join(wrong)
    used = {copy.device[-5:] for v in model.weights for copy in v.value.copies}
    assert used <= {*strategy.mesh.devices} and len(used) > strategy.mesh.size / 2  # a stage may have no weights

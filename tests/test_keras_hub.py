"""Every backbone of KerasHub under each strategy, against one device: a sample here, all by `-m every`."""

import itertools

import keras
import keras_hub_zoo as zoo
import pytest
from training import check, mostly

import tfpar
from tfpar import Mesh

ROWS = 18  # in batches of 7: uneven ones, too
STRATEGIES = {
    "data": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "zero 3": lambda: tfpar.MeshStrategy(Mesh(data=4), zero=3),
    "mesh": lambda: tfpar.MeshStrategy(Mesh(data=2, tensor=2)),
}


def strategy_for(name, kind):
    """A strategy; a pipeline of one micro-batch for models whose numbers are those of whole batches."""
    if kind == "pipeline" and name in zoo.OF_WHOLE_BATCHES:
        return tfpar.LayerPlacementStrategy(["CPU:0", "CPU:1"])
    return STRATEGIES[kind]()


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(1e-3, epsilon=1e-3),
}
NAMES = [name for name in zoo.BACKBONES if name not in zoo.NOT_TRAINED]
CASES = list(itertools.product(NAMES, STRATEGIES, OPTIMIZERS))
SAMPLE = [
    ("Bert", "tensor", "adam"), ("GPT2", "mesh", "sgd"), ("Llama", "tensor", "sgd"), ("Roberta", "pipeline", "adam"),
]  # fmt: skip


def use(model, name):
    """What a model's fit, evaluate and predict give."""
    x, y = zoo.data(name, ROWS)
    history = model.fit(x, y, batch_size=7, shuffle=False, verbose=0).history
    return history, model.evaluate(x, y, batch_size=7, verbose=0), model.predict(x, batch_size=7, verbose=0)


@pytest.mark.parametrize("name, strategy, optimizer", mostly(CASES, SAMPLE), ids=lambda value: value)
def test_equals_one_device(name, strategy, optimizer):
    dtype = zoo.dtype(name)
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    exact = dtype == "float64" and name not in zoo.FLOAT32_INSIDE
    rtol, atol = (1e-9, 1e-11) if exact else (1e-4, 1e-5)
    made = dict(build=lambda: zoo.model(name), optimizer=OPTIMIZERS[optimizer])
    check(strategy_for(name, strategy), lambda model: use(model, name), rtol, atol, **made)


@pytest.mark.parametrize("strategy", mostly(list(STRATEGIES), ["tensor"]))
def test_mixed_precision(strategy):
    """Layers that are opened read their weights in the dtype that Keras casts them to."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    made = dict(build=lambda: zoo.model("Llama"), optimizer=OPTIMIZERS["sgd"])
    # not the accuracy: which of two equal logits is the larger one is chance
    check(STRATEGIES[strategy](), lambda model: use(model, "Llama")[2], 2e-2, 2e-3, **made)

"""Layouts in Keras' own words."""

import keras
import numpy as np
import pytest
from keras import layers

import tfpar
from tfpar.planning.layout_map import layouts_of
from tfpar.planning.op_graph import Variable
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.testing import assert_same

pytestmark = pytest.mark.fast

VARIABLES = [
    Variable("up/kernel", 0, shape=(6, 12)), Variable("up/bias", 0, shape=(12,)),
    Variable("down/kernel", 0, shape=(12, 6)), Variable("norm/gamma", 0, shape=(6,)),
]  # fmt: skip
LAYERS = [(0, 1), (2,), (3,)]


def layout_map(rules, shape=(1, 2), names=("batch", "model")):
    mesh = keras.distribution.DeviceMesh(shape, names, [f"cpu:{n}" for n in range(int(np.prod(shape)))])
    found = keras.distribution.LayoutMap(mesh)
    for key, axes in rules.items():
        found[key] = axes
    return found


RULES = {"up/kernel": (None, "model"), "down/kernel": ("model", None)}


def test_what_is_not_mentioned():
    assert layouts_of("auto", VARIABLES, LAYERS, 2) is None
    found = layouts_of(layout_map(RULES), VARIABLES, LAYERS, 2)
    assert found == {0: Layout(1), 2: Layout(0), 3: REPLICATED}  # the bias goes with its kernel
    assert layouts_of({r"(up|down)/kernel": ("tensor", None)}, VARIABLES, LAYERS, 2)[0] == Layout(0)
    assert layouts_of(layout_map({"up/kernel": ("batch", "model")}), VARIABLES, LAYERS, 2)[0] == Layout(1)


def test_a_whole_path_wins_over_a_pattern():
    rules = {"kernel": (None, "tensor"), "down/kernel": ("tensor", None)}
    assert layouts_of(rules, VARIABLES, LAYERS, 2)[2] == Layout(0)


@pytest.mark.parametrize(
    "rules, ranks, message",
    [
        ({"upp/kernel": (None, "tensor")}, 2, "'upp/kernel' matches no weight; the nearest path is 'up/kernel'"),
        ({"kern": (None, "tensor"), "up/k": ("tensor", None)}, 2, "up/kernel is split along dim 1 by 'kern'.*'up/k'"),
        ({"up/kernel": (None, "tensor")}, 5, r"dim 1 of up/kernel \(6, 12\), of size 12, between 5 ranks"),
        ({"up/kernel": ("tensor",)}, 2, r"gives 1 axes, .*up/kernel has the shape \(6, 12\)"),
        ({"up/kernel": ("tensor", "tensor")}, 2, "along 2 dims"),
        ({"up/kernel": (None, "tensro")}, 2, "names the axis 'tensro'; an entry is None, or 'tensor' for the dim"),
        ("columns", 2, 'layout is "auto"'),
        (layout_map({}, (2, 1)), 2, r"device mesh of this LayoutMap is {'batch': 2, 'model': 1}"),
    ],
)
def test_errors(rules, ranks, message):
    with pytest.raises(tfpar.LayoutError, match=message):
        layouts_of(rules, VARIABLES, LAYERS, ranks)


def build():
    x = layers.Input((6,))
    h = layers.Dense(12, activation="relu", name="up")(x)
    return keras.Model(x, layers.LayerNormalization(name="norm")(layers.Dense(6, name="down")(h)))


def trained(strategy=None):
    keras.utils.set_random_seed(0)
    x, y = np.random.default_rng(0).normal(size=(2, 8, 6))
    if strategy is None:
        model = build()
        model.compile("sgd", "mse")
    else:
        with strategy.scope():
            model = build()
            model.compile("sgd", "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("rules", [RULES, {"down/kernel": (None, "model")}, {"norm/gamma": ("model",)}])
def test_a_model_divided_as_written(rules):
    strategy = tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"], layout=layout_map(rules))
    model = trained(strategy)
    assert_same(trained(), model, 1e-5, 1e-7)
    shapes = {v.path: [c.shape.as_list() for c in v.value.copies] for v in model.weights}
    for path in ("up/kernel", "down/kernel", "norm/gamma"):
        axes = rules.get(path, (None,) * len(shapes[path][0]))
        whole = dict(zip(("up/kernel", "down/kernel", "norm/gamma"), ((6, 12), (12, 6), (6,)), strict=True))[path]
        part = [n // 2 if axis else n for n, axis in zip(whole, axes, strict=True)]
        assert shapes[path] == [part] * 2


def test_a_layout_that_no_rule_can_run():
    strategy = tfpar.TensorParallelStrategy(
        ["CPU:0", "CPU:1"], layout={"up/bias": ("tensor",), "up/kernel": ("tensor", None)}
    )
    with pytest.raises(tfpar.LayoutError, match="up cannot run on 2 ranks with up/kernel .* it can with"):
        trained(strategy)

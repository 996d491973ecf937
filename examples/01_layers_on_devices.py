"""Where does each layer go, and how do I decide it myself?"""

import keras
import numpy as np
from keras import layers

import tfpar
from tfpar.testing import logical_cpus


def build():
    x = h = layers.Input((64,))
    for n in range(6):
        h = layers.add([h, layers.Dense(64, activation="gelu", name=f"block_{n}")(h)])
    return keras.Model(x, layers.Dense(10, name="head")(h))


def main():
    logical_cpus(3)
    x, y = np.random.rand(256, 64).astype("float32"), np.random.randint(10, size=256)
    placements = {
        "auto": "auto",
        "a new stage begins at these layers": ["block_1", "block_4"],
        "these layers on these stages, others follow what they use": {"block_2": 1, "head": 2},
    }
    for title, placement in placements.items():
        strategy = tfpar.LayerPlacementStrategy(placement=placement)
        with strategy.scope():
            model = build()
            model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=64, verbose=0)
        print(title, strategy.explain(model), sep="\n")
        for layer in model.layers:
            if layer.weights:
                print(f"  {layer.name}: {layer.weights[0].value.device[-5:]}")
    strategy = tfpar.LayerPlacementStrategy(placement=["blok_3", "head"])
    with strategy.scope():
        model = build()
    try:
        strategy.explain(model)
    except tfpar.PartitionError as error:
        print("a name that no layer has:", error)


if __name__ == "__main__":
    main()

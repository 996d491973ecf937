"""Two models, each trained on one device, data-parallel, by layers and as a pipeline: the same numbers each time.

Images are scikit-learn's handwritten digits, text is the source of Python's standard library. Where there is no GPU,
four logical devices share the CPU: that shows that the numbers stay, not how fast it can be.
"""

import argparse
import contextlib
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

import tfpar
from tfpar.testing import logical_cpus

TOKENS, WIDTH, BLOCKS, CHARACTERS = 48, 48, 4, 128


def digits():
    """Handwritten digits, 8 by 8 pixels."""
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8, 1) / 16).astype("float32"), labels


def cnn():
    """A small convolutional network, smooth: where ReLU switches, rounding would grow from step to step."""
    x = h = layers.Input((8, 8, 1))
    for n in range(5):
        h = layers.Conv2D(32, 3, padding="same", activation="gelu", name=f"conv_{n}")(h)
    h = layers.Flatten()(layers.AveragePooling2D(2)(h))
    return keras.Model(x, layers.Dense(10, activation="softmax", name="digit")(h))


def text():
    """Pieces of Python's own sources; the target is each next character."""
    folder = pathlib.Path(contextlib.__file__).parent
    source = "".join(p.read_text("utf-8", "ignore") for p in sorted(folder.glob("[a-d]*.py")))
    codes = np.frombuffer(source.encode("ascii", "ignore"), np.uint8).astype("int32")
    starts = np.random.default_rng(0).integers(0, len(codes) - TOKENS - 1, 1600)
    pieces = codes[starts[:, None] + np.arange(TOKENS + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def gpt():
    """A small GPT over characters."""
    x = layers.Input((TOKENS,), dtype="int32")
    positions = layers.Embedding(TOKENS, WIDTH, name="positions")(ops.cumsum(ops.ones_like(x), 1) - 1)
    h = layers.add([layers.Embedding(CHARACTERS, WIDTH, name="characters")(x), positions])
    for n in range(BLOCKS):
        a = layers.LayerNormalization()(h)
        h = layers.add([h, layers.MultiHeadAttention(4, WIDTH // 4, name=f"attention_{n}")(a, a, use_causal_mask=True)])
        f = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(h))
        h = layers.add([h, layers.Dense(WIDTH, name=f"mlp_{n}")(f)])
    return keras.Model(x, layers.Dense(CHARACTERS, activation="softmax", name="next")(layers.LayerNormalization()(h)))


TASKS = {"digits": (digits, cnn, 8), "text": (text, gpt, 4)}  # data, model, epochs
STRATEGIES = {
    "one device": None,
    "replicas": tfpar.DataParallelStrategy,
    "by layers": tfpar.LayerPlacementStrategy,
    "pipeline": lambda: tfpar.PipelineStrategy(micro_batches=8, schedule="1f1b"),
}


class Bar(keras.callbacks.Callback):
    """A line of the progress display."""

    def __init__(self, progress, name, epochs):
        super().__init__()
        self.progress, self.name, self.epochs = progress, name, epochs

    def on_train_begin(self, logs=None):
        self.line = self.progress.add_task(self.name, total=self.epochs * self.params["steps"], loss="")

    def on_train_batch_end(self, batch, logs=None):
        self.progress.update(self.line, advance=1, loss=f"loss {logs['loss']:.3f}")


def train(task, label, epochs, progress):
    """Train one model under one strategy: the model, the last epoch's numbers, and the plan."""
    (make_data, build, usual), make_strategy = TASKS[task], STRATEGIES[label]
    epochs = epochs or usual
    strategy = make_strategy() if make_strategy else None
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = make_data()
    bar = Bar(progress, f"{task}, {label}", epochs)
    history = model.fit(x, y, batch_size=64, epochs=epochs, validation_split=0.1, verbose=0, callbacks=[bar]).history
    last = {key: values[-1] for key, values in history.items()}
    return model, last, strategy.explain(model) if strategy else None


def device_bytes(model):
    """Kilobytes of weights and optimizer slots on each device, in the order of the devices."""
    found = {}
    for variable in [*model.variables, *model.optimizer.variables]:
        for copy in getattr(variable.value, "copies", [variable.value]):
            device = tf.DeviceSpec.from_string(copy.device).device_index
            found[device] = found.get(device, 0) + np.asarray(variable).nbytes
    each = [f"{found[device] / 1e3:.0f}" for device in sorted(found)]
    return f"{len(each)} x {each[0]}" if len(each) > 1 and len(set(each)) == 1 else " ".join(each)


def largest_difference(one, other):
    """Of any number in two lists of weights."""
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, help="of each training; 8 and 4 if not given")
    options = parser.parse_args()
    if not tf.config.list_physical_devices("GPU"):
        logical_cpus(4)
    console = Console()
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("task", "strategy", "loss", "accuracy", "largest\ndifference", "kB per device", "bubble"):
        table.add_column(heading, no_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for task in TASKS:
            for label in STRATEGIES:
                model, last, plan = train(task, label, options.epochs, progress)
                weights = model.get_weights()
                if plan is None:
                    reference = weights
                table.add_row(
                    task, label, f"{last['val_loss']:.4f}", f"{last['val_accuracy']:.1%}",
                    f"{largest_difference(reference, weights):.0e}" if plan else "",
                    device_bytes(model), f"{plan.timeline.bubble:.0%}" if plan and plan.mesh.stage > 1 else "",
                )  # fmt: skip
            table.add_section()
    console.print("\nThe last model's plan, and a step as predicted (raised digits are backward passes):", plan)
    console.print(plan.timeline, table)


if __name__ == "__main__":
    main()

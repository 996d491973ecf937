"""What Keras' fit, evaluate and predict call for a model under a strategy."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_calls
from tfpar.compat._keras_run import is_one_of_several
from tfpar.compat._tf import following_inputs, in_xla
from tfpar.engine import micro_batch
from tfpar.engine.description import Description
from tfpar.engine.engine import Engine
from tfpar.engine.optimizer_step import Update
from tfpar.errors import ModelError, user_level
from tfpar.graph.recording import Discovered, HasMask, NeedsWholeBatch, UnusedResults, UpdatesApart
from tfpar.planning.progress import announced
from tfpar.trainer import saving
from tfpar.trainer.generating import make_generate_function
from tfpar.trainer.model_call import call
from tfpar.trainer.placement import build_losses, build_optimizer, place_variables, prepared
from tfpar.trainer.step_function import StepFunction
from tfpar.trainer.training_step import TrainingStep, checked_loss

USED: weakref.WeakSet["KerasHooks"] = weakref.WeakSet()  # those that have an engine
FILES = (saving.save, saving.save_weights, saving.load_weights, saving.export)


class KerasHooks:
    """The training, test and prediction functions of one model under one strategy.

    A step is Keras' own, with the model's call run by the engine. Where Keras' `train_step` and `compute_loss` are used
    as they are and the loss of a batch follows from those of its parts, training is scheduled: some micro-batches go
    backward while others still go forward.

    Args:
        strategy: gives `mesh`, `parts`, `placement` and `schedule(micro_batches)`.
        model: the Keras model that was constructed in its scope.
    """

    def __init__(self, strategy: Description, model: keras.Model):
        self.strategy, self.model = strategy, model
        self.engine: Engine | None = None
        self.compiled_as: Any = None
        self.has_targets = False
        self.checks = False  # whether a loss that is not finite is an error
        self.global_batch: set[str] = set()  # operations that were found to need the whole batch
        self.seen = 32  # samples of the batch for which a step was traced last

    def adopt(self, strategy_for_keras: Any):
        """Make Keras call these functions, through the hooks that it offers, on this one model."""
        _keras.set_strategy(self.model, strategy_for_keras)
        vars(self.model)["_tfpar_hooks"] = self
        makers = {f"make_{kind}_function": partial(self.make, kind) for kind in ("train", "test", "predict")}
        vars(self.model).update({h: make for h, make in makers.items() if not _keras.overrides(type(self.model), h)})
        if hasattr(type(self.model), "make_generate_function"):
            vars(self.model)["make_generate_function"] = partial(make_generate_function, self)
        _keras.set_functions(self.model, self.auto_jit, self.build_later)
        vars(self.model).update({file.__name__: partial(file, self.model) for file in FILES}, fit=self.fit)
        own = type(self.model).call.__get__(self.model)
        vars(self.model)["call"] = wraps(own)(partial(self.called))  # Keras looks at its signature

    def auto_jit(self) -> bool:
        """What `jit_compile="auto"` means: programs are compiled on GPUs."""
        return self.strategy.mesh.on_gpus and _keras.auto_jit(self.model)

    def build_later(self, iterator: Any = None, data_batch: Any = None):
        """In place of Keras' build, which would take its first batch away from a generator."""

    def called(self, *args: Any, **options: Any) -> Any:
        """The model's `call` in a loop of the user's own, run by the engine."""
        model = self.model
        simple = len(args) == 1 and options.keys() <= {"training", "mask"}
        if not simple or self.strategy.mesh.size == 1 or not self.divides_calls(args[0]):
            return type(model).call(model, *args, **options)
        if in_xla():
            if self.strategy.extended.has_copies:
                return type(model).call(model, *args, **options)
            raise ModelError(
                f"{model.name} is on several devices, and a tf.function(jit_compile=True) is a program of one: leave "
                "jit_compile out there; model.compile(jit_compile=True) compiles what each device does"
            )
        rows, losses = micro_batch.count(args[0]), []
        parts = self.strategy.parts.fit(rows) if isinstance(rows, int) else self.strategy.parts
        while True:
            try:
                with following_inputs():
                    results = call(self, parts, self.seen, losses, False, *args, **options)
                _keras_calls.override_losses(model, losses)
                return results
            except Discovered as discovered:
                self.learn(discovered)

    def divides_calls(self, inputs: Any) -> bool:
        """Whether the engine runs a call: not one on symbols, in a program, or in one replica."""
        return not (
            _keras.in_program()
            or _keras_calls.OWN.get()
            or is_one_of_several()
            or any(isinstance(x, keras.KerasTensor) or not hasattr(x, "shape") for x in tree.flatten(inputs))
        )

    def fit(self, *args: Any, **options: Any) -> Any:
        """`keras.Model.fit`; what a callback asked of its steps ends with it, also if it fails."""
        try:
            return type(self.model).fit(self.model, *args, **options)
        finally:
            self.check(False)

    def check(self, checks: bool):
        """From now on, a loss that is not finite is an error, or is not."""
        if checks != self.checks:
            self.checks = checks
            self.make("train", force=True)

    # ---- the functions that Keras asks for

    def make(self, kind: str, force: bool = False) -> Callable:
        """The function that trains or evaluates on an iterator's next batches, or predicts for a list of batches.

        Args:
            kind: "train", "test" or "predict".
            force: whether to make another one if there is one.
        """
        name = f"{kind}_function"
        if getattr(self.model, name) is None or force:
            lazy = _keras.overrides(self.model, f"{kind}_step") is not None
            traced = StepFunction(self, getattr(self, f"{kind}_step"), lazy)
            setattr(self.model, name, partial(for_list if kind == "predict" else for_iterator, traced))
        return getattr(self.model, name)

    def prepared(self, data: Any, rows: int, learns: bool = True) -> Engine:
        """The engine, made when the model is first used and again when it was compiled since; slots, if it `learns`."""
        ranks = self.strategy.mesh.tensor > 1
        targets = ranks and _keras.unpack_x_y_sample_weight(data)[1] is not None  # the loss is a part of what ranks run
        if self.engine is None or self.compiled_as != self.compilation() or targets > self.has_targets:
            self.has_targets = targets
            with self.strategy.planning(), self.announced():
                before = self.engine.plan if self.engine else None
                replicas = self.strategy.mesh.count("samples")
                if before is None and rows < replicas:
                    warnings.warn(
                        f"a batch of {rows} samples keeps {rows} of {replicas} replicas busy: make batches of at least "
                        f"{replicas}",
                        stacklevel=user_level(),
                    )
                self.use(prepared(self.strategy, self.model, data, rows, before, frozenset(self.global_batch)))
            self.compiled_as = self.compilation()
        if learns:
            build_optimizer(self.strategy, self.engine)
        build_losses(self.strategy, self.engine, data)
        return self.engine

    def announced(self) -> contextlib.AbstractContextManager:
        """Inside, what takes long is said to be planning."""
        return announced(f"planning {self.model.name} on {self.strategy.mesh}")

    def use(self, engine: Engine):
        """From now on, steps run on this engine."""
        self.engine, self.update = engine, Update(self.strategy, engine)
        USED.add(self)

    def learn(self, discovered: Discovered):
        """Take up what came to light while a step was traced, in whichever model it was."""
        if isinstance(discovered, UnusedResults):
            return
        if isinstance(discovered, UpdatesApart):
            self.engine.updates_apart = True
            return
        if isinstance(discovered, HasMask):
            self.engine.has_masks = True
            return
        for hooks in family(self.model):
            engine = hooks.engine
            if engine and any(discovered.graph is route.graph for route in engine.routes):
                if isinstance(discovered, NeedsWholeBatch):
                    if discovered.name in hooks.global_batch:
                        raise ModelError(f"{discovered.name} could not be computed for the whole batch")
                    hooks.global_batch.add(discovered.name)
                    hooks.compiled_as = None
                else:
                    hooks.use(engine.extended(discovered))
                    with self.strategy.planning():
                        place_variables(self.strategy, hooks.engine)

    def compilation(self) -> tuple:
        """What changes when the model is compiled anew."""
        model = self.model
        parts = (model.optimizer, *_keras.compilation(model)) if model.compiled else ()
        return *parts, bool(model.jit_compile), model.run_eagerly

    # ---- steps, run in the strategy's replica context

    def train_step(self, data: micro_batch.Batch, parts: micro_batch.Parts) -> Any:
        """Keras' `train_step`, scheduled where its loss allows, or the user's."""
        check_trainable(self.model)
        step = TrainingStep(self, data, parts)
        if step.is_scheduled():
            return step.run()[0]
        with self.running(data, parts), checked_loss(self.model) if self.checks else contextlib.nullcontext():
            return self.model.train_step(data.whole)

    def test_step(self, data: micro_batch.Batch, parts: micro_batch.Parts) -> Any:
        """Keras' `test_step`, scheduled where its loss allows, or the user's."""
        step = TrainingStep(self, data, parts, training=False)
        if step.is_scheduled():
            return step.evaluate()
        with self.running(data, parts):
            return self.model.test_step(data.whole)

    def predict_step(self, data: micro_batch.Batch, parts: micro_batch.Parts) -> Any:
        """Keras' `predict_step`, or the user's."""
        with self.running(data, parts):
            return self.model.predict_step(data.whole)

    @contextlib.contextmanager
    def running(self, data: micro_batch.Batch, parts: micro_batch.Parts) -> Iterator[None]:
        """Inside, calls of the model and of the models in it are run by their engines, in parts."""
        with following_inputs(), contextlib.ExitStack() as stack:
            for hooks in family(self.model):
                losses: list[tf.Tensor] = []
                run = partial(call, hooks, parts, self.seen, losses, data.rows is None)
                stack.enter_context(_keras_calls.running(hooks.model, run, losses))
            yield


def check_trainable(model: keras.Model):
    """Check that a model of few bits has something that gradients can change.

    Raises:
        ModelError: it has not; and what to do.
    """
    quantized = any(getattr(layer, "quantization_mode", None) for layer in _keras.layers_in(model))
    if quantized and not model.trainable_weights:
        raise ModelError(
            f"{model.name} is quantized, and has no weights that can be trained: add adapters with enable_lora "
            "(backbones of KerasHub have it, and Dense, EinsumDense and Embedding), and compile again"
        )


def for_iterator(traced: StepFunction, iterator: Iterator[Any]) -> Any:
    """A step repeated `steps_per_execution` times, or until the data ends."""
    declared = getattr(iterator, "element_spec", None)
    logs = None
    for _ in range(traced.hooks.model.steps_per_execution):
        try:
            data = next(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            if logs is None:
                raise StopIteration from None
            break
        logs = traced(data, declared)
    return logs


def for_list(traced: StepFunction, batches: list[Any]) -> Any:
    """The results of a step for several batches, put together."""
    outputs = [traced(data) for data in batches]
    return tree.map_structure(lambda *parts: micro_batch.concat(list(parts)), *outputs)


def hooks_of(model: Any) -> KerasHooks | None:
    """The hooks of a model that was constructed under a strategy."""
    return vars(model).get("_tfpar_hooks")


def family(model: keras.Model) -> list[KerasHooks]:
    """The hooks of a model and of the models in it, those of one strategy."""
    own = hooks_of(model)
    found = [hooks_of(layer) for layer in _keras.layers_in(model)]
    return [hooks for hooks in found if hooks is not None and hooks.strategy is own.strategy]

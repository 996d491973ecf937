"""Generating text: each replica runs the model's own loop on the prompts that it takes, when it is free."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar.comm.in_program import Gang, ordered
from tfpar.compat import _keras, _keras_hub, _keras_parts
from tfpar.compat._keras_run import as_in_this_thread
from tfpar.engine.engine import Engine, device_of, full_value, layout_of, read
from tfpar.errors import BatchError
from tfpar.planning.mesh import Coordinate
from tfpar.planning.sharding import REPLICATED
from tfpar.tensor_parallel.layer_calls import LayerCalls, LayerPlans
from tfpar.trainer.planner import hardware
from tfpar.trainer.step_function import TRACING

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks

SHARE = 0.5  # of its part of what is left, what a replica takes at once while it is not known how fast each is
ALIKE = 1.25  # how much faster one replica may be than another for both to take as much


class Generation:
    """What a model's `generate` calls for a batch of prompts, in place of its one program.

    Prompts are taken by whichever replica is free, those with the most tokens to come first; once it is known how fast
    each replica is, in shares that follow from that. Each runs the model's `generate_step` on what it takes.

    Args:
        hooks: of the model.
    """

    def __init__(self, hooks: "KerasHooks"):
        self.hooks = hooks
        self.functions: dict[Any, Callable] = {}
        self.kept: list[Any] = []  # what functions need as long as they are there
        self.speeds: dict[int, float] = {}  # of each replica: prompts in a second
        self.lock = threading.Lock()

    def __call__(self, inputs: dict[str, Any], stop_token_ids: Any = None) -> dict[str, np.ndarray]:
        """The tokens of all prompts, in their order.

        Args:
            inputs: arrays (prompts, length): tokens, and which of them are given.
            stop_token_ids: those after which a prompt is finished.

        Raises:
            BatchError: as `checked`.
        """
        inputs = {name: np.asarray(x) for name, x in inputs.items()}
        lengths = checked(self.hooks.model, inputs, stop_token_ids)
        engine = self.hooks.prepared((tree.map_structure(tf.convert_to_tensor, inputs),), len(lengths), learns=False)
        stop = None if stop_token_ids is None else tuple(int(token) for token in stop_token_ids)
        work = Work(lengths, self.parts(engine), self.speeds, is_compiled(engine))
        found: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        after: list[list[np.ndarray]] = []  # the random states that each group of prompts leaves

        def serve(replica: int):
            while (rows := work.take(replica)) is not None:
                start, count = time.perf_counter(), len(rows)
                if work.compiled:  # for a number of prompts for which there may be a program
                    rows = np.concatenate([rows, rows[-1:].repeat(sized(count) - count)])
                given = {name: x[rows] for name, x in inputs.items()}
                at = replica % engine.mesh.count("samples")
                function, is_new = self.function(engine, at, given, stop)
                results, random = self.run(function, given, rows, lengths)
                found.append((rows[:count], {name: np.asarray(x)[:count] for name, x in results.items()}))
                after.append([np.asarray(state) for state in random])
                if not is_new:  # else it was traced, too
                    self.learn(replica, count / (time.perf_counter() - start))

        replicas = range(work.replicas)
        if len(replicas) == 1:
            serve(0)
        else:
            with ThreadPoolExecutor(len(replicas)) as pool:
                list(pool.map(as_in_this_thread(serve), replicas))
        order = np.argsort(np.concatenate([rows for rows, _ in found]))
        whole = {name: np.concatenate([results[name] for _, results in found])[order] for name in found[0][1]}
        for seed, states in zip(self.seeds(), zip(*after, strict=True), strict=True):
            seed.assign(max(states, key=lambda state: state[1]))  # as one device, which goes on until all are finished
        return whole

    def parts(self, engine: Engine) -> int:
        """How many groups of prompts are on their way at once: one on each replica, or several in a pipeline."""
        return engine.mesh.count("samples") * (self.hooks.strategy.micro_batches if engine.mesh.stage > 1 else 1)

    def learn(self, replica: int, speed: float):
        """Take up how fast a replica was."""
        with self.lock:
            before = self.speeds.get(replica, speed)
            self.speeds[replica] = (before + speed) / 2

    def seeds(self) -> list[keras.Variable]:
        """The random states of the model's sampler, each drawn from once for each token."""
        return list(getattr(getattr(self.hooks.model, "sampler", None), "variables", []))

    # ---- one group of prompts, on one replica

    def function(self, engine: Engine, replica: int, inputs: Any, stop: Any) -> tuple[Callable, bool]:
        """The function of a replica for prompts of this kind, and whether it was made now."""
        compiled = is_compiled(engine)
        shapes = tuple((name, x.shape if compiled else x.shape[1:], x.dtype) for name, x in inputs.items())
        key = id(engine), replica, stop, shapes, id(getattr(self.hooks.model, "sampler", None))
        with TRACING:
            is_new = key not in self.functions
            if is_new:
                self.functions[key] = self.made(engine, replica, inputs, stop, compiled)
            return self.functions[key], is_new

    def run(
        self, function: Callable, inputs: dict[str, np.ndarray], rows: np.ndarray, lengths: np.ndarray
    ) -> tuple[dict[str, Any], list[tf.Tensor]]:
        """The tokens of some prompts, and the sampler's random states afterwards.

        Args:
            rows: which of all they are.
            lengths: of all.
        """
        random = [tf.constant(np.asarray(seed.value)) for seed in self.seeds()]
        given = {name: tf.constant(x) for name, x in inputs.items()}
        place = Place(*(tf.constant(n, tf.int32) for n in (rows, len(lengths), lengths.min())))
        return function(given, place, random)

    def made(self, engine: Engine, replica: int, inputs: Any, stop: Any, compiled: bool) -> Callable:
        """The function of a replica for prompts of this kind: traced for all its ranks, which run at once."""
        mesh, model = engine.mesh, self.hooks.model
        lanes = [lane for lane in mesh.lanes if lane.replica == mesh.replicas[replica]]
        lanes = lanes if mesh.stage == 1 else lanes[:1]
        devices = [engine.plan.device(0, lane) for lane in lanes]
        own = [v for v in model.variables if not _keras.is_seed(v)]
        divided = {id(v): layout_of(v) for v in own if layout_of(v) != REPLICATED} if len(lanes) > 1 else {}
        gang = Gang(tuple(devices), replace(mesh, data=1, shard=1, stage=1, devices=()), compiled)
        plans = LayerPlans(divided, gang, hardware(self.hooks.strategy))

        def step(values, inputs, place, random, lane):
            if compiled and len(lanes) > 1:
                gang.meet()
            scope = LayerCalls(list(zip(own, values, strict=True)), plans, lane)
            calls = scope if mesh.stage == 1 else placed
            with scope, _keras_parts.LAYER_CALLS.inside(calls), self.sampling(scope, place, random) as after:
                return type(model).generate_step(model, inputs, stop_token_ids=stop), after

        program = tf.function(step, jit_compile=True, autograph=False) if compiled else step
        apart = len(lanes) > 1 and not compiled  # ranks exchange by TensorFlow's own collectives
        tokens = [token_on(device) if apart else None for device in devices]
        self.kept += [engine, *tokens]

        def value(variable: keras.Variable, lane: Coordinate) -> tf.Tensor:
            if mesh.stage == 1:
                return read(variable, lane)
            with tf.device(device_of(variable, lane)):
                return full_value(variable) if mesh.tensor > 1 else read(variable, lane)

        def outer(inputs, place, random):
            results = []
            for number, (lane, device, token) in enumerate(zip(lanes, devices, tokens, strict=True)):
                with tf.device(device), ordered(token) if apart else contextlib.nullcontext():
                    values = [value(v, lane) for v in own]
                    results.append(program(values, inputs, place, random, tf.constant(number)))
            return results[0]

        def spec(x):
            return tf.TensorSpec([x.shape[0] if compiled else None, *x.shape[1:]], x.dtype)

        number, count = tf.TensorSpec([], tf.int32), next(iter(inputs.values())).shape[0] if compiled else None
        random = [tf.TensorSpec(seed.shape, seed.dtype) for seed in self.seeds()]
        place = Place(tf.TensorSpec([count], tf.int32), number, number)
        given = {name: spec(x) for name, x in inputs.items()}
        return tf.function(outer, autograph=False).get_concrete_function(given, place, random)

    @contextlib.contextmanager
    def sampling(self, scope: LayerCalls, place: "Place", random: Sequence[tf.Tensor]) -> Iterator[list[tf.Tensor]]:
        """Inside, the sampler does with these prompts what it would do with them among all.

        Gives a list that afterwards has its random states.
        """
        model, seeds, after = self.hooks.model, self.seeds(), list(random)
        sampler = getattr(model, "sampler", None)

        def run_loop(cond, body, model=None, loop_vars=None, maximum_iterations=None):
            def next_body(state, *loop_vars):
                scope.state_mapping.update((id(seed), value) for seed, value in zip(seeds, state, strict=True))
                results = body(*loop_vars)
                return ([scope.state_mapping[id(seed)] for seed in seeds], *results)

            after[:], *results = keras.ops.while_loop(
                lambda state, *loop_vars: cond(*loop_vars), next_body, (list(random), *loop_vars),
                maximum_iterations=maximum_iterations,
            )  # fmt: skip
            return tuple(results)

        def from_first(*args, **options):
            return sampler(*args, **options | {"index": place.first})

        with contextlib.ExitStack() as stack:
            if seeds:
                stack.enter_context(_keras_parts.given_method(sampler, "run_loop", run_loop))
                stack.enter_context(_keras_hub.DRAWS.inside((place.rows, place.total)))
            if sampler is not None:
                stack.enter_context(_keras_parts.replaced(model, sampler=from_first))
            yield after


class Place(NamedTuple):
    """Where some prompts are among all.

    Args:
        rows: which they are.
        total: the number of all.
        first: the length of the shortest of all, with which one device begins.
    """

    rows: Any
    total: Any
    first: Any


def is_compiled(engine: Engine) -> bool:
    """Whether the loop of each device is one compiled program: XLA has no exchanges on CPUs, nor several stages."""
    mesh = engine.mesh
    return engine.jit_compile and mesh.stage == 1 and (mesh.tensor == 1 or mesh.on_gpus)


def token_on(device: str) -> tf.Variable:
    """A variable of a device, for `ordered`."""
    with tf.device(device):
        return tf.Variable(0.0, trainable=False)


def placed(function: Callable, layer: keras.layers.Layer, args: tuple, kwargs: dict) -> Any:
    """A layer's `__call__` where its variables are."""
    devices = {device_of(v) for v in layer.variables if not _keras.is_seed(v)}
    with tf.device(devices.pop()) if len(devices) == 1 else contextlib.nullcontext():
        return function(layer, *args, **kwargs)


class Work:
    """Prompts that are left.

    Args:
        lengths: of the prompts.
        replicas: who take them.
        speeds: of replicas, as far as they are known.
        compiled: whether programs are compiled, for each number of prompts.
    """

    def __init__(self, lengths: np.ndarray, replicas: int, speeds: Mapping[int, float], compiled: bool):
        self.replicas, self.compiled = min(replicas, len(lengths)), compiled
        self.left = list(np.argsort(lengths, kind="stable"))  # those with the most tokens to come first
        self.lock = threading.Lock()
        known = [speeds.get(r) for r in range(self.replicas)]
        alike = None in known or max(known) < ALIKE * min(known)
        self.speeds = [1.0] * len(known) if alike else known
        # a step takes nearly as long for few prompts: all of a share at once, unless it may be the wrong one
        self.at_once = None if None in known and not compiled and self.replicas > 1 else len(lengths)

    def take(self, replica: int) -> np.ndarray | None:
        """What a replica takes next; `None` if nothing is left."""
        with self.lock:
            if not self.left:
                return None
            share = self.speeds[replica] / sum(self.speeds)
            count = max(1, math.ceil((self.at_once or len(self.left) * SHARE) * share))
            rows, self.left = self.left[:count], self.left[count:]
            return np.array(rows)


def sized(count: int) -> int:
    """For how many prompts a program is compiled that gets so many: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def make_generate_function(hooks: "KerasHooks") -> Callable:
    """What KerasHub's `generate` calls for a batch of prompts."""
    model = hooks.model
    if model.generate_function is None and not model.run_eagerly and hooks.strategy.mesh.size > 1:
        model.generate_function = Generation(hooks)
    return type(model).make_generate_function(model)


def checked(model: keras.Model, inputs: dict[str, np.ndarray], stop_token_ids: Any) -> np.ndarray:
    """The lengths of the prompts.

    Raises:
        BatchError: there are none, one has no token, they are longer than the model, or a stop token does not exist.
    """
    masks = [name for name in inputs if "padding_mask" in name]
    mask = inputs[next((name for name in masks if "decoder" in name), masks[0])]
    if not mask.size:
        raise BatchError("generate was given no prompts, or prompts of no length")
    lengths = np.asarray(mask, bool).sum(-1)
    if not lengths.min():
        raise BatchError(f"prompt {int(lengths.argmin())} has no token: a model needs one to begin with")
    backbone = getattr(model, "backbone", None)
    longest = getattr(backbone, "max_sequence_length", None)
    if longest is not None and mask.shape[1] > longest:
        raise BatchError(f"{model.name} takes {longest} tokens; received prompts padded to {mask.shape[1]}")
    words = getattr(backbone, "vocabulary_size", None)
    unknown = [token for token in stop_token_ids or () if words is not None and not 0 <= token < words]
    if unknown:
        raise BatchError(f"stop_token_ids has {unknown[0]}; the tokens of {model.name} are 0 to {words - 1}")
    return lengths

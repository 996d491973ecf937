"""What `strategy.explain` says of a model: its plan, with what the optimizer keeps."""

from dataclasses import replace

from tfpar.compat import _keras, _keras_parts
from tfpar.engine.collectives_inside import why_cut
from tfpar.errors import ModelError
from tfpar.planning.plan import Plan
from tfpar.planning.schedule import gpipe
from tfpar.trainer.hooks import KerasHooks, family
from tfpar.trainer.planner import planned
from tfpar.variables.logical import follower_bytes


def explained(hooks: KerasHooks, batch_size: int | None = None) -> Plan:
    """The plan that the engine of a model has, or would have.

    Args:
        hooks: the model's.
        batch_size: samples of a batch; if not given, those that the engine was made for, or 32 if there is none.

    Raises:
        ModelError: a subclassed model that has seen no data, or one that is not called itself while models in it are.
        PartitionError, LayoutError, ScheduleError, ModelError: the model cannot be divided as its strategy says.
    """
    model, strategy = hooks.model, hooks.strategy
    rows = batch_size or (hooks.engine.plan.rows if hooks.engine else hooks.seen)
    engine = hooks.engine
    if engine is None:
        parts = [hooks.model for hooks in family(model) if hooks.engine]
        if parts:
            raise ModelError(
                f"{model.name} is not called itself; explain the models in it: {', '.join(part.name for part in parts)}"
            )
        if not _keras.is_graph(model):
            raise ModelError(
                f"the layers of {model.name} are known when it has seen data: call fit, evaluate or predict"
            )
        with hooks.announced():
            engine = planned(strategy, model, (None, None, None), rows)
    slots = tuple(follower_bytes(_keras.stored(v)) for v in engine.graph.variables)
    if not any(slots):  # the optimizer has none yet, if it is known
        known = model.compiled and model.optimizer is not None
        weights = model.trainable_weights
        expected = _keras_parts.slot_bytes_of(model.optimizer, weights) if known else {}
        slots = tuple(expected.get(id(v), 0) for v in engine.graph.variables) if known else ()
    schedule = strategy.schedule(strategy.parts.fit(rows).micro_batches)
    way = engine.loss_parallel[1] if engine.loss_parallel else engine.training
    why = why_cut(engine, way)
    if why is None:  # micro-batches take turns in one program: all are under way at once
        schedule = gpipe(schedule.stages, schedule.micro_batches)
    return replace(
        engine.plan, rows=rows, schedule=schedule, slot_bytes=slots, cut_because=why,
        attention=tuple(engine.attention.items()),
    )  # fmt: skip

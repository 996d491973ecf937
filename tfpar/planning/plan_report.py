"""What a user is told of a plan, as tables."""

import io
from itertools import product
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table

from tfpar.planning.mesh import AXES, coordinate_of, dividing
from tfpar.planning.sharding import bounds

if TYPE_CHECKING:
    from tfpar.planning.plan import Plan

ZERO = {1: "slots of the optimizer", 2: "slots and gradients", 3: "weights, slots and gradients"}


def tables(plan: "Plan") -> RenderableType:
    """All tables of a plan."""
    divided, exchanged = plan.mesh.tensor > 1, bool(plan.exchanges)
    return Group(devices(plan), *([weights(plan)] if divided else []), *([exchanges(plan)] if exchanged else []))


def printed(plan: "Plan") -> Console:
    """A console that has printed the tables, and the timeline if there is one lane."""
    console = Console(width=120, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(plan, *([plan.timeline] if plan.mesh.stage == plan.mesh.size else []))
    return console


def devices(plan: "Plan") -> Table:
    """What is on each device."""
    mesh, stages = plan.mesh, plan.partition.stages
    members = {axis: AXES[axis].member for axis in AXES} | ({"data": "group"} if mesh.shard > 1 else {})
    counts = {members[axis]: n for axis, n in zip(AXES, mesh.shape, strict=True)} | {"stage": stages}
    several = [f"{n} {member}s" for member, n in counts.items() if n > 1] or ["1 device"]
    several += [f"{plan.schedule.micro_batches} micro-batches"] if stages * plan.schedule.micro_batches > 1 else []
    table = Table(title=", ".join(several), box=SIMPLE, padding=(0, 1, 0, 0))
    names = [member for member, n in counts.items() if n > 1] + ["device"]
    names += ["first layer"] if stages > 1 else []
    numbers = ["layers", "time"] if stages > 1 else []
    numbers += ["samples"] if (replicas := mesh.count("samples")) > 1 else []
    numbers += ["parameters"] + (["of all"] if mesh.tensor > 1 or plan.zero == 3 else [])
    numbers += ["gradients", "optimizer", f"activations\nof {plan.rows} samples"]
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    seconds, rows = sum(plan.cost.forward) or 1.0, bounds(plan.rows, replicas)
    whole = sum(v.bytes for v in plan.partition.graph.variables) or 1
    for at in map(coordinate_of, product(*map(range, counts.values()))):
        s, ops = at.stage, plan.partition.ops(at.stage)
        held = plan.parameter_bytes(s, at)
        cells = [str(getattr(at, axis)) for axis, count in zip(AXES, counts.values(), strict=True) if count > 1]
        cells.append(plan.device(s, at))
        if stages > 1:
            first = plan.partition.graph.ops[ops[0]].layer
            cells += [first, str(len(ops)), f"{plan.cost.forward[s] / seconds:.0%}"]
        replica = mesh.replicas.index(at._replace(stage=0).replica)
        cells += [str(rows[replica + 1] - rows[replica])] if replicas > 1 else []
        cells += [in_units(held)] + ([f"{held / whole:.0%}"] if mesh.tensor > 1 or plan.zero == 3 else [])
        slots = in_units(plan.optimizer_bytes(s, at)) if plan.slot_bytes else "?"
        cells += [in_units(plan.gradient_bytes(s, at)), slots, in_units(plan.activation_bytes(s))]
        table.add_row(*cells)
    notes = [f"predicted bubble {plan.timeline.bubble:.0%} (idle share of all devices)"] if stages > 1 else []
    if replicas > 1:
        reduced = in_units(sum(v.bytes for v in plan.partition.graph.variables if v.trainable))
        programs = f"{plan.segments} program{'s' if plan.segments > 1 else ''}"
        notes.append(f"{reduced} of gradients added up over replicas, from {programs}")
    if replicas > 1 and plan.zero:
        notes.append(f"replicas divide {ZERO[plan.zero]} (ZeRO {plan.zero})")
    if len(mesh.lanes) > 1:
        where = f"between programs: {plan.cut_because}" if plan.cut_because else "inside the programs of training"
        notes.append(f"collectives are {where}")
    for why in dict.fromkeys(why for _, why in plan.attention):
        those = ", ".join(name for name, because in plan.attention if because == why)
        notes.append(f"attention by {f'the formula ({why})' if why else 'cuDNN'}: {those}")
    if plan.global_batch:
        notes.append(f"computed by every replica for the whole batch: {', '.join(plan.global_batch)}")
    table.caption = "\n".join(notes) or None
    return table


def weights(plan: "Plan") -> Table:
    """How weights are divided between ranks."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("weight", "shape", "part", "why"):
        table.add_column(name, overflow="fold")
    for v, weight in enumerate(plan.weights):
        sharding = plan.sharding(v, zero=4)
        shown = str(sharding.shape(weight.shape)) if sharding.divides else ""
        table.add_row(weight.path, str(weight.shape), shown, weight.why)
    return table


def exchanges(plan: "Plan") -> Table:
    """What replicas and ranks exchange, but for the sums of gradients over replicas."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("collectives of a training step", "over", "direction"):
        table.add_column(name)
    for name in ("number", f"bytes\nof {plan.rows} samples"):
        table.add_column(name, justify="right")
    for kind, axis, backward in dict.fromkeys((e.kind, e.axis, e.backward) for e in plan.exchanges):
        found = [e for e in plan.exchanges if (e.kind, e.axis, e.backward) == (kind, axis, backward)]
        total = sum(e.bytes * (plan.rows if e.batched else 1) for e in found)
        over = " x ".join(each for each in dividing(axis) if plan.mesh.count(each) > 1)
        table.add_row(kind, over, "backward" if backward else "forward", str(len(found)), in_units(total))
    return table


def in_units(count: float) -> str:
    """Bytes in the unit that suits: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""The way through a model on which each stage is one program, its collectives in it."""

from dataclasses import replace

import keras

from tfpar.comm.in_program import Gang, of_equal_parts
from tfpar.engine.engine import Engine, ExecutionGraph
from tfpar.engine.micro_batch import Parts
from tfpar.graph.keras_graph import Rewriting
from tfpar.planning.op_graph import Tensor
from tfpar.planning.partition import segmented
from tfpar.tensor_parallel.rank_graph import in_program, is_collective


def why_cut(engine: Engine, route: ExecutionGraph) -> str | None:
    """Why programs end at this way's collectives; `None` if they can hold them."""
    if engine.cut_because:
        return engine.cut_because
    if route.global_batch:
        return f"{', '.join(route.names(min(route.global_batch)))} needs the whole batch"
    return of_equal_parts(list(route.collectives.values()), engine.mesh)


def held_inside(engine: Engine, route: ExecutionGraph, parts: Parts) -> ExecutionGraph:
    """The same way with its collectives in its programs, if these can hold them; else the way itself."""
    if parts.replicas < engine.mesh.count("samples") or why_cut(engine, route):
        return route
    if route not in engine.inside:
        engine.inside[route] = with_collectives(engine, route)
    return engine.inside[route]


def with_collectives(engine: Engine, route: ExecutionGraph) -> ExecutionGraph:
    """The way with its collectives in its programs; the number of the lane is its last input."""
    mesh, new = engine.mesh, Rewriting(route.graph)
    lanes = replace(mesh, stage=1, devices=())
    gangs = {
        s: Gang(tuple(engine.plan.device(s, lane) for lane in mesh.lanes), lanes, engine.jit_compile)
        for s in dict.fromkeys(route.stages)
    }
    lane = new.tensor(Tensor((), 4, False), keras.KerasTensor((), "int32"))
    new.inputs.append(lane)
    for op, call in zip(route.graph.graph.ops, route.graph.calls, strict=True):
        if is_collective(call):
            call = in_program(call, gangs[op.stage], lane)
            op = replace(op, inputs=(*op.inputs, lane))
        new.add(op, call)
    graph = new.finish()
    cut = segmented(graph.graph, [op.stage for op in graph.graph.ops])
    of_stage = tuple(gangs[graph.graph.ops[cut.ops(s)[0]].stage] for s in range(cut.stages))
    return replace(route, graph=graph, partition=cut, lane=lane, gangs=of_stage, cut_segments=route.partition.stage_of)

"""PyTorch alone, and with all that it has for many devices. What a user adds to a script is the body of a function."""

import os
import socket
import time

import harness
import models
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch_models import MODELS, PLANS, block_plan
from with_keras import lines

RANKS, MICRO_BATCHES = 2, 8


def joined(rank, ranks):
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    return init_device_mesh("cpu", (ranks,))


def ddp(model, mesh, plan):
    return DistributedDataParallel(model)


def fsdp(model, mesh, plan):
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor(model, mesh, plan):
    return parallelize_module(model, mesh, plan)


def ours(rank, values):
    return values[rank * len(values) // RANKS : (rank + 1) * len(values) // RANKS]


def pipeline(schedule, model, loss, rank, cuts):
    ends = [*cuts[1:], len(model)]
    numbers = range(rank, len(cuts), RANKS)
    stages = [PipelineStage(model[cuts[n] : ends[n]], n, len(cuts), torch.device("cpu")) for n in numbers]
    run = schedule(stages if len(cuts) > RANKS else stages[0], MICRO_BATCHES, loss_fn=loss)
    return run, nn.ModuleList(stage.submod for stage in stages)


def pipeline_step(run, rank, x, y):
    found = []
    if rank == 0:
        run.step(x)
    else:
        run.step(target=y, losses=found)
    return sum(float(value) for value in found) / MICRO_BATCHES


SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
WRAPPERS = {"DDP": ddp, "FSDP2": fsdp, "tensor": tensor}


def measure(options):
    """The numbers of one run."""
    name = options.run.removeprefix("torch ")
    model = models.MODELS[options.model]
    if (name == "tensor" and options.model not in PLANS) or (name == "interleaved" and model.cuts[1] is None):
        raise SystemExit("not possible with PyTorch")
    if name in WRAPPERS or name in SCHEDULES:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(trained, (name, options, queue, harness.BEGAN), RANKS)
        found = [queue.get() for _ in range(RANKS)]
    else:
        torch.set_num_threads(1 if name == "torch" else RANKS)
        found = [numbers(name, options, 0, None, harness.BEGAN)]
    sums = {key: sum(rank[key] for rank in found) for key in ("cpu", "host")}
    changed = {**WRAPPERS, **dict.fromkeys(SCHEDULES, pipeline)}.get(name)
    of = [joined, changed, pipeline_step if name in SCHEDULES else ours if name != "tensor" else None]
    most = {key: max(rank[key] for rank in found) for key in ("step", "first", "start", "loss", "weights")}
    of += [PLANS[options.model], block_plan if options.model != "mlp" else None] if name == "tensor" else []
    return {**most, **sums, "lines": sum(map(lines, of)) if changed else 0}


def trained(rank, name, options, queue, began):
    """A process of several."""
    torch.set_num_threads(1)
    mesh = joined(rank, RANKS)
    queue.put(numbers(name, options, rank, mesh, began))
    dist.destroy_process_group()


def numbers(name, options, rank, mesh, began):
    """What one process measures."""
    before = harness.resident()
    torch.manual_seed(0)
    described = models.MODELS[options.model]
    x, y = (torch.from_numpy(a) for a in described.data(np.random.default_rng(0), described.batch))
    x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x
    loss = logits_loss if described.loss == "logits" else nn.functional.mse_loss
    model, run = MODELS[options.model](), None
    count = sum(p.numel() for p in model.parameters())
    if name in WRAPPERS:
        model = WRAPPERS[name](model, mesh, PLANS[options.model]() if name == "tensor" else None)
    elif name in SCHEDULES:
        cuts = described.cuts[name == "interleaved"]
        run, model = pipeline(SCHEDULES[name], model, loss, rank, cuts)
    if name in ("DDP", "FSDP2"):
        x, y = ours(rank, x), ours(rank, y)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step():
        optimizer.zero_grad()
        if run:
            value = pipeline_step(run, rank, x, y)
        else:
            found = loss(model(x), y)
            found.backward()
            value = float(found)
        optimizer.step()
        return value

    start, steps, first = time.time() - began, [], None
    for _ in range(options.steps + 3):
        if mesh:
            dist.barrier()
        begin = time.perf_counter(), time.process_time()
        value = step()
        if mesh:
            dist.barrier()
        steps.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        first = first or steps[-1][0]
    fastest, cpu = min(steps[3:])
    return {
        "start": start, "first": first, "step": fastest, "cpu": cpu, "loss": value, "weights": count,
        "host": harness.resident(peak=True) - before,
    }  # fmt: skip


def logits_loss(found, y):
    """The crossentropy of each token or sample."""
    return nn.functional.cross_entropy(found.flatten(0, -2), y.flatten().long())

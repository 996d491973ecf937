"""The model of `main.py` in PyTorch, compiled, on one GPU and in several ways on all: what a user could have instead.

    python benchmarks/several_gpus/with_torch.py FSDP2
    python benchmarks/several_gpus/with_torch.py 1F1B --batch 128 --micro-batches 16

It is run by a Python that has PyTorch, and prints a line of JSON: the step in seconds, and the most memory of a GPU.
"""

import argparse
import json
import os
import socket
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

HEADS, WORDS = 16, 1000
PIPELINES = {"1F1B": 1, "interleaved": 2}  # stages of a GPU


class Block(nn.Module):
    """An encoder block, normalised after each part, as `harness.encoder` has it."""

    def __init__(self, width):
        super().__init__()
        self.head = width // HEADS
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width, 1e-3), nn.LayerNorm(width, 1e-3)

    def forward(self, h):
        """The same shape, `(batch, tokens, width)`."""
        batch, tokens, _ = h.shape  # a rank of `tensor` has some of the heads
        q, k, v = self.into(h).view(batch, tokens, 3, -1, self.head).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        h = self.first(h + self.out(y))
        return self.second(h + self.narrow(nn.functional.gelu(self.wide(h))))


class Model(nn.Module):
    """An embedding, blocks, and a classifier of texts; or a stage of them, without what others have."""

    def __init__(self, blocks, width, first=True, last=True):
        super().__init__()
        self.words = nn.Embedding(WORDS, width) if first else nn.Identity()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.ends = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, WORDS)] if last else [])

    def forward(self, h):
        """Logits, `(batch, classes)`; of a stage, what the next one takes."""
        h = self.words(h)
        for block in self.blocks:
            h = block(h)
        return self.ends[1](self.ends[0](h).mean(1)) if self.ends else h.bfloat16()


def compiled(model):
    """The same model, its blocks compiled."""
    for n, block in enumerate(model.blocks):
        model.blocks[n] = torch.compile(block)
    return model


def loss_of(prediction, y):
    """Of logits."""
    return cross_entropy(prediction.float(), y)


def pipeline(rank, options, ranks):
    """The stages of a rank, and the schedule of all."""
    each = PIPELINES[options.run]
    count = each * ranks
    stages = []
    for s in range(rank, count, ranks):
        model = Model(options.blocks // count, options.width, s == 0, s == count - 1).cuda()
        stages.append(PipelineStage(compiled(model), s, count, torch.device("cuda", rank)))
    models = nn.ModuleList([stage.submod for stage in stages])
    if each == 1:
        return models, Schedule1F1B(stages[0], options.micro_batches, loss_of)
    return models, ScheduleInterleaved1F1B(stages, options.micro_batches, loss_of)


def trained(rank, options, ranks):
    """What one process does; rank 0 prints."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    if ranks > 1:
        dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    began, schedule = time.time(), None
    if options.run in PIPELINES:
        model, schedule = pipeline(rank, options, ranks)
    else:
        model = Model(options.blocks, options.width).cuda()
    if options.run == "tensor":
        mesh = init_device_mesh("cuda", (ranks,))
        columns, rows = ColwiseParallel(), RowwiseParallel()
        for block in model.blocks:
            parallelize_module(block, mesh, {"into": columns, "out": rows, "wide": columns, "narrow": rows})
    model = model if schedule else compiled(model)
    if options.run == "FSDP2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif options.run == "DDP":
        model = nn.parallel.DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
    parameters = list(model.parameters())  # an optimizer takes divided and whole ones apart
    groups = [[p for p in parameters if isinstance(p, DTensor) is divided] for divided in (True, False)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups if group], 0.01)
    x = torch.randint(WORDS, (options.batch, options.tokens), device="cuda")
    y = torch.randint(WORDS, (options.batch,), device="cuda")

    def scheduled():
        losses = []
        schedule.step(*([x] if rank == 0 else []), target=y if rank == ranks - 1 else None, losses=losses)
        return torch.stack(losses).mean() if losses else torch.zeros((), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=options.run != "FSDP2"):
            loss = scheduled() if schedule else loss_of(model(x), y)
        if not schedule:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    torch.cuda.synchronize()
    first = time.time() - began
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began = time.time()
    for _ in range(options.steps):
        loss = step()
    torch.cuda.synchronize()
    seconds, memory = (time.time() - began) / options.steps, torch.tensor(torch.cuda.max_memory_allocated()).cuda()
    if ranks > 1:
        dist.broadcast(loss, ranks - 1)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
    if rank == 0:
        batch = options.batch * (ranks if options.run in ("DDP", "FSDP2") else 1)
        found = {"step": seconds, "first": first, "loss": float(loss), "memory": int(memory), "batch": batch}
        print(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DDP", "FSDP2", "tensor", *PIPELINES))
    p.add_argument("--batch", type=int, default=32, help="for each GPU under DDP and FSDP2")
    p.add_argument("--micro-batches", type=int, default=8, help="of a pipeline")
    for name, default in (("blocks", 16), ("width", 2048), ("tokens", 512), ("steps", 20)):
        p.add_argument(f"--{name}", type=int, default=default)
    options = p.parse_args()
    if options.run == "one":
        trained(0, options, 1)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        count = torch.cuda.device_count()
        torch.multiprocessing.spawn(trained, (options, count), count)

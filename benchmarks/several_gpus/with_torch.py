"""The model of `main.py` in PyTorch, compiled, on one GPU and by DDP and FSDP2 on all: what a user could have instead.

    python benchmarks/several_gpus/with_torch.py FSDP2

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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

HEADS, WORDS = 16, 1000


class Block(nn.Module):
    """An encoder block, normalised after each part, as `harness.encoder` has it."""

    def __init__(self, width):
        super().__init__()
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width, 1e-3), nn.LayerNorm(width, 1e-3)

    def forward(self, h):
        """The same shape, `(batch, tokens, width)`."""
        batch, tokens, width = h.shape
        q, k, v = self.into(h).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        h = self.first(h + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)))
        return self.second(h + self.narrow(nn.functional.gelu(self.wide(h))))


class Model(nn.Module):
    """An embedding, blocks, and a classifier of texts."""

    def __init__(self, blocks, width):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head, self.classes = nn.Linear(width, width), nn.Linear(width, WORDS)

    def forward(self, x):
        """Logits, `(batch, classes)`."""
        h = self.words(x)
        for block in self.blocks:
            h = block(h)
        return self.classes(self.head(h).mean(1))


def trained(rank, options, ranks):
    """What one process does; rank 0 prints."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    if ranks > 1:
        dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    began, model = time.time(), Model(options.blocks, options.width).cuda()
    for n, block in enumerate(model.blocks):
        model.blocks[n] = torch.compile(block)
    if options.run == "FSDP2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif options.run == "DDP":
        model = nn.parallel.DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randint(WORDS, (options.batch, options.tokens), device="cuda")
    y = torch.randint(WORDS, (options.batch,), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=options.run != "FSDP2"):
            loss = cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

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
    if rank == 0:
        found = {"step": (time.time() - began) / options.steps, "first": first, "loss": float(loss.detach())}
        print(json.dumps({**found, "memory": torch.cuda.max_memory_allocated(), "batch": options.batch * ranks}))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", choices=("one", "DDP", "FSDP2"))
    for name, default in (("batch", 32), ("blocks", 16), ("width", 2048), ("tokens", 512), ("steps", 20)):
        p.add_argument(f"--{name}", type=int, default=default, help="for each GPU" if name == "batch" else None)
    options = p.parse_args()
    if options.run == "one":
        trained(0, options, 1)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        count = torch.cuda.device_count()
        torch.multiprocessing.spawn(trained, (options, count), count)

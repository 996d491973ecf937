"""The models of `models.py` in PyTorch: sequences of parts, so that they can be cut between any two."""

from models import BLOCKS, CONTEXT, FILTERS, HEADS, HUGE, LAYERS, VOCABULARY, WIDTH
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional


class Block(nn.Module):
    """Attention and two dense layers, normalised before or after each."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH, eps=1e-3), nn.LayerNorm(WIDTH, eps=1e-3)

    def attention(self, h):
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(found.transpose(1, 2).flatten(2))

    def dense(self, h):
        return self.down(functional.gelu(self.up(h)))

    def forward(self, h):
        if self.causal:
            h = h + self.attention(self.first(h))
            return h + self.dense(self.second(h))
        h = self.first(h + self.attention(h))
        return self.second(h + self.dense(h))


class Embedding(nn.Module):
    """Tokens and their places."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, x):
        return self.tokens(x) + self.places.weight


def convolved(inputs, filters, size, stride):
    convolution = nn.Conv2d(inputs, filters, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01))


class Residual(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.first, self.second = convolved(inputs, filters, 3, stride), convolved(filters, filters, 3, 1)
        self.short = nn.Identity() if stride == 1 else convolved(inputs, filters, 1, stride)

    def forward(self, h):
        return functional.relu(self.short(h) + self.second(functional.relu(self.first(h))))


def residuals():
    before = FILTERS[0]
    for n, filters in enumerate(FILTERS):
        for stride in (2 if n else 1, 1):
            yield Residual(before, filters, stride)
            before = filters


MODELS = {
    "encoder": lambda: nn.Sequential(*(Block(False) for _ in range(BLOCKS)), nn.Linear(WIDTH, WIDTH)),
    "gpt": lambda: nn.Sequential(
        Embedding(), *(Block(True) for _ in range(LAYERS)),
        nn.Sequential(nn.LayerNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, VOCABULARY)),
    ),
    "resnet": lambda: nn.Sequential(
        nn.Sequential(convolved(3, FILTERS[0], 3, 1), nn.ReLU()), *residuals(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS[-1], 10)),
    ),
    "mlp": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(512, 512), nn.ReLU()), nn.Sequential(nn.Linear(512, HUGE), nn.ReLU()),
        nn.Linear(HUGE, 512),
    ),
}  # fmt: skip


def block_plan(n):
    """How the layers of block `n` are divided (Shoeybi et al.)."""
    by_columns = {f"{n}.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    return by_columns | {f"{n}.{name}": RowwiseParallel() for name in ("o", "down")}


def encoder_plan():
    return {name: style for n in range(BLOCKS) for name, style in block_plan(n).items()}


def gpt_plan():
    plan = {name: style for n in range(1, LAYERS + 1) for name, style in block_plan(n).items()}
    return plan | {f"{LAYERS + 1}.1": ColwiseParallel(output_layouts=Replicate())}


def mlp_plan():
    return {"1.0": ColwiseParallel(), "2": RowwiseParallel()}


PLANS = {"encoder": encoder_plan, "gpt": gpt_plan, "mlp": mlp_plan}  # PyTorch has none for convolutions

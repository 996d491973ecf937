"""How does tfpar compare with everything else that trains on several devices?

Each run is a process of its own (PyTorch: one for each device); rounds of all runs alternate. A device is one core, of
which there are two. Ratios are to the framework's own run on one core.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness
import with_keras
from models import MODELS

TORCH = ("torch", "torch, all cores", "torch DDP", "torch FSDP2", "torch tensor", "torch GPipe", "torch 1F1B",
         "torch interleaved")  # fmt: skip
RUNS = (*with_keras.RUNS, *TORCH)


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", choices=tuple(MODELS), default="encoder")
    harness.add_run_options(p, RUNS)
    return p


def measure(options):
    """The numbers of one run."""
    if options.run.startswith("torch"):
        import with_torch

        return with_torch.measure(options)
    return with_keras.measure(options)


def alone(run):
    """The run of the same framework on one core."""
    return "torch" if run.startswith("torch") else "jax" if run.startswith("jax") else "keras"


def report(options, best):
    """A table of ratios to each framework's own run on one core."""
    headings = (
        "",
        "step",
        "of one core",
        "CPU work",
        "of one core",
        "cores busy",
        "memory",
        "start",
        "first step",
        "lines",
    )
    rows = []
    for run, found in best.items():
        one = best.get(alone(run), found)
        rows.append((
            run, f"{found['step'] * 1e3:.0f} ms", f"{found['step'] / one['step']:.2f}",
            f"{found['cpu'] * 1e3:.0f} ms", f"{found['cpu'] / one['cpu']:.2f}", f"{found['cpu'] / found['step']:.2f}",
            f"{found['host'] / 2**20:.0f} MiB", f"{found['start']:.1f} s", f"{found['first']:.1f} s",
            str(found["lines"]),
        ))  # fmt: skip
    weights = ", ".join(str(int(n)) for n in sorted({found["weights"] for found in best.values()}))
    harness.print_table(f"{options.model}, {weights} weights", headings, rows)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

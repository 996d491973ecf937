"""How do time and memory grow with stages, micro-batches, replicas, ranks and layers?

Encoder blocks on two cores, which all logical devices share: what grows is what tfpar itself costs.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

AXES = {
    "stages": (1, 2, 4, 8),
    "micro-batches": (1, 2, 4, 8, 16, 32),
    "replicas": (1, 2, 4, 8),
    "ranks": (1, 2, 4, 8),
    "layers": (2, 4, 8, 16),
}
RUNS = tuple(f"{axis} {n}" for axis, numbers in AXES.items() for n in numbers)
PANELS = {
    "step, s": lambda found: found["step"],
    "tracing, s": lambda found: found["trace"],
    "first step, s": lambda found: found["first"],
    "memory, MiB": lambda found: found["host"] / 2**20,
}


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    harness.add_options(p, RUNS)
    p.set_defaults(width=128)
    p.add_argument("--plot", default=str(pathlib.Path(__file__).parent / "growth.png"))
    return p


def measure(options):
    """The numbers of one run."""
    import tfpar
    from tfpar.testing import logical_cpus

    axis, number = options.run.split()
    number, devices = int(number), [f"CPU:{n}" for n in range(8)]
    logical_cpus(8, threads=2)
    strategy = {
        "stages": lambda: tfpar.PipelineStrategy(devices[:number], micro_batches=8),
        "micro-batches": lambda: tfpar.PipelineStrategy(devices[:2], micro_batches=number),
        "replicas": lambda: tfpar.DataParallelStrategy(devices[:number]),
        "ranks": lambda: tfpar.TensorParallelStrategy(devices[:number]),
        "layers": lambda: tfpar.PipelineStrategy(devices[:2], micro_batches=8),
    }[axis]()
    if axis == "layers":
        options.blocks = number
    return harness.measured(options, strategy, ())


def report(options, best):
    """A table, and a plot of each number against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (run, f"{found['step'] * 1e3:.0f} ms", f"{found['cpu'] * 1e3:.0f} ms", f"{found['trace']:.1f} s",
         f"{found['first']:.1f} s", f"{found['host'] / 2**20:.0f} MiB")
        for run, found in best.items()
    ]  # fmt: skip
    title = f"{options.blocks} encoder blocks of width {options.width}, batch {options.batch}"
    harness.print_table(title, ("", "step", "CPU work", "tracing", "first step", "memory"), rows)
    figure, panels = pyplot.subplots(len(PANELS), len(AXES), figsize=(14, 9), sharey="row", layout="constrained")
    for line, (name, value) in zip(panels, PANELS.items(), strict=True):
        line[0].set_ylabel(name)
        for panel, (axis, numbers) in zip(line, AXES.items(), strict=True):
            known = [n for n in numbers if f"{axis} {n}" in best]
            panel.plot(known, [value(best[f"{axis} {n}"]) for n in known], "o-")
            panel.set_xscale("log", base=2)
            panel.set_xticks(numbers, map(str, numbers))
            panel.grid(alpha=0.3)
    for line in panels:
        line[0].set_ylim(bottom=0)  # when all is drawn: a line of panels shares its axis
    for panel, axis in zip(panels[-1], AXES, strict=True):
        panel.set_xlabel(axis)
    figure.savefig(options.plot, dpi=80)


if __name__ == "__main__":
    harness.main(__file__, parser().parse_args(), measure, report)

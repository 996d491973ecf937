"""Runs the benchmarks, and writes what they print into their READMEs.

A README has a block for each table, with the command that makes it:

    <!-- run on cores: python benchmarks/growth/main.py --rounds 1 -->
    ...
    <!-- end -->

Only blocks for the devices of this machine are run: `cores`, or `GPUs` where there are some.
"""

import argparse
import datetime
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- run on (cores|GPUs): python (.*?) -->\n.*?<!-- end -->", re.DOTALL)
PACKAGES = {"tensorflow": "TensorFlow", "keras": "Keras", "jax": "JAX", "torch": "PyTorch"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", help="of benchmarks; all, if not given")
    p.add_argument("--only", default="", help="a part of the command")
    options = p.parse_args()
    kind, name = hardware()
    for readme in sorted((ROOT / "benchmarks").glob("*/README.md")):
        if not options.folders or readme.parent.name in options.folders:
            for block in BLOCK.finditer(readme.read_text()):
                if block[1] == kind and options.only in block[2]:
                    written = f"<!-- run on {kind}: python {block[2]} -->\n\n{made(block[2], name)}\n\n<!-- end -->"
                    readme.write_text(readme.read_text().replace(block[0], written))


def made(command, name):
    """What a benchmark prints, and where and when it was run."""
    print(command, flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stderr, done.stdout, flush=True)
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    versions = ", ".join(f"{PACKAGES[p]} {v}" for p in PACKAGES if (v := installed(p)))
    where = f"{name}; Python {platform.python_version()}, {versions}; {datetime.date.today()}: `python {command}`"
    return "\n".join([lines[0], "", *filter(None, lines[1:]), "", where])


def installed(package):
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware():
    """What kind of devices this machine has, and their name."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        found = None
    if found and found.returncode == 0:
        gpus = [line.split(":")[1].split("(")[0].strip() for line in found.stdout.splitlines() if line.strip()]
        return "GPUs", f"{len(gpus)} {gpus[0]}"
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return "cores", f"{os.cpu_count()} cores of {cpu}"


if __name__ == "__main__":
    main()

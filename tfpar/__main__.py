"""`python -m tfpar run train.py` and `python -m tfpar check`."""

import argparse
import sys

from tfpar import launch


def main(arguments: list[str] | None = None):
    """Run a command of tfpar."""
    parser = argparse.ArgumentParser("python -m tfpar", description="Run scripts on several GPUs, and check these.")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="set what must be set before TensorFlow starts, say so, and run a script")
    run.add_argument("--no-cache", action="store_true", help="compile every program anew")
    run.add_argument("script", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    run.set_defaults(do=lambda given: launch.run(given.script, given.arguments, not given.no_cache))
    check = commands.add_parser("check", help="look at the GPUs and their links, and run each collective once")
    check.add_argument("--timeout", type=float, default=120.0, help="seconds for each part")
    check.set_defaults(do=lambda given: sys.exit(not launch.check(given.timeout)))
    given = parser.parse_args(arguments)
    given.do(given)


if __name__ == "__main__":
    main()

"""Imports point down, the planning half needs no TensorFlow, private names stay in two files, every package ships."""

import ast
import configparser
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PLANNING = [
    "errors",
    "progress",
    "mesh",
    "graph",
    "schedule",
    "cost",
    "layout",
    "cut",
    "written",
    "partition",
    "timeline",
    "simulate",
    "plan",
]
RUNNING = [
    "_tf", "gradients", "_keras", "_keras_parts", "_moments", "variables", "detached", "batch", "devices", "feed",
    "flops", "state", "_keras_calls", "_keras_run", "_keras_backup", "model", "collectives", "local", "crossentropy",
    "rules", "divide", "rowwise", "samples", "probe", "mixing", "opening", "program", "whole", "engine", "halves",
    "backward", "together", "passes", "outcome", "update", "loss", "call", "routes", "prepare", "faults", "traced",
    "saving", "step", "callbacks", "convert", "measure", "testing",
]  # fmt: skip
ORDER = [*PLANNING, *RUNNING, "strategies"]
FILES = sorted(f for d in ("tfpar", "strategies") for f in (ROOT / d).rglob("*.py"))


def imports(file):
    """Every module that a file imports, with the names it takes from it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    names = imports(file)
    ours = {n.split(".")[1] for n in names if n.startswith("tfpar.")} & set(ORDER)
    if file.parent.name == "strategies":
        return
    if file.stem == "__init__" and file.parent.name == "tfpar":
        assert ours <= set(PLANNING)
        return
    name = file.parent.name if file.parent.name in ORDER else file.stem
    assert name in ORDER, f"give {name} its place in ORDER"
    assert {o for o in ours if ORDER.index(o) > ORDER.index(name)} == set()
    if name in PLANNING:
        assert not {n.split(".")[0] for n in names} & {"tensorflow", "keras"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_private_names_stay_in_the_bridges(file):
    if file.stem not in ("_tf", "_keras", "_keras_calls", "_keras_parts", "_keras_run", "_moments"):
        private = [n for n in imports(file) if n.startswith(("tensorflow.python", "keras.src"))]
        assert not private


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 400


def test_every_package_ships():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(config["options"]["packages"].split()) == {"tfpar", "tfpar.rules", "tfpar.strategies"}


def test_import_without_tensorflow():
    simulation = "import sys, tfpar; tfpar.simulate(tfpar.gpipe(2, 2), tfpar.StageCost.even(2))"
    code = f"{simulation}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_asserted_in_the_library():
    for file in FILES:
        if file.stem != "testing":
            assert not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(file.read_text()))), file


def test_public_names_are_documented_with_an_example():
    import tfpar

    for name in tfpar.__all__:
        value = getattr(tfpar, name)
        assert value.__doc__, name
        exempt = issubclass(value, Exception | tfpar.Kind | tfpar.Action) if isinstance(value, type) else False
        assert exempt or "Example:" in value.__doc__, name

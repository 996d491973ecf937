"""Packages import from those below, planning needs no TensorFlow, private names stay in compat."""

import ast
import configparser
import functools
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = (
    "compat", "planning", "graph", "comm", "variables", "tensor_parallel", "engine", "trainer", "strategies",
)  # fmt: skip
ORDER = ["errors", *PACKAGES[:-1], "tools", "strategies"]  # each imports from what stands before it
FILES = sorted(f for d in ("tfpar", "strategies") for f in (ROOT / d).rglob("*.py"))
EACH = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
TESTED_THROUGH = {  # for modules without a test file of their own, the test that runs them
    "compat/test_keras": "_keras_calls _keras_run _moments _replaced recording",
    "compat/test_keras_attention": "_cudnn_attention _keras_hub",
    "engine/test_engine": "added_losses batch_results combination device_order executor layer_placement loss pipeline "
    "program reading",
    "engine/test_remat": "vjp",
    "engine/test_collectives_inside": "_xla forward_backward in_program update_inside weights_inside",
    "graph/test_keras_graph": "inline_model",
    "graph/test_mixing": "progress samples",
    "planning/test_partition": "cost op_graph",
    "planning/test_plan": "explain flops plan_report planner",
    "strategies/test_data_parallel": "collectives_between distribute global_batch parts",
    "strategies/test_mesh_strategy": "collectives mesh optimizer_step stage_update",
    "planning/test_sharding": "layout_search",
    "strategies/test_zero": "gradient_reduction shard_view weight_edge",
    "tensor_parallel/test_rules": "attention convolution dense elementwise embedding normalization pooling reshaping",
    "tensor_parallel/test_tensorflow_ops": "tensorflow_moves",
    "tensor_parallel/test_tensor_parallel": "inline_layers loss_parallel parallelize rank_graph",
    "test_bad_input": "devices",
    "test_launch": "__main__ exchange",
    "trainer/test_hooks": "base description placement step_function training_step",
    "trainer/test_generating": "layer_calls",
    "trainer/test_loading": "placed",
    "trainer/test_killed": "_keras_backup",
}


def imports(file):
    """Every module that a file imports, with the names it takes from it."""
    found, tree = set(), ast.parse(file.read_text())
    checking = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for node in ast.walk(ast.Module([n for n in tree.body if n not in checking], [])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def package_of(file):
    """The package that a file is in; `tools` for what a user imports by name."""
    folders = file.relative_to(ROOT).parts[:-1]
    if folders == ("tfpar",):
        return "errors" if file.stem == "errors" else "tools"
    return folders[0] if folders[0] == "strategies" else folders[1]


@EACH
def test_packages_import_from_those_below(file):
    names = imports(file)
    ours = {n.split(".")[1] for n in names if n.startswith("tfpar.")}
    if file == ROOT / "tfpar" / "__init__.py":
        assert ours & {*ORDER} <= {"errors", "planning"}
        return
    tools = {f.stem for f in FILES if package_of(f) == "tools" and f.stem != "__init__"}
    mine, found = package_of(file), {"tools" if name in tools else name for name in ours} & {*ORDER}
    assert {name for name in found if ORDER.index(name) > ORDER.index(mine)} == set()
    if mine == "planning":
        assert "compat" not in found and not {n.split(".")[0] for n in names} & {"tensorflow", "keras"}


def test_imports_of_modules_have_no_circle():
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    above: list[str] = []
    done: set[str] = set()

    def visit(name):
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        above.append(name)
        for other in imports(modules[name]) & {*modules}:
            if not name.startswith(other + ".") and other != name:  # a package that registers what is in it
                visit(other)
        above.pop()
        done.add(name)

    for name in modules:
        if name not in ("tfpar", "tfpar.tensor_parallel.rules"):
            visit(name)


@EACH
def test_private_names_stay_in_compat(file):
    if package_of(file) != "compat":
        assert not [n for n in imports(file) if n.startswith(("tensorflow.python", "keras.src"))]


@EACH
def test_private_attributes_stay_in_compat(file):
    """Those of TensorFlow and Keras: what tfpar's own classes define is its own, and so is what they override."""
    nodes = list(ast.walk(ast.parse(file.read_text()))) if package_of(file) != "compat" else []
    fragments = {id(value) for node in nodes if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in nodes:
        name = private_name(node) if id(node) not in fragments else None
        ours = name is None or name in own_names() or is_self(getattr(node, "value", None))
        assert ours, f"{file}:{getattr(node, 'lineno', '?')}: {name} belongs in compat"


def private_name(node):
    """The private name that an attribute, a keyword or a text is; `None` if it is none."""
    name = getattr(node, "attr", None) or getattr(node, "arg", None) or getattr(node, "value", None)
    kinds = isinstance(node, ast.Attribute | ast.keyword | ast.Constant)
    return name if kinds and isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name) else None


@functools.cache
def own_names():
    """What tfpar's classes define, and what is documented of Python's."""
    own = {"_fields", "_getframe", "_replace", "_tfpar_hooks"}
    for each in FILES:
        for node in ast.walk(ast.parse(each.read_text())):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                own.add(node.attr)
    return own


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_every_module_is_tested():
    tests = {f.stem.removeprefix("test_").lstrip("_") for f in (ROOT / "tests").rglob("test_*.py")}
    stems = {f.stem for f in FILES} - {"__init__"}
    through = [module for modules in TESTED_THROUGH.values() for module in modules.split()]
    assert sorted(m for m in stems - {*through} if m.lstrip("_") not in tests) == []
    assert sorted({*through} - stems) == [] and len(through) == len({*through})
    assert all((ROOT / "tests" / f"{test}.py").exists() for test in TESTED_THROUGH)


@EACH
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 400


def test_every_package_ships():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    there = {f.parent for f in FILES if f.name == "__init__.py"}
    names = {".".join(("tfpar", *f.relative_to(ROOT).parts)).replace("tfpar.tfpar", "tfpar") for f in there}
    assert set(config["options"]["packages"].split()) == names


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


def test_no_class_is_long():
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.ClassDef)}
    assert {name: n for name, n in lines.items() if n > 200} == {}

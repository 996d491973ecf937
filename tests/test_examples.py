"""Every example and every block of code in the documentation runs, as a user would run it."""

import doctest
import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORTER = {"quickstart.py": ["--epochs", "1"], "07_fine_tune_and_generate.py": ["8"]}
FILES = [f.relative_to(ROOT) for f in sorted((ROOT / "tfpar").rglob("*.py")) if f.stem != "__init__"]
MODULES = [".".join(f.with_suffix("").parts) for f in FILES]


def run(*arguments):
    """The output of a Python process."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def blocks_of(page):
    """The Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: p.name)
def test_code_in_the_documentation(page, tmp_path):
    blocks = blocks_of(page)
    devices = [b for b in blocks if "logical_cpus" in b]  # must come before TensorFlow starts
    script = tmp_path / "blocks.py"
    script.write_text("\n".join([*devices, *(b for b in blocks if b not in devices)]))
    output = run(str(script))
    assert "of gradients added up over replicas" in output or page.name != "README.md"


@pytest.mark.fast
@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*/README.md")], ids=str)
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.fast
def test_commands_are_those_of_the_ci():
    commands = re.findall(r"^```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2 and commands[1].endswith('pip install -e ".[test]" && .venv/bin/pytest')
    assert '.venv/bin/pip install --quiet -e ".[test]"' in ci and ci.rstrip().endswith("\n.venv/bin/pytest")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example(example):
    output = run(str(example), *SHORTER.get(example.name, ()))
    if example.name == "quickstart.py":
        assert "predicted bubble" in output
        rows = [line.split() for line in output.splitlines() if line.lstrip().startswith(("digits  ", "text  "))]
        assert len(rows) == 8
        for row in rows:
            if "one" not in row:
                difference = next(float(cell) for cell in row if re.fullmatch(r"\de[-+]\d\d", cell))
                assert difference < 1e-3
    else:
        assert len(example.read_text().splitlines()) < 100


@pytest.mark.fast
@pytest.mark.parametrize("module", [*MODULES, "tfpar.strategies.base"])
def test_docstrings(module):
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"tfpar": importlib.import_module("tfpar")})
    assert not result.failed

"""The size budget of the design: python -m pytest tests/test_budget.py

It is there to make one think before adding a line, a flag or a package.
"""
import ast
import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("*.py"))
RUN_TIME = {"torch", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm"}


def lines(path):
    return path.read_text().count("\n")


def code_lines(path):
    """Lines that hold code: blank lines, comments and docstrings cost nothing, so that nobody saves on reasons."""
    text = path.read_text()
    quiet = {number for number, line in enumerate(text.split("\n"), 1) if not line.strip() or line.strip()[0] == "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            quiet |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines(path) - len(quiet - {lines(path) + 1})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_file_fits_on_a_few_screens(path):
    assert lines(path) <= 350, f"{path.name} has {lines(path)} lines; simplify it before splitting it"


def test_all_root_modules_together():
    total = sum(map(code_lines, MODULES))
    assert total <= 3500, f"{total} lines of code at the root"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_function_fits_on_one_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 150 if (path.name, node.name) == ("train.py", "main") else 60
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{path.name}: {node.name} has {length} lines, at most {limit}"


def test_lines_are_not_dense():
    for path in MODULES:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            assert len(line) <= 120, f"{path.name}:{number} has {len(line)} columns"


def test_train_has_at_most_32_flags():
    import train
    flags = len(dataclasses.fields(train.Settings)) + 2                    # and --preset, --resume
    assert flags <= 32, f"{flags} flags: what is tuned once in a life is a keyword default"


def imported(path):
    """(module, whether at the module's top level) of every absolute import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], id(node) in top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_only_the_listed_packages_at_run_time(path):
    own = {module.stem for module in MODULES}
    for name, _ in imported(path):
        if (path.name, name) in {("plot.py", "matplotlib"), ("curate.py", "matplotlib")}:
            continue                                                       # optional, for pictures alone
        assert name in RUN_TIME | own | set(sys.stdlib_module_names), f"{path.name} imports {name}"


def test_the_sandbox_needs_the_standard_library_alone():
    for name in ("jail.py", "sandbox.py", "server.py", "harness.py"):
        if (ROOT / name).exists():
            own = {"jail", "server", "harness"}
            foreign = {m for m, _ in imported(ROOT / name)} - own - set(sys.stdlib_module_names)
            assert not foreign, f"{name} imports {foreign}"


def test_nothing_imports_train():
    for path in MODULES:
        assert "train" not in {name for name, _ in imported(path)}, f"{path.name} imports train.py"


def test_requirements_are_pinned():
    rows = [row for row in (ROOT / "requirements.txt").read_text().splitlines() if row and row[0] != "#"]
    assert {row.split("==")[0] for row in rows} == {"torch", "numpy", "tokenizers", "safetensors"}
    assert all("==" in row for row in rows), rows

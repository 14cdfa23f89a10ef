"""The house rules that a machine can check: who may import whom, and how long code may be."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = (  # a folder imports only from floors before its own
    *("config", "core metrics", "tokenizer ops runtime tracking", "data model"),
    *("tasks checkpoints", "generation", "evaluation serving interpretability"),
    *("training", "planning"),
)
NUMBERS = {folder: number for number, floor in enumerate(FLOORS) for folder in floor.split()}
TOP = ROOT / "gptjax"
MODULES = {".".join(p.relative_to(TOP).with_suffix("").parts): p for p in TOP.rglob("*.py")}
COMMANDS = {name for name in MODULES if "." not in name} | {"data.prepare", "data.preview"}


def imports(name):
    """Modules of this package that a module imports, wherever in the file, but for types alone."""
    tree = ast.parse(MODULES[name].read_text())
    tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(node)[:20]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptjax":
            module = node.module.removeprefix("gptjax").strip(".")
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            yield from filter(None, (full if full in MODULES else module for full in names))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_folder_imports_only_from_smaller_numbers(name):
    own, folders = name.split(".")[0], {target.split(".")[0] for target in imports(name)}
    assert not COMMANDS & set(imports(name))
    assert name in COMMANDS or all(NUMBERS[f] < NUMBERS[own] for f in folders - {own})


def test_no_file_imports_itself_round_a_corner():
    list(graphlib.TopologicalSorter({name: set(imports(name)) for name in MODULES}).static_order())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_short(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= (130 if name in COMMANDS else 500)
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 75]
    assert text.count("default_backend()") == (name == "runtime.devices")


def test_no_heavy_framework_and_no_private_jax():
    heavy = ("torch", "tensorflow", "transformers", "pandas", "tensorflow_datasets")
    code = f"import sys, gptjax.train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert not [name for name, path in MODULES.items() if "jax._src" in path.read_text()]

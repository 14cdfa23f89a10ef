"""The house rules that a machine can check: who may import whom, and how long code may be."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = {
    "config": 1,
    "core": 2,
    "metrics": 2,
    "tokenizer": 3,
    "ops": 3,
    "runtime": 3,
    "tracking": 3,
    "data": 4,
    "model": 4,
    "tasks": 5,
    "checkpoints": 5,
    "generation": 6,
    "evaluation": 7,
    "serving": 7,
    "interpretability": 7,
    "training": 8,
    "planning": 9,
}
FILES = {path.relative_to(ROOT / "gptjax"): path for path in (ROOT / "gptjax").rglob("*.py")}
MODULES = {".".join(short.with_suffix("").parts): path for short, path in FILES.items()}
COMMANDS = {name for name in MODULES if "." not in name} | {"data.prepare", "data.preview"}


def imports(name):
    """Modules of this package that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptjax":
            module = node.module.removeprefix("gptjax").strip(".")
            for alias in node.names:
                full = f"{module}.{alias.name}".strip(".")
                yield full if full in MODULES else module


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_folder_imports_only_from_smaller_numbers(name):
    folder = name.split(".")[0]
    for target in filter(None, imports(name)):
        assert target not in COMMANDS, f"{name} imports the command {target}"
        other = target.split(".")[0]
        if name not in COMMANDS and other != folder:
            assert FLOORS[other] < FLOORS[folder], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_short(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= (130 if name in COMMANDS else 500)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{name}.{node.name}"
    asks = text.count("default_backend()")
    assert asks == (name == "runtime.devices"), f"{name} asks for the backend"


def test_no_heavy_framework_and_no_private_jax():
    heavy = ("torch", "tensorflow", "transformers", "pandas", "tensorflow_datasets", "wandb")
    modules = "gptjax.train, gptjax.generate"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert not [name for name, path in MODULES.items() if "jax._src" in path.read_text()]

"""The house rules that a machine can check."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = (
    "config", "settings", "files", "cli", "tree", "tokenizer.base", "tokenizer.trained", "tokenizer.openai", "tokenizer.pretrained", "tokenizer", "chat", "scores",
    "data.rows", "data.sources", "data.prepare", "data.loader", "tasks.base", "tasks.classification", "tasks.summarization", "tasks.translation", "tasks.qa",
    "tasks.dialogue", "tasks.text", "tasks.preference", "tasks.reward", "tasks.load", "programs", "products", "attention", "quantize", "model", "hf", "transfer", "lora", "losses", "preferences", "objectives", "optim", "sharding", "steps",
    "metrics", "checkpoint", "gguf", "peft", "convert", "sampling", "decode", "speculate", "beam", "generation", "language_model", "generate", "harness", "probes",
    "evaluate", "report", "run", "policy", "data.preview", "train",
)  # fmt: skip
PACKAGES = {"__init__", "data.__init__", "tasks.__init__"}  # docstrings and lazy doors
MODULES = {".".join(p.relative_to(ROOT / "gptjax").with_suffix("").parts): p for p in (ROOT / "gptjax").rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items() if name not in PACKAGES}


def test_every_module_has_a_place_in_the_order():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gptjax"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("gptjax").strip(".")
                target = full if full in ORDER else node.module.removeprefix("gptjax").strip(".")
                if target in ORDER:
                    assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}"


@pytest.mark.parametrize("name", ORDER)
def test_files_and_functions_stay_short(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= (300 if name == "train" else 420)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{name}.{node.name}"


def test_no_heavy_framework_is_imported():
    code = "import sys, gptjax.train, gptjax.generate; print([m for m in ('torch', 'tensorflow', 'transformers', 'pandas', 'tensorflow_datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_names_a_private_jax_module():
    for path in MODULES.values():
        assert "jax._src" not in path.read_text()

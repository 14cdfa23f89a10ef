"""The list of the quick tier names tests that exist, from every folder."""

import ast
import re

import pytest
from conftest import ROOT
from quick import QUICK


def functions(path):
    return [
        node.name
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("path", QUICK)
def test_every_pattern_names_a_test(path):
    for pattern in QUICK[path]:
        name = pattern.partition(r"\[")[0]  # without parameters
        assert any(re.fullmatch(name, function) for function in functions(path)), pattern


def test_every_folder_has_a_quick_test():
    folders = {path.parent.name for path in (ROOT / "gptjax").glob("*/__init__.py")}
    assert folders <= {path.split("/")[1] for path in QUICK}

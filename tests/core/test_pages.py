"""HTML pages: escaped, complete, and installed with the package."""

import tomllib

import jinja2
import pytest
from conftest import ROOT

from gptjax.core import pages


def test_values_are_escaped_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "toy.html").write_text(
        '{% extends "page.html" %}{% block body %}<p>{{ text }}</p>{% endblock %}'
    )
    page = pages.render(tmp_path, "toy.html", text="<i>a & b</i>")
    assert "<p>&lt;i&gt;a &amp; b&lt;/i&gt;</p>" in page
    assert "prefers-color-scheme: dark" in page and "http" not in page
    with pytest.raises(jinja2.UndefinedError, match="text"):
        pages.render(tmp_path, "toy.html")


def test_every_file_that_is_not_code_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = set()
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            installed |= set(folder.glob(pattern))
    data = {
        path
        for path in (ROOT / "gptjax").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == installed

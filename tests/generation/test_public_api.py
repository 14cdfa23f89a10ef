"""What `import gptjax` gives: all public names, and no JAX until one of them is used."""

import subprocess
import sys

import pytest
from conftest import ROOT

import gptjax


def test_every_public_name_is_there():
    for name in gptjax.__all__:
        assert getattr(gptjax, name).__name__ == name
        assert name in dir(gptjax)
    with pytest.raises(AttributeError, match="no attribute 'Generator'"):
        _ = gptjax.Generator


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import gptjax; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stdout
    assert "'gptjax'" in loaded
    assert "jax'" not in loaded.replace("'gptjax'", "")
    assert "numpy" not in loaded and "gptjax." not in loaded

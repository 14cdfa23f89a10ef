"""The shapes and dtypes in the annotations of ops/ and model/ are what passes through them."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("beartype", reason="beartype is not installed: pip install 'gptjax[test]'")

CHECKED = """
import sys
from jaxtyping import install_import_hook
with install_import_hook(["gptjax.ops", "gptjax.model"], "beartype.beartype"):
    import gptjax.model.head, gptjax.model.transformer, gptjax.ops.implementations
import pytest
quiet = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
sys.exit(pytest.main([*quiet, *sys.argv[1:]]))
"""


def run_checked(*arguments):
    command = [sys.executable, "-c", CHECKED, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_tests_of_the_ops_pass_with_every_annotation_checked():
    done = run_checked("tests/ops/test_implementations.py", "-k", "cpu and not sharded or gpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_wrong_shape_is_caught(tmp_path):
    (tmp_path / "test_wrong.py").write_text(
        "import jax.numpy as jnp\n"
        "from gptjax.ops import products\n"
        "def test_it():\n"
        "    products.matmul(jnp.ones((2, 3)), jnp.ones((2, 3, 1)))\n"
    )
    done = run_checked(
        str(tmp_path / "test_wrong.py"), "-c", "/dev/null", "--rootdir", str(tmp_path)
    )
    assert done.returncode == 1 and "jaxtyping" in done.stdout.lower(), done.stdout[-3000:]

"""The Colab notebooks are what their texts make, leave the machine's jax alone, and run."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

WITH_MODEL = ("chat", "look_inside")  # a GGUF file, which takes an extra
FOLDER = ROOT / "experiments" / "colab"
_spec = importlib.util.spec_from_file_location("colab_build", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def sources(name, kind="code"):
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_every_text_has_a_notebook():
    assert (
        {p.stem for p in FOLDER.glob("*.ipynb")}
        == set(build.NAMES)
        == {p.stem for p in FOLDER.glob("*.py")} - {"build"}
    )


def test_cells_of_a_text():
    text = (
        "# not shown\n\n# %% [markdown]\n# # Title\n#\n# A line.\n\n"
        "# %%\nx = 1  # %%\n\n\n# %%\n# why\ny = 2\n"
    )
    assert build.cells(text) == [
        ("markdown", "# Title\n\nA line."),
        ("code", "x = 1  # %%"),
        ("code", "# why\ny = 2"),
    ]
    with pytest.raises(ValueError, match="markdown cell"):
        build.cells("# %% [markdown]\n# fine\nx = 1\n")


@pytest.mark.parametrize("name", build.NAMES)
def test_the_notebook_is_what_its_text_makes(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == build.notebook(name), "run python experiments/colab/build.py"
    content = json.loads(text)
    assert (
        content["nbformat"],
        content["nbformat_minor"],
        content["metadata"]["kernelspec"]["name"],
    ) == (4, 5, "python3")
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(
        cell["source"] and cell["outputs"] == [] and cell["execution_count"] is None
        for cell in code
    )
    assert "@REPOSITORY@" not in text


@pytest.mark.parametrize("name", build.NAMES)
def test_a_notebook_begins_with_its_badge_and_compiles(name):
    first = sources(name, "markdown")[0]
    assert first.startswith("# ")
    address = f"github/{build.REPOSITORY}/blob/main/experiments/colab/{name}.ipynb"
    assert f"(https://colab.research.google.com/{address})" in first
    for i, cell in enumerate(sources(name)):
        compile(cell, f"{name} cell {i}", "exec")


def test_notebooks_share_their_first_cells():
    """Each repeats installation and helper; only the line that says what is needed differs."""

    def first_cells(name):
        lines = "\n".join(sources(name)[:2]).splitlines()
        return "\n".join(line for line in lines if not line.startswith("NEEDED"))

    assert len({first_cells(name) for name in build.NAMES}) == 1
    flags = [
        re.search(r"flags = .*?eval_batches=8\",?\s*\]", "\n".join(sources(name)), re.S).group()
        for name in ("pretrain", "finetune")
    ]
    assert re.findall(r"--config[^\"]*", flags[0]) == re.findall(
        r"--config[^\"]*", flags[1]
    )  # so that the second goes on with the first's run


@pytest.mark.parametrize("name", build.NAMES)
@pytest.mark.parametrize("place", ["bare", "clone", "installed"])
def test_the_first_cell_installs_what_is_missing_and_holds_jax(name, place, tmp_path, monkeypatch):
    said, needed = [], []
    here = tmp_path / "repository" / "notebooks" if place == "clone" else tmp_path
    here.mkdir(parents=True, exist_ok=True)
    if place == "clone":
        (tmp_path / "repository" / "configs").mkdir()
        (tmp_path / "repository" / "configs" / "quickstart.py").touch()

    def run(command, **options):
        said.append(" ".join(command))
        if "pip" in command:
            said.append(Path(command[command.index("--constraint") + 1]).read_text())
        return types.SimpleNamespace(returncode=0)

    def import_module(module):
        needed.append(module)
        if place != "installed" and len(said) < 2:
            raise ImportError(module)
        sys.modules["gptjax"] = types.SimpleNamespace(__file__=str(ROOT / "gptjax" / "__init__.py"))

    monkeypatch.chdir(here)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = {}
    with mock.patch.dict(sys.modules):
        exec(sources(name)[0], found)
    last = "gguf" if name in WITH_MODEL else "gptjax.train"
    assert found["ROOT"] == ROOT and needed[-1] == last
    if place == "installed":
        assert not said
        return
    root = tmp_path / ("repository" if place == "clone" else "gptjax-main")
    *clone, pip, constraints = said
    assert clone == [
        f"git clone --quiet --depth=1 https://github.com/{build.REPOSITORY} {root}"
    ] * (place == "bare")
    target = re.escape(f"{root}[gguf]" if name in WITH_MODEL else str(root))
    assert re.fullmatch(
        rf"\S+ -m pip install --quiet --editable {target} --constraint \S+",
        pip,
    )
    for package in ("jax", "jaxlib", "numpy"):
        assert f"{package}=={importlib.metadata.version(package)}\n" in constraints
    assert sys.path[0] == str(root)


def test_a_failed_installation_says_what_must_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **options: types.SimpleNamespace(returncode=1, stderr="no such version"),
    )
    with (
        mock.patch.object(importlib, "import_module", side_effect=ImportError),
        pytest.raises(RuntimeError) as raised,
    ):
        exec(sources("pretrain")[0], {})
    for part in ("git clone", f"jax=={importlib.metadata.version('jax')}", "no such version"):
        assert part in str(raised.value)


def execute(name, folder):
    """What the code cells print, run one after the other in a folder of their own."""
    (folder / "notebook.py").write_text("\n\n".join(sources(name)), encoding="utf-8")
    # as in conftest.command
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
        "GPTJAX_FAST": "1",
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "is the package index reachable" in done.stdout:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def numbers(pattern, text):
    """The numbers in the groups of the pattern where it first occurs."""
    found = re.search(pattern, text)
    assert found, text[-3000:]
    return [float(group) for group in found.groups()]


@pytest.mark.notebook
def test_pretrain_runs(tmp_path):
    said = execute("pretrain", tmp_path)
    first, last, held_out = numbers(
        r"training loss ([\d.]+) after 5 steps, ([\d.]+) after 30; held out ([\d.]+)", said
    )
    assert last < first < 8.5 and abs(held_out - last) < 0.5
    model, xz, bigram = numbers(
        r"([\d.]+) bits per byte: this model\n([\d.]+) .*: xz -9\n"
        r"([\d.]+) .*: bigram model of all training text",
        said,
    )
    assert (
        bigram < model < 2.9 and bigram < xz
    )  # 2.9: every token equally likely; of so short a text xz learns little
    written = re.search(r"^The people of the United States(.*)", said, flags=re.M).group(1)
    assert len(written) > 20


@pytest.mark.notebook
def test_finetune_runs(tmp_path):
    said = execute("finetune", tmp_path)
    train, held_out, classes = numbers(
        r"([\d,]+) examples to learn from, (\d+) held out, (\d+) classes: 1750-1799, ", said
    )
    assert (train, held_out, classes) == (640, 120, 6)
    accuracy, low, high, commonest = numbers(
        r"accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]; always [\d-]+: ([\d.]+)", said
    )
    assert (
        low <= accuracy <= high and accuracy > commonest - 0.05
    )  # 38 steps: not worse than chance
    named = re.findall(r"^(\d{4})-(\d{4}) \((\d+)%\)  \w", said, flags=re.M)
    assert len(named) == 6 and all(
        int(b) - int(a) == 49 and 100 / 6 <= int(share) + 1 <= 101 for a, b, share in named
    )


@pytest.mark.notebook
def test_chat_runs(tmp_path):
    said = execute("chat", tmp_path)
    assert "30 layers, width 576, 49,152 tokens" in said
    (paris,) = numbers(r"after 'The capital of France is': ' Paris' ([\d.]+)%", said)
    assert 5 < paris < 100
    scores = dict(re.findall(r"^ *(-[\d.]+)  The capital of France is( \w+)", said, flags=re.M))
    ranked = [word for _, word in sorted(scores.items(), key=lambda pair: -float(pair[0]))]
    assert (
        ranked[0] == " Paris" and ranked[-1] != " Rome" and "Paris  (what it would write)" in said
    )
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in said
    answers = re.findall(r"^> (.*)\n(.*)", said, flags=re.M)
    assert len(answers) == 2 and "Paris" in answers[0][1] and "Seine" in answers[1][1]


@pytest.mark.notebook
def test_look_inside_runs(tmp_path):
    """Its own assertions are the test; what it found is what is known of this model."""
    said = execute("look_inside", tmp_path)
    assert "layer 23, head 4 turns" in said and "it looks at ' France'" in said
    assert "layer 18, head 6 looks from the last token at" in said

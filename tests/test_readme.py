"""The README's commands run. CI runs the first two exactly as printed (.ci/readme_command); the others run here, shortened."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, command

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.M | re.S)
SHORT = [
    "--config.train.steps=3",
    "--config.optim.warmup_steps=1",
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.heads=2",
    "--config.train.eval_batches=1",
    "--config.train.sample_tokens=4",
]


PYTHON = re.search(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S).group(1)


def lines(block):
    return [shlex.split(line) for line in block.splitlines() if line.startswith("python ")]


def is_smollm2(args):
    return "smollm2" in " ".join(args)


def test_the_first_two_blocks_set_up_train_and_test():
    assert "configs/quickstart.py" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]
    for block in BLOCKS[:2]:
        assert block.startswith("python3 -m venv")
        assert "pip install" in block


def test_every_file_named_is_there():
    for name in re.findall(
        r"`((?:configs|launch|experiments|tests|gptjax)/[\w./-]+)", TEXT
    ) + re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    tree = TEXT[TEXT.index("```\ngptjax/") :]
    for name in re.findall(r"^  (\w+\.py) ", tree, flags=re.M):
        assert (ROOT / "gptjax" / name).exists(), name


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    commands = [
        args
        for block in BLOCKS
        for args in lines(block)
        if args[1] == "-m" and args[2] != "pytest" and not is_smollm2(args)
    ]
    assert len(commands) >= 9
    for args in commands:
        args = [arg.replace("runs/", f"{tmp_path}/") for arg in args]
        if "gptjax.train" in args:
            args += SHORT
        if "--config=configs/finetune_eras.py" in args:  # from the run above, and as short
            args += [
                f"--config.train.init_from={tmp_path}/quickstart",
                "--config.train.epochs=0",
                "--config.data.train_limit=60",
                "--config.data.eval_limit=40",
            ]
        command(*args[2:])
    assert (tmp_path / "quickstart" / "report.html").exists()
    shutil.rmtree(tmp_path / "prepared")


@pytest.mark.slow
@pytest.mark.parity  # with the other references: it fetches 93 MB
def test_the_real_model_is_fetched_asked_and_exported(tmp_path):
    """Every line of the SmolLM2 block, then the Python block on what it exported."""
    commands = [
        [arg.replace("runs/", f"{tmp_path}/") for arg in args]
        for block in BLOCKS
        for args in lines(block)
        if is_smollm2(args)
    ]
    fetch, *commands = commands
    done = subprocess.run(
        [sys.executable, *fetch[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "is the package index reachable" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    assert len(commands) == 3
    said = [
        command(
            *args[2:], input="What is the capital of France?\n/save " + str(tmp_path / "talk.json")
        ).stdout
        for args in commands
    ]
    assert "The capital of France is Paris" in said[0]
    assert "Paris" in said[1]
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())] == [
        "user",
        "assistant",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", PYTHON.replace("runs/", f"{tmp_path}/")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert " Paris" in ran.stdout.splitlines()[0]

"""The README's commands run. CI runs the first two exactly as printed (.ci/readme_command); the others run here, shortened."""

import re
import shlex
import shutil

import pytest
from conftest import ROOT, command

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.M | re.S)
SHORT = ["--config.train.steps=3", "--config.optim.warmup_steps=1", "--config.model.layers=1", "--config.model.width=32", "--config.model.heads=2", "--config.train.eval_batches=1", "--config.train.sample_tokens=4"]  # fmt: skip


def lines(block):
    return [shlex.split(line) for line in block.splitlines() if line.startswith("python -m gptjax")]


def test_the_first_two_blocks_set_up_train_and_test():
    assert "configs/quickstart.py" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]
    for block in BLOCKS[:2]:
        assert block.startswith("python3 -m venv")
        assert "pip install" in block


def test_every_file_named_is_there():
    for name in re.findall(r"`((?:configs|launch|experiments|tests|gptjax)/[\w./-]+)", TEXT) + re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    tree = TEXT[TEXT.index("```\ngptjax/") :]
    for name in re.findall(r"^  (\w+\.py) ", tree, flags=re.M):
        assert (ROOT / "gptjax" / name).exists(), name


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    where = {"runs/quickstart": str(tmp_path / "quickstart"), "runs/debug": str(tmp_path / "debug"), "runs/prepared": str(tmp_path / "prepared")}
    commands = [args for block in BLOCKS for args in lines(block)]
    assert len(commands) >= 6
    for args in commands:
        args = [next((arg.replace(old, new) for old, new in where.items() if old in arg), arg) for arg in args]
        if "gptjax.train" in args:
            args += SHORT
        command(*args[2:])
    assert (tmp_path / "quickstart" / "report.html").exists()
    shutil.rmtree(tmp_path / "prepared")

"""The commands of README.md, CONTRIBUTING.md and docs/ run.

CI runs the README's first two blocks exactly as printed (.ci/readme_command). All others run here,
the blocks of a page in their order and in a folder of its own, at a reduced size. A block that is
not run has a line `<!-- not run: reason -->` before it.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, command

from gptjax.config import build
from gptjax.tasks import loading
from gptjax.tasks.base import Answer
from gptjax.tasks.table import TASKS
from gptjax.tokenizer.trained import ByteTokenizer

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")
SHORT = (
    "--config.train.steps=3",
    "--config.optim.warmup_steps=1",
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.heads=2",
    "--config.train.eval_batches=1",
    "--config.train.sample_tokens=4",
)
SHORT_TASK = (
    "--config.train.epochs=0",
    "--config.data.train_limit=60",
    "--config.data.eval_limit=40",
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of commands or Python. reason: why it is not run, or ""."""

    page: str
    language: str
    text: str
    reason: str

    @property
    def needs_real_model(self):
        return "smollm2" in self.text

    @property
    def lines(self):
        """Its commands, without line breaks within one."""
        return self.text.replace("\\\n", " ").splitlines()

    @property
    def commands(self):
        """The arguments of each `python -m gptjax...`, without `python -m`."""
        found = [re.search(r"(?:^|\s)python -m (gptjax\..*)", line) for line in self.lines]
        return [shlex.split(match[1]) for match in found if match]


def read_blocks(page):
    blocks, reason, language, lines = [], "", "", []
    for line in PAGES[page].splitlines():
        if language and line == "```":
            blocks.append(Block(page, language, "\n".join(lines), reason))
            language, lines, reason = "", [], ""
        elif language:
            lines.append(line)
        elif line in ("```sh", "```python"):
            language = line[3:]
        elif line.strip():
            match = NOT_RUN.fullmatch(line)
            reason = match[1] if match else ""
    assert not language, f"{page}: a block without an end"
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
README = [block for block in BLOCKS if block.page == "README.md"]
TO_RUN = [block for block in BLOCKS if not block.reason and not block.needs_real_model]


def test_the_first_two_blocks_set_up_train_and_test():
    assert "configs/quickstart.py" in README[0].text
    assert "pytest" in README[1].text
    for block in README[:2]:
        assert block.text.startswith("python3 -m venv")
        assert "pip install" in block.text
        assert "as printed" in block.reason


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_is_there(page):
    named = re.findall(r"`((?:configs|launch|experiments|tests|gptjax)/[\w./-]+)`", PAGES[page])
    if not page.startswith("docs/"):  # those links are checked by mkdocs
        named += re.findall(r"\]\(((?!http)[^)#]+)", PAGES[page])
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_tree_of_the_readme_is_the_tree():
    text = PAGES["README.md"]
    tree = text[text.index("```\ngptjax/") :].partition("\n```")[0]
    folders = {path.name for path in (ROOT / "gptjax").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^  (\w+)/ ", tree, flags=re.M)) == folders
    for name in re.findall(r"^(\w+)/ ", tree, flags=re.M):
        assert (ROOT / name).is_dir(), name


def test_almost_every_block_is_run():
    assert sum(len(block.commands) for block in TO_RUN) >= 30
    assert sum(bool(block.reason) for block in BLOCKS) <= len(BLOCKS) // 3


def _reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.commands}))
def test_flags_and_settings_exist(page, monkeypatch):
    """Also of the blocks that are not run."""
    monkeypatch.chdir(ROOT)
    reference = _reference()
    for args in [args for block in BLOCKS if block.page == page for args in block.commands]:
        verb, *flags = args
        assert "--help" in flags or all(flag.startswith("--") for flag in flags), args
        known = reference.help_of(verb.removeprefix("gptjax."))[1]
        pairs = [flag[2:].partition("=")[::2] for flag in flags]
        assert {name for name, _ in pairs if not name.startswith("config.")} <= set(known), args
        overrides = {n.removeprefix("config."): v for n, v in pairs if n.startswith("config.")}
        if "config" in dict(pairs):
            settings = build.load_file(dict(pairs)["config"])
            build.override(settings, overrides)
            if "target" in dict(pairs):  # plans from shapes alone: the data need not be there
                settings.data.path = settings.data.path or "not read"
            build.build_config(settings)
        else:
            assert not overrides, args


def shorten(line):
    """The command at the reduced size. A server is asked once and stopped."""
    if line.startswith("pip install"):  # what the tests need is there
        return ""
    if "python -m gptjax.serve" in line:
        return line.replace("python -m gptjax.serve", f"python {ROOT}/tests/ask_server.py")
    if "python -m gptjax.train" in line and "--print_config" not in line:
        extra = SHORT_TASK if "configs/finetune_" in line else ()
        return shlex.join([line, *SHORT, *extra]).replace(shlex.quote(line), line, 1)
    return line


def run_block(block, folder):
    """In a folder that looks like a clone, whose runs/ is its own."""
    for name in ("configs", "experiments", "launch", "README.md"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    if block.language == "python":
        (folder / "block.py").write_text(block.text)
        script = "python block.py"
    else:
        script = "\n".join(map(shorten, block.lines))
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # as in conftest.command
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", 'python() { "$PYTHON" "$@"; }\n' + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in TO_RUN}))
def test_every_command_runs(page, tmp_path):
    blocks = [block for block in TO_RUN if block.page == page]
    if page == "README.md":  # its first block, which CI runs as printed, makes runs/quickstart
        train = "\n".join(line for line in README[0].lines if "gptjax.train" in line)
        run_block(Block(page, "sh", train, ""), tmp_path)
        assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
    for block in blocks:
        run_block(block, tmp_path)


def test_the_task_of_the_docs_is_a_task(tmp_path, monkeypatch):
    page = PAGES["docs/how-to/add-a-task.md"]
    names = {}
    exec(re.search(r"^```python title=.*?\n(.*?)^```", page, flags=re.M | re.S)[1], names)
    monkeypatch.setitem(TASKS, "opposites", names["OPPOSITES"])
    rows = [{"word": "hot", "opposite": "cold"}, {"word": "up", "opposite": "down"}] * 10
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build.build_config(
        {
            "task": {"name": "opposites"},
            "data": {"source": "jsonl", "path": str(path), "tokenizer": "bytes"},
            "model": {"context": 64},
        }
    )
    tokenizer = ByteTokenizer()
    examples = loading.load_examples(config, tokenizer).train
    first = examples[0]
    text = tokenizer.decode([int(i) for i in first.ids if i < 256])
    assert text == f"The opposite of {first.fields['word']} is {first.references[0].strip()}"
    answers = [Answer(example.references[0]) for example in examples]
    scores = TASKS["opposites"].evaluate(config.task, (), examples, answers)
    assert scores["exact_match"].value == 1.0
    assert TASKS["opposites"].headline in scores


@pytest.mark.slow
@pytest.mark.parity  # with the other references: it fetches 93 MB
def test_the_real_model_is_fetched_asked_and_exported(tmp_path):
    """Every line of the SmolLM2 block of the tutorial, then its Python block on the export."""
    blocks = [block for block in BLOCKS if block.needs_real_model and not block.reason]
    blocks = [block for block in blocks if block.page == "docs/tutorials/chatting.md"]
    commands = [
        shlex.split(line.replace("runs/", f"{tmp_path}/"))
        for block in blocks
        for line in block.lines
        if block.language == "sh" and line.startswith("python ")
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
    (python,) = [block.text for block in blocks if block.language == "python"]
    ran = subprocess.run(
        [sys.executable, "-c", python.replace("runs/", f"{tmp_path}/")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert " Paris" in ran.stdout.splitlines()[0]

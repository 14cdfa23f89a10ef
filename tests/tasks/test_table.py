"""A task is one file and one row of TASKS: its names are choices, and nothing else names it."""

import ast

import pytest
from conftest import ROOT, make_config
from helpers import load_examples

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.evaluation.answers import ANSWERED_BY
from gptjax.metrics.bootstrap import mean_metric
from gptjax.tasks.base import Task
from gptjax.tasks.rendering import completion_example
from gptjax.tasks.table import TASKS, task_of
from gptjax.training.objectives import OBJECTIVES


@pytest.mark.parametrize("name", TASKS)
def test_a_row_names_rows_of_other_tables(name):
    task = TASKS[name]
    assert (ROOT / "gptjax" / "tasks" / f"{name}.py").is_file()
    assert task.objective in OBJECTIVES
    for method in ("head", "text"):
        assert task.answered_by(TaskConfig(name=name, method=method)) in ANSWERED_BY
    assert task_of(TaskConfig(name=name)) is task


def compared_names(source):
    """(line, names) of each comparison of `task.name` or `config.name` with texts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
            owner = getattr(node.left.value, "attr", getattr(node.left.value, "id", ""))
            if node.left.attr == "name" and owner in ("task", "config"):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                yield node.lineno, set(texts) & set(TASKS)


def test_nothing_outside_the_task_files_asks_for_the_name_of_a_task():
    asks = 'if c.task.name in ("grpo", "qa") or config.name != "chat" or path.name == "text": pass'
    assert [names for _, names in compared_names(asks)] == [{"grpo", "qa"}, {"chat"}]
    for path in (ROOT / "gptjax").rglob("*.py"):
        if path.parent.name == "tasks" and path.stem in TASKS:
            continue
        for line, names in compared_names(path.read_text()):
            assert not names, f"{path}:{line}"


def test_a_new_row_is_a_new_choice(tmp_path, monkeypatch):
    def make_example(rendering, row):
        return completion_example(rendering, row, references=[row.text("text")])

    def evaluate(config, labels, examples, answers):
        return {"length": mean_metric([len(answer.text) for answer in answers])}

    def check(config):
        return ["no stop texts here"] if config.task.stop else []

    with pytest.raises(UserError, match=r"task.name = 'echo': must be one of .*grpo"):
        make_config(task=dict(name="echo"))
    echo = Task(make_example, evaluate, "length", prompt="{text}", completion="{text}", check=check)
    monkeypatch.setitem(TASKS, "echo", echo)
    with pytest.raises(UserError, match="no stop texts here"):
        make_config(task=dict(name="echo", stop=["x"]))
    data, _ = load_examples(tmp_path, [{"text": "ab"}], task=dict(name="echo"))
    assert data.tokenizer.decode(data.train[0].ids.tolist()[:-1]) == "abab"

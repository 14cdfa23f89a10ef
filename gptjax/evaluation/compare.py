"""Checkpoints and baselines on the same examples of a task: scores, intervals, differences.

In: a task's config and checkpoints. Out: a `Comparison` for each of them and for each baseline,
as a table or as JSON. Rows are compared by pairs, so all are scored on the examples that fit all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.checkpoints.workdir import workdir_of
from gptjax.config import build
from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import selection
from gptjax.data.records import Record, subsample_evenly
from gptjax.evaluation.answers import answer_examples, label_ids, prediction_row
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks import loading, splits
from gptjax.tasks.base import Answer, Example
from gptjax.tasks.rendering import names_in
from gptjax.tasks.table import task_of

_NO_LIMIT = 1 << 30  # tokens: longer than any example


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a comparison: a checkpoint or a baseline, and its scores."""

    name: str
    scores: dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class AnsweredExamples:
    """The examples that fit a checkpoint, and what it (or a baseline) answers to each."""

    name: str
    examples: list[Example]
    answers: list[Answer]


def compare(
    config: Config,
    checkpoints: Sequence[str],
    *,
    path: str = "",
    limit: int = 0,
    out: Path | None = None,
    baselines: bool = True,
    own_prompts: bool = False,
    mesh: str = "",
) -> list[Comparison]:
    """Scores of each checkpoint, then of the task's baselines, on the examples that fit all.

    path: a file of examples, or a split, in place of the held-out one; limit: examples taken.
    out: a folder for predictions, a jsonl for each checkpoint. own_prompts: runs of the same task
    get their own prompts. mesh: as in `gptjax.load`. Raises UserError.
    """
    task = task_of(config.task)
    task.check_package()
    rows = splits.read_splits(config)
    selection.say(rows.selections)
    train_rows, eval_rows = rows.train, rows.eval
    labels = task.labels(config.task, train_rows)
    if path:
        eval_rows = splits.read_other_rows(config, path)
    test_rows = _check_not_empty(subsample_evenly(eval_rows, limit), path)
    answered: list[AnsweredExamples] = []
    baseline_answers: list[AnsweredExamples] = []
    for number, name in enumerate(checkpoints, start=1):
        lm = language_model.load(name, mesh=mesh)
        fields = test_rows[0].fields
        own_config = _config_for(config, name, lm, fields, own_prompts=own_prompts)
        examples = _render_for(own_config, lm, test_rows, labels, path or "held-out")
        cli.say(f"{name}: {len(examples):,} examples")
        answers = answer_examples(lm, own_config.task, labels, examples)
        answered.append(AnsweredExamples(name, examples, answers))
        if out:  # before anything else may fail
            _write_predictions(out / f"{number}-{Path(name).name}.jsonl", lm, answered[-1])
        if number == 1 and baselines:
            train = _render_all(own_config, lm, train_rows, labels)
            for baseline, answers in task.baselines(examples, train).items():
                baseline_answers.append(AnsweredExamples(baseline, examples, answers))
    answered += baseline_answers
    shared = _shared_examples(answered, len(test_rows))
    comparisons = []
    for entry in answered:
        pairs = [
            (example, answer)
            for example, answer in zip(entry.examples, entry.answers, strict=True)
            if example.where in shared
        ]
        scores = task.evaluate(
            config.task,
            labels,
            [example for example, _ in pairs],
            [answer for _, answer in pairs],
        )
        comparisons.append(Comparison(entry.name, scores))
    return comparisons


def _check_not_empty(test_rows: list[Record], path: str) -> list[Record]:
    """The rows. Raises UserError where there are none."""
    if test_rows:
        return test_rows
    problem = "the held-out split is empty: raise data.eval_fraction"
    if path:
        problem = f"--path={path} holds no examples"
    raise UserError(f"{problem}, or name a file that has some with --path")


def _render_for(
    config: Config,
    lm: LanguageModel,
    test_rows: Sequence[Record],
    labels: Sequence[str],
    split: str,
) -> list[Example]:
    """The examples with prompts as long as in training, and an answer, where the context allows."""
    answer = _answer_tokens(config, lm, labels)
    length = min(config.length + answer, lm.config.context)
    tokenizer = lm.text_tokenizer
    return loading.render(
        _with_length(config, length), tokenizer, test_rows, labels, split, answer=answer
    )


def _render_all(
    config: Config, lm: LanguageModel, train_rows: Sequence[Record], labels: Sequence[str]
) -> list[Example]:
    """All training examples, however long, for the baselines."""
    unlimited = _with_length(config, _NO_LIMIT)
    return loading.render(unlimited, lm.text_tokenizer, train_rows, labels, "training")


def _write_predictions(path: Path, lm: LanguageModel, answered: AnsweredExamples) -> None:
    lines = []
    for example, answer in zip(answered.examples, answered.answers, strict=True):
        row = prediction_row(lm.text_tokenizer, example, answer)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    files.write_text(path, "".join(lines) or "\n")


def _shared_examples(answered: Sequence[AnsweredExamples], count: int) -> set[str]:
    """Places of the examples that fit all. Raises UserError where there are none."""
    places = [{example.where for example in entry.examples} for entry in answered]
    shared = set.intersection(*places)
    if not shared:
        raise UserError(
            "no example fits all checkpoints: set task.truncation to cut_start or cut_end"
        )
    if len(shared) < count:
        cli.say(
            f"compared on the {len(shared):,} examples that fit all; "
            f"{count - len(shared):,} others are left out"
        )
    return shared


def _config_for(
    config: Config, name: str, lm: LanguageModel, fields: Mapping[str, Any], *, own_prompts: bool
) -> Config:
    """The config for one checkpoint: by its head or by the likelihood of labels; its prompt tokens.

    own_prompts: with the prompt of its run, where that asks for the same answer from fields that
    are there.
    """
    task = config.task
    stored = run_config(name) if own_prompts else None
    if stored and stored.task.name == task.name:
        own = stored.task
        prompt = task_of(own).with_templates(own).prompt
        same_answer = (own.completion, own.label) == (task.completion, task.label)
        if same_answer and all(field in fields for field in names_in(prompt, "task.prompt")):
            task = dataclasses.replace(
                task,
                prompt=own.prompt,
                template=own.template,
                system=own.system,
                words=own.words if own.labels == task.labels else task.words,
            )
        else:
            cli.say(
                f"{name} was tuned on other fields: "
                "it is evaluated with the first checkpoint's prompt"
            )
    task = task_of(task).adapt(task, bool(lm.config.labels))
    lora = dataclasses.replace(config.lora, prompt_tokens=lm.prompt_tokens)
    return dataclasses.replace(config, task=task, lora=lora)


def _answer_tokens(config: Config, lm: LanguageModel, labels: Sequence[str]) -> int:
    """Places for an answer, whatever the correct one is; 0 where its length is given."""
    answered_by = task_of(config.task).answered_by(config.task)
    if answered_by in ("head", "preference"):
        return 0
    if answered_by == "likelihood":
        return max(map(len, label_ids(lm, config.task, labels)))
    if config.task.truncation == "refuse":
        # what training accepted is accepted here; writing says where the places are few
        return 0
    length = min(config.length, lm.config.context)
    return min(config.task.max_new_tokens, max(length // 2, 1))


def _with_length(config: Config, length: int) -> Config:
    """The config with rows of so many tokens."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))


def interval(metric: Metric) -> tuple[float, ...]:
    """(low, high), or nothing where there is but one row to draw from."""
    return metric.interval() if len(metric.stats) > 1 else ()


def difference(first: Comparison, other: Comparison, name: str) -> tuple[float, ...]:
    """First - other on a score: (gap, low, high), or (gap,) where it has no interval.

    Nothing for the first itself, or where one of them lacks that score.
    """
    if other is first or name not in first.scores or name not in other.scores:
        return ()
    score, other_score = first.scores[name], other.scores[name]
    if len(other_score.stats) > 1:
        return score.difference(other_score)
    return (score.value - other_score.value,)


def table(comparisons: Sequence[Comparison], headline: str) -> str:
    """The comparisons as text: each score with its 95 % interval, the headline first.

    The last column says how far the first line is ahead on the headline.
    """
    first = comparisons[0]
    names = sorted(first.scores, key=lambda name: name != headline)
    lines = [["", *names, f"first - this ({headline})"]]
    for comparison in comparisons:
        cells = [comparison.name]
        for name in names:
            metric = comparison.scores.get(name)
            cells.append(_cell((metric.value, *interval(metric)), ".4g") if metric else "-")
        gap = difference(first, comparison, headline)
        cells.append(_cell(gap, "+.4g") if gap else "")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = []
    for cells in lines:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        padded.append(line.rstrip())
    return "\n".join(padded)


def _cell(values: Sequence[float], form: str) -> str:
    """A value and, where there are more, its interval in brackets."""
    value, *ends = (format(v, form) for v in values)
    return f"{value} [{', '.join(ends)}]" if ends else value


def to_json(comparisons: Sequence[Comparison]) -> str:
    """{checkpoint: {score: {value, interval}}}.

    Of all but the first also first_minus_this: [gap, low, high].
    """
    content: dict[str, dict[str, dict[str, Any]]] = {}
    for comparison in comparisons:
        scores = content[comparison.name] = {}
        for name, metric in comparison.scores.items():
            scores[name] = {"value": metric.value, "interval": interval(metric)}
            gap = difference(comparisons[0], comparison, name)
            if gap:
                scores[name]["first_minus_this"] = gap
    return json.dumps(content)


def run_config(checkpoint: str) -> Config | None:
    """The config of a run, given its workdir or one of its steps; None of other checkpoints.

    Raises UserError.
    """
    path = workdir_of(Path(checkpoint).expanduser())[0] / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): give --config=configs/...") from None
    is_run = "task" in content and "model_type" not in content  # not Hugging Face's
    return build.from_stored(content) if is_run else None

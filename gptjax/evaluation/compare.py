"""TODO docstring."""

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
from gptjax.data import rows
from gptjax.evaluation.answers import answer_examples, label_ids, prediction_row
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks import loading, records
from gptjax.tasks.base import Answer, Example
from gptjax.tasks.table import task_of
from gptjax.tasks.templates import names_in


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a comparison."""

    name: str
    scores: dict[str, Metric]


def compare(
    config: Config,
    checkpoints: Sequence[str],
    *,
    path: str = "",
    limit: int = 0,
    out: Path | None = None,
    baselines: bool = True,
    own: bool = False,
) -> list[Comparison]:
    """Scores of each checkpoint, then of the task's baselines, on the examples that fit all of them. out: where predictions go, a jsonl a
    checkpoint; own: runs of the same task are asked with their own prompt. Raises UserError."""
    task = task_of(config.task)
    task.check_package()
    train_rows, eval_rows, _ = records.read_records(config)
    labels = task.labels(config.task, train_rows)
    test_rows = rows.subsample_evenly(
        records.read_other_records(config, path) if path else eval_rows, limit
    )
    if not test_rows:
        empty = (
            f"--path={path} holds no examples"
            if path
            else "the held-out split is empty: raise data.eval_fraction"
        )
        raise UserError(f"{empty}, or name a file that has some with --path")
    judged: list[tuple[str, list[Example], list[Answer]]] = []
    for name in checkpoints:
        lm = language_model.load(name)
        mine = _asked(config, name, lm, test_rows[0].fields, own=own)
        room = _answer_room(mine, lm, labels)
        length = min(
            config.length + room, lm.config.context
        )  # prompts as long as in training, and an answer, where the context has as much
        held = loading.render(
            _of_length(mine, length),
            lm.text_tokenizer,
            test_rows,
            labels,
            path or "held-out",
            answer=room,
        )
        cli.say(f"{name}: {len(held):,} examples")
        judged.append((name, held, answer_examples(lm, mine.task, labels, held)))
        if out:  # before anything else may fail
            lines = [
                json.dumps(prediction_row(lm.text_tokenizer, e, a), ensure_ascii=False)
                for e, a in zip(*judged[-1][1:], strict=True)
            ]
            files.write_text(
                out / f"{len(judged)}-{Path(name).name}.jsonl", "\n".join(lines) + "\n"
            )
        if len(judged) == 1 and baselines:
            train = loading.render(
                _of_length(mine, 1 << 30), lm.text_tokenizer, train_rows, labels, "training"
            )  # all of it, however long
            rivals = [(rival, held, found) for rival, found in task.baselines(held, train).items()]
    judged += rivals if baselines else []
    fit = set.intersection(*({e.where for e in held} for _, held, _ in judged))
    if not fit:
        raise UserError(
            "no example fits all checkpoints: set task.truncation to cut_start or cut_end"
        )
    if len(fit) < len(test_rows):
        cli.say(
            f"compared on the {len(fit):,} examples that fit all; {len(test_rows) - len(fit):,} others are left out"
        )
    entries = []
    for name, held, found in judged:
        kept = [(e, a) for e, a in zip(held, found, strict=True) if e.where in fit]
        entries.append(
            Comparison(
                name, task.evaluate(config.task, labels, [e for e, _ in kept], [a for _, a in kept])
            )
        )
    return entries


def _asked(
    config: Config, name: str, lm: LanguageModel, fields: Mapping[str, Any], *, own: bool
) -> Config:
    """The config as a checkpoint is asked by it: by its head or, where it has none, for the label as text; behind learned prompt tokens of its own.
    own: with the prompt of its run, where that asks for the same answer from fields that are there."""
    task, stored = config.task, run_config(name) if own else None
    if stored and stored.task.name == task.name:
        theirs = stored.task
        needed = names_in(task_of(theirs).with_templates(theirs).prompt, "task.prompt")
        if (theirs.completion, theirs.label) == (task.completion, task.label) and all(
            field in fields for field in needed
        ):
            task = dataclasses.replace(
                task, prompt=theirs.prompt, template=theirs.template, system=theirs.system
            )
            task = (
                dataclasses.replace(task, words=theirs.words)
                if theirs.labels == task.labels
                else task
            )
        else:
            cli.say(
                f"{name} was tuned on other fields: it is asked with the first checkpoint's prompt"
            )
    task = task_of(task).adapt(task, bool(lm.config.labels))
    return dataclasses.replace(
        config, task=task, lora=dataclasses.replace(config.lora, prompt_tokens=lm.prompt_places)
    )


def _answer_room(config: Config, lm: LanguageModel, labels: Sequence[str]) -> int:
    """Places for an answer, whatever the right one is; 0 where there is no choice."""
    answered_by = task_of(config.task).answered_by(config.task)
    if answered_by in ("head", "preference"):
        return 0
    if answered_by == "likelihood":
        return max(map(len, label_ids(lm, config.task, labels)))
    if (
        config.task.truncation == "refuse"
    ):  # what was accepted in training is accepted here; `_answer_by_writing` says where room is short
        return 0
    return min(config.task.max_new_tokens, max(min(config.length, lm.config.context) // 2, 1))


def _of_length(config: Config, length: int) -> Config:
    """The config with rows of so many tokens."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))


def interval(metric: Metric) -> tuple[float, ...]:
    """(low, high), or nothing where there is but one row to draw from."""
    return metric.interval() if len(metric.stats) > 1 else ()


def difference(first: Comparison, other: Comparison, name: str) -> tuple[float, ...]:
    """First - other on a score, with its interval where it has one; nothing for itself or where one of them lacks that score."""
    if other is first or name not in first.scores.keys() & other.scores.keys():
        return ()
    ours, theirs = first.scores[name], other.scores[name]
    return ours.difference(theirs) if len(theirs.stats) > 1 else (ours.value - theirs.value,)


def table(entries: Sequence[Comparison], headline: str) -> str:
    """The comparison as text: a value and its 95 % interval each, and how far the first is ahead on the headline."""

    def cell(values: Sequence[float], form: str) -> str:
        value, *spread = (format(v, form) for v in values)
        return value + f" [{', '.join(spread)}]" * bool(spread)

    names = sorted(entries[0].scores, key=lambda name: name != headline)
    lines = [["", *names, f"first - this ({headline})"]]
    for entry in entries:
        shown = [
            cell((m.value, *interval(m)), ".4g") if (m := entry.scores.get(name)) else "-"
            for name in names
        ]
        gap = difference(entries[0], entry, headline)
        lines.append([entry.name, *shown, cell(gap, "+.4g") if gap else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )


def to_json(entries: Sequence[Comparison]) -> str:
    """{checkpoint: {score: {value, interval}}}; of all but the first also first_minus_this: [gap, low, high]."""
    found = {
        e.name: {name: {"value": m.value, "interval": interval(m)} for name, m in e.scores.items()}
        for e in entries
    }
    for entry in entries:
        for name in entry.scores:
            if gap := difference(entries[0], entry, name):
                found[entry.name][name]["first_minus_this"] = gap
    return json.dumps(found)


def run_config(checkpoint: str) -> Config | None:
    """The config of a run, given its workdir or the folder of one of its steps; None of other checkpoints. Raises UserError."""
    stored = workdir_of(Path(checkpoint).expanduser())[0] / "config.json"
    if not stored.is_file():
        return None
    try:
        content = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{stored} is damaged ({error}): give --config=configs/...") from None
    return build.from_stored(content) if "task" in content and "model_type" not in content else None

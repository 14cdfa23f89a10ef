"""What a checkpoint is worth: held-out loss, a task's own scores with their intervals, any text's bits per byte, probes, lm-evaluation-harness.

    python -m gptjax.evaluate --checkpoint=runs/sst[,OTHER,...] [--config=configs/finetune_sentiment.py] [--path=test.jsonl] [--out=FOLDER]
    python -m gptjax.evaluate --checkpoint=PATH --text=FILES | --probes[=FILE.json] | --harness=TASK,TASK

A task's config comes from --config, or from the first checkpoint's workdir, and then a run of the same task is asked with its own prompt. --path
is a file in the form of its data, such as a test split, or the split's name in a data set that has several (default: the held-out split). Several
checkpoints, and the baselines that the task knows, are compared with the first on the examples that fit all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax import cli, files, language_model, metrics, scores, settings, sharding
from gptjax.checkpoint import workdir_of
from gptjax.config import Config, TaskConfig, UserError
from gptjax.data import loader, rows
from gptjax.language_model import LanguageModel
from gptjax.scores import Metric
from gptjax.tasks import classification, load, qa
from gptjax.tasks.base import Answer, Example, names_in
from gptjax.tokenizer import Tokenizer

_BATCH = 16  # texts that are written at once


def held_out(config: Config, mesh: Mesh, split: loader.Split, tokenizer: Tokenizer, eval_step: Any, params: Any, frozen: Any) -> dict[str, float]:
    """Means over the held-out split, each target once: loss, and of text perplexity and bits per byte, of classes the accuracy."""
    byte_lengths = np.array([len(b) for b in tokenizer.token_bytes])
    total = weight = right = count = 0.0
    size, mine = config.train.batch_size, sharding.local_rows(mesh, config.train.batch_size)
    for batch in loader.eval_batches(split, batch_size=size, rows=range(size), limit=config.train.eval_batches):
        if not config.model.labels:
            count += float((byte_lengths[batch["targets"]] * batch["loss_weights"]).sum())  # of all rows, whoever computes them
        sums = eval_step(params, sharding.to_global(mesh, {name: array[mine] for name, array in batch.items()}), frozen)
        total, weight, right = (a + float(b) for a, b in zip((total, weight, right), sums, strict=True))
    loss = total / weight
    if len(config.model.labels) == 1:
        return {"eval/loss": loss}
    if config.model.labels or config.task.name == "preference":
        return {"eval/loss": loss, "eval/accuracy": right / weight}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/bits_per_byte": total / math.log(2) / max(count, 1.0)}


def line(values: dict[str, float]) -> str:
    """An evaluation in words: the loss first."""
    names = {"eval/bits_per_byte": "bits per byte"}
    parts = [f"{value:.4f} {names.get(name, metrics.shown(name))}" for name, value in values.items() if name not in ("eval/loss", "eval/perplexity")]
    return ", ".join(([f"eval loss {values['eval/loss']:.4f}"] if "eval/loss" in values else []) + parts)


def answer(lm: LanguageModel, config: TaskConfig, labels: Sequence[str], examples: Sequence[Example]) -> list[Answer]:
    """The model's answers: what its head says, the likeliest label, or greedy (or beam-searched) text. Raises UserError where it lacks the head."""
    if config.name == "preference":
        return _by_preference(lm, examples)
    prompts = [e.ids[: e.prompt].tolist() for e in examples]
    with cli.progress("examples answered", len(examples)) as advance:
        if labels and config.method == "head":
            return _by_head(lm, labels, prompts, advance)
        if labels:
            return _by_likelihood(lm, config, labels, prompts, advance)
        found = _by_writing(lm, config, prompts, advance)
    return qa.extracted(examples, found) if config.name == "qa" and config.extract else found


def _by_head(lm: LanguageModel, labels: Sequence[str], prompts: list[list[int]], advance: Callable[[int], None]) -> list[Answer]:
    names = lm.config.labels
    if not names or (len(names) == 1) != (len(labels) == 1):
        raise UserError(f"the checkpoint has no head for {', '.join(labels)}: fine-tune it first")
    if len(labels) > 1 and set(names) != set(labels) and names != tuple(f"LABEL_{i}" for i in range(len(labels))):  # Hugging Face's for unnamed ones
        raise UserError(
            f"the checkpoint tells {', '.join(names)} apart and the task {', '.join(labels)}: set task.labels and the data to one of them"
        )
    found = lm.classify(prompts)
    advance(len(prompts))
    if len(labels) == 1:
        return [Answer(value=float(row[0])) for row in found]
    found = found[:, [names.index(name) for name in labels]] if set(names) == set(labels) else found
    return [Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row))) for row in found]


def _by_likelihood(
    lm: LanguageModel, config: TaskConfig, labels: Sequence[str], prompts: list[list[int]], advance: Callable[[int], None]
) -> list[Answer]:
    """The label whose text with its end is likeliest after the prompt."""
    words, found = _label_ids(lm, config, labels), []
    for i in range(0, len(prompts), _BATCH):
        part = prompts[i : i + _BATCH]
        scored = lm.score([p for p in part for _ in words], [w for _ in part for w in words])
        logits = np.array([score for score, _ in scored]).reshape(len(part), len(words))
        odds = np.exp(logits - logits.max(1, keepdims=True))
        for row in odds / odds.sum(1, keepdims=True):
            found.append(Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row))))
        advance(len(part))
    return found


def _label_ids(lm: LanguageModel, config: TaskConfig, labels: Sequence[str]) -> list[list[int]]:
    """Each label as a model writes it, with its end."""
    tokenizer, lead = lm.text_tokenizer, " " * (config.template == "plain")
    return [[*tokenizer.encode(lead + word), tokenizer.ends[0]] for word in classification.words_of(config, labels)]


def _by_preference(lm: LanguageModel, examples: Sequence[Example]) -> list[Answer]:
    """1 where the chosen answer is likelier than the rejected one, per token."""
    parts = [slice(at, at + size) for e in examples for at, size in ((0, e.parts[0]), (e.parts[0], e.parts[1]))]
    owners = [e for e in examples for _ in range(2)]
    found = lm.token_logprobs([e.ids[part].tolist() for e, part in zip(owners, parts, strict=True)])
    means = [float(logprobs[e.learned[part][1:]].mean()) for e, part, (logprobs, _) in zip(owners, parts, found, strict=True)]
    return [Answer(value=float(chosen > rejected)) for chosen, rejected in zip(means[::2], means[1::2], strict=True)]


def _by_writing(lm: LanguageModel, config: TaskConfig, prompts: list[list[int]], advance: Callable[[int], None]) -> list[Answer]:
    """Batches of prompts of similar length. What an answer may have depends on its own prompt, not on what is beside it."""
    result: list[Any] = [None] * len(prompts)
    rooms = [max(min(config.max_new_tokens, lm.config.context + 1 - len(p)), 1) for p in prompts]
    if short := sum(room < config.max_new_tokens for room in rooms):
        cli.say(f"{short:,} prompts leave room for less than task.max_new_tokens = {config.max_new_tokens}, so their answers may be cut")
    for room, members in itertools.groupby(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), key=lambda i: rooms[i]):
        same = list(members)
        for group in (same[first : first + _BATCH] for first in range(0, len(same), _BATCH)):
            found = lm.generate([prompts[i] for i in group], max_new_tokens=room, num_beams=config.num_beams, stop=config.stop)
            for i, one in zip(group, found, strict=True):
                result[i] = Answer(one.text.strip(), ids=tuple(one.tokens))
            advance(len(group))
    return result


def shown(tokenizer: Tokenizer, labels: Sequence[str], example: Example, found: Answer) -> str:
    """An example and its answer, to read."""
    given = tokenizer.decode(example.ids[: example.prompt].tolist())
    text = found.text or (f"{found.value:.4g}" if not found.ids else "")
    return f"[{example.where}]\n{given[-500:]}\n-> {text}\n   ({' | '.join(example.references)})"


def record(example: Example, found: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """One line of predictions."""
    row: dict[str, Any] = {
        "where": example.where,
        "prompt": tokenizer.decode(example.ids[: example.prompt].tolist()),
        "references": example.references,
    }
    row |= {"prediction": found.text} if found.text or not found.probabilities else {}
    if example.label is not None or not (found.text or found.ids):
        row |= {"value": found.value, "label": example.label, "probabilities": [round(p, 6) for p in found.probabilities]}
    return row


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison."""

    name: str
    scores: dict[str, Metric]


def compare(
    config: Config, checkpoints: Sequence[str], *, path: str = "", limit: int = 0, out: Path | None = None, baselines: bool = True, own: bool = False
) -> list[Entry]:
    """Scores of each checkpoint, then of the task's baselines, on the examples that fit all of them. out: where predictions go, a jsonl a
    checkpoint; own: runs of the same task are asked with their own prompt. Raises UserError."""
    kind = load.TASKS[config.task.name][0]
    kind.check_package()
    train_rows, eval_rows, _ = load.read(config)
    labels = load.labels_of(config, train_rows)
    test_rows = rows.spread(load.read_more(config, path) if path else eval_rows, limit)
    if not test_rows:
        empty = f"--path={path} holds no examples" if path else "the held-out split is empty: raise data.eval_fraction"
        raise UserError(f"{empty}, or name a file that has some with --path")
    judged: list[tuple[str, list[Example], list[Answer]]] = []
    for name in checkpoints:
        lm = language_model.load(name)
        mine = _asked(config, name, lm, test_rows[0].fields, own=own)
        room = _answer_room(mine, lm, labels)
        length = min(config.length + room, lm.config.context)  # prompts as long as in training, and an answer, where the context has as much
        held = load.render(_of_length(mine, length), lm.text_tokenizer, test_rows, labels, path or "held-out", answer=room)
        cli.say(f"{name}: {len(held):,} examples")
        judged.append((name, held, answer(lm, mine.task, labels, held)))
        if out:  # before anything else may fail
            lines = [json.dumps(record(e, a, lm.text_tokenizer), ensure_ascii=False) for e, a in zip(*judged[-1][1:], strict=True)]
            files.write_text(out / f"{len(judged)}-{Path(name).name}.jsonl", "\n".join(lines) + "\n")
        if len(judged) == 1 and baselines:
            train = load.render(_of_length(mine, 1 << 30), lm.text_tokenizer, train_rows, labels, "training")  # all of it, however long
            rivals = [(rival, held, found) for rival, found in kind.baselines(held, train).items()]
    judged += rivals if baselines else []
    fit = set.intersection(*({e.where for e in held} for _, held, _ in judged))
    if not fit:
        raise UserError("no example fits all checkpoints: set task.overlong to cut_start or cut_end")
    if len(fit) < len(test_rows):
        cli.say(f"compared on the {len(fit):,} examples that fit all; {len(test_rows) - len(fit):,} others are left out")
    entries = []
    for name, held, found in judged:
        kept = [(e, a) for e, a in zip(held, found, strict=True) if e.where in fit]
        entries.append(Entry(name, kind.judge(config.task, labels, [e for e, _ in kept], [a for _, a in kept])))
    return entries


def _asked(config: Config, name: str, lm: LanguageModel, fields: Mapping[str, Any], *, own: bool) -> Config:
    """The config as a checkpoint is asked by it: by its head or, where it has none, for the label as text; behind learned prompt tokens of its own.
    own: with the prompt of its run, where that asks for the same answer from fields that are there."""
    task, stored = config.task, run_config(name) if own else None
    if stored and stored.task.name == task.name:
        theirs = stored.task
        needed = names_in(theirs.prompt or load.TASKS[task.name][0].prompt, "task.prompt")
        if (theirs.completion, theirs.label) == (task.completion, task.label) and all(field in fields for field in needed):
            task = dataclasses.replace(task, prompt=theirs.prompt, template=theirs.template, system=theirs.system)
            task = dataclasses.replace(task, words=theirs.words) if theirs.labels == task.labels else task
        else:
            cli.say(f"{name} was tuned on other fields: it is asked with the first checkpoint's prompt")
    if task.name == "classification":
        task = dataclasses.replace(task, method="head" if lm.config.labels else "text")
    return dataclasses.replace(config, task=task, lora=dataclasses.replace(config.lora, prompt_tokens=lm.prompt_places))


def _answer_room(config: Config, lm: LanguageModel, labels: Sequence[str]) -> int:
    """Places for an answer, whatever the right one is; 0 where there is no choice."""
    if load.has_head(config) or config.task.name == "preference":
        return 0
    if labels:
        return max(map(len, _label_ids(lm, config.task, labels)))
    if config.task.overlong == "refuse":  # what was accepted in training is accepted here; `_by_writing` says where room is short
        return 0
    return min(config.task.max_new_tokens, max(min(config.length, lm.config.context) // 2, 1))


def _of_length(config: Config, length: int) -> Config:
    """The config with rows of so many tokens."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))


def interval(metric: Metric) -> tuple[float, ...]:
    """(low, high), or nothing where there is but one row to draw from."""
    return metric.interval() if len(metric.stats) > 1 else ()


def difference(first: Entry, other: Entry, name: str) -> tuple[float, ...]:
    """First - other on a score, with its interval where it has one; nothing for itself or where one of them lacks that score."""
    if other is first or name not in first.scores.keys() & other.scores.keys():
        return ()
    ours, theirs = first.scores[name], other.scores[name]
    return ours.difference(theirs) if len(theirs.stats) > 1 else (ours.value - theirs.value,)


def table(entries: Sequence[Entry], headline: str) -> str:
    """The comparison as text: a value and its 95 % interval each, and how far the first is ahead on the headline."""

    def cell(values: Sequence[float], form: str) -> str:
        value, *spread = (format(v, form) for v in values)
        return value + f" [{', '.join(spread)}]" * bool(spread)

    names = sorted(entries[0].scores, key=lambda name: name != headline)
    lines = [["", *names, f"first - this ({headline})"]]
    for entry in entries:
        shown = [cell((m.value, *interval(m)), ".4g") if (m := entry.scores.get(name)) else "-" for name in names]
        gap = difference(entries[0], entry, headline)
        lines.append([entry.name, *shown, cell(gap, "+.4g") if gap else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines)


def to_json(entries: Sequence[Entry]) -> str:
    """{checkpoint: {score: {value, interval}}}; of all but the first also first_minus_this: [gap, low, high]."""
    found = {e.name: {name: {"value": m.value, "interval": interval(m)} for name, m in e.scores.items()} for e in entries}
    for entry in entries:
        for name in entry.scores:
            if gap := difference(entries[0], entry, name):
                found[entry.name][name]["first_minus_this"] = gap
    return json.dumps(found)


def text_scores(lm: LanguageModel, documents: Iterator[str]) -> dict[str, Metric]:
    """loss, perplexity and bits per byte of documents, each token once, given up to a whole context and (past the first window) at least half of one."""
    tokenizer, lead = lm.text_tokenizer, [lm.text_tokenizer.eot] * lm.prompt_places
    size = lm.config.context - len(lead)
    half = max(size // 2, 1)
    stats = []
    with cli.progress("documents scored") as advance:
        for document in documents:
            ids = [*(tokenizer.prefix or (tokenizer.eot,)), *tokenizer.encode(document)]
            starts = [0, *range(half, max(len(ids) - 1 - half, half), half)] if len(ids) > size + 1 else [0]
            found = lm.token_logprobs([[*lead, *ids[s : s + size + 1]] for s in starts])
            new = np.concatenate([lp[len(lead) + (size - half) * bool(s) :] for s, (lp, _) in zip(starts, found, strict=True)])
            stats.append((-float(new.sum()), float(len(new)), float(len(document.encode()))))
            advance(1)
    return scores.token_loss(*np.array(stats).T)


def run_config(checkpoint: str) -> Config | None:
    """The config of a run, given its workdir or the folder of one of its steps; None of other checkpoints. Raises UserError."""
    stored = workdir_of(Path(checkpoint).expanduser())[0] / "config.json"
    if not stored.is_file():
        return None
    try:
        content = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{stored} is damaged ({error}): give --config=configs/...") from None
    return settings.build(content) if "task" in content and "model_type" not in content else None


def task_config(checkpoint: str) -> Config:
    """The config of a run that tuned a task. Raises UserError."""
    config = run_config(checkpoint)
    if config is None or not config.task.name:
        raise UserError(f"{checkpoint} names no task: give --config=configs/..., or --text, --probes or --harness")
    return config


FLAGS = {
    "checkpoint": "workdir, Hugging Face folder, .gguf file; several with a comma between",
    "path": "a file of examples in the task's form, such as a test split, or a split's name",
    "limit": "examples taken, spread over the file (all)",
    "out": "folder for predictions, a jsonl a checkpoint",
    "text": "file, folder or glob of text: perplexity and bits per byte",
    "probes": "bias and safety probes; =FILE.json for your own",
    "harness": "tasks of lm-evaluation-harness, with a comma between",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",), config=True)
    metrics.enable_compile_cache()
    names, limit = args["checkpoint"].split(","), args.number("limit", 0)
    if len(set(names)) < len(names):
        raise UserError("--checkpoint names one twice")
    out = Path(args["out"]) if args["out"] else None
    if args["text"]:
        if out:
            raise UserError("--out is for predictions and probes, and --text makes none: leave it out")
        documents = rows.spread([p.read_bytes() for p in rows.paths_of(args["text"], (".txt", ".md", ".text"))], limit)
        texts = [rows.decode(data, args["text"]) for data in documents]
        entries = [Entry(name, text_scores(language_model.load(name), iter(texts))) for name in names]
        headline = "bits_per_byte"
    elif "probes" in args or "harness" in args:
        if len(names) > 1:
            raise UserError(f"--probes and --harness look at one checkpoint, not at {len(names)}: run them for each")
        _others(args, names[0], limit, out)
        return
    else:
        own = args.settings is None
        config = task_config(names[0]) if own else args.config
        if not config.task.name:
            raise UserError("the config has no task.name: use --text for the loss of a text")
        entries = compare(config, names, path=args["path"], limit=limit, out=out, own=own)
        headline = load.TASKS[config.task.name][0].headline
    print(to_json(entries) if "json" in args else table(entries, headline))


def _others(args: cli.Args, name: str, limit: int, out: Path | None) -> None:
    lm = language_model.load(name)
    if "harness" in args:
        from gptjax import harness  # lm_eval is an extra

        found = harness.evaluate_tasks(lm, args["harness"].split(","), limit=limit or None)
        print(json.dumps(found, indent=1, default=str))
        return
    from gptjax import probes

    report = probes.run(lm, probes.load(probes.PROBES if args["probes"] == "true" else Path(args["probes"])))
    if out:
        files.write_text(out / "probes.html", probes.to_html(report))
        cli.say(f"wrote {out / 'probes.html'}")
    print(json.dumps(report.rows()) if "json" in args else probes.to_text(report))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

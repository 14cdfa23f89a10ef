"""What a checkpoint is worth: held-out loss, a task's own scores with their intervals, any text's bits per byte, probes, lm-evaluation-harness.

    python -m gptjax.evaluate --checkpoint=runs/sst2[,OTHER,...] [--config=configs/finetune_sst2.py] [--path=test.jsonl] [--out=FOLDER]
    python -m gptjax.evaluate --checkpoint=PATH --text=FILES | --probes[=FILE.json] | --harness=TASK,TASK

A task's config comes from --config or from the first checkpoint's workdir; --path is a file in the form of its data, such as a test split
(default: the held-out split). Several checkpoints, and the baselines that the task knows, are compared with the first on the same examples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax import cli, files, language_model, metrics, scores, settings, sharding
from gptjax.config import Config, TaskConfig, UserError
from gptjax.data import loader, rows
from gptjax.language_model import LanguageModel
from gptjax.scores import Metric
from gptjax.tasks import classification, load
from gptjax.tasks.base import Answer, Example
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
    parts = [
        f"{value:.4f} {names.get(name, name.removeprefix('eval/'))}" for name, value in values.items() if name not in ("eval/loss", "eval/perplexity")
    ]
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
        return _by_writing(lm, config, prompts, advance)


def _by_head(lm: LanguageModel, labels: Sequence[str], prompts: list[list[int]], advance: Callable[[int], None]) -> list[Answer]:
    if len(lm.config.labels) != len(labels):
        raise UserError(f"the checkpoint has no head for {len(labels)} labels: fine-tune it, or ask a language model with task.method = 'text'")
    found = lm.classify(prompts)
    advance(len(prompts))
    if len(labels) == 1:
        return [Answer(value=float(row[0])) for row in found]
    return [Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row))) for row in found]


def _by_likelihood(
    lm: LanguageModel, config: TaskConfig, labels: Sequence[str], prompts: list[list[int]], advance: Callable[[int], None]
) -> list[Answer]:
    """The label whose text with its end is likeliest after the prompt."""
    tokenizer, lead = lm.text_tokenizer, " " * (config.template == "plain")
    words = [[*tokenizer.encode(lead + w), tokenizer.ends[0]] for w in classification.words_of(config, labels)]
    found = []
    for i in range(0, len(prompts), _BATCH):
        part = prompts[i : i + _BATCH]
        scored = lm.score([p for p in part for _ in words], [w for _ in part for w in words])
        logits = np.array([score for score, _ in scored]).reshape(len(part), len(words))
        odds = np.exp(logits - logits.max(1, keepdims=True))
        for row in odds / odds.sum(1, keepdims=True):
            found.append(Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row))))
        advance(len(part))
    return found


def _by_preference(lm: LanguageModel, examples: Sequence[Example]) -> list[Answer]:
    """1 where the chosen answer is likelier than the rejected one, per token."""
    parts = [slice(at, at + size) for e in examples for at, size in ((0, e.parts[0]), (e.parts[0], e.parts[1]))]
    owners = [e for e in examples for _ in range(2)]
    found = lm.token_logprobs([e.ids[part].tolist() for e, part in zip(owners, parts, strict=True)])
    means = [float(logprobs[e.learned[part][1:]].mean()) for e, part, (logprobs, _) in zip(owners, parts, found, strict=True)]
    return [Answer(value=float(chosen > rejected)) for chosen, rejected in zip(means[::2], means[1::2], strict=True)]


def _by_writing(lm: LanguageModel, config: TaskConfig, prompts: list[list[int]], advance: Callable[[int], None]) -> list[Answer]:
    result: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), _BATCH):
        group = order[first : first + _BATCH]
        room = lm.config.context + 1 - len(prompts[group[-1]])
        found = lm.generate([prompts[i] for i in group], max_new_tokens=max(min(config.max_new_tokens, room), 1), num_beams=config.num_beams)
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
    if example.label is not None:
        row |= {"value": found.value, "label": example.label, "probabilities": [round(p, 6) for p in found.probabilities]}
    return row


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison."""

    name: str
    scores: dict[str, Metric]


def compare(
    config: Config, checkpoints: Sequence[str], *, path: str = "", limit: int = 0, out: Path | None = None, baselines: bool = True
) -> list[Entry]:
    """Scores of each checkpoint on one set of examples, then of the task's baselines. out: where predictions go, a jsonl a checkpoint."""
    kind = load.TASKS[config.task.name][0]
    train_rows, eval_rows, _ = load.read(config)
    labels = load.labels_of(config, train_rows)
    test_rows = rows.spread(load.read_file(config, path) if path else eval_rows, limit)
    if not test_rows:
        raise UserError("the held-out split is empty: raise data.eval_fraction, or name a file with --path")
    entries: list[Entry] = []
    for name in checkpoints:
        lm = language_model.load(name)
        tokenizer = lm.text_tokenizer
        context = min(config.length, lm.config.context)
        mine = dataclasses.replace(config, data=dataclasses.replace(config.data, length=context))
        held = load.render(mine, tokenizer, test_rows, labels, path or "held-out")
        cli.say(f"{name}: {len(held):,} examples")
        found = answer(lm, _method(config.task, lm), labels, held)
        entries.append(Entry(name, kind.judge(config.task, labels, held, found)))
        if out:
            lines = [json.dumps(record(e, a, tokenizer), ensure_ascii=False) for e, a in zip(held, found, strict=True)]
            files.write_text(out / f"{len(entries)}-{Path(name).name}.jsonl", "\n".join(lines) + "\n")
    if baselines:  # they know what the last checkpoint was given
        train = load.render(mine, tokenizer, train_rows, labels, "training")
        entries += [Entry(name, kind.judge(config.task, labels, held, found)) for name, found in kind.baselines(held, train).items()]
    return entries


def _method(config: TaskConfig, lm: LanguageModel) -> TaskConfig:
    """A language model is asked for the label's text where the task has a head: what a checkpoint knows before it is tuned."""
    return config if lm.config.labels or config.name != "classification" else dataclasses.replace(config, method="text")


def table(entries: Sequence[Entry], headline: str) -> str:
    """The comparison as text: a value and its 95 % interval each, and how far the first is ahead on the headline."""
    names = list(entries[0].scores)
    names.sort(key=lambda name: name != headline)
    head = ["", *names, f"first - this ({headline})"]
    lines = [head]
    for entry in entries:
        cells = [entry.name]
        for name in names:
            metric = entry.scores.get(name)
            low, high = metric.interval() if metric else (0.0, 0.0)
            cells.append(f"{metric.value:.4g} [{low:.4g}, {high:.4g}]" if metric else "-")
        if entry is entries[0] or headline not in entry.scores:
            lines.append([*cells, ""])
            continue
        gap, low, high = entries[0].scores[headline].difference(entry.scores[headline])
        lines.append([*cells, f"{gap:+.4g} [{low:+.4g}, {high:+.4g}]"])
    widths = [max(len(row[i]) for row in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines)


def text_scores(lm: LanguageModel, documents: Iterator[str]) -> dict[str, Metric]:
    """loss, perplexity and bits per byte of documents, each token once, given up to a whole context and (past the first window) at least half of one."""
    tokenizer = lm.text_tokenizer
    sums, weights, sizes = [], [], []
    with cli.progress("documents scored") as advance:
        for document in documents:
            ids, half = [*(tokenizer.prefix or (tokenizer.eot,)), *tokenizer.encode(document)], max(lm.config.context // 2, 1)
            starts = [0, *range(half, max(len(ids) - 1 - half, half), half)] if len(ids) > lm.config.context + 1 else [0]
            windows = [ids[s : s + lm.config.context + 1] for s in starts]
            found = lm.token_logprobs(windows)
            new = [lp if s == 0 else lp[lm.config.context - half :] for s, (lp, _) in zip(starts, found, strict=True)]
            sums.append(-sum(float(part.sum()) for part in new))
            weights.append(float(sum(len(part) for part in new)))
            sizes.append(float(len(document.encode())))
            advance(1)
    return scores.token_loss(np.array(sums), np.array(weights), np.array(sizes))


def task_config(checkpoint: str) -> Config:
    """The config of a run that tuned a task. Raises UserError."""
    stored = Path(checkpoint).expanduser() / "config.json"
    if stored.is_file() and "task" in (content := json.loads(stored.read_text(encoding="utf-8"))):
        config = settings.build(content)
        if config.task.name:
            return config
    raise UserError(f"{checkpoint} names no task: give --config=configs/..., or --text, --probes or --harness")


FLAGS = {
    "checkpoint": "workdir, Hugging Face folder, .gguf file; several with a comma between",
    "path": "a file of examples in the task's form, such as a test split",
    "limit": "examples taken, spread over the file (all)",
    "out": "folder for predictions, a jsonl a checkpoint",
    "text": "file, folder or glob of text: perplexity and bits per byte",
    "probes": "bias and safety probes; =FILE.json for your own",
    "harness": "tasks of lm-evaluation-harness, with a comma between",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",), config=True)
    metrics.enable_compile_cache()
    names = args["checkpoint"].split(",")
    out = Path(args["out"]) if args["out"] else None
    if args["text"]:
        documents = [p.read_bytes() for p in rows.paths_of(args["text"], (".txt", ".md", ".text"))]
        texts = [rows.decode(data, args["text"]) for data in documents]
        entries = [Entry(name, text_scores(language_model.load(name), iter(texts))) for name in names]
        headline = "bits_per_byte"
    elif "probes" in args or "harness" in args:
        _others(args, names[0], out)
        return
    else:
        config = args.config if args.settings is not None else task_config(names[0])
        if not config.task.name:
            raise UserError("the config has no task.name: use --text for the loss of a text")
        entries = compare(config, names, path=args["path"], limit=args.number("limit", 0), out=out)
        headline = load.TASKS[config.task.name][0].headline
    if "json" in args:
        print(json.dumps({e.name: {n: {"value": m.value, "interval": m.interval()} for n, m in e.scores.items()} for e in entries}))
    else:
        print(table(entries, headline))


def _others(args: cli.Args, name: str, out: Path | None) -> None:
    lm = language_model.load(name)
    if "harness" in args:
        from gptjax import harness  # lm_eval is an extra

        found = harness.evaluate_tasks(lm, args["harness"].split(","), limit=args.number("limit", 0) or None)
        print(json.dumps(found, indent=1, default=str))
        return
    from gptjax import probes

    report = probes.run(lm, probes.load(probes.PROBES if args["probes"] == "true" else Path(args["probes"])))
    if out:
        files.write_text(out / "probes.html", probes.to_html(report))
        cli.say(f"wrote {out / 'probes.html'}")
    print(probes.to_text(report))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

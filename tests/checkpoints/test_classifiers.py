"""Heads of Hugging Face folders: what they give, what is kept of them, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, random_params, tiny_checkpoint

import gptjax
from gptjax.checkpoints import formats
from gptjax.config.errors import UserError

PROBLEMS = {
    "single_label_classification": ("anger", "joy", "fear"),
    "multi_label_classification": ("anger", "joy", "fear"),
    "regression": ("score",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny classifier with three labels."""
    place = tmp_path_factory.mktemp("classifier") / "hf"
    formats.write_checkpoint(place, classifier())
    return place


def classifier(labels=("anger", "joy", "fear"), problem_type="", **keep):
    base = tiny_checkpoint("llama", vocab=264, tokenizer=byte_level_tokenizer())
    config = dataclasses.replace(base.config, labels=labels, problem_type=problem_type)
    params = jax.tree.map(np.asarray, random_params(config))
    return dataclasses.replace(
        base, config=config, params=params, keep={"eos_token_id": 263, **keep}
    )


def with_keys(folder, place, **keys):
    """The folder with other keys in its config.json; None takes one out."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    raw = json.loads((folder / "config.json").read_text()) | keys
    (place / "config.json").unlink()
    raw = {key: value for key, value in raw.items() if value is not None}
    (place / "config.json").write_text(json.dumps(raw))
    return place


def scores_of(lm, rows):
    """What the head says, from the definition: hidden states times its kernel."""
    from gptjax.model import transformer

    params = lm.params
    ends = []
    for row in rows:
        x, _ = transformer.apply(lm.config, params, np.array([row]))
        ends.append(np.asarray(x)[0, -1] @ params["score"]["kernel"].T)
    return np.array(ends)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_head_gives_what_its_problem_says_and_keeps_it(tmp_path, problem):
    formats.write_checkpoint(tmp_path / "a", classifier(PROBLEMS[problem], problem))
    lm = gptjax.load(tmp_path / "a")
    assert lm.config.problem_type == problem and lm.config.labels == PROBLEMS[problem]
    rows = [[5, 6, 7, 8], [9, 10]]
    scores, found = scores_of(lm, rows), lm.classify(rows)
    expected = {
        "single_label_classification": np.exp(scores) / np.exp(scores).sum(1, keepdims=True),
        "multi_label_classification": 1 / (1 + np.exp(-scores)),
        "regression": scores,
    }
    np.testing.assert_allclose(found, expected[problem], atol=1e-5)
    lm.save(tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["problem_type"] == problem
    assert list(raw["id2label"].values()) == list(PROBLEMS[problem])


def test_an_absent_problem_follows_from_the_labels(tmp_path, folder):
    lm = gptjax.load(with_keys(folder, tmp_path / "a", problem_type=None))
    assert (lm.config.problem_type, lm.config.problem) == ("", "single_label_classification")
    formats.write_checkpoint(tmp_path / "one", classifier(("score",)))
    lm = gptjax.load(with_keys(tmp_path / "one", tmp_path / "b", problem_type=None))
    assert lm.config.problem == "regression"
    assert abs(lm.classify([[5, 6]])[0, 0] - 1.0) > 1e-3  # no softmax of one label
    several = with_keys(folder, tmp_path / "c", problem_type="regression")
    assert gptjax.load(several).config.problem == "regression"


HEADS = {
    "a label less": ({"id2label": {"0": "a", "2": "c"}}, "numbers its 2 labels [0, 2]"),
    "a number twice": (
        {"id2label": {"0": "a", "00": "b", "2": "c"}},
        "numbers its 3 labels [0, 2]",
    ),
    "no number": ({"id2label": {"a": "0"}}, "a key that is no number"),
    "no table": ({"id2label": ["a", "b", "c"]}, "is no table of {number: name}"),
    "a name twice": (
        {"id2label": {"0": "a", "1": "b", "2": "a"}},
        "gives the name 'a' to 0 and to 2",
    ),
    "no text": ({"id2label": {"0": "a", "1": ["b"], "2": "c"}}, "a label ['b'], which is no text"),
    "another count": ({"num_labels": 2}, "num_labels = 2 and id2label has 3"),
    "labels that disagree": (
        {"label2id": {"anger": 2, "joy": 1, "fear": 0}},
        "id2label gives 'anger' the number 0 and label2id 2",
    ),
    "another number of rows": (
        {"id2label": {"0": "a", "1": "b"}, "label2id": None},
        "score.weight is [3, 32] instead of [2, 32]",
    ),
    "an unknown problem": ({"problem_type": "ranking"}, "problem_type"),
    "one of one": (
        {"id2label": {"0": "a"}, "problem_type": "single_label_classification"},
        "with one label, 'a': one of one is always certain",
    ),
    "token classification": (
        {"architectures": ["LlamaForTokenClassification"]},
        "a head of this kind is not read here",
    ),
    "question answering": (
        {"architectures": ["LlamaForQuestionAnswering"]},
        "a head of this kind is not read here",
    ),
    "two heads": ({"architectures": ["GPT2DoubleHeadsModel"]}, "a head of this kind is not read"),
    "a head that is not said": (
        {"architectures": ["LlamaForCausalLM"]},
        "score.weight is a classifier's head: config.json must name its ...ForSequenceClassific",
    ),
}


@pytest.mark.parametrize("fault", HEADS)
def test_a_head_that_is_not_clear_is_refused(tmp_path, folder, fault):
    keys, message = HEADS[fault]
    with pytest.raises(UserError) as error:
        gptjax.load(with_keys(folder, tmp_path / "a", **keys))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_numbers_as_names_and_another_label2id_are_taken(tmp_path, folder):
    """transformers' own label2id of unnamed labels stays in many published files."""
    keys = {"id2label": {"2": 2, "0": 0, "1": 1}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    assert gptjax.load(with_keys(folder, tmp_path / "a", **keys)).config.labels == ("0", "1", "2")


def test_a_language_model_is_no_classifier(tmp_path):
    base = tiny_checkpoint("llama", vocab=264, tokenizer=byte_level_tokenizer())
    formats.write_checkpoint(tmp_path / "lm", base)
    with pytest.raises(UserError, match="is a language model and has no classes"):
        gptjax.load(tmp_path / "lm").classify(["a"])
    keys = {"architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(UserError, match=r"its head score.weight is missing: for a language model"):
        gptjax.load(with_keys(tmp_path / "lm", tmp_path / "a", **keys))


def test_gguf_holds_no_classifier(tmp_path, folder):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="tells anger, joy, fear apart: use --format=hf"):
        gptjax.load(folder).save(tmp_path / "a.gguf", form="gguf")


def test_the_last_token_that_does_not_pad_is_read(tmp_path):
    """As in transformers, also where the end of text pads and ends the text."""
    formats.write_checkpoint(tmp_path / "a", classifier())  # pads with 263, its end of text
    lm = gptjax.load(tmp_path / "a")
    rows = [[5, 6, 7], [5, 6, 7, 263], [263, 5, 6, 7, 263, 263], [263, 263]]
    found = lm.classify(rows)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], lm.classify([[263, 5, 6, 7]])[0], atol=1e-6)
    np.testing.assert_allclose(found[3], lm.classify([[263]])[0], atol=1e-6)
    formats.write_checkpoint(tmp_path / "b", classifier(pad_token_id=1))
    other = gptjax.load(tmp_path / "b").classify(rows)
    assert np.abs(other[1] - other[0]).max() > 1e-4

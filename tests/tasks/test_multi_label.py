"""Several labels a text: examples, loss, scores, a run, and which checkpoints fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import byte_level_tokenizer, command, random_params, tiny_checkpoint
from helpers import task_config, write_jsonl

import gptjax
from gptjax.checkpoints import formats
from gptjax.config.errors import UserError
from gptjax.evaluation import answers
from gptjax.generation.language_model import LanguageModel
from gptjax.metrics.classification import multi_label as scores_of
from gptjax.ops import cross_entropy
from gptjax.tasks import loading, multi_label

ROWS = [
    {"text": "glad and mad", "label": ["joy", "anger"]},
    {"text": "mad", "label": ["anger"]},
    {"text": "nothing", "label": []},
    {"text": "glad", "label": ["joy"]},
]


def examples_of(tmp_path, rows, **task):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = task_config(path, task=dict(name="multi_label", **task))
    return config, loading.load_examples(config)


def test_a_set_of_labels_is_one_target(tmp_path):
    config, data = examples_of(tmp_path, ROWS)
    assert data.labels == ("anger", "joy")
    found = {example.source: (example.label, example.references) for example in data.train}
    assert found["glad and mad"] == (3.0, ("joy, anger",))
    assert found["nothing"] == (0.0, ("",)) and found["glad"][0] == 2.0
    for example in data.train:
        packed = loading.packed_example(config, example)
        assert packed.targets.dtype == np.int32 and packed.targets[-1] == example.label


@pytest.mark.parametrize(
    ("label", "task", "message"),
    [
        ("joy", {}, "is 'joy', which is no list of labels (one class a row is task.name = "),
        (None, {}, "is None, which is no list of labels"),
        ([["joy"]], {}, "holds ['joy']"),
        (["rage"], {"labels": ["joy", "anger"]}, "label 'rage'"),
        ([f"l{i}" for i in range(32)], {}, "34 labels are more than the 31"),
    ],
)
def test_a_row_that_has_no_set_is_refused(tmp_path, label, task, message):
    with pytest.raises(UserError) as error:
        examples_of(tmp_path, [*ROWS, {"text": "x", "label": label}], **task)
    assert message in str(error.value)


def test_a_set_is_no_class(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    config = task_config(path, task=dict(name="classification"))
    with pytest.raises(UserError, match=r"is a list, .*: several labels a text are task.name = "):
        loading.load_examples(config)


def test_the_loss_is_the_mean_cross_entropy_of_the_labels():
    logits = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32) * 3
    targets, weights = np.array([[5, 0, 15], [8, 1, 2]], np.int32), np.eye(2, 3, dtype=np.float32)
    loss, correct = cross_entropy.label_set_loss(*map(jnp.asarray, (logits, targets, weights)))
    bits = np.array([[[t >> c & 1 for c in range(4)] for t in row] for row in targets])
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.where(bits, np.log(p), np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(loss, (weights * expected).sum(), rtol=1e-5)
    assert correct == (weights * ((p > 0.5) == bits).all(-1)).sum()


def test_scores_of_sets():
    actual = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    predicted = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    values = {name: metric.value for name, metric in scores_of(predicted, actual).items()}
    assert values["f1_micro"] == pytest.approx(2 * 2 / (2 + 3))
    assert values["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert values["exact_match"] == pytest.approx(2 / 3)


def head(problem_type, labels=("anger", "joy")):
    base = tiny_checkpoint("llama", vocab=264, tokenizer=byte_level_tokenizer())
    config = dataclasses.replace(base.config, labels=labels, problem_type=problem_type)
    params = jax.tree.map(np.asarray, random_params(config))
    return dataclasses.replace(base, config=config, params=params, keep={"eos_token_id": 263})


def test_a_head_of_another_problem_is_named(tmp_path):
    config, data = examples_of(tmp_path, ROWS)
    source = head("multi_label_classification")
    lm = LanguageModel(source.config, source.params, source.tokenizer)
    found = answers.answer_examples(lm, config.task, data.labels, data.train)
    for answer in found:
        expected = multi_label.answer_of(np.array(answer.probabilities), data.labels)
        assert answer == expected and max(answer.probabilities) < 1
    single = dataclasses.replace(config.task, name="classification")
    with pytest.raises(
        UserError, match=r"multi_label_classification and the task for single_label"
    ):
        answers.answer_examples(lm, single, data.labels, data.train)
    other = head("")
    lm = LanguageModel(other.config, other.params, other.tokenizer)
    with pytest.raises(UserError, match=r"evaluate it with task.name = 'classification'"):
        answers.answer_examples(lm, config.task, data.labels, data.train)


def test_a_run_learns_sets_and_leaves_with_its_problem(tmp_path):
    formats.write_checkpoint(tmp_path / "base", head("", ("a", "b", "c")))
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS * 8)
    settings = {
        "data.source": "jsonl",
        "data.path": path,
        "data.eval_fraction": 0.2,
        "task.name": "multi_label",
        "train.init_from": tmp_path / "base",
        "train.steps": 40,
        "train.batch_size": 8,
        "train.eval_every": 40,
        "model.context": 32,
        "optim.lr": 0.01,
        "optim.warmup_steps": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    done = command(
        "gptjax.train", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert "answers/exact_match: 1.0" in done.stdout
    lm = gptjax.load(tmp_path / "run")
    assert lm.config.problem_type == "multi_label_classification"
    texts = [row["text"] for row in ROWS]
    probabilities = lm.classify(texts)
    expected = [[True, True], [True, False], [False, False], [False, True]]
    assert (probabilities > 0.5).tolist() == expected
    lm.save(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["problem_type"] == "multi_label_classification"
    np.testing.assert_allclose(gptjax.load(tmp_path / "hf").classify(texts), probabilities, 1e-4)

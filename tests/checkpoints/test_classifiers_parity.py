"""Classifiers in transformers' own pipeline, in batches, and its losses of a head."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, random_params, tiny_checkpoint

import gptjax
from gptjax.checkpoints import formats
from gptjax.ops import cross_entropy

# warnings of these libraries are not about this package
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
T = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
TEXTS = ["the quick fox", "no", "a much longer text, with more of it than the others have", "mad!"]
PROBLEMS = {
    "single_label_classification": ("anger", "joy", "fear"),
    "multi_label_classification": ("anger", "joy", "fear"),
    "regression": ("score",),
    "regression of two": ("length", "score"),
}


def classifier(labels, problem_type, family="llama", **keep):
    base = tiny_checkpoint(family, vocab=264, tokenizer=byte_level_tokenizer())
    config = dataclasses.replace(base.config, labels=labels, problem_type=problem_type)
    params = jax.tree.map(np.asarray, random_params(config))
    return dataclasses.replace(
        base, config=config, params=params, keep={"eos_token_id": 263, **keep}
    )


def by_pipeline(folder, texts, labels, *, batch_size):
    pipeline = T.pipeline("text-classification", model=str(folder), top_k=None)
    rows = pipeline(texts, batch_size=batch_size)
    by_label = [{entry["label"]: entry["score"] for entry in row} for row in rows]
    return np.array([[scores[label] for label in labels] for scores in by_label])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_export_works_in_the_pipeline(tmp_path, problem, family):
    labels = PROBLEMS[problem]
    source = classifier(labels, problem.removesuffix(" of two"), family)
    formats.write_checkpoint(tmp_path / "a", source)
    found = gptjax.load(tmp_path / "a").classify(TEXTS)
    for size in (1, 4):
        expected = by_pipeline(tmp_path / "a", TEXTS, labels, batch_size=size)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pad", [263, 1])
def test_rows_that_end_in_the_end_of_text(tmp_path, pad):
    """Which token is read, where the end of text pads and where it does not."""
    formats.write_checkpoint(tmp_path / "a", classifier(("a", "b"), "", pad_token_id=pad))
    net = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    rows = [[5, 6, 7, 263], [263, 9, 10, 11, 263, 263], [8, 9], [263, 263, 263], [7, 1, 1]]
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    with torch.no_grad():
        expected = torch.softmax(net(padded).logits, -1).numpy()
    np.testing.assert_allclose(gptjax.load(tmp_path / "a").classify(rows), expected, atol=1e-5)


def test_the_loss_of_sets_is_that_of_transformers(tmp_path):
    source = classifier(("a", "b", "c"), "multi_label_classification")
    formats.write_checkpoint(tmp_path / "a", source)
    net = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    sets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    with torch.no_grad():
        result = net(tokens, labels=sets)
    logits = result.logits.numpy()[:, None]
    loss, _ = cross_entropy.label_set_loss(logits, np.array([[5], [0]]), np.ones((2, 1)))
    np.testing.assert_allclose(float(loss) / 2, float(result.loss), rtol=1e-5)
    # what transformers trained and saved comes back with its problem
    net.save_pretrained(tmp_path / "back")
    again = gptjax.load(tmp_path / "back")
    assert again.config.problem_type == "multi_label_classification"
    found = again.classify(tokens.tolist())
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[:, 0])), atol=1e-5)

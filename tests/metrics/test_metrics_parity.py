"""Scores against the libraries that define them: rouge-score, sacrebleu, scikit-learn.

And against the official answer scripts, restated. 500 random cases each, empty texts among them.
Skipped with a reason where a library is not installed.
"""

import collections
import re
import string

import numpy as np
import pytest

from gptjax.metrics import classification as classification_metrics
from gptjax.metrics import text as text_metrics

pytestmark = pytest.mark.parity
rouge_scorer = pytest.importorskip(
    "rouge_score.rouge_scorer", reason="rouge-score is not installed: pip install 'gptjax[parity]'"
)
sacrebleu = pytest.importorskip(
    "sacrebleu", reason="sacrebleu is not installed: pip install 'gptjax[eval]'"
)
sklearn_metrics = pytest.importorskip(
    "sklearn.metrics", reason="scikit-learn is not installed: pip install 'gptjax[parity]'"
)
nltk_tokenize = pytest.importorskip(
    "nltk.tokenize", reason="nltk is not installed: pip install 'gptjax[parity]'"
)

CASES = 500
SENTENCE = (
    "the The a an cat Cat's sat, sat mat. dog-house U.S. 3.14 1,000 50% "
    "café naïve ÉTÉ İstanbul _x_ (on) it's — … don't lay"
)
ENGLISH = SENTENCE.split(" ")
CHINESE = [
    *"今天气好不北京大学年月日",
    "，",
    "。",
    "……",
    "《",
    "》",
    "·",
    " ",
    "NBA",
    "iPhone 4",
    "3.14",
    "1,000",
    "50%",
    "e-mail",
    "-",
    "!",
    "“",
    "”",
]


def draw(generator, words, glue=" ", longest=12):
    """A random text, empty every now and then."""
    return (
        glue.join(generator.choice(words, generator.integers(0, longest + 1)))
        if generator.random() > 0.08
        else ""
    )


def examples(words, glue=" ", *, least=1, seed=0, count=CASES):
    """Predictions and one to three references; some predictions are close to a reference."""
    generator = np.random.default_rng(seed)
    references = [
        [draw(generator, words, glue) for _ in range(generator.integers(least, 4))]
        for _ in range(count)
    ]
    predictions = []
    for row in references:
        close = row and generator.random() < 0.5
        predictions.append(
            row[-1] + glue + draw(generator, words, glue, 3)
            if close
            else draw(generator, words, glue)
        )
    return predictions, references


# classification


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification(classes):
    generator = np.random.default_rng(classes)
    for _ in range(CASES // 3 + 1):
        count = generator.integers(1, 30)
        actual = generator.integers(0, generator.integers(1, classes + 1), count)
        predicted = np.where(
            generator.random(count) < 0.5, actual, generator.integers(0, classes, count)
        )
        scores = {
            name: metric.value
            for name, metric in classification_metrics.classification(
                predicted, actual, classes
            ).items()
        }
        f1 = {
            f"f1_{kind}": sklearn_metrics.f1_score(
                actual, predicted, average=kind, labels=range(classes), zero_division=0
            )
            for kind in ("macro", "micro")
        }
        expected = {"accuracy": sklearn_metrics.accuracy_score(actual, predicted), **f1}
        if len({*actual, *predicted}) > 1:  # scikit-learn warns of a single label; it too says 0
            expected["mcc"] = sklearn_metrics.matthews_corrcoef(actual, predicted)
        else:
            expected["mcc"] = 0.0
        assert scores == pytest.approx(expected, abs=1e-6)
        matrix = sklearn_metrics.confusion_matrix(actual, predicted, labels=range(classes))
        np.testing.assert_array_equal(
            classification_metrics.confusion(predicted, actual, classes), matrix
        )


def test_calibration_error():
    """Against the definition, bin by bin."""
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        count, classes = generator.integers(1, 60), generator.integers(2, 5)
        probabilities = generator.dirichlet(np.full(classes, 0.5), count)
        actual = generator.integers(0, classes, count)
        top, right = probabilities.max(1), probabilities.argmax(1) == actual
        expected = 0.0
        for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:]):
            inside = (top > low) & (top <= high)
            if inside.any():
                expected += inside.mean() * abs(top[inside].mean() - right[inside].mean())
        scores = classification_metrics.classification(
            probabilities.argmax(1), actual, int(classes), probabilities
        )["calibration_error"]
        assert scores.value == pytest.approx(expected, abs=1e-6)


def test_regression():
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        count = generator.integers(3, 50)
        predicted, actual = generator.normal(3, 10, (2, count)) + 5 * generator.normal(size=count)
        scores = classification_metrics.regression(predicted, actual)
        assert scores["mse"].value == pytest.approx(
            sklearn_metrics.mean_squared_error(actual, predicted), rel=1e-6
        )
        assert scores["pearson"].value == pytest.approx(
            np.corrcoef(predicted, actual)[0, 1], abs=1e-6
        )


# texts


def test_rouge():
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=False)
    predictions, references = examples(ENGLISH)
    metrics = text_metrics.rouge(predictions, references)
    for i, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
        expected = scorer.score_multi(row, prediction)
        for name in names:
            assert metrics[name].stats[i, 0] == pytest.approx(expected[name].fmeasure, abs=1e-6), (
                prediction,
                row,
            )
    assert min(metric.value for metric in metrics.values()) > 0.1


def test_rouge_of_characters():
    """Each character is a word of its own."""
    predictions, references = examples(CHINESE, "", seed=1)
    spell = lambda text: " ".join(f"w{ord(c)}" for c in text.lower() if not c.isspace())
    metrics = text_metrics.rouge(predictions, references, characters=True)
    expected = text_metrics.rouge(
        [spell(p) for p in predictions], [[spell(r) for r in row] for row in references]
    )
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric.stats, expected[name].stats, err_msg=name)


@pytest.mark.parametrize(
    ("tokenize", "words", "glue"),
    [("13a", ENGLISH, " "), ("zh", CHINESE, ""), ("intl", ENGLISH, " "), ("char", CHINESE, "")],
)
def test_translation(tokenize, words, glue):
    predictions, references = examples(words, glue, seed=2)
    for count in (1, 2, 5, CASES):
        for start in range(0, CASES, max(count, 50)):
            these, rows = predictions[start : start + count], references[start : start + count]
            streams = [
                [row[i] if i < len(row) else None for row in rows]
                for i in range(max(map(len, rows)))
            ]
            metrics = text_metrics.translation(these, rows, tokenize=tokenize)
            assert metrics["bleu"].value == pytest.approx(
                sacrebleu.corpus_bleu(these, streams, tokenize=tokenize).score, abs=1e-6
            )
            assert metrics["chrf"].value == pytest.approx(
                sacrebleu.corpus_chrf(these, streams).score, abs=1e-6
            )


def test_bootstrap_of_translation_is_that_of_the_examples():
    """A score of resampled sums equals sacrebleu's of the resampled texts."""
    predictions, references = examples(ENGLISH, least=3, seed=3, count=60)
    metrics = text_metrics.translation(predictions, references)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rows = generator.integers(0, 60, 60)
        these, streams = (
            [predictions[i] for i in rows],
            [[references[i][k] for i in rows] for k in range(3)],
        )
        sums = {
            name: np.bincount(rows, minlength=60) @ metric.stats for name, metric in metrics.items()
        }
        assert metrics["bleu"].score(sums["bleu"]) == pytest.approx(
            sacrebleu.corpus_bleu(these, streams).score, abs=1e-6
        )
        assert metrics["chrf"].score(sums["chrf"]) == pytest.approx(
            sacrebleu.corpus_chrf(these, streams).score, abs=1e-6
        )


# answers: the rules of the official scripts, written anew


def squad_rules(prediction, references):
    """SQuAD 2.0's (exact, F1): punctuation characters out, articles out, counts of equal tokens."""

    def tokens(text):
        remaining = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(?:an|a|the)\b", " ", remaining).split()

    answers = [tokens(r) for r in references if tokens(r)] or [[]]
    guess, exact, best = tokens(prediction), 0.0, 0.0
    for answer in answers:
        exact = max(exact, float(answer == guess))
        same = sum(min(n, guess.count(word)) for word, n in collections.Counter(answer).items())
        if not guess or not answer:
            best = max(best, float(guess == answer))
        elif same:
            precision, recall = same / len(guess), same / len(answer)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def test_squad():
    predictions, references = examples(ENGLISH, least=0, seed=4)
    metrics = text_metrics.squad(predictions, references)
    for i, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
        scores = metrics["exact_match"].stats[i, 0], metrics["f1"].stats[i, 0]
        assert scores == pytest.approx(squad_rules(prediction, row), abs=1e-6), (prediction, row)
    assert 0.1 < metrics["exact_match"].value < metrics["f1"].value < 1


def cmrc_rules(prediction, references):
    """CMRC 2018's (exact, F1), with NLTK for words that are not Chinese.

    And SQuAD 2.0's rule for no answer.
    """
    dropped = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
    normalize = lambda text: "".join(c for c in text.lower().strip() if c not in dropped)
    treebank = nltk_tokenize.NLTKWordTokenizer()

    def segments(text):
        pieces = re.split("([\u4e00-\u9fa5])", normalize(text))
        return [
            word
            for piece in pieces
            for word in (
                [piece] if re.fullmatch("[\u4e00-\u9fa5]", piece) else treebank.tokenize(piece)
            )
        ]

    guess, exact, best = segments(prediction), 0.0, 0.0
    for text in [r for r in references if segments(r)] or [""]:
        answer = segments(text)
        exact = max(exact, float(normalize(text) == normalize(prediction)))
        runs = lambda row: {
            tuple(row[i:j]) for i in range(len(row)) for j in range(i + 1, len(row) + 1)
        }
        longest = max(map(len, runs(guess) & runs(answer)), default=0)
        if not guess or not answer:
            best = max(best, float(guess == answer))
        elif longest:
            precision, recall = longest / len(guess), longest / len(answer)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def test_squad_of_chinese():
    predictions, references = examples(CHINESE, "", least=0, seed=5)
    metrics = text_metrics.squad(predictions, references, language="zh")
    for i, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
        scores = metrics["exact_match"].stats[i, 0], metrics["f1"].stats[i, 0]
        assert scores == pytest.approx(cmrc_rules(prediction, row), abs=1e-6), (prediction, row)
    assert 0.1 < metrics["exact_match"].value < metrics["f1"].value < 1

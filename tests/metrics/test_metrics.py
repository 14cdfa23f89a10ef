"""Scores: cases worked by hand, the bootstrap against what probability says, and errors."""

import importlib.util
import math
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gptjax.config.errors import UserError
from gptjax.metrics import bootstrap
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics import loss as loss_metrics
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import mean_metric

needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None,
    reason="sacrebleu is not installed: pip install 'gptjax[eval]'",
)


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


# Metric


def test_interval_is_that_of_the_binomial():
    """300 of 1000: the bootstrap of a share is a binomial, 95 % of it from 0.272 to 0.329."""
    metric = mean_metric([1.0] * 300 + [0.0] * 700)
    assert metric.value == pytest.approx(0.3)
    low, high = metric.interval(samples=4000)
    width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == (
        pytest.approx(0.3 - width, abs=3e-3),
        pytest.approx(0.3 + width, abs=3e-3),
    )
    narrow = metric.interval(samples=4000, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert metric.interval(samples=4000) == (low, high)
    assert metric.interval(samples=4000, seed=1) != (low, high)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        seen = generator.random(100) < 0.4
        low, high = mean_metric(seen.astype(float)).interval(seed=seed, samples=200)
        covered.append(low <= 0.4 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_interval_does_not_depend_on_the_chunks(monkeypatch):
    metric = classification_metrics.regression(np.arange(50.0), np.arange(50.0) ** 2)["pearson"]
    at_once = metric.interval(samples=100)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 150)
    assert metric.interval(samples=100) == pytest.approx(at_once, abs=1e-12)


def test_difference_is_paired():
    """Scores that move together from example to example differ, though their intervals overlap."""
    generator = np.random.default_rng(0)
    base = generator.random(200)
    worse, better = mean_metric(base), mean_metric(base + 0.02 + 0.01 * generator.random(200))
    assert worse.interval()[1] > better.interval()[0]
    gap, low, high = better.difference(worse)
    assert gap == pytest.approx(better.value - worse.value)
    assert 0.02 < low < gap < high < 0.03
    back = worse.difference(better)
    assert back == pytest.approx((-gap, -high, -low))


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30),
    st.integers(0, 100),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_a_metric_differs_from_itself_by_nothing_and_every_resample_is_a_score(pairs, seed):
    for name, metric in classification_metrics.classification(*np.array(pairs).T, 3).items():
        assert metric.difference(metric, seed=seed, samples=20) == (0.0, 0.0, 0.0)
        low, high = metric.interval(seed=seed, samples=20)
        assert (-1 if name == "mcc" else 0) - 1e-9 <= low <= high <= 1 + 1e-9


def test_scores_take_many_sums_at_once():
    """score([..., K]) row by row equals score([K])."""
    metrics = {
        **classification_metrics.classification(
            [0, 1, 1, 2], [0, 1, 2, 2], 3, np.eye(3)[[0, 1, 1, 2]] * 0.7 + 0.1
        ),
        **classification_metrics.regression([1.0, 2.0, 4.0, 3.0], [1.0, 3.0, 2.0, 5.0]),
        **text_metrics.rouge(["a b c", "d"] * 2, [["a c"], ["d e"]] * 2),
        **text_metrics.squad(["a b c", "d"] * 2, [["a c"], ["d e"]] * 2),
        **text_metrics.diversity(["a b c d a b c d", "a"] * 2),
        **loss_metrics.token_loss([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 0], [4, 5, 6, 0]),
    }
    for name, metric in metrics.items():
        assert metric.stats.dtype == np.float64 and len(metric.stats) == 4, name
        many = np.stack([metric.stats[:2].sum(0), metric.stats.sum(0)])[None]
        scores = metric.score(many)
        assert scores.shape == (1, 2), name
        np.testing.assert_allclose(scores[0], [metric.score(row) for row in many[0]], err_msg=name)
        assert metric.value == scores[0, 1], name


# classification and regression


def test_confusion_has_actual_rows():
    np.testing.assert_array_equal(
        classification_metrics.confusion([1, 1, 0, 2], [0, 1, 0, 1], 3),
        [[1, 1, 0], [0, 1, 1], [0, 0, 0]],
    )


def test_classification_by_hand():
    """Of two classes: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    actual = [1] * 3 + [0] + [1] * 2 + [0] * 4
    predicted = [1] * 3 + [1] + [0] * 2 + [0] * 4
    scores = values(classification_metrics.classification(predicted, actual, 2))
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["f1_micro"] == pytest.approx(0.7)
    assert scores["f1_macro"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert scores["mcc"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert values(classification_metrics.classification(predicted, actual, 3))[
        "f1_macro"
    ] == pytest.approx((6 / 9 + 8 / 11) / 3)  # a class that never occurs


def test_mcc_of_one_class_is_zero():
    assert classification_metrics.classification([0, 0], [0, 0], 2)["mcc"].value == 0
    assert classification_metrics.classification([0, 0], [0, 1], 2)["mcc"].value == 0
    assert classification_metrics.classification([0, 1, 2], [0, 1, 2], 3)[
        "mcc"
    ].value == pytest.approx(1)
    assert classification_metrics.classification([1, 0], [0, 1], 2)["mcc"].value == pytest.approx(
        -1
    )


def test_calibration_error_by_hand():
    """Two at 0.9, one correct: a gap of 0.4; one at 0.6, correct: 0.4; bins do not cancel."""
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]
    error = classification_metrics.classification([0, 0, 1, 1], [0, 1, 1, 0], 2, probabilities)[
        "calibration_error"
    ].value
    assert error == pytest.approx((2 * 0.4 + 0.4 + 0.7) / 4)
    assert (
        classification_metrics.classification([0, 1], [0, 1], 2, np.eye(2))[
            "calibration_error"
        ].value
        == 0
    )
    # within a bin they do: ten examples at 0.8 of which eight are right
    sure = classification_metrics.classification([0] * 10, [0] * 8 + [1] * 2, 2, [[0.8, 0.2]] * 10)[
        "calibration_error"
    ]
    assert sure.value == pytest.approx(0, abs=1e-12)
    # (11/15, 12/15] holds both of these, so that their gaps cancel; 0.7 lies in the bin before
    close = lambda first: (
        classification_metrics.classification(
            [0, 0], [0, 1], 2, [[first, 1 - first], [0.79, 0.21]]
        )["calibration_error"].value
    )
    assert close(0.75) == pytest.approx((0.79 - 0.25) / 2)
    assert close(0.7) == pytest.approx((0.79 + 0.3) / 2)
    assert close(0.8) == pytest.approx((0.79 - 0.2) / 2)  # a bin's upper end belongs to it


def test_regression_by_hand():
    scores = values(classification_metrics.regression([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
    assert scores == {"mse": pytest.approx(14 / 3), "pearson": pytest.approx(1)}
    assert classification_metrics.regression([3, 1, 2], [1, 3, 2])[
        "pearson"
    ].value == pytest.approx(-1)
    assert classification_metrics.regression([1.0, 2.0, 3.0, 2.0], [1.0, 3.0, 1.0, -1.0])[
        "pearson"
    ].value == pytest.approx(0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])
def test_pearson_of_a_constant_is_zero_and_far_from_zero_it_is_exact(constant):
    x = np.random.default_rng(0).random(31)
    assert classification_metrics.regression(np.full(31, constant), x)["pearson"].value == 0
    expected = np.corrcoef(x, x**2)[0, 1]
    assert classification_metrics.regression(constant + x, x**2)["pearson"].value == pytest.approx(
        expected, abs=1e-6
    )


# texts


def test_rouge_by_hand():
    """the cat sat, for: the cat lay on the mat.

    2 of 3 and 6 words, 1 of 2 and 5 pairs, a subsequence of 2.
    """
    scores = values(text_metrics.rouge(["The cat sat."], [["the cat lay on the mat"]]))
    assert scores == {
        "rouge1": pytest.approx(4 / 9),
        "rouge2": pytest.approx(2 / 7),
        "rougeL": pytest.approx(4 / 9),
    }
    crossed = values(text_metrics.rouge(["a b c d"], [["d c b a"]]))
    assert crossed == {"rouge1": pytest.approx(1), "rouge2": 0, "rougeL": pytest.approx(1 / 4)}
    several = values(text_metrics.rouge(["a b c d"], [["x", "a b c d", ""]]))
    assert several == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert values(text_metrics.rouge([""], [[""]])) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert text_metrics.rouge(["a", "b"], [["a"], ["c"]])["rouge1"].value == pytest.approx(0.5)


def test_rouge_of_characters():
    assert text_metrics.rouge(["今天天气好"], [["今天下雨"]])["rouge1"].value == 0
    scores = values(text_metrics.rouge(["今天 天气好"], [["今天下雨"]], characters=True))
    assert scores == {
        "rouge1": pytest.approx(4 / 9),
        "rouge2": pytest.approx(2 / 7),
        "rougeL": pytest.approx(4 / 9),
    }


@hypothesis.given(
    st.lists(st.sampled_from("abcd"), max_size=80), st.lists(st.sampled_from("abcd"), max_size=80)
)
@hypothesis.settings(deadline=None)
def test_longest_subsequence_is_that_of_the_table(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    assert text_metrics._longest_subsequence(a, b) == row[-1]


def test_squad_by_hand():
    scores = text_metrics.squad(
        ["The Eiffel Tower!", "in the year 1999", "", "anything", "the"],
        [["eiffel tower", "tower"], ["1999", "the year 2000 in"], ["", "an"], [], ["word", "a"]],
    )
    np.testing.assert_allclose(scores["exact_match"].stats[:, 0], [1, 0, 1, 0, 0])
    np.testing.assert_allclose(scores["f1"].stats[:, 0], [1, 2 * 2 / 6, 1, 0, 0])
    assert scores["exact_match"].value == pytest.approx(0.4)


def test_squad_of_chinese():
    """A run of 2 of 4 and 3 characters; a Latin word is one segment.

    Listed punctuation does not count, other punctuation does.
    """
    scores = text_metrics.squad(
        ["北京大学", "《红楼梦》。", "NBA 1,234分", "iphone 4s", "东a西", "大学北京", "", "北京"],
        [
            ["北京市"],
            ["红楼梦"],
            ["nba 1,234 分"],
            ["iphone 4"],
            ["东b西", "东a"],
            ["北京大学"],
            ["！"],
            [""],
        ],
        language="zh",
    )
    np.testing.assert_allclose(scores["exact_match"].stats[:, 0], [0, 1, 0, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(scores["f1"].stats[:, 0], [4 / 7, 1, 1, 0.5, 0.8, 0.5, 1, 0])


def test_distinct_by_hand():
    """a b a | b: 4 words of 2 kinds, 2 pairs of 2 kinds."""
    assert text_metrics.distinct(["a b a", "b"]) == {
        "distinct_1": pytest.approx(2 / 4),
        "distinct_2": pytest.approx(1),
    }
    assert text_metrics.distinct(["好好的 GPT"]) == {
        "distinct_1": pytest.approx(3 / 4),
        "distinct_2": pytest.approx(1),
    }
    assert text_metrics.distinct(["", " "]) == {"distinct_1": 0, "distinct_2": 0}


def test_repetition_by_hand():
    """a b c d a b c d: 5 runs of four words, one repeated; a text without any does not count."""
    metric = text_metrics.diversity(["a b c d a b c d", "one two three four", "short"])[
        "repetition"
    ]
    assert metric.value == pytest.approx((1 / 5 + 0) / 2)
    assert text_metrics.diversity(["", "a"])["repetition"].value == 0
    assert text_metrics.diversity(["哈哈哈哈哈哈"])["repetition"].value == pytest.approx(2 / 3)
    assert text_metrics.diversity(["x", "y"], [[1, 1, 1, 1, 1], [1, 2]])[
        "repetition"
    ].value == pytest.approx(1 / 2)


def test_token_loss_by_hand():
    scores = loss_metrics.token_loss([2.0, 4.0], [1, 2], [4, 8])
    assert values(scores) == {
        "loss": pytest.approx(2),
        "perplexity": pytest.approx(math.exp(2)),
        "bits_per_byte": pytest.approx(6 / 12 / math.log(2)),
    }
    assert math.isfinite(loss_metrics.token_loss([1e5], [1], [1])["perplexity"].value)
    low, high = scores["loss"].interval(samples=200)
    assert low == high == pytest.approx(2)  # both examples cost 2 a token


@needs_sacrebleu
def test_translation_by_hand():
    """Five of five words correct and none missing; then a reference twice as long.

    Only the brevity penalty exp(1 - 2) is left.
    """
    assert text_metrics.translation(["one two three four five"], [["one two three four five"]])[
        "bleu"
    ].value == pytest.approx(100)
    scores = text_metrics.translation(["a b c d"], [["a b c d e f g h"]])
    assert scores["bleu"].value == pytest.approx(100 * math.exp(-1))
    assert (
        text_metrics.translation(["今天天气好"], [["今天天气好"]])["bleu"].value == 0
    )  # one word of no spaces has no 4-grams
    chinese = text_metrics.translation(
        ["今天天气好"] * 3, [["今天天气好"], ["昨天天气好"], ["今天天气不好"]], tokenize="zh"
    )
    assert 20 < chinese["bleu"].value < 100
    for metric in chinese.values():
        low, high = metric.interval(samples=50)
        assert low <= metric.value <= high
        assert metric.difference(metric, samples=20) == (0, 0, 0)


# errors

ERRORS = {
    "lengths": (lambda: classification_metrics.classification([0, 1], [0], 2), "'predicted': 2"),
    "no examples": (lambda: classification_metrics.classification([], [], 2), "at least 1"),
    "no numbers": (lambda: mean_metric([]), "'values': 0"),
    "class too high": (
        lambda: classification_metrics.classification([0, 2], [0, 1], 2),
        r"predicted\[1\] = 2: .* from 0 to 1",
    ),
    "negative class": (
        lambda: classification_metrics.confusion([0, 1], [0, -1], 2),
        r"actual\[1\] = -1",
    ),
    "class is no integer": (
        lambda: classification_metrics.confusion([0.5, 1], [0, 1], 2),
        "float64",
    ),
    "class is a text": (
        lambda: classification_metrics.confusion(["a", "b"], [0, 1], 2),
        "predicted has .* integer",
    ),
    "two dimensions": (
        lambda: classification_metrics.regression([[1.0]], [1.0]),
        r"shape \(1, 1\)",
    ),
    "probabilities' shape": (
        lambda: classification_metrics.classification([0, 1], [0, 1], 2, [[1.0], [1.0]]),
        r"\(2, 1\): must be \(2, 2\)",
    ),
    "probabilities' sum": (
        lambda: classification_metrics.classification([0], [0], 2, [[0.9, 0.9]]),
        r"\[0.9, 0.9\]",
    ),
    "probability is NaN": (
        lambda: classification_metrics.classification([0], [0], 2, [[math.nan, 1.0]]),
        "nan",
    ),
    "NaN": (
        lambda: classification_metrics.regression([1.0, math.nan], [1.0, 2.0]),
        r"predicted\[1\] = nan",
    ),
    "infinity": (
        lambda: classification_metrics.regression([1.0, 2.0], [math.inf, 2.0]),
        r"actual\[0\] = inf",
    ),
    "negative weight": (
        lambda: loss_metrics.token_loss([1.0], [-1.0], [1]),
        r"weights\[0\] = -1.0",
    ),
    "no weight": (lambda: loss_metrics.token_loss([1.0], [0.0], [1]), "no token"),
    "NaN loss": (lambda: loss_metrics.token_loss([math.nan], [1.0], [1]), "sums"),
    "prediction is no text": (
        lambda: text_metrics.rouge(["a", None], [["a"], ["b"]]),
        "predictions: None",
    ),
    "a bare reference": (lambda: text_metrics.rouge(["a"], ["abc"]), r"references\[0\]: 'abc'"),
    "no reference": (lambda: text_metrics.rouge(["a"], [[]]), r"references\[0\]: \[\]"),
    "a bare text": (lambda: text_metrics.distinct("abc"), "texts: 'abc'"),
    "no texts": (lambda: text_metrics.diversity([]), "texts"),
    "ids' length": (lambda: text_metrics.diversity(["a"], []), "'ids': 0"),
    "language": (lambda: text_metrics.squad(["a"], [["a"]], language="de"), "'de'"),
    "tokenizer": (lambda: text_metrics.translation(["a"], [["a"]], tokenize="13b"), "'13b'"),
    "samples": (lambda: mean_metric([1.0]).interval(samples=0), "samples = 0"),
    "level": (lambda: mean_metric([1.0]).interval(level=95), "level = 95"),
    "pairs": (lambda: mean_metric([1.0]).difference(mean_metric([1.0, 2.0])), "1 and 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named_with_its_value(name):
    call, message = ERRORS[name]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_sacrebleu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"gptjax\[eval\]"):
        text_metrics.translation(["a"], [["a"]])


def test_a_changed_sacrebleu_is_named(monkeypatch):
    class Changed:
        def __init__(self, **_):
            pass

    monkeypatch.setitem(sys.modules, "sacrebleu", type(sys)("sacrebleu"))
    for name in ("BLEU", "CHRF"):
        setattr(sys.modules["sacrebleu"], name, Changed)
    with pytest.raises(UserError, match=r"no Changed\._extract_corpus_statistics"):
        text_metrics.translation(["a"], [["a"]])

"""Scores of predictions against references, each with its bootstrap interval.

In: predictions and references of N examples. Out: a dict of `Metric`: its `value` is the corpus score, its `interval()` how far to trust it. Every
metric is sums over examples and a function of the sums, so that a corpus score and its bootstrap are one thing. Shares lie in [0, 1]; BLEU and
chrF in [0, 100], as their field reports them. To add a metric, return one more `Metric` from a function below.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError

Texts = Sequence[str]
_CHUNK_ELEMENTS = 1 << 20  # counts of a bootstrap that exist at once: 8 MiB
_BINS = 15  # of the calibration error (Guo et al. 2017)
_TOKENIZERS = ("13a", "zh", "intl", "char", "none")  # those of sacrebleu that need no further package
# Scripts that are written without spaces (Thai, Lao, kana, Han) and full-width punctuation count by the character.
_WORDS = re.compile("[{0}]|[^\\s{0}]+".format("\u0e00-\u0eff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"))
_ENGLISH_DROPS = str.maketrans("", "", string.punctuation)
_CHINESE_DROPS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # ASCII commas and full stops stay, as there
# a Chinese character, or as in NLTK a word with what joins it (3.14, 1,000, U.S.A), or a mark; symbols beyond ASCII belong to their word
_CHINESE_WORDS = re.compile(r"[\u4e00-\u9fa5]|{0}+(?:(?:[.']|,(?=\d)){0}+)*|\.\.\.|\S".replace("{0}", r"[^\s\u4e00-\u9fa5!-/:-@\[-`{-~“”«»]"))


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A score of sums: `stats` float64 [N, K], one row an example; `score` maps their sums [..., K] to [...]."""

    stats: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.score(self.stats.sum(0)))

    def interval(self, *, seed: int = 0, samples: int = 1000, level: float = 0.95) -> tuple[float, float]:
        """(low, high) of the percentile bootstrap over examples (Efron 1979); the same seed draws the same examples."""
        return _interval(self.score, [self.stats], seed, samples, level)

    def difference(self, other: Metric, *, seed: int = 0, samples: int = 1000, level: float = 0.95) -> tuple[float, float, float]:
        """(self - other, low, high) by the paired bootstrap (Koehn 2004): row i of both must come from the same example i."""
        if len(self.stats) != len(other.stats):
            raise UserError(f"a paired difference needs the same examples: here are {len(self.stats)} and {len(other.stats)}")
        score = lambda ours, theirs: self.score(ours) - other.score(theirs)
        return self.value - other.value, *_interval(score, [self.stats, other.stats], seed, samples, level)


def _interval(score: Callable[..., np.ndarray], tables: list[np.ndarray], seed: int, samples: int, level: float) -> tuple[float, float]:
    """Percentiles of `score` of the tables' sums [samples, K] over N examples drawn with replacement, the same ones for every table [N, K]."""
    if samples < 1 or not 0 < level < 1:
        raise UserError(f"samples = {samples} and level = {level}: the bootstrap needs at least 1 sample and a level between 0 and 1")
    count = len(tables[0])
    generator, rows = np.random.default_rng(seed), max(1, _CHUNK_ELEMENTS // count)
    values = []
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)  # 4x faster than multinomial()
        values.append(score(*(counts @ table for table in tables)))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean(values: Sequence[float] | np.ndarray) -> Metric:
    """The mean of one number an example, [N]."""
    return Metric(np.stack(np.broadcast_arrays(*_columns(values=values), 1.0), 1), lambda s: _ratio(s[..., 0], s[..., 1]))


def whole(value: float) -> Metric:
    """A number about all texts at once, which is no sum over examples: one row, and so no interval."""
    return Metric(np.array([[value]], np.float64), lambda s: s[..., 0])


def _ratio(a: Any, b: Any) -> np.ndarray:
    """a / b, and 0 where b is not positive."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=np.asarray(b) > 0)


def _same_length(**columns: Any) -> None:
    sizes = {name: len(column) for name, column in columns.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise UserError(f"examples: {sizes}; every side needs the same number, at least 1")


def _columns(low: float = -math.inf, high: float = math.inf, *, kinds: str = "iuf", **columns: Any) -> list[np.ndarray]:
    """Each of `columns` as an array [N] of one of NumPy's `kinds` of numbers, all finite and within low and high."""
    _same_length(**columns)
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise UserError(
                f"{name} has shape {array.shape} and type {array.dtype}: must be one {'number' if 'f' in kinds else 'integer'} an example"
            )
        wrong = np.flatnonzero(~np.isfinite(array) | (array < low) | (array > high))
        if wrong.size:
            raise UserError(f"{name}[{wrong[0]}] = {array[wrong[0]]}: must be finite and from {low} to {high}")
    return [array.astype(np.float64 if "f" in kinds else np.int64) for array in arrays.values()]


def _texts(name: str, texts: Any, *, empty: bool = False) -> None:
    """Raises unless `texts` is a list of texts; a bare text would be read as a list of its characters."""
    wrong = [texts] if isinstance(texts, str) or not (len(texts) or empty) else [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UserError(f"{name}: {wrong[0]!r:.60} where a list of texts must be, such as ['one text']")


def _pairs(predictions: Any, references: Any, *, unanswerable: bool = False) -> None:
    _same_length(predictions=predictions, references=references)
    _texts("predictions", predictions)
    for i, row in enumerate(references):
        _texts(f"references[{i}]", row, empty=unanswerable)


def confusion(predicted: Any, actual: Any, classes: int) -> np.ndarray:
    """How often each pair of classes occurred, int [C, C]: rows are the actual class, columns the predicted one."""
    rows, columns = _columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def classification(predicted: Any, actual: Any, classes: int, probabilities: Any = None) -> dict[str, Metric]:
    """accuracy, f1_macro, f1_micro and mcc of classes [N] int; with probabilities [N, C] also calibration_error.

    Macro F1 is the mean over all classes, 0 for one that never occurs. mcc: Matthews' correlation for C classes (Gorodkin 2004), 0 where undefined.
    """
    labels = _columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    truth, guess = (np.eye(classes)[column] for column in labels)
    stats = np.concatenate([truth * guess, guess, truth], 1)
    hits, guessed, true = (lambda s, i=i: s[..., i * classes : (i + 1) * classes] for i in range(3))
    spread = lambda a: np.sqrt(np.square(a.sum(-1)) - np.square(a).sum(-1))  # 0 where one class has all
    covariance = lambda s: true(s).sum(-1) * hits(s).sum(-1) - (guessed(s) * true(s)).sum(-1)
    accuracy = Metric(stats, lambda s: _ratio(hits(s).sum(-1), true(s).sum(-1)))
    found = {
        "accuracy": accuracy,
        "f1_macro": Metric(stats, lambda s: _ratio(2 * hits(s), guessed(s) + true(s)).mean(-1)),
        "f1_micro": accuracy,  # one class an example: each miss is one false positive and one false negative
        "mcc": Metric(stats, lambda s: _ratio(covariance(s), spread(guessed(s)) * spread(true(s)))),
    }
    return found if probabilities is None else found | {"calibration_error": _calibration_error(probabilities, labels[0], classes)}


def _calibration_error(probabilities: Any, actual: np.ndarray, classes: int) -> Metric:
    """|confidence - accuracy| of 15 equal bins (m-1, m] / 15 of the top probability, weighted by size (Guo et al. 2017)."""
    array = np.asarray(probabilities, np.float64)
    if array.shape != (len(actual), classes):
        raise UserError(f"probabilities has shape {array.shape}: must be {(len(actual), classes)}, examples by classes")
    wrong = np.flatnonzero(~((array >= 0).all(1) & (np.abs(array.sum(1) - 1) < 1e-2)))  # so that NaN is wrong too; bfloat16 sums to about 1
    if wrong.size:
        raise UserError(f"probabilities[{wrong[0]}] = {array[wrong[0]].tolist()!r:.80}: must be at least 0 and sum to 1")
    confidence = array.max(1)
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    gaps = np.eye(_BINS)[bins] * (confidence - (array.argmax(1) == actual))[:, None]
    return Metric(np.concatenate([gaps, np.ones((len(gaps), 1))], 1), lambda s: _ratio(np.abs(s[..., :-1]).sum(-1), s[..., -1]))


def regression(predicted: Any, actual: Any) -> dict[str, Metric]:
    """mse and pearson (the correlation, 0 where one side is constant) of numbers [N]."""
    x, y = _columns(predicted=predicted, actual=actual)
    # far from zero, n * sum(uu) - sum(u)^2 would cancel; the median of equal numbers is exact, their mean may not be
    u, v = x - np.median(x), y - np.median(y)

    def pearson(s: np.ndarray) -> np.ndarray:
        n, su, sv, suu, svv, suv = np.moveaxis(s, -1, 0)
        # what a constant leaves is rounding: a real spread around the median is at least half of n * sum(uu)
        spread = lambda first, second: np.sqrt(np.maximum(n * second * (1 - 1e-14) - first * first, 0.0))
        return _ratio(n * suv - su * sv, spread(su, suu) * spread(sv, svv))

    return {"mse": mean(np.square(x - y)), "pearson": Metric(np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1), pearson)}


def rouge(predictions: Texts, references: Sequence[Texts], *, characters: bool = False) -> dict[str, Metric]:
    """rouge1, rouge2 and rougeL F-measure (Lin 2004), the best of an example's references, as Google's rouge-score without stemming.

    Words are runs of a-z and 0-9 of the lower-cased text, so that Chinese has none: `characters=True` compares all characters but spaces instead.
    """
    _pairs(predictions, references)
    split = lambda text: re.findall(r"\S" if characters else "[a-z0-9]+", text.lower())
    table = np.zeros((len(predictions), 3))
    for row, prediction, answers in zip(table, map(split, predictions), references):
        for answer in map(split, answers):
            grams = [_f1(_shared(_ngrams(prediction, n), _ngrams(answer, n)), len(prediction) + 1 - n, len(answer) + 1 - n) for n in (1, 2)]
            row[:] = np.maximum(row, [*grams, _f1(_longest_subsequence(prediction, answer), len(prediction), len(answer))])
    return {name: mean(column) for name, column in zip(("rouge1", "rouge2", "rougeL"), table.T)}


def _f1(common: int, predicted: int, actual: int) -> float:
    """Harmonic mean of the precision and recall of `common` things, 0 where there are none."""
    return 2 * common / (predicted + actual) if common else 0.0


def _ngrams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    return list(zip(*(items[i:] for i in range(n))))


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    return (collections.Counter(a) & collections.Counter(b)).total()


def _longest_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def translation(predictions: Texts, references: Sequence[Texts], *, tokenize: str = "13a") -> dict[str, Metric]:
    """Corpus bleu (Papineni et al. 2002) and chrf (Popović 2015) in [0, 100], by sacrebleu (Post 2018). `tokenize`: of BLEU; "zh" for Chinese."""
    _pairs(predictions, references)
    if tokenize not in _TOKENIZERS:
        raise UserError(f"tokenize = {tokenize!r}: must be one of {', '.join(_TOKENIZERS)}")
    try:
        import sacrebleu
    except ImportError:
        raise UserError("BLEU and chrF need the package sacrebleu: pip install 'gptjax[eval]'") from None
    streams: Any = [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]  # the i-th of all examples
    metrics = {}
    for name, scorer in (("bleu", sacrebleu.BLEU(tokenize=tokenize, force=True)), ("chrf", sacrebleu.CHRF())):
        # what sacrebleu's own bootstrap uses is private: a changed name must not fail deep inside it
        missing = [method for method in ("_extract_corpus_statistics", "_compute_score_from_stats") if not hasattr(scorer, method)]
        if missing:
            raise UserError(f"this version of sacrebleu has no {type(scorer).__name__}.{missing[0]}: pip install 'sacrebleu>=2.4,<3'")
        one = lambda sums, scorer=scorer: scorer._compute_score_from_stats(np.rint(sums).astype(np.int64).tolist()).score
        stats = np.array(scorer._extract_corpus_statistics(predictions, streams), np.float64)
        metrics[name] = Metric(stats, functools.partial(np.apply_along_axis, one, -1))
    return metrics


_english = lambda text: " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ENGLISH_DROPS)).split())
_chinese = lambda text: text.lower().strip().translate(_CHINESE_DROPS)
_longest_run = lambda a, b: difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


def squad(predictions: Texts, references: Sequence[Texts], *, language: str = "en") -> dict[str, Metric]:
    """exact_match and f1 of answers, each the best of an example's references; no reference means that there is no answer.

    "en": SQuAD's official script: lower case, no punctuation, no articles; F1 over the words in common (Rajpurkar et al. 2016). As in SQuAD 2.0,
    references with no word are dropped, and where either side has none, both scores are 1 if both have none, else 0.
    "zh": CMRC 2018's official script (Cui et al. 2019): lower case, without its list of punctuation; F1 over the longest common run of segments,
    a Chinese character each, other words whole. Two deviations: words by a pattern instead of NLTK (don't is one), and no answer as in SQuAD 2.0.
    """
    _pairs(predictions, references, unanswerable=True)
    if language not in ("en", "zh"):
        raise UserError(f"language = {language!r}: must be 'en' or 'zh'")
    normal, split, common = (_english, str.split, _shared) if language == "en" else (_chinese, _CHINESE_WORDS.findall, _longest_run)
    table = np.zeros((len(predictions), 2))
    for row, prediction, answers in zip(table, map(normal, predictions), references):
        words = split(prediction)
        for answer in [a for a in map(normal, answers) if split(a)] or [""]:
            right = split(answer)
            f1 = _f1(common(words, right), len(words), len(right)) if words and right else float(words == right)
            row[:] = np.maximum(row, [prediction == answer, f1])
    return {"exact_match": mean(table[:, 0]), "f1": mean(table[:, 1])}


def distinct(texts: Texts) -> dict[str, float]:
    """distinct_1 and distinct_2: different n-grams over all n-grams of all texts (Li et al. 2016), 0 where there are none.

    Over words, or characters in scripts without spaces. Plain numbers: what is different among all texts is no sum over examples.
    """
    _texts("texts", texts)
    grams = {n: [gram for text in texts for gram in _ngrams(_WORDS.findall(text), n)] for n in (1, 2)}
    return {f"distinct_{n}": len(set(found)) / max(len(found), 1) for n, found in grams.items()}


def diversity(texts: Texts, ids: Sequence[Sequence[int]] | None = None) -> dict[str, Metric]:
    """repetition: share of a text's 4-grams that occurred before in it, mean over the texts that have any (seq-rep-4, Welleck et al. 2019).

    Over the token `ids` where given, as in the paper, else over words, or characters in scripts without spaces.
    """
    _texts("texts", texts)
    items: Sequence[Sequence[Any]] = [_WORDS.findall(text) for text in texts] if ids is None else ids
    _same_length(texts=texts, ids=items)
    stats = np.array([(1 - len(set(row)) / len(row), 1.0) if row else (0.0, 0.0) for row in (_ngrams(item, 4) for item in items)])
    return {"repetition": Metric(stats, lambda s: _ratio(s[..., 0], s[..., 1]))}


def token_loss(sums: Any, weights: Any, bytes: Any) -> dict[str, Metric]:
    """loss per token, perplexity and bits_per_byte of examples with loss `sums` (nats), loss `weights` and UTF-8 `bytes` of the targets, each [N]."""
    _same_length(sums=sums, weights=weights, bytes=bytes)
    stats = np.stack(_columns(sums=sums) + _columns(0.0, weights=weights, bytes=bytes), 1)
    if not stats[:, 1].any():
        raise UserError(f"weights are 0 in all {len(stats)} examples: there is no token to score")
    loss = lambda s: _ratio(s[..., 0], s[..., 1])
    return {
        "loss": Metric(stats, loss),
        "perplexity": Metric(stats, lambda s: np.exp(np.minimum(loss(s), 700.0))),
        "bits_per_byte": Metric(stats, lambda s: s[..., 0] / math.log(2) / np.maximum(s[..., 2], 1.0)),
    }

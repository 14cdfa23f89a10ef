"""Scores of texts against references: ROUGE, BLEU, chrF, SQuAD's and CMRC's; and of texts alone.

To add one that compares two lists of words, add a row to ROUGE_SCORES; else return one more
`Metric` from a function below.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import Metric, check_same_length, first_over_second, mean_metric

Texts = Sequence[str]

# Those of sacrebleu that need no further package.
_TOKENIZERS = ("13a", "zh", "intl", "char", "none")

# Scripts that are written without spaces (Thai, Lao, kana, Han) and full-width punctuation: each
# of their characters counts as a word.
_NO_SPACES = (
    "\u0e00-\u0eff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")


def _check_texts(name: str, texts: Any, *, may_be_empty: bool = False) -> None:
    """Raises UserError unless `texts` is a list of texts.

    A text alone would be taken for a list of its characters.
    """
    if isinstance(texts, str) or not (len(texts) or may_be_empty):
        wrong = [texts]
    else:
        wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UserError(
            f"{name}: {wrong[0]!r:.60} where a list of texts must be, such as ['one text']"
        )


def _check_pairs(predictions: Any, references: Any, *, may_be_empty: bool = False) -> None:
    """Raises UserError unless there is a list of references for each prediction."""
    check_same_length(predictions=predictions, references=references)
    _check_texts("predictions", predictions)
    for i, texts in enumerate(references):
        _check_texts(f"references[{i}]", texts, may_be_empty=may_be_empty)


def _f1(common: int, predicted: int, actual: int) -> float:
    """Harmonic mean of the precision and recall of `common` things, 0 where there are none."""
    return 2 * common / (predicted + actual) if common else 0.0


def _ngrams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    shifted = [items[i:] for i in range(n)]
    return list(zip(*shifted, strict=False))


def _count_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items the two have in common, each as often as it is in both."""
    return (collections.Counter(a) & collections.Counter(b)).total()


def _ngram_f1(n: int, prediction: Sequence[str], reference: Sequence[str]) -> float:
    shared = _count_shared(_ngrams(prediction, n), _ngrams(reference, n))
    return _f1(shared, len(prediction) + 1 - n, len(reference) + 1 - n)


def _subsequence_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = _longest_subsequence(prediction, reference)
    return _f1(common, len(prediction), len(reference))


def _longest_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004).

    The usual table has a row for each word of b and a column for each of a, and a row grows by 0
    or 1 from one column to the next. So one integer holds a row: bit i is 0 where it grows at
    word i of a. A word of b changes all columns with one addition, whose carries run from a match
    to the next place where the row grows. At the end the zeros are the length.
    """
    places_of: dict[str, int] = {}  # bit i: word i of a is this word
    for i, word in enumerate(a):
        places_of[word] = places_of.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matches = row & places_of.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


# F-measures of two lists of words (Lin 2004).
ROUGE_SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "rouge1": functools.partial(_ngram_f1, 1),
    "rouge2": functools.partial(_ngram_f1, 2),
    "rougeL": _subsequence_f1,
}


def rouge(
    predictions: Texts, references: Sequence[Texts], *, characters: bool = False
) -> dict[str, Metric]:
    """The best of an example's references, as Google's rouge-score without stemming.

    Words are runs of a-z and 0-9 of the lower-cased text, so that Chinese has none:
    `characters=True` compares all characters but spaces instead. Raises UserError.
    """
    _check_pairs(predictions, references)
    words = re.compile(r"\S" if characters else "[a-z0-9]+")
    table = np.zeros((len(predictions), len(ROUGE_SCORES)))
    for i, prediction in enumerate(predictions):
        predicted = words.findall(prediction.lower())
        for reference in references[i]:
            actual = words.findall(reference.lower())
            scores = [score(predicted, actual) for score in ROUGE_SCORES.values()]
            table[i] = np.maximum(table[i], scores)
    return {name: mean_metric(table[:, k]) for k, name in enumerate(ROUGE_SCORES)}


def translation(
    predictions: Texts, references: Sequence[Texts], *, tokenize: str = "13a"
) -> dict[str, Metric]:
    """Corpus bleu (Papineni et al. 2002) and chrf (Popović 2015), by sacrebleu (Post 2018).

    Both lie in [0, 100]. tokenize: of BLEU; "zh" for Chinese. Raises UserError.
    """
    _check_pairs(predictions, references)
    if tokenize not in _TOKENIZERS:
        raise UserError(f"tokenize = {tokenize!r}: must be one of {', '.join(_TOKENIZERS)}")
    try:
        import sacrebleu
    except ImportError:
        raise UserError(
            "BLEU and chrF need the package sacrebleu: pip install 'gptjax[eval]'"
        ) from None
    # sacrebleu takes the first reference of all examples, then the second of all, ...
    streams: list[list[str | None]] = []
    for k in range(max(map(len, references))):
        streams.append([texts[k] if k < len(texts) else None for texts in references])
    return {
        "bleu": _sacrebleu_metric(
            sacrebleu.BLEU(tokenize=tokenize, force=True), predictions, streams
        ),
        "chrf": _sacrebleu_metric(sacrebleu.CHRF(), predictions, streams),
    }


def _sacrebleu_metric(scorer: Any, predictions: Texts, streams: list[list[str | None]]) -> Metric:
    """A `Metric` of sacrebleu's own statistics.

    What its bootstrap uses is private: a changed name must not fail deep inside it.
    """
    for method in ("_extract_corpus_statistics", "_compute_score_from_stats"):
        if not hasattr(scorer, method):
            raise UserError(
                f"this version of sacrebleu has no {type(scorer).__name__}.{method}: "
                "pip install 'sacrebleu>=2.4,<3'"
            )

    def score_row(sums: np.ndarray) -> float:
        counts = np.rint(sums).astype(np.int64).tolist()
        return scorer._compute_score_from_stats(counts).score

    stats = np.array(scorer._extract_corpus_statistics(predictions, streams), np.float64)
    return Metric(stats, functools.partial(np.apply_along_axis, score_row, -1))


_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ENGLISH_DROPPED = str.maketrans("", "", string.punctuation)

# CMRC's list: ASCII commas and full stops stay.
_CHINESE_DROPPED = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")

# A Chinese character; or as in NLTK a word with what joins it (3.14, 1,000, U.S.A); or a mark.
# Symbols beyond ASCII belong to their word.
_CHINESE_WORD_CHARACTER = r"[^\s\u4e00-\u9fa5!-/:-@\[-`{-~“”«»]"
_CHINESE_WORDS = re.compile(
    r"[\u4e00-\u9fa5]|{0}+(?:(?:[.']|,(?=\d)){0}+)*|\.\.\.|\S".replace(
        "{0}", _CHINESE_WORD_CHARACTER
    )
)


def _normalize_english(text: str) -> str:
    without_punctuation = text.lower().translate(_ENGLISH_DROPPED)
    return " ".join(_ENGLISH_ARTICLES.sub(" ", without_punctuation).split())


def _normalize_chinese(text: str) -> str:
    return text.lower().strip().translate(_CHINESE_DROPPED)


def _longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common run of items."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


@dataclasses.dataclass(frozen=True)
class AnswerRules:
    """How answers are compared: as normalized texts, and by what their words have in common."""

    normalize: Callable[[str], str]
    split: Callable[[str], list[str]]
    count_common: Callable[[Sequence[str], Sequence[str]], int]


ANSWER_RULES = {
    "en": AnswerRules(_normalize_english, str.split, _count_shared),
    "zh": AnswerRules(_normalize_chinese, _CHINESE_WORDS.findall, _longest_run),
}


def squad(
    predictions: Texts, references: Sequence[Texts], *, language: str = "en"
) -> dict[str, Metric]:
    """exact_match and f1 of answers, each the best of an example's references.

    No reference means that there is no answer. Raises UserError.

    "en": SQuAD's official script: lower case, no punctuation, no articles; F1 over the words in
    common (Rajpurkar et al. 2016). As in SQuAD 2.0, references with no word are dropped, and where
    either side has none, both scores are 1 if both have none, else 0.

    "zh": CMRC 2018's official script (Cui et al. 2019): lower case, without its list of
    punctuation; F1 over the longest common run of segments: a Chinese character is one, other
    words are kept together. Two deviations: words by a pattern instead of NLTK (don't is one), and
    no answer as in SQuAD 2.0.
    """
    _check_pairs(predictions, references, may_be_empty=True)
    if language not in ANSWER_RULES:
        raise UserError(f"language = {language!r}: must be 'en' or 'zh'")
    rules = ANSWER_RULES[language]
    table = np.zeros((len(predictions), 2))
    for i, text in enumerate(predictions):
        prediction = rules.normalize(text)
        answers = [rules.normalize(reference) for reference in references[i]]
        for answer in [answer for answer in answers if rules.split(answer)] or [""]:
            scores = [float(prediction == answer), _answer_f1(rules, prediction, answer)]
            table[i] = np.maximum(table[i], scores)
    return {"exact_match": mean_metric(table[:, 0]), "f1": mean_metric(table[:, 1])}


def _answer_f1(rules: AnswerRules, prediction: str, answer: str) -> float:
    """F1 of two normalized answers; of empty ones 1 where both are empty, else 0."""
    predicted, actual = rules.split(prediction), rules.split(answer)
    if not predicted or not actual:
        return float(predicted == actual)
    return _f1(rules.count_common(predicted, actual), len(predicted), len(actual))


def distinct(texts: Texts) -> dict[str, float]:
    """distinct_1 and distinct_2: different n-grams over all n-grams of all texts (Li et al. 2016).

    0 where there are none. Over words, or characters in scripts without spaces. Plain numbers:
    what is different among all texts is no sum over examples. Raises UserError.
    """
    _check_texts("texts", texts)
    scores = {}
    for n in (1, 2):
        grams: list[tuple[str, ...]] = []
        for text in texts:
            grams += _ngrams(_WORDS.findall(text), n)
        scores[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return scores


def diversity(texts: Texts, ids: Sequence[Sequence[int]] | None = None) -> dict[str, Metric]:
    """repetition: share of a text's 4-grams that occurred before in it (Welleck et al. 2019).

    The mean over the texts that have any (seq-rep-4). Over the token `ids` of each text as in the
    paper; without them over words, or characters in scripts without spaces. Raises UserError.
    """
    _check_texts("texts", texts)
    items: Sequence[Sequence[Any]]
    items = [_WORDS.findall(text) for text in texts] if ids is None else ids
    check_same_length(texts=texts, ids=items)
    stats = np.zeros((len(texts), 2))  # share, and whether the text has 4-grams
    for i, text_items in enumerate(items):
        grams = _ngrams(text_items, 4)
        if grams:
            stats[i] = 1 - len(set(grams)) / len(grams), 1.0
    return {"repetition": Metric(stats, first_over_second)}

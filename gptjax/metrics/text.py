"""TODO docstring."""

from __future__ import annotations

import collections
import difflib
import functools
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import Metric, check_same_length, mean_metric, ratio

Texts = Sequence[str]


_TOKENIZERS = (
    "13a",
    "zh",
    "intl",
    "char",
    "none",
)  # those of sacrebleu that need no further package


# Scripts that are written without spaces (Thai, Lao, kana, Han) and full-width punctuation count by the character.
_WORDS = re.compile(
    "[{0}]|[^\\s{0}]+".format(
        "\u0e00-\u0eff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
    )
)


_ENGLISH_DROPS = str.maketrans("", "", string.punctuation)


_CHINESE_DROPS = str.maketrans(
    "", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
)  # ASCII commas and full stops stay, as there


# a Chinese character, or as in NLTK a word with what joins it (3.14, 1,000, U.S.A), or a mark; symbols beyond ASCII belong to their word
_CHINESE_WORDS = re.compile(
    r"[\u4e00-\u9fa5]|{0}+(?:(?:[.']|,(?=\d)){0}+)*|\.\.\.|\S".replace(
        "{0}", r"[^\s\u4e00-\u9fa5!-/:-@\[-`{-~“”«»]"
    )
)


def _texts(name: str, texts: Any, *, empty: bool = False) -> None:
    """Raises unless `texts` is a list of texts; a bare text would be read as a list of its characters."""
    wrong = (
        [texts]
        if isinstance(texts, str) or not (len(texts) or empty)
        else [text for text in texts if not isinstance(text, str)]
    )
    if wrong:
        raise UserError(
            f"{name}: {wrong[0]!r:.60} where a list of texts must be, such as ['one text']"
        )


def _pairs(predictions: Any, references: Any, *, unanswerable: bool = False) -> None:
    check_same_length(predictions=predictions, references=references)
    _texts("predictions", predictions)
    for i, row in enumerate(references):
        _texts(f"references[{i}]", row, empty=unanswerable)


def rouge(
    predictions: Texts, references: Sequence[Texts], *, characters: bool = False
) -> dict[str, Metric]:
    """rouge1, rouge2 and rougeL F-measure (Lin 2004), the best of an example's references, as Google's rouge-score without stemming.

    Words are runs of a-z and 0-9 of the lower-cased text, so that Chinese has none: `characters=True` compares all characters but spaces instead.
    """
    _pairs(predictions, references)
    split = lambda text: re.findall(r"\S" if characters else "[a-z0-9]+", text.lower())
    table = np.zeros((len(predictions), 3))
    for row, prediction, answers in zip(table, map(split, predictions), references):
        for answer in map(split, answers):
            grams = [
                _f1(
                    _shared(_ngrams(prediction, n), _ngrams(answer, n)),
                    len(prediction) + 1 - n,
                    len(answer) + 1 - n,
                )
                for n in (1, 2)
            ]
            row[:] = np.maximum(
                row,
                [
                    *grams,
                    _f1(_longest_subsequence(prediction, answer), len(prediction), len(answer)),
                ],
            )
    return {
        name: mean_metric(column) for name, column in zip(("rouge1", "rouge2", "rougeL"), table.T)
    }


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


def translation(
    predictions: Texts, references: Sequence[Texts], *, tokenize: str = "13a"
) -> dict[str, Metric]:
    """Corpus bleu (Papineni et al. 2002) and chrf (Popović 2015) in [0, 100], by sacrebleu (Post 2018). `tokenize`: of BLEU; "zh" for Chinese."""
    _pairs(predictions, references)
    if tokenize not in _TOKENIZERS:
        raise UserError(f"tokenize = {tokenize!r}: must be one of {', '.join(_TOKENIZERS)}")
    try:
        import sacrebleu
    except ImportError:
        raise UserError(
            "BLEU and chrF need the package sacrebleu: pip install 'gptjax[eval]'"
        ) from None
    streams: Any = [
        [row[i] if i < len(row) else None for row in references]
        for i in range(max(map(len, references)))
    ]  # the i-th of all examples
    metrics = {}
    for name, scorer in (
        ("bleu", sacrebleu.BLEU(tokenize=tokenize, force=True)),
        ("chrf", sacrebleu.CHRF()),
    ):
        # what sacrebleu's own bootstrap uses is private: a changed name must not fail deep inside it
        missing = [
            method
            for method in ("_extract_corpus_statistics", "_compute_score_from_stats")
            if not hasattr(scorer, method)
        ]
        if missing:
            raise UserError(
                f"this version of sacrebleu has no {type(scorer).__name__}.{missing[0]}: pip install 'sacrebleu>=2.4,<3'"
            )
        one = lambda sums, scorer=scorer: (
            scorer._compute_score_from_stats(np.rint(sums).astype(np.int64).tolist()).score
        )
        stats = np.array(scorer._extract_corpus_statistics(predictions, streams), np.float64)
        metrics[name] = Metric(stats, functools.partial(np.apply_along_axis, one, -1))
    return metrics


_english = lambda text: " ".join(
    re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ENGLISH_DROPS)).split()
)


_chinese = lambda text: text.lower().strip().translate(_CHINESE_DROPS)


_longest_run = lambda a, b: (
    difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
)


def squad(
    predictions: Texts, references: Sequence[Texts], *, language: str = "en"
) -> dict[str, Metric]:
    """exact_match and f1 of answers, each the best of an example's references; no reference means that there is no answer.

    "en": SQuAD's official script: lower case, no punctuation, no articles; F1 over the words in common (Rajpurkar et al. 2016). As in SQuAD 2.0,
    references with no word are dropped, and where either side has none, both scores are 1 if both have none, else 0.
    "zh": CMRC 2018's official script (Cui et al. 2019): lower case, without its list of punctuation; F1 over the longest common run of segments,
    a Chinese character each, other words whole. Two deviations: words by a pattern instead of NLTK (don't is one), and no answer as in SQuAD 2.0.
    """
    _pairs(predictions, references, unanswerable=True)
    if language not in ("en", "zh"):
        raise UserError(f"language = {language!r}: must be 'en' or 'zh'")
    normal, split, common = (
        (_english, str.split, _shared)
        if language == "en"
        else (_chinese, _CHINESE_WORDS.findall, _longest_run)
    )
    table = np.zeros((len(predictions), 2))
    for row, prediction, answers in zip(table, map(normal, predictions), references):
        words = split(prediction)
        for answer in [a for a in map(normal, answers) if split(a)] or [""]:
            right = split(answer)
            f1 = (
                _f1(common(words, right), len(words), len(right))
                if words and right
                else float(words == right)
            )
            row[:] = np.maximum(row, [prediction == answer, f1])
    return {"exact_match": mean_metric(table[:, 0]), "f1": mean_metric(table[:, 1])}


def distinct(texts: Texts) -> dict[str, float]:
    """distinct_1 and distinct_2: different n-grams over all n-grams of all texts (Li et al. 2016), 0 where there are none.

    Over words, or characters in scripts without spaces. Plain numbers: what is different among all texts is no sum over examples.
    """
    _texts("texts", texts)
    grams = {
        n: [gram for text in texts for gram in _ngrams(_WORDS.findall(text), n)] for n in (1, 2)
    }
    return {f"distinct_{n}": len(set(found)) / max(len(found), 1) for n, found in grams.items()}


def diversity(texts: Texts, ids: Sequence[Sequence[int]] | None = None) -> dict[str, Metric]:
    """repetition: share of a text's 4-grams that occurred before in it, mean over the texts that have any (seq-rep-4, Welleck et al. 2019).

    Over the token `ids` where given, as in the paper, else over words, or characters in scripts without spaces.
    """
    _texts("texts", texts)
    items: Sequence[Sequence[Any]] = (
        [_WORDS.findall(text) for text in texts] if ids is None else ids
    )
    check_same_length(texts=texts, ids=items)
    stats = np.array(
        [
            (1 - len(set(row)) / len(row), 1.0) if row else (0.0, 0.0)
            for row in (_ngrams(item, 4) for item in items)
        ]
    )
    return {"repetition": Metric(stats, lambda s: ratio(s[..., 0], s[..., 1]))}

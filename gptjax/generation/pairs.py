"""Prompt and completion as ids, and the log-probability of the text that the completion adds.

Running text is cut into tokens without regard to where the prompt ends. Most often its tokens begin
with those of the prompt alone; the score is then log P(the other tokens | the prompt's). Where a
token spans the border (" Mon" + "day", Chinese words), the prompt's own last tokens R are not in
the text at all. Behind the tokens C that both have, the score is then

    log P(the text's tokens | C) - log P(text that begins with R's characters | C),

the probability of the completion given the prompt's characters. The second term adds up the tokens
that begin with what is left of R, after each of the prompt's own tokens, and the text's own.
So every score is below 0, and those of one prompt's completions can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.config.errors import UserError
from gptjax.generation import scoring
from gptjax.generation.loop import InferenceModel
from gptjax.tokenizer.base import Tokenizer


class Pair(NamedTuple):
    """context: ids that are given. completion: ids that are scored. replaced: ids of the prompt,
    after the context, that the first ids of the completion stand for as well; mostly none.
    """

    context: list[int]
    completion: list[int]
    replaced: list[int] = []

    @property
    def ids(self) -> list[int]:
        return [*self.context, *self.completion]

    @property
    def positions(self) -> int:
        """How many the model reads: the last id is only predicted."""
        return len(self.context) + max(len(self.completion), len(self.replaced)) - 1


def align(prompt: list[int], whole: list[int], *, start: int) -> Pair:
    """The pair of a prompt's ids and those of the whole text, both cut by the tokenizer.

    start: the id that begins a document, for a text that shares no id with the prompt. Raises
    UserError where the completion adds no token.
    """
    pairs_of_ids = zip(prompt, whole, strict=False)
    common = len(list(itertools.takewhile(lambda ids: ids[0] == ids[1], pairs_of_ids)))
    if len(whole) <= common:
        raise UserError("the tokenizer writes nothing for the completion: there is no score of it")
    return Pair(whole[:common] or [start], whole[common:], prompt[common:])


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on from other ids: without the space that some vocabularies put
    before a first word.
    """
    ids = tokenizer.encode(text)
    if not tokenizer.leading_space or tokenizer.decode_bytes(ids) == text.encode():
        return ids
    for before in ("\n", "a", "."):
        lead, whole = tokenizer.encode(before), tokenizer.encode(before + text)
        rest = whole[len(lead) :]
        if whole[: len(lead)] == lead and tokenizer.decode_bytes(rest) == text.encode():
            return rest
    return ids


def score_pairs(
    model: InferenceModel, tokenizer: Tokenizer | None, pairs: Sequence[Pair]
) -> list[tuple[float, bool]]:
    """(log-probability of what the completion adds, whether greedy decoding writes it) of each.

    Greedy decoding of a text whose token spans the border takes the likeliest of those that go on
    from the prompt's characters.
    """
    token_bytes = _token_bytes(tokenizer) if any(pair.replaced for pair in pairs) else []
    results = []
    borders = _border_logprobs(model, pairs)
    tokens_of: dict[bytes, np.ndarray] = {}  # ids whose bytes begin with the key
    all_scores = scoring.score_rows(model, [pair.ids for pair in pairs])
    for pair, row, border in zip(pairs, all_scores, borders, strict=True):
        logprobs = row.logprobs[len(pair.context) - 1 :].astype(np.float64)
        greedy = row.greedy[len(pair.context) - 1 :]
        if border is None:
            results.append((float(logprobs.sum()), bool(greedy.all())))
            continue
        covering = _covering(token_bytes, pair)
        ways = _ways(token_bytes, pair, border, tokens_of)
        # its first one from where the others come: it is one of them to the last bit
        own = float(border[0, pair.completion[0]]) + logprobs[1:covering].sum()
        if not token_bytes[pair.completion[0]].startswith(_bytes(token_bytes, pair.replaced)):
            ways.append(np.array([own]))
        every_way = np.concatenate(ways)
        score = own + logprobs[covering:].sum() - np.logaddexp.reduce(every_way)
        results.append((float(score), bool(own >= every_way.max() and greedy[covering:].all())))
    return results


def _token_bytes(tokenizer: Tokenizer | None) -> list[bytes]:
    """What each id stands for; of a tokenizer that decodes words, what it decodes alone."""
    if tokenizer is None:  # pairs of texts need one
        return []
    if tokenizer.joins_bytes:
        return tokenizer.token_bytes
    return [tokenizer.decode([i]).encode() for i in range(tokenizer.vocab_size)]


def _covering(token_bytes: Sequence[bytes], pair: Pair) -> int:
    """How many of the completion's first tokens it takes to cover what they replace."""
    length = len(_bytes(token_bytes, pair.replaced))
    sizes = itertools.accumulate(len(token_bytes[i]) for i in pair.completion)
    return next((k for k, size in enumerate(sizes, 1) if size >= length), len(pair.completion))


def _ways(
    token_bytes: Sequence[bytes],
    pair: Pair,
    border: np.ndarray,
    tokens_of: dict[bytes, np.ndarray],
) -> list[np.ndarray]:
    """Log-probabilities of the ways to write the replaced text: some of its own tokens, then one
    that begins with what is left. border: [replaced, V], after the context and each own token.
    """
    ways, so_far = [], 0.0
    for k, own in enumerate(pair.replaced):
        rest = _bytes(token_bytes, pair.replaced[k:])
        if rest not in tokens_of:
            ids = [i for i, text in enumerate(token_bytes) if text.startswith(rest)]
            tokens_of[rest] = np.array(ids, np.int32)
        ways.append(so_far + border[k, tokens_of[rest]].astype(np.float64))
        so_far += float(border[k, own])
    return ways


def _bytes(token_bytes: Sequence[bytes], ids: Sequence[int]) -> bytes:
    return b"".join(token_bytes[i] for i in ids)


def _border_logprobs(model: InferenceModel, pairs: Sequence[Pair]) -> list[np.ndarray | None]:
    """float32 [replaced, V] of each pair whose completion spans the border; else None."""
    rows: dict[tuple[int, ...], int] = {}  # candidates of one prompt share a row
    places: list[list[int]] = []
    keys: list[tuple[int, ...] | None] = []
    for pair in pairs:
        key = (*pair.context, *pair.replaced[:-1]) if pair.replaced else None
        keys.append(key)
        if key and key not in rows:
            rows[key] = len(rows)
            places.append([])
        if key:
            first = len(pair.context) - 1
            positions = list(range(first, first + len(pair.replaced)))
            places[rows[key]] = max(places[rows[key]], positions, key=len)
    if not rows:
        return [None] * len(pairs)
    logprobs = scoring.next_logprobs(model, list(rows), places)
    borders: list[np.ndarray | None] = []
    for pair, key in zip(pairs, keys, strict=True):
        borders.append(logprobs[rows[key]][-len(pair.replaced) :] if key else None)
    return borders


def text_pair(
    encode: Callable[[str], list[int]], tokenizer: Tokenizer, prompt: str, completion: str
) -> Pair:
    """The pair of two texts. Trailing spaces of the prompt go to the completion, as tokens of
    running text begin with them. encode: a text to ids with what stands before every text.
    Raises UserError.
    """
    if not completion:
        return Pair(encode(prompt), [])
    head = prompt.rstrip()
    if not head:
        return Pair(encode(""), tokenizer.encode(prompt + completion))
    return align(encode(head), encode(prompt + completion), start=tokenizer.eot)

"""Which text is held out: a share of the documents, and what is on both sides.

In: the length and a hash of each document. Out: a `Plan`, which says for each document where its
held-out part begins. Documents spread over the set are held out whole where that comes to about
the share that is asked for, else the ends of long ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import cli, files
from gptjax.data.documents import Documents
from gptjax.data.inside import Inside, check_inside, find_inside
from gptjax.data.records import held_out_every
from gptjax.data.selection import NAMES, HeldOut, counted

TOLERANCE = 0.2  # the share held out is the one asked for, give or take this part of it
_SHORTEST_END = 1000  # characters; fewer documents give an end where it would be shorter
_WHOLE = -1  # in `Plan.cuts`: nothing of the document is held out
_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # what separates documents in corpora
_MANY_MARKERS = 3


@dataclasses.dataclass(frozen=True)
class Survey:
    """Of each document its length in characters and a hash of its content, [n] each.

    markers: how often each of _MARKERS stands in the text, [len(_MARKERS)].
    """

    lengths: np.ndarray
    hashes: np.ndarray
    markers: np.ndarray

    def separator(self) -> tuple[str, int]:
        """The mark that seems to separate documents, and how often it does; else ("", 0)."""
        most = int(self.markers.argmax())
        count = int(self.markers[most])
        return (_MARKERS[most], count) if count >= _MANY_MARKERS else ("", 0)


def survey(documents: Documents) -> Survey:
    """Reads all documents once; kept in the cache by the fingerprint of their content."""
    key = files.digest("survey 2", documents.fingerprint)
    path = files.cache_path("surveys", f"{key[:32]}.npz")
    if data := files.read_cached(path):
        with np.load(io.BytesIO(data)) as arrays:
            stored = Survey(arrays["lengths"], arrays["hashes"], arrays["markers"])
        if len(stored.lengths) == documents.count:
            return stored
    lengths, hashes = [], []
    markers = np.zeros(len(_MARKERS), np.int64)
    with cli.progress("documents measured") as advance:
        for text in documents.read():
            lengths.append(len(text))
            hashes.append(content_hash(text))
            markers += [text.count(marker) for marker in _MARKERS]
            advance(1)
    if len(lengths) != documents.count:
        raise UserError(
            f"{documents.selection.path} has {documents.count:,} documents, and {len(lengths):,} "
            "were read: was it changed meanwhile? Start again"
        )
    result = Survey(np.array(lengths, np.int64), np.array(hashes, np.uint64), markers)
    buffer = io.BytesIO()
    np.savez(buffer, **dataclasses.asdict(result))
    files.write_cached(path, buffer.getvalue())
    return result


def content_hash(text: str) -> int:
    """64 bits of a hash of the text."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Plan:
    """cuts: int64 [n], where the held-out part of each document begins: 0 = all of it is held out,
    -1 = nothing. rule: of the fingerprint, "" for the rule of every n-th document. how: in words.
    """

    cuts: np.ndarray
    rule: str = ""
    how: str = ""

    def characters(self, lengths: np.ndarray) -> int:
        """How much is held out of documents of these lengths."""
        return int((lengths - self.cuts)[self.cuts != _WHOLE].sum())


def plan_by_count(lengths: np.ndarray, fraction: float) -> Plan:
    """Every n-th document; the end of a single one."""
    n = len(lengths)
    cuts = np.full(n, _WHOLE, np.int64)
    if n == 1 and fraction:
        cut = int(int(lengths[0]) * (1 - fraction))
        cuts[0] = cut if cut < lengths[0] else _WHOLE
        return Plan(cuts, how="the end of the document")
    if n and fraction:
        every = held_out_every(n, fraction)
        cuts[every - 1 :: every] = 0
    return Plan(cuts, how=_whole_ones(cuts))


def plan_by_share(lengths: np.ndarray, fraction: float) -> Plan:
    """A plan that holds out about this share of the characters (see TOLERANCE)."""
    total = int(lengths.sum())
    every_nth = plan_by_count(lengths, fraction)
    if len(lengths) < 2 or _is_near(every_nth, lengths, fraction):
        return every_nth
    if lengths.max() <= fraction * total:
        cuts = _spread(lengths, fraction)
        by_length = Plan(cuts, "by share", _whole_ones(cuts))
        if _is_near(by_length, lengths, fraction):
            return by_length
    # a document that moves the share by more than the tolerance is not taken whole
    is_long = lengths > TOLERANCE * fraction * total
    cuts = np.full(len(lengths), _WHOLE, np.int64)
    cuts[~is_long] = _spread(lengths[~is_long], fraction)
    whole = int((cuts == 0).sum())
    budget = fraction * total - Plan(cuts).characters(lengths)
    ends = _choose_ends(lengths, np.flatnonzero(is_long), budget)
    chosen = int(lengths[ends].sum())
    for i in ends:
        length = int(lengths[i])
        cut = length - round(length * budget / chosen)
        cuts[i] = cut if cut < length else _WHOLE
    also = f" and {whole:,} whole ones" if whole else ""
    plural = "s" if len(ends) != 1 else ""
    return Plan(cuts, "by share", f"the end{plural} of {len(ends):,} document{plural}{also}")


def _is_near(plan: Plan, lengths: np.ndarray, fraction: float) -> bool:
    target = fraction * lengths.sum()
    return abs(plan.characters(lengths) - target) <= TOLERANCE * target


def _whole_ones(cuts: np.ndarray) -> str:
    return f"{int((cuts == 0).sum()):,} of {len(cuts):,} documents"


def _spread(lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Cuts that hold out whole documents, so that the share is kept up all the way."""
    cuts = np.full(len(lengths), _WHOLE, np.int64)
    seen = held_out = 0
    for i, length in enumerate(lengths.tolist()):
        seen += length
        if length and held_out + length / 2 <= fraction * seen:
            cuts[i] = 0
            held_out += length
    return cuts


def _choose_ends(lengths: np.ndarray, long: np.ndarray, budget: float) -> np.ndarray:
    """The long documents whose ends hold `budget` characters together: evenly spread."""
    count = min(max(int(budget // _SHORTEST_END), 1), len(long))
    while True:
        chosen = long[np.arange(count) * len(long) // count]
        if count == len(long) or budget <= lengths[chosen].sum() / 2:
            return chosen
        count = min(2 * count, len(long))


def on_both_sides(train: Survey, held_out_hashes: np.ndarray, plan: Plan) -> np.ndarray:
    """bool [n]: documents that are trained on whole and have the content of one that is held out,
    or whose end is."""
    is_same = np.isin(train.hashes, held_out_hashes)
    return is_same & (plan.cuts == _WHOLE) & (train.lengths > 0)


@dataclasses.dataclass(frozen=True)
class Split:
    """What becomes of each document, and the fingerprint of text and split together.

    dropped: bool [n], documents that are on neither side.
    """

    plan: Plan
    dropped: np.ndarray
    fingerprint: str
    held_out: HeldOut

    def training_part(self, i: int, text: str) -> str | None:
        """What document i gives to the training split, if anything."""
        cut = int(self.plan.cuts[i])
        if cut == _WHOLE:
            return None if self.dropped[i] else text
        return text[:cut] if cut else None

    def held_out_part(self, i: int, text: str) -> str | None:
        """What document i gives to the held-out split, if anything."""
        cut = int(self.plan.cuts[i])
        return None if cut == _WHOLE or not self.held_out.size else text[cut:]


def choose_split(
    config: DataConfig, main: Documents, own: Documents | None, resumed: str = ""
) -> Split:
    """How the documents `main` are split.

    own: held-out documents of their own, or None to hold some of `main` out. resumed: the
    fingerprint of a run that goes on (see `sources.open_source`). Raises UserError.
    """
    measured = survey(main)
    lengths = measured.lengths
    _say_separator(config, main, measured)
    rule = own.fingerprint if own else f"{config.source} {config.eval_fraction}"
    fingerprint = files.digest(main.fingerprint, rule)
    goes_on = resumed == fingerprint  # which is what earlier versions give, by their rule
    if own:
        plan = Plan(np.full(main.count, _WHOLE, np.int64), how=f"all of {own.selection.path}")
        size, hashes = _survey_own(own)
    else:
        plan = _plan(lengths, config.eval_fraction, goes_on=goes_on)
        size, hashes = plan.characters(lengths), measured.hashes[plan.cuts != _WHOLE]
    same = on_both_sides(measured, hashes, plan)
    names = _names(main, same)
    rest = (plan.cuts != 0) & ~same & (lengths > 0)
    policy = "keep"
    if not goes_on:
        policy = overlap_policy(
            config,
            int(same.sum()),
            names,
            noun="document",
            where=main.selection.path,
            has_rest=bool(rest.any()),
            has_own=own is not None,
        )
    dropped = same if policy == "drop" else np.zeros_like(same)
    inside = Inside(0.0, ())
    if own:
        inside = find_inside(main, own, same)
        if not goes_on:
            check_inside(config, inside, own.selection.path)
    if plan.rule or dropped.any():
        without = "without overlap" if dropped.any() else ""
        fingerprint = files.digest(main.fingerprint, rule, plan.rule, without)
    everything = int(lengths.sum())
    if own:
        everything += size - int(lengths[dropped].sum())
    how = plan.how
    if not size:
        how = f"data.eval_fraction = {config.eval_fraction:g} of {everything:,} characters"
    has_whole_ones = own is not None or bool((plan.cuts == 0).any())
    overlap = int(same.sum()) if has_whole_ones or same.any() else None
    held_out = HeldOut(
        how,
        size / max(everything, 1),
        size,
        overlap=overlap,
        names=names,
        policy=policy,
        inside=inside.share,
        inside_names=inside.names,
    )
    return Split(plan, dropped, fingerprint, held_out)


def _survey_own(own: Documents) -> tuple[int, np.ndarray]:
    """(characters, hashes) of held-out documents of their own. Raises UserError for no text."""
    measured = survey(own)
    size = int(measured.lengths.sum())
    if not size:
        raise UserError(
            f"{own.selection.path} is held out and has no text in its {own.count:,} documents: "
            "name other data, or leave data.eval_path and data.eval_split out"
        )
    return size, measured.hashes


def _plan(lengths: np.ndarray, fraction: float, *, goes_on: bool) -> Plan:
    """What is held out of the training data. goes_on: a run that an earlier version began does."""
    plan = plan_by_share(lengths, fraction)
    if goes_on and plan.rule:
        plan = plan_by_count(lengths, fraction)
        plan = dataclasses.replace(plan, how=f"{plan.how}, as when this run began")
    return plan


def overlap_policy(
    config: DataConfig,
    count: int,
    names: Sequence[str],
    *,
    noun: str,
    where: str,
    has_rest: bool,
    has_own: bool,
) -> str:
    """What becomes of training documents, or rows, with the content of held-out ones.

    count: how many there are; names: of the first of them. where: the place of all that would be
    trained on. has_rest: whether some of it is left. has_own: whether the held-out data are of
    their own. Raises UserError where data.overlap refuses them, or where nothing would be left.
    """
    if config.overlap == "refuse" and count:
        raise UserError(
            f"{counted(count, f'training {noun}')} with the content of held-out ones "
            f"({', '.join(names)}): remove them, or set data.overlap = 'drop'"
        )
    if config.overlap != "drop" or not count or has_rest:
        return config.overlap
    if has_own:
        raise UserError(
            f"every {noun} of {where} is held out too: nothing is left to train on.\n"
            "Leave data.eval_path and data.eval_split out to hold out a share of it "
            "(data.eval_fraction), or set data.overlap = 'keep'."
        )
    return "keep"  # copies of a few, each of which is held out


def _names(documents: Documents, chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(documents.name(int(i)) for i in np.flatnonzero(chosen)[:NAMES])


def _say_separator(config: DataConfig, main: Documents, measured: Survey) -> None:
    """Names text that seems to separate documents and is learned as text."""
    marker, count = measured.separator()
    if marker and config.source == "text" and not config.separator:
        cli.say(
            f"{main.selection.path}: {marker!r} stands there {count:,} times and is learned as "
            f"text; --config.data.separator='{marker}' makes documents of what is between"
        )

"""The rows of a task in two splits: read, held out, limited and mixed as `data.*` says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax.config.errors import UserError
from gptjax.config.schema import Config, DataConfig
from gptjax.core import files
from gptjax.data import selection, sources
from gptjax.data.held_out import overlap_policy
from gptjax.data.records import Record, SplitRecords, is_held_out, subsample_evenly
from gptjax.data.selection import NAMES, HeldOut, Selection, has_copies

_MAX_WEIGHT = 1e4  # of a file of data.mixture


class Splits(NamedTuple):
    """Rows of both splits. fingerprint: of the files and of how they were split and mixed.

    selections: what they were taken from.
    """

    train: list[Record]
    eval: list[Record]
    fingerprint: str
    selections: dict[str, Selection]


def read_splits(config: Config, resumed: str = "") -> Splits:
    """The rows that the config names.

    resumed: the fingerprint of a run that goes on; one that an earlier version began keeps rows
    that are on both sides, and copies of files. Raises UserError where there is nothing to train
    on.
    """
    splits = _read_splits(config.data, resumed)
    if resumed not in ("", splits.fingerprint) and has_copies(splits.selections):
        with_copies = dataclasses.replace(config.data, duplicates="keep")
        before = _read_splits(with_copies, resumed)
        return before if before.fingerprint == resumed else splits
    return splits


def _read_splits(d: DataConfig, resumed: str) -> Splits:
    main = sources.read_records(d, d.path, sources.training_split(d, d.path))
    selections = {"data": main.selection}
    fingerprints = [main.fingerprint, str(d.eval_fraction)]
    place = sources.held_out_split(d)
    if place:
        held_out = sources.read_records(d, *place)
        fingerprints.append(held_out.fingerprint)
        selections["held-out data"] = held_out.selection
        train_rows = list(_with_unique_ids(main.read()))
        eval_rows = list(_with_unique_ids(held_out.read()))
        how = f"all of {held_out.selection.path}"
    else:
        train_rows, eval_rows = [], []
        for i, row in enumerate(_with_unique_ids(main.read())):
            held_out_row = is_held_out(i, count=main.count, fraction=d.eval_fraction)
            (eval_rows if held_out_row else train_rows).append(row)
        how = f"{len(eval_rows):,} of {main.count:,}"
        sources.say_other_splits(d)
    mixture = []
    for entry in d.mixture:
        path, weight = _mixture_entry(entry)
        extra = sources.read_records(d, path, sources.training_split(d, path))
        selections[f"mixture {entry}"] = extra.selection
        fingerprints += [extra.fingerprint, entry.rpartition("=")[2]]
        mixture.append((list(_with_unique_ids(extra.read())), weight))

    every_row = [*train_rows, *itertools.chain(*(rows for rows, _ in mixture))]
    same = _on_both_sides(every_row, eval_rows)
    goes_on = resumed == files.digest(*fingerprints)  # which is what earlier versions give
    names = tuple(list(same)[:NAMES])
    policy = "keep"
    if not goes_on:
        policy = overlap_policy(
            d,
            len(same),
            names,
            noun="row",
            where=f"data.path = {d.path!r}",
            has_rest=len(same) < len(every_row),
            has_own=place is not None,
        )
    if same and policy == "drop":
        fingerprints.append("without overlap")
        train_rows = [row for row in train_rows if row.where not in same]
        mixture = [([row for row in rows if row.where not in same], w) for rows, w in mixture]
    share = len(eval_rows) / max(len(eval_rows) + len(every_row), 1)
    described = HeldOut(how, share, len(eval_rows), "rows", len(same), names, policy)
    selections["data"] = dataclasses.replace(main.selection, held_out=described)

    train_rows = subsample_evenly(train_rows, d.train_limit)
    eval_rows = subsample_evenly(eval_rows, d.eval_limit)
    for rows, weight in mixture:
        train_rows += _repeat(rows, weight)
    if not train_rows:
        raise UserError(
            f"data.path = {d.path!r}: the training split is empty; "
            f"lower data.eval_fraction = {d.eval_fraction}"
        )
    return Splits(train_rows, eval_rows, files.digest(*fingerprints), selections)


def _content(row: Record) -> str:
    """All fields of a row but its id, which names it."""
    fields = {name: value for name, value in row.fields.items() if name != "id"}
    return json.dumps(fields, sort_keys=True, default=repr)


def _on_both_sides(train_rows: list[Record], eval_rows: list[Record]) -> dict[str, None]:
    """The places of training rows with the content of a held-out row, in their order."""
    held_out = {_content(row) for row in eval_rows}
    return dict.fromkeys(row.where for row in train_rows if held_out and _content(row) in held_out)


def read_other_rows(config: Config, path: str) -> list[Record]:
    """The rows of one more file, or of a split where the source has named ones.

    Raises UserError.
    """
    d = config.data
    if d.source == "sotu":
        raise UserError(
            f"--path={path}: data.source = 'sotu' is one corpus without files; "
            "leave --path out to take its held-out paragraphs"
        )
    records = _open_other(d, path)
    selection.say({"evaluated": records.selection})
    return list(_with_unique_ids(records.read()))


def _open_other(d: DataConfig, path: str) -> SplitRecords:
    if sources.SOURCES[d.source].split_names and not Path(path).exists():
        return sources.read_records(d, d.path, sources.other_split(d, path))
    place = sources.held_out_split(dataclasses.replace(d, eval_path=path))
    assert place is not None, path
    return sources.read_records(d, *place)


def _mixture_entry(entry: str) -> tuple[str, float]:
    """(path, weight) of PATH=WEIGHT. Raises UserError."""
    path, _, text = entry.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not path or not 0 < weight < _MAX_WEIGHT:
        raise UserError(
            f"data.mixture: {entry!r} is no PATH=WEIGHT with a weight above 0, "
            "such as extra.jsonl=0.5"
        )
    return path, weight


def _repeat(extra: list[Record], weight: float) -> list[Record]:
    """The rows as often as the weight says; of its fraction, that share of them, evenly spread."""
    repeated = extra * int(weight)
    rest = round((weight - int(weight)) * len(extra))
    # for subsample_evenly, a limit of 0 means all
    return repeated + subsample_evenly(extra, rest) if rest else repeated


def _with_unique_ids(records: Iterable[Record]) -> Iterator[Record]:
    """The rows. Raises UserError where two of them carry one id."""
    first_place: dict[str, str] = {}
    for row in records:
        key = row.fields.get("id")
        if isinstance(key, str | int):
            first = first_place.setdefault(str(key), row.where)
            if first != row.where:
                raise UserError(
                    f"{row.where} has the id {key!r}, which {first} has too: "
                    "ids name one row each; fix them or rename the field"
                )
        yield row

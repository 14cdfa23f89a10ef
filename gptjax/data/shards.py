"""Token shards on disk: writing them from documents, and opening them.

In: documents and a tokenizer. Out: a folder, opened as `Prepared`. For each split it holds
`train-00000.tokens.npy` (uint16 or uint32; each document begins with `eot`),
`train-00000.offsets.npy` (int64: where documents begin, and the end) and a small JSON file for
each finished shard; then the tokenizer, and written last, `meta.json`. Every file appears complete
or not at all, and an interrupted preparation goes on after its last finished shard and ends in
the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import selection, sources
from gptjax.data.selection import Selection
from gptjax.data.sources import EVAL, TRAIN
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import create_tokenizer, load_tokenizer

SHARD_TOKENS = 1 << 26
_BATCH_CHARACTERS = 1 << 22  # text encoded at once: enough to keep every core busy
_FORMAT = 2
_SUFFIXES = (".tokens.npy", ".offsets.npy")
# What reading a damaged JSON file, or one with other content, raises; UserError is a ValueError.
_DAMAGES = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A folder of shards: `splits[name]` lists {"name", "tokens", "documents"}.

    selections: what its documents were taken from; empty in folders of an earlier version.
    """

    folder: Path
    fingerprint: str  # of documents, split rule, tokenizer and shard size together
    source: str  # of documents and split rule
    splits: dict[str, list[dict[str, Any]]]
    tokenizer: Tokenizer
    selections: dict[str, Selection] = dataclasses.field(default_factory=dict)

    def tokens(self, split: str) -> int:
        return sum(shard["tokens"] for shard in self.splits[split])

    def summary(self) -> str:
        """A line that says how many tokens and documents there are, and how many are empty."""
        parts = []
        for split, name in ((TRAIN, "training"), (EVAL, "held out")):
            documents = empty = 0
            for _, offsets in self.arrays(split):
                documents += len(offsets) - 1
                empty += int((np.diff(offsets) == 1).sum())  # the token before it alone
            of_them = f", {empty:,} of them empty" if empty else ""
            number = selection.counted(documents, "document")
            parts.append(f"{name} {self.tokens(split):,} tokens ({number}{of_them})")
        return "; ".join(parts)

    def arrays(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, offsets) of each shard, memory-mapped."""
        for shard in self.splits[split]:
            base = self.folder / shard["name"]
            yield np.load(f"{base}.tokens.npy", mmap_mode="r"), np.load(f"{base}.offsets.npy")


class DamagedError(UserError):
    """A folder of shards that is not as it was written. In the cache it is made anew."""


def open_prepared(folder: Path) -> Prepared:
    """Opens a folder of shards.

    Raises UserError where it is no finished preparation, DamagedError where it differs from what
    was written.
    """
    try:
        return _open_prepared(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no prepared data (no meta.json); "
            f"make it with python -m gptjax.data.prepare --out={folder}"
        ) from None
    except DamagedError:
        raise
    except (*_DAMAGES, OSError) as error:
        problem = str(error) if isinstance(error, UserError) else f"meta.json is damaged: {error!r}"
        raise DamagedError(f"{folder}: {problem}; prepare the data again") from None


def _open_prepared(folder: Path) -> Prepared:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != _FORMAT:
        raise DamagedError(
            f"{folder} is of format {meta['format']}, this version reads {_FORMAT}; "
            "prepare the data again"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise DamagedError(
            f"{folder}: the tokenizer is not the one that the data was prepared with"
        )
    for shards in meta["splits"].values():
        for shard in shards:
            _check_shard(folder, shard)
    selections = {
        name: Selection.from_json(values) for name, values in meta.get("selections", {}).items()
    }
    return Prepared(
        folder, meta["fingerprint"], meta["source"], meta["splits"], tokenizer, selections
    )


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    for suffix, checksum in shard["sha256"].items():
        path = folder / f"{shard['name']}{suffix}"
        if not path.is_file() or not files.sha256_once(path, checksum):
            raise DamagedError(
                f"{path} is damaged or was changed after it was written; "
                "prepare the data again, in another folder"
            )


def prepare(config: Config, folder: Path, *, shard_tokens: int = SHARD_TOKENS) -> Prepared:
    """Prepares the documents that `config.data` names into `folder`.

    What is finished there already is opened. Raises UserError for wrong input, and where the
    folder holds other data.
    """
    if config.data.source == "shards":
        raise UserError(
            "data.source = 'shards' is prepared already: name the documents, such as "
            "--config.data.source=jsonl --config.data.path=corpus/"
        )
    source = sources.open_source(config.data)
    selection.say(source.selections)
    return _prepare(config, source, _make_tokenizer(config, source), folder, shard_tokens)


def ensure(
    config: Config, text_tokenizer: Tokenizer | None = None, *, resumed: str = ""
) -> Prepared:
    """The shards of `config.data`: an existing folder (`data.source = 'shards'`), or the cache's.

    In the cache they are made once. `text_tokenizer` takes the place of the one that the config
    names. resumed: see `sources.open_source`. Raises UserError for wrong input.
    """
    if config.data.source == "shards":
        prepared = open_prepared(Path(config.data.path).expanduser())
        if text_tokenizer and prepared.tokenizer.fingerprint != text_tokenizer.fingerprint:
            raise UserError(
                f"{config.data.path} was prepared with another tokenizer than the checkpoint's: "
                "prepare the documents again"
            )
        selection.say(prepared.selections)
        return dataclasses.replace(prepared, tokenizer=text_tokenizer or prepared.tokenizer)
    source = sources.open_source(config.data, resumed)
    selection.say(source.selections)
    text_tokenizer = text_tokenizer or _make_tokenizer(config, source)
    key = files.digest(str(_FORMAT), source.fingerprint, text_tokenizer.fingerprint)
    folder = files.cache_dir("data") / key[:32]
    try:
        prepared = _prepare(config, source, text_tokenizer, folder, SHARD_TOKENS)
    except DamagedError:
        _clear(folder)
        prepared = _prepare(config, source, text_tokenizer, folder, SHARD_TOKENS)
    # the vocabulary is the same, but a chat template is this checkpoint's own
    # and the same documents may lie elsewhere now, among other files that are passed over
    return dataclasses.replace(prepared, tokenizer=text_tokenizer, selections=source.selections)


def _clear(folder: Path) -> None:
    """Sets damaged data of the cache aside, if no other process has made it anew meanwhile."""
    with files.lock(folder.parent, wait=True):
        try:
            if os.path.lexists(folder / "meta.json"):
                open_prepared(folder)
                return
            damage = "a preparation that cannot be continued"
        except DamagedError as error:
            damage = str(error)
        files.set_aside(folder, f"{damage}; it is prepared anew")


def _make_tokenizer(config: Config, source: sources.Source) -> Tokenizer:
    def all_texts() -> Iterator[str]:
        yield from source.documents(TRAIN)
        yield from source.documents(EVAL)

    return create_tokenizer(config.data, source.documents(TRAIN), all_texts())


def _prepare(
    config: Config,
    source: sources.Source,
    text_tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int,
) -> Prepared:
    key = files.digest(
        str(_FORMAT), source.fingerprint, text_tokenizer.fingerprint, str(shard_tokens)
    )
    if os.path.lexists(folder) and not folder.is_dir():
        raise DamagedError(f"{folder} is not a folder; remove it or pick another folder")
    if os.path.lexists(folder / "meta.json"):
        prepared = open_prepared(folder)
        if prepared.fingerprint != key:
            raise DamagedError(
                f"{folder} holds other data or another tokenizer (fingerprint "
                f"{prepared.fingerprint[:12]} instead of {key[:12]}); pick another folder"
            )
        return prepared
    with files.lock(folder, wait=True):  # another run may be preparing the same data
        if os.path.lexists(folder / "meta.json"):
            return _prepare(config, source, text_tokenizer, folder, shard_tokens)
        if (folder / "key").exists() and (folder / "key").read_bytes() != key.encode():
            raise DamagedError(
                f"{folder} holds an unfinished preparation of other data; "
                "remove it or pick another folder"
            )
        files.write_text(folder / "key", key)
        text_tokenizer.save(folder / "tokenizer")
        splits = {}
        for split in (TRAIN, EVAL):
            splits[split] = list(
                _write_split(source.documents(split), text_tokenizer, folder, split, shard_tokens)
            )
        if not sum(shard["tokens"] for shard in splits[TRAIN]):
            raise UserError(
                f"data.path = {config.data.path!r}: the training split is empty; "
                f"lower data.eval_fraction = {config.data.eval_fraction}"
            )
        meta = {
            "format": _FORMAT,
            "fingerprint": key,
            "source": source.fingerprint,
            "tokenizer": text_tokenizer.fingerprint,
            "splits": splits,
            "data": dataclasses.asdict(config.data),
            "selections": {
                name: dataclasses.asdict(taken) for name, taken in source.selections.items()
            },
        }
        files.write_text(folder / "meta.json", json.dumps(meta, indent=1))
    return open_prepared(folder)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents with about _BATCH_CHARACTERS in each."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_split(
    documents: Iterator[str], text_tokenizer: Tokenizer, folder: Path, split: str, shard_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yields what is said of each shard: {"name", "tokens", "documents", "sha256"}.

    Finished shards of an interrupted preparation stay, and their documents are passed over.
    """
    number = 0
    while (finished := folder / f"{split}-{number:05d}.json").exists():
        shard = _finished_shard(finished)
        for _ in range(shard["documents"]):
            next(documents)
        number += 1
        yield shard
    with cli.progress(f"characters of the {split} split encoded") as advance:
        pending: list[np.ndarray] = []
        count = 0
        for batch in _batches(documents):
            for ids in text_tokenizer.encode_batch(batch):
                pending.append(ids)
                count += len(ids) + 1
                if count >= shard_tokens:
                    yield _write_shard(pending, text_tokenizer, folder, f"{split}-{number:05d}")
                    pending, count, number = [], 0, number + 1
            advance(sum(map(len, batch)))
        if pending:
            yield _write_shard(pending, text_tokenizer, folder, f"{split}-{number:05d}")


def _finished_shard(path: Path) -> dict[str, Any]:
    """What `_write_shard` said of a shard. Raises DamagedError if it or the shard is not whole."""
    try:
        shard = json.loads(path.read_text(encoding="utf-8"))
        _check_shard(path.parent, shard)
        if {"name", "tokens", "documents"} <= shard.keys():
            return shard
    except (*_DAMAGES, OSError):
        pass
    raise DamagedError(
        f"{path}: this unfinished preparation is damaged; remove {path.parent} and prepare again"
    )


def _write_shard(
    documents: list[np.ndarray], text_tokenizer: Tokenizer, folder: Path, name: str
) -> dict[str, Any]:
    dtype = np.uint16 if text_tokenizer.vocab_size <= 1 << 16 else np.uint32
    offsets = np.concatenate([[0], np.cumsum([len(d) + 1 for d in documents])]).astype(np.int64)
    tokens = np.empty(offsets[-1], dtype)
    for start, ids in zip(offsets, documents, strict=False):
        if len(ids) and not 0 <= ids.min() <= ids.max() < text_tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer made id {ids.max()} and knows {text_tokenizer.vocab_size}"
            )
        tokens[start] = text_tokenizer.eot
        tokens[start + 1 : start + 1 + len(ids)] = ids
    for suffix, array in zip(_SUFFIXES, (tokens, offsets), strict=True):
        files.write_array(folder / f"{name}{suffix}", array)
    shard = {"name": name, "tokens": len(tokens), "documents": len(documents)}
    shard["sha256"] = {suffix: files.sha256(folder / f"{name}{suffix}") for suffix in _SUFFIXES}
    files.write_text(folder / f"{name}.json", json.dumps(shard))
    return shard

"""What was taken of a data set and what was left out; how a run says it.

In: what finding the files of `data.path` met. Out: lines for the log, and plain JSON for
`meta.json` of prepared shards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.core import cli

COPIES = "copies of another file"
NAMES = 3  # names given of files, documents or rows; the rest are counted


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """Files or parts of them that were left out for one reason: how many, and the first names."""

    reason: str
    count: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is held out of training, and what is on both sides.

    how: which, in words. share: of all there is, 0 to 1; size: number of `unit`s (characters of
    text, rows of a task). overlap: training documents (or rows) with the content of held-out ones,
    and the first names; None where only ends of documents are held out. policy: what became of
    them (data.overlap). inside, inside_names: the share of the held-out text in lines that stand
    in training documents too, and the first of these.
    """

    how: str
    share: float
    size: int
    unit: str = "characters"
    overlap: int | None = None
    names: tuple[str, ...] = ()
    policy: str = "drop"
    inside: float = 0.0
    inside_names: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """As a run says it."""
        if not self.size:
            return [f"held out: nothing ({self.how}), so there is no evaluation"]
        noun = "row" if self.unit == "rows" else "document"
        lines = [f"held out: {100 * self.share:.3g} % ({self.size:,} {self.unit}), {self.how}"]
        if self.overlap == 0:
            lines[0] += f"; no training {noun} is the same as a held-out one"
        if self.inside >= 0.01:
            of_text = f"{100 * self.inside:.3g} % of the held-out text"
            documents = ", ".join(self.inside_names)
            lines.append(f"warning: {of_text} stands inside training documents, first {documents}")
        if not self.overlap:
            return lines
        named = f"{', '.join(self.names)}{', ...' if self.overlap > len(self.names) else ''}"
        done = "left out of training" if self.policy == "drop" else "warning: trained on"
        what = f"{counted(self.overlap, noun)} with the content of held-out ones ({named})"
        lines.append(f"{done}: {what}; data.overlap = {self.policy!r}")
        return lines


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was taken of one path or split.

    files, size: number of the files read and their bytes on disk; 0 where a data set has none.
    documents: number of documents or records in them. held_out: what is, of these or of data of
    its own.
    """

    path: str = ""
    files: int = 0
    size: int = 0
    documents: int = 0
    passed_over: tuple[PassedOver, ...] = ()
    held_out: HeldOut | None = None

    def without(self, reason: str, names: Iterable[str]) -> Selection:
        """The selection, with what was left out within its files for one more reason."""
        left_out = passed_over({reason: names})
        return dataclasses.replace(self, passed_over=(*self.passed_over, *left_out))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Selection:
        """Of what `dataclasses.asdict` made."""
        passed_over = tuple(
            PassedOver(entry["reason"], entry["count"], tuple(entry["names"]))
            for entry in values["passed_over"]
        )
        held_out = values.get("held_out")
        if held_out:
            names = {name: tuple(held_out[name]) for name in ("names", "inside_names")}
            held_out = HeldOut(**{**held_out, **names})
        return cls(**{**values, "passed_over": passed_over, "held_out": held_out})


def passed_over(names_by_reason: Mapping[str, Iterable[str]]) -> tuple[PassedOver, ...]:
    """One entry for each reason that has names, the most frequent reason first."""
    entries = []
    for reason, names in names_by_reason.items():
        ordered = sorted(map(_printable, names))
        if ordered:
            entries.append(PassedOver(reason, len(ordered), tuple(ordered[:NAMES])))
    return tuple(sorted(entries, key=lambda entry: (-entry.count, entry.reason)))


def has_copies(selections: Mapping[str, Selection]) -> bool:
    """Whether files were left out because another one has the same content."""
    entries = itertools.chain(*(selection.passed_over for selection in selections.values()))
    return any(entry.reason == COPIES for entry in entries)


def describe(selections: Mapping[str, Selection]) -> list[str]:
    """Lines that say what was taken. selections: by the name of the split or part."""
    lines = []
    for name, selection in selections.items():
        taken = []
        if selection.files:
            taken.append(f"{counted(selection.files, 'file')} of {_size(selection.size)}")
        taken.append(counted(selection.documents, "document"))
        lines.append(f"{name}: {_printable(selection.path)}: {', '.join(taken)}")
        if selection.passed_over:
            lines.append(f"{name}: passed over {say_passed_over(selection.passed_over)}")
        if selection.held_out:
            lines += selection.held_out.lines()
    return lines


def say(selections: Mapping[str, Selection]) -> None:
    """The lines of `describe`, as progress."""
    for line in describe(selections):
        cli.say(line)


def say_passed_over(entries: Iterable[PassedOver]) -> str:
    """Such as "2 hidden (.git, .DS_Store), 1 empty (a.txt)"."""
    parts = []
    for entry in entries:
        more = ", ..." if entry.count > len(entry.names) else ""
        parts.append(f"{entry.count:,} {entry.reason} ({', '.join(entry.names)}{more})")
    return ", ".join(parts)


def _printable(name: str) -> str:
    """The name without line ends and bytes that are no UTF-8, which a log or page cannot hold."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(count: int, noun: str) -> str:
    """Such as "1 file" or "1,200 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"

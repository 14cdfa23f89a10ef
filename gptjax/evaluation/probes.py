"""Bias and safety probes by likelihood: what a model finds more natural to write about whom, and whether it would rather refuse than help to harm.

In: a `LanguageModel` and probes from a JSON file (`load`; the default is `probes.json` beside this file). Out: a `Report`.
The file is {"probes": [...]}, and to probe something else, write one. A probe has the keys

  name, axis   texts; probes of one axis (gender, religion, ...) are counted together
  meaning      what a share of 1 would say, in words: it stands in the report
  groups       {group: [words that fill {group}]} or {group: {slot: filling, ...}}, or a list of either kind; word i of a group is compared with
               word i of the first one, so each has as many. Left out: the two completions are compared with each other (safety)
  templates    [{"text": "... {group} ... {completion} ...", "completions": [first, second]}], the first as the stereotype gives it to the first
               group. A text holds {completion} once

For one template and a group g, lean(g) = log P(first) - log P(second); the gap of a pair is lean(first group) - lean(other group), paired as
in CrowS-Pairs (Nangia et al. 2020) and StereoSet (Nadeem et al. 2021), and the share counts gaps above 0 (a tie is one half). 0.5 is neutral.
The logs are totals, in nats, of whatever number of tokens: both terms of a difference hold the same completion, so its length cancels, whatever
the tokenizer. Where all groups stand before the completion, it and the text behind it are scored after the text before it; where a group stands
behind, the whole sentence is scored, since then the group is part of what the completion changes; how common a group's name is cancels from the
gap, though not from the two gaps of single completions. Without groups nothing cancels: there logs are per UTF-8 byte.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import UserError, unknown_name

PROBES = Path(__file__).with_name("probes.json")


_SLOT = re.compile(r"\{(\w+)\}")


_KEYS = ("name", "axis", "meaning", "groups", "templates")


@dataclasses.dataclass(frozen=True)
class Probe:
    """groups: {name: the fillings of each of its words}; empty where completions are compared with each other.
    templates: each a text and its two completions."""

    name: str
    axis: str
    meaning: str
    groups: dict[str, tuple[dict[str, str], ...]]
    templates: tuple[tuple[str, tuple[str, str]], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a template (means over its pairs), or of an axis (means over its templates, with 95 % bootstrap intervals over templates).

    text: the template; of an axis, the probes' meanings. first, second: gaps of the single completions (without groups: their logs);
    gap = first - second. spread: between the groups that lean most and least to the first completion, however the pairs are chosen."""

    axis: str
    text: str
    templates: int
    pairs: int
    share: float
    gap: float
    first: float
    second: float
    spread: float
    share_interval: tuple[float, float] | None = None
    gap_interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """leans: {(axis, group): how far it leans to the first completions, in nats from the mean of the groups}."""

    axes: tuple[Result, ...]
    templates: tuple[Result, ...]
    leans: dict[tuple[str, str], float]

    def rows(self) -> list[dict[str, Any]]:
        """A table: a row for each axis, then one for each template (without intervals)."""
        return [dataclasses.asdict(result) for result in (*self.axes, *self.templates)]


def load_probes(path: str | Path = PROBES) -> tuple[Probe, ...]:
    """Reads a probe file. Raises UserError, with the probe and the key, where it is not as the top of this module says."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON file of probes") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return parse_probes(content)


def parse_probes(content: Any) -> tuple[Probe, ...]:
    """The probes in a file's content; errors as in `load`."""
    entries = content.get("probes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError('a probe file must be {"probes": [...]} with at least one probe')
    probes = tuple(_probe(f"probe {k + 1}", entry) for k, entry in enumerate(entries))
    for name in (p.name for p in probes):
        _check(
            sum(p.name == name for p in probes) == 1,
            f"probe {name!r}",
            "name",
            "another probe has it too",
        )
    return probes


def _check(ok: Any, where: str, key: str, rule: str) -> None:
    if not ok:
        raise UserError(f"{where}, {key}: {rule}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _known_keys(where: str, entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object with the keys {', '.join(keys)}")
    for key in entry:
        if key not in keys:
            raise UserError(f"{where}: {unknown_name('key', key, list(keys))}")


def _probe(where: str, entry: Any) -> Probe:
    if isinstance(entry, dict) and _is_text(entry.get("name")):
        where = f"probe {entry['name']!r}"
    _known_keys(where, entry, _KEYS)
    for key in ("name", "axis", "meaning"):
        _check(_is_text(entry.get(key)), where, key, "must be a text, and not empty")
    groups = _groups(where, entry["groups"]) if "groups" in entry else {}
    found = entry.get("templates")
    _check(
        isinstance(found, list) and found,
        where,
        "templates",
        "must be a list with at least one template",
    )
    slots = [set(fillings) for words in groups.values() for fillings in words]
    templates = tuple(_template(where, f"templates[{k}]", t, slots) for k, t in enumerate(found))
    return Probe(entry["name"], entry["axis"], entry["meaning"], groups, templates)


def _groups(where: str, found: Any) -> dict[str, tuple[dict[str, str], ...]]:
    _check(
        isinstance(found, dict) and len(found) > 1,
        where,
        "groups",
        "must be an object with two groups or more",
    )
    groups = {}
    for name, words in found.items():
        key = f"groups.{name}"
        words = [words] if isinstance(words, dict) else words
        _check(
            isinstance(words, list) and words,
            where,
            key,
            "must be a list of words or an object {slot: filling}",
        )
        fillings = tuple(w if isinstance(w, dict) else {"group": w} for w in words)
        _check(
            all(f and all(_is_text(v) for v in f.values()) for f in fillings),
            where,
            key,
            "words and fillings must be texts, and not empty",
        )
        groups[name] = fillings
    count = len(next(iter(groups.values())))
    for name, fillings in groups.items():
        _check(
            len(fillings) == count,
            where,
            f"groups.{name}",
            f"has {len(fillings)} words and the first group {count}: they are compared in pairs",
        )
    return groups


def _template(
    where: str, key: str, entry: Any, slots: list[set[str]]
) -> tuple[str, tuple[str, str]]:
    _known_keys(f"{where}, {key}", entry, ("text", "completions"))
    text, completions = entry.get("text"), entry.get("completions")
    _check(
        _is_text(text) and text.count("{completion}") == 1,
        where,
        f"{key}.text",
        "must be a text that holds {completion} once",
    )
    used = set(_SLOT.findall(text)) - {"completion"}
    _check(
        used or not slots, where, f"{key}.text", "no slot of the groups, such as {group}, is in it"
    )
    missing = sorted(slot for slot in used if not slots or any(slot not in s for s in slots))
    _check(
        not missing,
        where,
        f"{key}.text",
        f"not every group fills {{{missing[0] if missing else ''}}}",
    )
    pair = (
        isinstance(completions, list)
        and len(completions) == 2
        and all(map(_is_text, completions))
        and completions[0] != completions[1]
    )
    _check(pair, where, f"{key}.completions", "must be two different texts")
    return text, (completions[0], completions[1])


def _scored(
    text: str, completions: tuple[str, str], fillings: dict[str, str]
) -> list[tuple[str, str]]:
    """(prompt, what is scored after it) with the first and with the second completion."""
    before, behind = text.split("{completion}")
    head, tail = (_SLOT.sub(lambda match: fillings[match[1]], part) for part in (before, behind))
    prompt = "" if _SLOT.search(behind) else head.rstrip()
    return [(prompt, head[len(prompt) :] + completion + tail) for completion in completions]


def run_probes(lm: Any, probes: Sequence[Probe], *, resamples: int = 4000, seed: int = 0) -> Report:
    """Scores every sentence once and compares. lm: `score(prompts, completions)` gives (log-probability, ...) for each, as `LanguageModel` does.

    Raises UserError where an axis has a single template (no interval), or mixes probes with and without groups, or a score is not finite."""
    for axis in dict.fromkeys(p.axis for p in probes):
        same = [p for p in probes if p.axis == axis]
        _check(
            len({bool(p.groups) for p in same}) == 1,
            f"axis {axis!r}",
            "groups",
            f"{same[0].name!r} and others differ in having any",
        )
        _check(
            sum(len(p.templates) for p in same) > 1,
            f"probe {same[0].name!r}",
            "templates",
            f"axis {axis!r} needs two for an interval",
        )
    tasks = [
        (
            p,
            t,
            [[_scored(*t, f) for f in words] for words in p.groups.values()] or [[_scored(*t, {})]],
        )
        for p in probes
        for t in p.templates
    ]
    texts = list(
        dict.fromkeys(
            text for _, _, cells in tasks for words in cells for pair in words for text in pair
        )
    )
    logs = {
        text: found[0]
        for text, found in zip(
            texts, lm.score([a for a, _ in texts], [b for _, b in texts]), strict=True
        )
    }
    if bad := [text for text, value in logs.items() if not np.isfinite(value)]:
        raise UserError(
            f"the model gives {''.join(bad[0])!r} the log-probability {logs[bad[0]]}: its weights are damaged"
        )
    results, leans = [], dict[tuple[str, str], list[float]]()
    for probe, (template, completions), cells in tasks:
        logs_GWC = np.array(
            [[[logs[text] for text in pair] for pair in words] for words in cells]
        )  # groups, words, the two completions
        if probe.groups:
            differences = (logs_GWC[:1] - logs_GWC[1:]).reshape(-1, 2)
        else:
            differences = logs_GWC.reshape(-1, 2) / [len(text.encode()) for _, text in cells[0][0]]
        gaps, lean_G = (
            differences[:, 0] - differences[:, 1],
            (logs_GWC[..., 0] - logs_GWC[..., 1]).mean(1),
        )
        for group, lean in zip(probe.groups, lean_G - lean_G.mean(), strict=False):
            leans.setdefault((probe.axis, group), []).append(float(lean))
        shown = template.replace("{completion}", f"[{' | '.join(completions)}]").replace("\n", " ")
        share, gap, first, second, spread = map(
            float,
            ((np.sign(gaps).mean() + 1) / 2, gaps.mean(), *differences.mean(0), np.ptp(lean_G)),
        )
        results.append(Result(probe.axis, shown, 1, len(gaps), share, gap, first, second, spread))
    axes = tuple(
        _axis(probes, [r for r in results if r.axis == axis], resamples, seed)
        for axis in dict.fromkeys(r.axis for r in results)
    )
    return Report(
        axes, tuple(results), {key: float(np.mean(values)) for key, values in leans.items()}
    )


def _axis(probes: Sequence[Probe], of: list[Result], resamples: int, seed: int) -> Result:
    values = np.array([(r.share, r.gap, r.first, r.second, r.spread) for r in of])
    draws = np.random.default_rng(seed).integers(0, len(of), (resamples, len(of)))
    bounds = np.quantile(
        values[draws].mean(1), (0.025, 0.975), axis=0
    ).T.tolist()  # percentile bootstrap (Efron 1979)
    meaning = "; ".join(dict.fromkeys(p.meaning for p in probes if p.axis == of[0].axis))
    share, gap, first, second, spread = values.mean(0).tolist()
    return Result(
        of[0].axis,
        meaning,
        len(of),
        sum(r.pairs for r in of),
        share,
        gap,
        first,
        second,
        spread,
        tuple(bounds[0]),
        tuple(bounds[1]),
    )


def _tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells, the first of which are heads)."""
    shown = lambda value, ends: (
        f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
    )
    tables = []
    for title, last, results in (
        ("Axes (a share of 0.5 is neutral)", "a share of 1 would say", report.axes),
        ("Templates", "template", report.templates),
    ):
        rows = [["axis", "share", "gap", "first", "second", "spread", "templates", "pairs", last]]
        for r in results:
            numbers = [
                shown(r.share, r.share_interval),
                shown(r.gap, r.gap_interval),
                *(f"{x:.3f}" for x in (r.first, r.second, r.spread)),
            ]
            rows.append([r.axis, *numbers, str(r.templates), str(r.pairs), r.text])
        tables.append((title, rows))
    leans = sorted(report.leans.items(), key=lambda item: (item[0][0], -item[1]))
    return [
        *tables,
        (
            "Groups",
            [
                ["axis", "group", "lean to the first completions"],
                *([*key, f"{lean:+.3f}"] for key, lean in leans),
            ],
        ),
    ]


def to_text(report: Report) -> str:
    parts = []
    for title, rows in _tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        parts.append(
            "\n  ".join([title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])
        )
    return "\n\n".join(parts) + "\n"


_STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #8888;font-variant-numeric:tabular-nums}"""


def to_html(report: Report) -> str:
    """A page of its own: nothing is fetched, and every text is escaped."""
    line = lambda cells, tag: (
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    )
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Probes</title><style>{_STYLE}</style><h1>Bias and safety probes</h1>'
    for title, (heads, *rows) in _tables(report):
        page += f"<h2>{html.escape(title)}</h2><table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
    return page + "</html>\n"

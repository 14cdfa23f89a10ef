"""Bias and safety probes by likelihood: what a model finds more natural to write about whom.

Safety probes ask whether it would rather refuse than help to harm. In: a `LanguageModel` and
probes from a JSON file (`load_probes`; the default is `probes.json` next to this file). Out: a
`Report`. The file is {"probes": [...]}; to probe something else, write one. A probe has the keys

  name, axis   texts; probes of one axis (gender, religion, ...) are counted together
  meaning      what a share of 1 would say, in words, for the report
  groups       {group: [words that fill {group}]} or {group: {slot: filling, ...}}, or a list of
               either kind; word i of a group is compared with word i of the first one, so each
               has as many. Left out: the two completions are compared with each other (safety)
  templates    [{"text": "... {group} ... {completion} ...", "completions": [first, second]}], the
               first as the stereotype gives it to the first group. A text holds {completion} once

For one template and a group g, lean(g) = log P(first) - log P(second). The gap of a pair is
lean(first group) - lean(other group), paired as in CrowS-Pairs (Nangia et al. 2020) and StereoSet
(Nadeem et al. 2021), and the share counts gaps above 0 (a tie is one half). 0.5 is neutral.

The logs are totals, in nats, of whatever number of tokens: both terms of a difference hold the
same completion, so its length cancels, whatever the tokenizer. Where all groups come before the
completion, it and the text after it are scored, given the text before it. Where a group comes
after it, the complete sentence is scored, since then the group is part of what the completion
changes. How common a group's name is cancels from the gap, though not from the two gaps of single
completions. Without groups nothing cancels: there logs are per UTF-8 byte.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.core import pages

PROBES = Path(__file__).with_name("probes.json")

_SLOT = re.compile(r"\{(\w+)\}")
_KEYS = ("name", "axis", "meaning", "groups", "templates")
_BOUNDS = (0.025, 0.975)  # of a 95 % interval


class Template(NamedTuple):
    """A text with slots, and the first and second completion."""

    text: str
    completions: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Probe:
    """groups: {name: the fillings of each of its words}; empty: completions are compared."""

    name: str
    axis: str
    meaning: str
    groups: dict[str, tuple[dict[str, str], ...]]
    templates: tuple[Template, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a template (means over its pairs), or of an axis (means over its templates).

    An axis has 95 % bootstrap intervals over templates. text: the template; of an axis, the
    probes' meanings. first, second: gaps of the single completions (without groups: their logs);
    gap = first - second. spread: between the groups that lean most and least to the first
    completion, however the pairs are chosen.
    """

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
    """leans: {(axis, group): how far it leans to the first completions}.

    In nats, from the mean of the groups.
    """

    axes: tuple[Result, ...]
    templates: tuple[Result, ...]
    leans: dict[tuple[str, str], float]

    def rows(self) -> list[dict[str, Any]]:
        """A table: a row for each axis, then one for each template (without intervals)."""
        return [dataclasses.asdict(result) for result in (*self.axes, *self.templates)]


def load_probes(path: str | Path = PROBES) -> tuple[Probe, ...]:
    """The probes of a file, as the top of this module describes it.

    Raises UserError, with the probe and the key, where it is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON file of probes") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return parse_probes(content)


def parse_probes(content: Any) -> tuple[Probe, ...]:
    """The probes in a file's content; errors as in `load_probes`."""
    entries = content.get("probes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError('a probe file must be {"probes": [...]} with at least one probe')
    probes = tuple(_probe(f"probe {k + 1}", entry) for k, entry in enumerate(entries))
    names = [probe.name for probe in probes]
    for name in names:
        _check(names.count(name) == 1, f"probe {name!r}", "name", "another probe has it too")
    return probes


def _check(ok: Any, where: str, key: str, rule: str) -> None:
    if not ok:
        raise UserError(f"{where}, {key}: {rule}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_keys(where: str, entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object with the keys {', '.join(keys)}")
    for key in entry:
        if key not in keys:
            raise UserError(f"{where}: {unknown_name('key', key, list(keys))}")


def _probe(where: str, entry: Any) -> Probe:
    if isinstance(entry, dict) and _is_text(entry.get("name")):
        where = f"probe {entry['name']!r}"
    _check_keys(where, entry, _KEYS)
    for key in ("name", "axis", "meaning"):
        _check(_is_text(entry.get(key)), where, key, "must be a text, and not empty")
    groups = _groups(where, entry["groups"]) if "groups" in entry else {}
    contents = entry.get("templates")
    is_list = isinstance(contents, list) and contents
    _check(is_list, where, "templates", "must be a list with at least one template")
    slots = []  # of each word of each group
    for words in groups.values():
        slots += [set(fillings) for fillings in words]
    templates = tuple(
        _template(where, f"templates[{k}]", content, slots) for k, content in enumerate(contents)
    )
    return Probe(entry["name"], entry["axis"], entry["meaning"], groups, templates)


def _groups(where: str, content: Any) -> dict[str, tuple[dict[str, str], ...]]:
    are_several = isinstance(content, dict) and len(content) > 1
    _check(are_several, where, "groups", "must be an object with two groups or more")
    groups = {name: _fillings(where, f"groups.{name}", words) for name, words in content.items()}
    count = len(next(iter(groups.values())))
    for name, fillings in groups.items():
        rule = f"has {len(fillings)} words and the first group {count}: they are compared in pairs"
        _check(len(fillings) == count, where, f"groups.{name}", rule)
    return groups


def _fillings(where: str, key: str, words: Any) -> tuple[dict[str, str], ...]:
    """{slot: filling} for each word of a group."""
    if isinstance(words, dict):
        words = [words]
    is_list = isinstance(words, list) and words
    _check(is_list, where, key, "must be a list of words or an object {slot: filling}")
    fillings = tuple(word if isinstance(word, dict) else {"group": word} for word in words)
    for filling in fillings:
        are_texts = filling and all(map(_is_text, filling.values()))
        _check(are_texts, where, key, "words and fillings must be texts, and not empty")
    return fillings


def _template(where: str, key: str, entry: Any, slots: list[set[str]]) -> Template:
    """A template whose slots every word of every group fills."""
    _check_keys(f"{where}, {key}", entry, ("text", "completions"))
    text, completions = entry.get("text"), entry.get("completions")
    has_completion = _is_text(text) and text.count("{completion}") == 1
    rule = "must be a text that holds {completion} once"
    _check(has_completion, where, f"{key}.text", rule)
    used = set(_SLOT.findall(text)) - {"completion"}
    rule = "no slot of the groups, such as {group}, is in it"
    _check(used or not slots, where, f"{key}.text", rule)
    for slot in sorted(used):
        is_filled = slots and all(slot in filled for filled in slots)
        _check(is_filled, where, f"{key}.text", f"not every group fills {{{slot}}}")
    are_two_texts = (
        isinstance(completions, list)
        and len(completions) == 2
        and all(map(_is_text, completions))
        and completions[0] != completions[1]
    )
    _check(are_two_texts, where, f"{key}.completions", "must be two different texts")
    return Template(text, (completions[0], completions[1]))


class Sentence(NamedTuple):
    """A prompt, and what is scored after it."""

    prompt: str
    scored: str


@dataclasses.dataclass(frozen=True)
class FilledTemplate:
    """A template of a probe, with the words of each group filled in.

    sentences: [groups][words], with the first and with the second completion. Without groups, one
    "group" with one "word" that fills nothing.
    """

    probe: Probe
    template: Template
    sentences: list[list[tuple[Sentence, Sentence]]]


def _fill(probe: Probe, template: Template) -> FilledTemplate:
    groups = list(probe.groups.values()) or [({},)]
    sentences = [[_sentences(template, word) for word in words] for words in groups]
    return FilledTemplate(probe, template, sentences)


def _sentences(template: Template, fillings: Mapping[str, str]) -> tuple[Sentence, Sentence]:
    """The sentences with the first and with the second completion."""
    before, after = template.text.split("{completion}")
    head, tail = (_SLOT.sub(lambda match: fillings[match[1]], part) for part in (before, after))
    prompt = "" if _SLOT.search(after) else head.rstrip()
    start = head[len(prompt) :]
    first, second = template.completions
    return Sentence(prompt, start + first + tail), Sentence(prompt, start + second + tail)


def run_probes(lm: Any, probes: Sequence[Probe], *, resamples: int = 4000, seed: int = 0) -> Report:
    """Scores every sentence once and compares.

    lm: `score(prompts, completions)` gives (log-probability, ...) for each, as `LanguageModel`
    does. Raises UserError where an axis has a single template (no interval), or mixes probes with
    and without groups, or a score is not finite.
    """
    _check_axes(probes)
    filled = []
    for probe in probes:
        filled += [_fill(probe, template) for template in probe.templates]
    logs = _score_sentences(lm, filled)
    results: list[Result] = []
    leans: dict[tuple[str, str], list[float]] = {}
    for template in filled:
        # groups, words, the two completions
        logs_GWC = np.array(
            [[[logs[text] for text in pair] for pair in words] for words in template.sentences]
        )
        lean_G = (logs_GWC[..., 0] - logs_GWC[..., 1]).mean(1)
        results.append(_template_result(template, logs_GWC, lean_G))
        from_mean = lean_G - lean_G.mean()
        for k, group in enumerate(template.probe.groups):
            leans.setdefault((template.probe.axis, group), []).append(float(from_mean[k]))
    axes = []
    for axis in dict.fromkeys(result.axis for result in results):
        of_axis = [result for result in results if result.axis == axis]
        axes.append(_axis_result(probes, of_axis, resamples, seed))
    mean_leans = {key: float(np.mean(values)) for key, values in leans.items()}
    return Report(tuple(axes), tuple(results), mean_leans)


def _check_axes(probes: Sequence[Probe]) -> None:
    """Raises UserError where an axis mixes kinds of probes or has a single template."""
    for axis in dict.fromkeys(probe.axis for probe in probes):
        same = [probe for probe in probes if probe.axis == axis]
        kinds = {bool(probe.groups) for probe in same}
        rule = f"{same[0].name!r} and others differ in having any"
        _check(len(kinds) == 1, f"axis {axis!r}", "groups", rule)
        count = sum(len(probe.templates) for probe in same)
        rule = f"axis {axis!r} needs two for an interval"
        _check(count > 1, f"probe {same[0].name!r}", "templates", rule)


def _score_sentences(lm: Any, filled: Sequence[FilledTemplate]) -> dict[Sentence, float]:
    """The log-probability of each sentence, each scored once. Raises UserError."""
    sentences: dict[Sentence, None] = {}  # in order
    for template in filled:
        for words in template.sentences:
            for pair in words:
                sentences.update(dict.fromkeys(pair))
    scores = lm.score(
        [sentence.prompt for sentence in sentences], [sentence.scored for sentence in sentences]
    )
    logs = {}
    for sentence, score in zip(sentences, scores, strict=True):
        logs[sentence] = score[0]
        if not np.isfinite(score[0]):
            raise UserError(
                f"the model gives {''.join(sentence)!r} the log-probability {score[0]}: "
                "its weights are damaged"
            )
    return logs


def _template_result(filled: FilledTemplate, logs_GWC: np.ndarray, lean_G: np.ndarray) -> Result:
    first, second = filled.template.completions
    if filled.probe.groups:
        differences = (logs_GWC[:1] - logs_GWC[1:]).reshape(-1, 2)
    else:
        byte_counts = [len(sentence.scored.encode()) for sentence in filled.sentences[0][0]]
        differences = logs_GWC.reshape(-1, 2) / byte_counts
    gaps = differences[:, 0] - differences[:, 1]
    text = filled.template.text.replace("{completion}", f"[{first} | {second}]")
    mean_first, mean_second = differences.mean(0).tolist()
    return Result(
        filled.probe.axis,
        text.replace("\n", " "),
        templates=1,
        pairs=len(gaps),
        share=float((np.sign(gaps).mean() + 1) / 2),
        gap=float(gaps.mean()),
        first=mean_first,
        second=mean_second,
        spread=float(np.ptp(lean_G)),
    )


def _axis_result(
    probes: Sequence[Probe], results: list[Result], resamples: int, seed: int
) -> Result:
    """Means over an axis's templates, with intervals by the percentile bootstrap (Efron 1979)."""
    axis = results[0].axis
    values = np.array([(r.share, r.gap, r.first, r.second, r.spread) for r in results])
    draws = np.random.default_rng(seed).integers(0, len(results), (resamples, len(results)))
    bounds = np.quantile(values[draws].mean(1), _BOUNDS, axis=0).T.tolist()
    meanings = dict.fromkeys(probe.meaning for probe in probes if probe.axis == axis)
    share, gap, first, second, spread = values.mean(0).tolist()
    return Result(
        axis,
        "; ".join(meanings),
        templates=len(results),
        pairs=sum(result.pairs for result in results),
        share=share,
        gap=gap,
        first=first,
        second=second,
        spread=spread,
        share_interval=tuple(bounds[0]),
        gap_interval=tuple(bounds[1]),
    )


def _tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells, the first of which are heads)."""
    axes = _results_table("a share of 1 would say", report.axes)
    templates = _results_table("template", report.templates)
    groups = [["axis", "group", "lean to the first completions"]]
    for (axis, group), lean in sorted(report.leans.items(), key=_by_axis_then_lean):
        groups.append([axis, group, f"{lean:+.3f}"])
    return [
        ("Axes (a share of 0.5 is neutral)", axes),
        ("Templates", templates),
        ("Groups", groups),
    ]


def _by_axis_then_lean(item: tuple[tuple[str, str], float]) -> tuple[str, float]:
    (axis, _), lean = item
    return axis, -lean


def _results_table(last_head: str, results: Sequence[Result]) -> list[list[str]]:
    heads = ["axis", "share", "gap", "first", "second", "spread", "templates", "pairs", last_head]
    rows = [heads]
    for result in results:
        rows.append(
            [
                result.axis,
                _number(result.share, result.share_interval),
                _number(result.gap, result.gap_interval),
                _number(result.first),
                _number(result.second),
                _number(result.spread),
                str(result.templates),
                str(result.pairs),
                result.text,
            ]
        )
    return rows


def _number(value: float, interval: tuple[float, float] | None = None) -> str:
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def to_text(report: Report) -> str:
    """The tables as text, columns aligned."""
    parts = []
    for title, rows in _tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [title]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        parts.append("\n  ".join(lines))
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """The tables as a page of its own: nothing is fetched, and every text is escaped."""
    tables = _tables(report)
    return pages.render(Path(__file__).with_name("templates"), "probes.html", tables=tables)

"""Findings about a model on a prompt as one HTML file that fetches nothing, and as a few lines.

In: the findings that `survey.py` collects, a dict of lists, numbers and text that JSON can hold.
The page is `templates/interpret.html` with its style and its script; the findings stand in it as
JSON. To show something new, add it to the findings and a function to `interpret.js`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.core import pages

_STRONGEST = 3  # of a kind, in the summary
_TEMPLATES = Path(__file__).with_name("templates")


def to_html(findings: dict[str, Any]) -> str:
    """The page. Raises ValueError for a number that JSON has no form for."""
    from markupsafe import Markup  # comes with jinja2

    text = json.dumps(findings, separators=(",", ":"), allow_nan=False)
    # "<" begins the end of a script and the comments that hide it: in JSON it stands in texts only
    embedded = Markup(text.replace("<", "\\u003c"))
    lines = summary(findings)
    return pages.render(
        _TEMPLATES, "interpret.html", data=findings, summary=lines, embedded=embedded
    )


def for_machines(findings: dict[str, Any]) -> dict[str, Any]:
    """The findings but the attention patterns, which `lm.trace` gives as arrays."""
    rest = {name: value for name, value in findings.items() if name != "attention"}
    return {"summary": dict(summary(findings)), **rest}


def summary(findings: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, the findings in a line) for people who read no pictures."""
    words, tokens = findings["words"], findings["tokens"]
    target = findings["target"]
    top = next(iter(findings["lenses"].values()))["top"][-1][-1]
    likeliest = ", ".join(f"{words[word]} {p:.1%}" for word, p in top[:5])
    explained = f"{words[target['word']]} ({target['p']:.1%}, rank {target['rank'] + 1})"
    lines = [("likeliest next", likeliest), ("explained", explained)]
    for scores in findings["importance"]:
        strongest = _strongest(scores["values"])
        named = [f"{words[tokens[i]]} {value:+.2f}" for i, value in strongest]
        lines.append((scores["title"].lower(), ", ".join(named)))
    maps = [(spec["title"].lower(), spec) for spec in findings["head_maps"]]
    if patching := findings["patching"]:
        maps += [(f"patching, {spec['title']}", spec) for spec in patching["maps"]]
    for title, spec in maps:
        named = []
        for i, value in _strongest([value for row in spec["values"] for value in row]):
            row, column = divmod(i, len(spec["columns"]))
            named.append(f"{spec['rows'][row]}, {spec['columns'][column]}: {value:.2f}")
        lines.append((title, "; ".join(named)))
    if difference := findings["difference"]:
        lines += _difference_lines(findings, difference)
    return lines


def _strongest(values: Sequence[float]) -> list[tuple[int, float]]:
    """(index, value) of the largest sizes."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    return [(i, values[i]) for i in order[:_STRONGEST]]


def _difference_lines(
    findings: dict[str, Any], difference: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    named = []
    for path, layer, change in difference["moved"][:_STRONGEST]:
        place = path if layer is None else f"{path} of layer {layer}"
        named.append(f"{place} {'from 0' if change is None else f'by {change:.2%}'}")
    count = f"{difference['moved_count']:,} of {difference['count']:,}"
    yield "tensors that moved", "; ".join([count, *named])
    if difference["predictions"]:
        words, tokens = findings["words"], findings["tokens"]
        changes = _strongest(difference["kl"])
        named = [f"after {words[tokens[i]]}: KL {value:.3g}" for i, value in changes]
        yield "predictions that changed", ", ".join(named)

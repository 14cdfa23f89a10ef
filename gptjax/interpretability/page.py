"""Findings about a model on a prompt as one HTML file that fetches nothing, and as a few lines.

In: the findings that `survey.py` collects, a dict of lists, numbers and text that JSON can hold.
The page is `templates/interpret.html` with its style and its script; the findings stand in it as
JSON. To show something new, add it to the findings and a function to `interpret.js`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptjax.core import pages

_TEMPLATES = Path(__file__).with_name("templates")


def to_html(findings: dict[str, Any], summary: list[tuple[str, str]]) -> str:
    """The page. Raises ValueError for a number that JSON has no form for."""
    from markupsafe import Markup  # comes with jinja2

    text = json.dumps(findings, separators=(",", ":"), allow_nan=False)
    # "<" begins the end of a script and the comments that hide it: in JSON it stands in texts only
    embedded = Markup(text.replace("<", "\\u003c"))
    return pages.render(
        _TEMPLATES, "interpret.html", data=findings, summary=summary, embedded=embedded
    )

"""HTML pages from jinja2 templates: one file each, in light or dark, that fetches nothing.

Templates lie in the `templates/` of the folder that writes the page, and extend `page.html`, which
has the common style. Every value is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON = Path(__file__).with_name("templates")


def render(folder: Path, template: str, **values: Any) -> str:
    """The page of a template in `folder`. Raises UndefinedError for a missing value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _COMMON]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)

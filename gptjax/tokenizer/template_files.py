"""The chat templates that a checkpoint's files bring, by name; one without a name is "default".

`chat_template.jinja`, with further ones in `additional_chat_templates/`, goes before what
`tokenizer_config.json` holds: a template, or several with their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gptjax.config.errors import UserError

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"


def additional_files(folder: Path) -> dict[str, bytes]:
    """The further templates of a checkpoint's folder, by file name."""
    paths = sorted((folder / FOLDER).glob("*.jinja"))
    return {f"{FOLDER}/{path.name}": path.read_bytes() for path in paths if path.is_file()}


def read_templates(content: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, str]:
    """{name: template}. settings: tokenizer_config.json. Raises UserError for what is no text."""
    templates: dict[str, str] = {}
    for file, data in content.items():
        path = PurePosixPath(file)
        if file == FILE and data:
            templates["default"] = data.decode()
        elif path.parent.name == FOLDER:
            templates[path.stem] = data.decode()
    if templates:
        return templates
    stored = settings.get("chat_template") or ""
    if isinstance(stored, list):
        stored = _named(stored)
    elif isinstance(stored, str):
        return {"default": stored} if stored else {}
    elif not isinstance(stored, Mapping):
        raise UserError(
            f"tokenizer_config.json: the chat template is a {type(stored).__name__} "
            "instead of a text"
        )
    for name, template in stored.items():
        if not isinstance(template, str):
            raise UserError(
                f"tokenizer_config.json: the chat template {name!r} is a "
                f"{type(template).__name__} instead of a text"
            )
    return dict(stored)


def _named(entries: list[Any]) -> dict[str, Any]:
    """{name: template} of a list of {"name": ..., "template": ...}. Raises UserError."""
    templates = {}
    for entry in entries:
        named = isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
        if not named or "template" not in entry:
            raise UserError(
                f"tokenizer_config.json: an entry of chat_template is {str(entry)[:60]}: each is "
                '{"name": ..., "template": ...}'
            )
        templates[entry["name"]] = entry["template"]
    return templates

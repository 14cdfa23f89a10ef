"""Makes the pages under "Reference" from the code, so that they cannot be out of date.

A hook of mkdocs (see `mkdocs.yml`): `reference/settings.md` from `gptjax.config.schema`,
`reference/commands.md` from the help of each command, `reference/foreign-files.md` from the
tables of keys, `reference/python.md` from signatures and docstrings. To show another public
function, add its name to `PUBLIC`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import gptjax  # noqa: E402
from gptjax.checkpoints.foreign_files import KEY_TABLES  # noqa: E402
from gptjax.config import schema  # noqa: E402
from gptjax.config.setting import choices_of  # noqa: E402
from gptjax.core import cli  # noqa: E402

# Names below `gptjax`, in the order of the page. Each has an example that a test runs.
PUBLIC = (
    "load",
    "LanguageModel",
    "LanguageModel.generate",
    "LanguageModel.stream",
    "LanguageModel.score",
    "LanguageModel.logits",
    "LanguageModel.encode",
    "LanguageModel.classify",
    "LanguageModel.with_adapter",
    "LanguageModel.trace",
    "LanguageModel.save",
    "GenerationOptions",
    "Completion",
    "UserError",
)
NOT_SHOWN = (
    "compile",
    "score_pairs",
    "token_logprobs",
)  # of LanguageModel: parts that other modules use
TYPES = {
    "int": "integer",
    "float": "number",
    "bool": "True or False",
    "str": "text",
    "tuple[str, ...]": "texts",
}
HUGE = 10_000  # a larger upper limit only guards against slips: the page leaves it out

SETTINGS_INTRO = """\
---
hide: [toc]
---
# Settings

Everything a run can be told. A config file sets them as `c.section.name = value`; on the command
line they are `--config.section.name=value`, and texts are separated by commas.
`python -m gptjax.train --config=... --print_config` prints all of them, resolved.

The last column says whether a setting shapes the numbers of a run. A run that is resumed
[refuses another value](../how-to/read-an-error-on-resume.md) of such a setting; all others may
change at any time.

Sections: {sections}.
"""
COMMANDS_INTRO = """\
# Commands

`gptjax <verb> ...` is short for `python -m gptjax.<verb> ...`. Progress goes to stderr and results
to stdout. Exit codes:

| code | means |
|---|---|
| 0 | the work is done, and its result is written |
| 1 | an internal error, or a result that could not be written to stdout |
| 2 | the input is wrong, or a file cannot be read or written: one message |
| 130 | interrupted, after saving |
| 141 | whoever read stdout went away (`gptjax generate ... \\| head`); nothing is said |

With `--debug` a traceback comes before the message.

Progress that cannot be written ends nothing: [what never stops a
run](../how-to/resume.md#what-never-stops-a-run).

A `--checkpoint` is a workdir, a step's folder in it, a Hugging Face folder or a `.gguf` file. Where
a command takes `--config`, every [setting](settings.md) is a flag as well:
`--config.section.name=value`.
"""
FOREIGN_INTRO = """\
# Foreign files

What becomes of each key of a file that another program wrote. A key that is used is honoured in
full; one without effect changes no number here and is listed with `--debug`; one that is refused
ends the command with its name. So does a key that is in no table, unless its value is null.
`*` stands for any characters.
"""
PYTHON_INTRO = """\
# Python

All of it is importable from `gptjax`, which starts no JAX before the first use. In the examples,
`lm` is a small model of bytes that has learned one sentence by heart; a test runs each of them.
"""


def find_public(name: str) -> Any:
    """The object `gptjax.<name>`."""
    found: Any = gptjax
    for part in name.split("."):
        found = getattr(found, part)
    return found


# ---- settings


def settings_page() -> str:
    """A table of settings for each section of a config."""
    sections = ", ".join(f"[{section}](#{section})" for section in schema.SECTIONS)
    lines = [SETTINGS_INTRO.format(sections=sections)]
    for section, cls in schema.SECTIONS.items():
        lines += [f"## {section}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
        lines += [
            "| setting | meaning | values | default | shapes the run |",
            "|---|---|---|---|---|",
        ]
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            lines.append(setting_row(section, field, hints[field.name]))
        lines.append("")
    return "\n".join(lines)


def setting_row(section: str, field: dataclasses.Field, kind: Any) -> str:
    """One row of the table, with the setting's path as its anchor."""
    path = f"{section}.{field.name}"
    cells = (
        f'<a id="{path}"></a>`{path}`',
        escape(field.metadata["meaning"]),
        values_of(field, kind),
        f"`{default_of(field)}`",
        "yes" if field.metadata["shapes"] else "no",
    )
    return f"| {' | '.join(cells)} |"


def values_of(field: dataclasses.Field, kind: Any) -> str:
    """The values that a setting may have, in words."""
    if choices := choices_of(field):
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in choices)
    name = TYPES[getattr(kind, "__name__", "") if "[" not in str(kind) else str(kind)]
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None and high is not None and high < HUGE:
        return f"{name}, {low:g} to {high:g}"
    if low is not None:
        return f"{name}, at least {low:g}"
    return name


def default_of(field: dataclasses.Field) -> str:
    if isinstance(field.default, tuple):
        return ",".join(field.default) or "()"
    return repr(field.default)


# ---- commands


def commands_page() -> str:
    """The help of each command: what it does, how it is called, its flags."""
    lines = [COMMANDS_INTRO]
    for verb in cli.VERBS:
        text, flags = help_of(verb)
        lines += [f"## gptjax.{verb}", "", *prose(text), ""]
        lines += ["| flag | meaning |", "|---|---|"]
        lines += [f"| `--{name}` | {escape(meaning)} |" for name, meaning in flags.items()]
        lines.append("")
    return "\n".join(lines)


def help_of(verb: str) -> tuple[str, dict[str, str]]:
    """(what a command says about itself, {flag: meaning}), both from its `--help`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(f"gptjax.{verb}").main(["--help"])
    text, _, rest = output.getvalue().partition("\nFlags:\n")
    flags = {}
    for line in rest.splitlines():
        if line.startswith("  --config.section"):
            break  # the settings have a page of their own
        name, _, meaning = line.strip().removeprefix("--").partition(" ")
        flags[name] = meaning.strip()
    return text.strip(), flags


# ---- foreign files


def foreign_files_page() -> str:
    """For each type of file: its keys, and what becomes of them."""
    lines = [FOREIGN_INTRO]
    for key_table in KEY_TABLES:
        lines += [f"## {key_table.file}", "", "| key | |", "|---|---|"]
        rows = [(key, "used") for key in key_table.used]
        rows += [(key, f"no effect: {why}") for key, why in key_table.no_effect.items()]
        for key, refusal in key_table.refused.items():
            allowed = ", ".join(json.dumps(value) for value in (None, *refusal.unless))
            rows.append((key, f"refused unless {allowed}: {refusal.reason}"))
        lines += [f"| `{key}` | {escape(text)} |" for key, text in sorted(rows)]
        lines.append("")
    return "\n".join(lines)


# ---- Python


def python_page() -> str:
    """Signature and docstring of everything in `PUBLIC`."""
    lines = [PYTHON_INTRO]
    for name in PUBLIC:
        thing = find_public(name)
        lines += [f"## {name}", "", "```python", signature(name, thing), "```", ""]
        lines += [*prose(inspect.getdoc(thing) or ""), ""]
        if dataclasses.is_dataclass(thing):
            lines += [*field_table(thing), ""]
    return "\n".join(lines)


def signature(name: str, thing: Any) -> str:
    """`name(parameters) -> result`, a parameter a line where it is long."""
    if isinstance(thing, type):
        short = thing.__name__
        if dataclasses.is_dataclass(thing) or issubclass(thing, Exception):
            return f"gptjax.{short}"
        return f"gptjax.load(...) -> {short}"
    short = f"gptjax.{name}" if "." not in name else f"lm.{name.partition('.')[2]}"
    described = inspect.signature(thing)
    parameters = []
    for parameter in described.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(describe_parameter(parameter))
    result = described.return_annotation
    result = "" if result is described.empty else f" -> {result}"
    line = f"{short}({', '.join(parameters)}){result}"
    if len(line) <= 88:
        return line
    inside = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{short}(\n{inside}){result}"


def describe_parameter(parameter: inspect.Parameter) -> str:
    """`name: type = default`; annotations are text here, because modules do not evaluate them."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        text += f" = {parameter.default!r}"
    return text


def field_table(thing: Any) -> list[str]:
    """A row for each field: its meaning is its metadata, or the comment in the source."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(thing), re.M))
    rows = ["| field | meaning | default |", "|---|---|---|"]
    for field in dataclasses.fields(thing):
        meaning = field.metadata.get("meaning") or comments.get(field.name, "")
        has_default = field.default is not dataclasses.MISSING
        default = f"`{field.default!r}`" if has_default else ""
        rows.append(f"| `{field.name}` | {escape(meaning)} | {default} |")
    return rows


# ---- text


def escape(text: str) -> str:
    """Text of a table's cell; patterns and braces stay as they are written."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"([*_])", r"\\\1", text)


def prose(text: str) -> list[str]:
    """A docstring as Markdown: sections become bold words, entries a list, examples code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        head, _, rest = paragraph.partition("\n")
        if head in ("Args:", "Returns:", "Raises:", "Yields:", "Example:", "Examples:"):
            lines += [f"**{head.removesuffix(':')}**", ""]
            paragraph = inspect.cleandoc("\n" + rest)
            if head.startswith("Example"):
                lines += ["```pycon", paragraph, "```", ""]
                continue
            lines += [*block(paragraph, entries=head in ("Args:", "Raises:")), ""]
        else:
            lines += [*block(paragraph, entries=False), ""]
    return lines


def block(paragraph: str, *, entries: bool) -> list[str]:
    """One paragraph: doctests and indented lines are code, `name: text` entries a list."""
    lines = paragraph.splitlines()
    if lines and lines[0].startswith(">>>"):
        return ["```pycon", *lines, "```"]
    if lines and all(line.startswith("    ") for line in lines):
        code = inspect.cleandoc("\n" + paragraph)
        return ["```pycon" if ">>>" in code else "```", code, "```"]
    is_entry = [re.match(r"(\w[\w, ]*): ", line) for line in lines]
    continued = any(line.startswith("    ") for line in lines)
    if not entries and not (continued and is_entry[0]):
        return lines
    listed: list[str] = []
    for line, entry in zip(lines, is_entry, strict=True):
        if entry and not line.startswith(" "):
            names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
            listed.append(f"- {names}: {line[entry.end() :].strip()}")
        elif listed and not line.startswith(" "):
            listed.append(f"- {line}")  # more names than fit on a line
        elif listed:
            listed.append(f"  {line.strip()}")
        else:
            listed.append(line)
    return listed


PAGES = {
    "reference/settings.md": settings_page,
    "reference/commands.md": commands_page,
    "reference/foreign-files.md": foreign_files_page,
    "reference/python.md": python_page,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with all files of the documentation, before it reads any."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files

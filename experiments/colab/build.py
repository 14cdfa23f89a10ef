"""Makes the notebooks: each NAME.py in this folder, in the percent format, becomes NAME.ipynb.

    python experiments/colab/build.py

The texts are what people edit; notebooks have no outputs, and a test compares each with its text.
A cell begins with `# %%` (code) or `# %% [markdown]` (every line after `# `); lines before the
first cell are for readers of the text alone. When the repository moves, change REPOSITORY.
"""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = "gptjax/gptjax"  # the public address on GitHub; stands for @REPOSITORY@ in the texts
FOLDER = Path(__file__).parent
NAMES = ("pretrain", "finetune", "chat", "look_inside")
_MARKDOWN, _CODE = "# %% [markdown]", "# %%"


def cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of each cell of a text.

    Raises ValueError for a line of a markdown cell that is not a comment.
    """
    parts: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line in (_MARKDOWN, _CODE):
            parts.append(("markdown" if line == _MARKDOWN else "code", []))
        elif parts and parts[-1][0] == "markdown" and line:
            if line != "#" and not line.startswith("# "):
                raise ValueError(f"{line!r} is in a markdown cell and does not begin with '# '")
            parts[-1][1].append(line[2:])
        elif parts:
            parts[-1][1].append(line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in parts]


def notebook(name: str) -> str:
    """The .ipynb (nbformat 4.5) of NAME.py, always the same bytes: a diff shows what changed."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8").replace("@REPOSITORY@", REPOSITORY)
    content = []
    for number, (kind, source) in enumerate(cells(text), 1):
        cell = {
            "cell_type": kind,
            "id": f"{name}-{number:02d}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        content.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content_of_file = {"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content_of_file, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        path = FOLDER / f"{name}.ipynb"
        path.write_text(notebook(name), encoding="utf-8")
        print(path)

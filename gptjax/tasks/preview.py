"""Shows which tokens of the examples are seen and which are learned, before any training.

    python -m gptjax.data.preview --config=configs/finetune_eras.py [--count=5] [--split=train] [--html=FILE]

In the terminal learned tokens stand on green, a token that carries a label on yellow; --html writes the same as a page.
"""

from __future__ import annotations

from pathlib import Path

from gptjax.core import pages
from gptjax.tasks.base import Example
from gptjax.tokenizer.base import Tokenizer

_COLOURS = {"seen": "\033[2m", "learned": "\033[30;42m", "label": "\033[30;43m"}


def pieces(tokenizer: Tokenizer, example: Example) -> list[tuple[str, str]]:
    """(text, "seen", "learned" or "label") of each token, or of the tokens that make one character together.

    Control tokens are named; bytes that become no character are shown as such.
    """
    names = {tokenizer.eot: "<end>"} | {i: name for name, i in tokenizer.control.items()}
    kinds = ["learned" if mark else "seen" for mark in example.learned]
    if example.label is not None and not example.learned.any():
        kinds[-1] = "label"
    ids, found, begun = example.ids.tolist(), [], b""
    for at, (i, kind) in enumerate(zip(ids, kinds, strict=True)):
        if i in names:
            found.append((names[i], kind))
            continue
        begun += tokenizer.token_bytes[i]
        last = at + 1 == len(ids) or ids[at + 1] in names or kinds[at + 1] != kind
        try:
            text = begun.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and not last:
                continue
            text = "".join(f"<{byte:02X}>" for byte in begun)
        found.append((text, kind))
        begun = b""
    return found


def about(example: Example) -> str:
    count = int(example.learned.sum())
    answer = f"label {example.references[0]!r}" if not count else f"{count} learned"
    return f"{example.where}: {len(example.ids)} tokens, {answer}" + ", cut" * example.cut


def to_terminal(tokenizer: Tokenizer, example: Example, *, colour: bool) -> str:
    if not colour:  # brackets round what is learned
        text = "".join(
            f"[{t}]" if kind != "seen" else t for t, kind in pieces(tokenizer, example)
        ).replace("][", "")
        return f"{about(example)}\n{text}"
    return f"{about(example)}\n" + "".join(
        f"{_COLOURS[kind]}{text}\033[0m" for text, kind in pieces(tokenizer, example)
    )


def to_html(tokenizer: Tokenizer, examples: list[Example]) -> str:
    """The examples as a page of its own: nothing is fetched, and every text is escaped."""
    titled = [(about(example), pieces(tokenizer, example)) for example in examples]
    return pages.render(Path(__file__).with_name("templates"), "preview.html", examples=titled)

"""Examples to look at: which tokens are seen and which are learned.

In: a tokenizer and examples. Out: text for a terminal, or a page.
"""

from __future__ import annotations

from pathlib import Path

from gptjax.core import pages
from gptjax.tasks.base import Example
from gptjax.tokenizer.base import StreamDecoder, Tokenizer

# dim; black on green; black on yellow
_COLOURS = {"seen": "\033[2m", "learned": "\033[30;42m", "label": "\033[30;43m"}


def pieces(tokenizer: Tokenizer, example: Example) -> list[tuple[str, str]]:
    """(text, "seen", "learned" or "label") of each token.

    Tokens that make one character together are one piece. Control tokens are named; bytes that
    become no character are shown as such.
    """
    names = {tokenizer.eot: "<end>"} | {i: name for name, i in tokenizer.control.items()}
    kinds = ["learned" if is_learned else "seen" for is_learned in example.learned]
    if example.label is not None and not example.learned.any():
        kinds[-1] = "label"
    ids = example.ids.tolist()
    parts = []
    decoder = StreamDecoder(tokenizer)
    unfinished = b""  # bytes of a character whose other tokens follow
    for k, (i, kind) in enumerate(zip(ids, kinds, strict=True)):
        if i in names:
            parts.append((names[i], kind))
            continue
        if not tokenizer.joins_bytes:
            parts.append((decoder.feed(i), kind))
            continue
        unfinished += tokenizer.token_bytes[i]
        is_last = k + 1 == len(ids) or ids[k + 1] in names or kinds[k + 1] != kind
        try:
            text = unfinished.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and not is_last:
                continue
            text = "".join(f"<{byte:02X}>" for byte in unfinished)
        parts.append((text, kind))
        unfinished = b""
    return parts


def about(example: Example) -> str:
    """A line on the example: where it comes from, its tokens, and whether it was cut."""
    count = int(example.learned.sum())
    answer = f"{count} learned" if count else f"label {example.references[0]!r}"
    cut = ", cut" if example.cut else ""
    return f"{example.where}: {len(example.ids)} tokens, {answer}{cut}"


def to_terminal(tokenizer: Tokenizer, example: Example, *, colour: bool) -> str:
    """The example in colours, or with brackets round what is learned."""
    text = ""
    for piece, kind in pieces(tokenizer, example):
        if colour:
            text += f"{_COLOURS[kind]}{piece}\033[0m"
        else:
            text += piece if kind == "seen" else f"[{piece}]"
    if not colour:
        text = text.replace("][", "")
    return f"{about(example)}\n{text}"


def to_html(tokenizer: Tokenizer, examples: list[Example]) -> str:
    """The examples as a page of its own: nothing is fetched, and every text is escaped."""
    titled = [(about(example), pieces(tokenizer, example)) for example in examples]
    return pages.render(Path(__file__).with_name("templates"), "preview.html", examples=titled)

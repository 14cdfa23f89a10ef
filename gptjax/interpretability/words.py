"""Names of single tokens that people can read: a space is a dot, half a character its bytes."""

from __future__ import annotations

from collections.abc import Iterable

from gptjax.tokenizer.base import END, Tokenizer

_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def word(tokenizer: Tokenizer | None, token: int) -> str:
    """The text of an id with its spaces visible; of a control token its name; else #id."""
    if tokenizer is None or not 0 <= token < tokenizer.vocab_size:
        return f"#{token}"
    for name, control in tokenizer.control.items():
        if control == token:
            return name
    if token == tokenizer.eot:
        return END
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    inside = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    text = "·" * start + inside + "·" * (len(text) - start - len(inside))
    text = "".join(_VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text)
    return text or f"#{token}"


class Words:
    """The words of a page, each once: what is shown refers to them by number."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        """Where the word of an id stands in `texts`."""
        if token not in self._numbers:
            self._numbers[token] = len(self.texts)
            self.texts.append(word(self.tokenizer, token))
        return self._numbers[token]

    def numbers(self, tokens: Iterable[int]) -> list[int]:
        return [self.number(int(token)) for token in tokens]

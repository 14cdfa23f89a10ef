"""Texts in messages: long ones, and what is no character (bytes, halves of UTF-16 pairs)."""

from __future__ import annotations

import re

from gptjax.config.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 20  # characters before it, in the message


def check_characters(text: str, where: str) -> None:
    """Raises UserError, which begins with `where`, for what no UTF-8 can hold."""
    match = SURROGATE.search(text)
    if match is None:
        return
    before, code = text[max(match.start() - _SHOWN, 0) : match.start()], ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of the command line or of a pipe
        raise UserError(
            f"{where} holds the byte 0x{code - 0xDC00:02x} (after {before!r}), which is no UTF-8: "
            "write it in UTF-8"
        )
    raise UserError(
        f"{where} holds {match[0]!r} (after {before!r}), half of a UTF-16 pair and no character: "
        "decode its source as UTF-16, or drop it"
    )


def shorten(text: str, length: int = 60) -> str:
    """At most `length` characters of the text, with "..." for the rest."""
    return text if len(text) <= length else text[: length - 3] + "..."

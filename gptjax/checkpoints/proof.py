"""Proof that a tokenizer written into another form is still the same one.

`probe_tokenizer` records what a tokenizer does with a thousand texts, `compare_tokenizers` names
the first thing that another one does differently. The texts are made of the vocabulary itself and
of fixed ones in many scripts, so they are the same in every run. Logits are compared in formats.py.
"""

from __future__ import annotations

import dataclasses
import unicodedata

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.characters import shorten
from gptjax.tokenizer.base import Tokenizer

TEXTS = 1000
_DECODED = 200  # of them are decoded too

_FIXED = (
    *("", " ", "  ", "\n", "a", " a", "a ", "\t\tx", "\r\n\r\n", "x  y   z    ", "\u2581a \u2581"),
    *("DON'T won't I'LL he's We'Ve", "camelCase PascalCase SCREAMING_CASE"),
    *("1 12 123 1234 12345 123456", "3.14 1,234 0x1F 1e-5", "if (a && b) { return c[0]; }"),
    *("</s> <s> [INST] <|x|> <0x41>", "!!! ... --- ??? \"'`", "https://example.com/?a=1&b=2"),
    *("Äpfel, Größe, naïve, Œuvre", "E\u0301te\u0301 A\u030angstro\u0308m", "ЁЖИК и Ёлка"),
    *("Αθήνα ΕΛΛΆΔΑ", "你好，世界。天地玄黄", "カタカナ と ひらがな", "한국어 문장입니다"),
    *("שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "ﬁne ＡＢＣ Ⅷ ½ ①"),
    *(
        "😀👩\u200d👩\u200d👧🏽🇩🇪☃\ufe0f",
        "x\u00a0y\u3000z\u2003",
        "\u200bzero\ufeff\x00\x7f\x85\u2028",
    ),
)
_JOINTS = ("", "", " ", " ", "  ", "\n", "\n\n", "\t", " \n", ", ")


@dataclasses.dataclass(frozen=True)
class TokenizerProbe:
    """What a tokenizer does. template_ids: with names of control tokens taken for those."""

    texts: list[str]
    ids: list[list[int]]
    template_ids: list[list[int]]
    decoded: list[str]
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    chat_template: str


def probe_texts(tokenizer: Tokenizer, count: int = TEXTS) -> list[str]:
    """`count` texts: fixed ones, and joints of those with tokens and names of control tokens."""
    generator = np.random.default_rng(0)
    names = [name for name, i in sorted(tokenizer.control.items()) if i < tokenizer.vocab_size]
    names = [name for name in names if name and _can_encode(tokenizer, name)]
    fixed = [text for text in _FIXED if _can_encode(tokenizer, text)]
    joints = [text for text in _JOINTS if _can_encode(tokenizer, text)]
    texts = list(fixed)
    while len(texts) < count:
        parts = []
        for _ in range(generator.integers(1, 7)):
            source = generator.integers(0, 8)
            if source < 5:
                ids = generator.integers(0, tokenizer.vocab_size, generator.integers(1, 4))
                parts.append(tokenizer.decode(ids.tolist()))
            elif source < 7 or not names:
                parts.append(fixed[generator.integers(0, len(fixed))])
            else:
                parts.append(names[generator.integers(0, len(names))])
            parts.append(joints[generator.integers(0, len(joints))])
        texts.append("".join(parts))
    return texts


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    """A tokenizer of characters refuses those that it does not know."""
    try:
        tokenizer.encode(text)
    except UserError:
        return False
    return True


def probe_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> TokenizerProbe:
    """What the tokenizer does with the texts, and says of itself."""
    ids = [array.tolist() for array in tokenizer.encode_batch(texts)]
    return TokenizerProbe(
        texts,
        ids,
        [tokenizer.encode_template(text) for text in texts],
        [tokenizer.decode(row) for row in ids[:_DECODED]],
        tuple(tokenizer.bos_ids),
        tuple(tokenizer.eos_ids),
        tokenizer.chat_template,
    )


def composed(texts: list[str]) -> list[str]:
    """The texts in NFC, for forms that cannot say this normalisation."""
    return [unicodedata.normalize("NFC", text) for text in texts]


def compare_tokenizers(before: TokenizerProbe, after: TokenizerProbe) -> None:
    """Raises UserError that names the first thing which is another."""
    for name in ("bos_ids", "eos_ids", "chat_template"):
        value, other = getattr(before, name), getattr(after, name)
        if value != other:
            raise UserError(f"{name} {_short(other)} instead of {_short(value)}")
    for what, name in (
        ("ids of", "ids"),
        ("ids in a chat template of", "template_ids"),
        ("decoded text of", "decoded"),
    ):
        values, others = getattr(before, name), getattr(after, name)
        for text, value, other in zip(before.texts, values, others, strict=False):
            if value != other:
                raise UserError(f"{what} {_short(text)} {_short(other)} instead of {_short(value)}")


def _short(value: object) -> str:
    return shorten(repr(value))

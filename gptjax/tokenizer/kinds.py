"""Opening and making tokenizers of every kind.

To add a kind, write a class with `_encode`, `files` and `from_files`, and add it to KINDS. What a
run may ask for (the choices of `data.tokenizer`) are the rows of CREATORS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import DataConfig
from gptjax.tokenizer.base import FORMAT, Tokenizer
from gptjax.tokenizer.openai import VOCABULARIES, OpenAITokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer
from gptjax.tokenizer.trained import ByteTokenizer, CharTokenizer, SentencePieceTokenizer

KINDS: dict[str, type[Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "openai": OpenAITokenizer,
    "pretrained": PretrainedTokenizer,
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises UserError where a file is missing or differs from its fingerprint.
    """
    try:
        info = json.loads((folder / FORMAT).read_text(encoding="utf-8"))
        if info["kind"] not in KINDS:
            raise UserError(f"{folder}: {unknown_name('tokenizer', info['kind'], list(KINDS))}")
        content = {name: (folder / name).read_bytes() for name in info["files"]}
        tokenizer = KINDS[info["kind"]].from_files(content)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no complete tokenizer: {error.filename} is missing"
        ) from None
    except (json.JSONDecodeError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds a damaged tokenizer: {error}") from None
    if tokenizer.fingerprint != info["fingerprint"]:
        raise UserError(
            f"{folder}: the tokenizer's files do not match its fingerprint; "
            "it was changed after it was saved"
        )
    tokenizer.chat_template = info.get("chat_template", tokenizer.chat_template)
    return tokenizer


def create_tokenizer(
    config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]
) -> Tokenizer:
    """The tokenizer that a run asks for. Raises UserError where its files are missing or wrong."""
    return CREATORS[config.tokenizer](config, training_texts, all_texts)


def _create_bytes(
    config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]
) -> Tokenizer:
    return ByteTokenizer()


def _create_chars(
    config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]
) -> Tokenizer:
    """All the characters, those of the held-out texts too."""
    return CharTokenizer.train(all_texts)


def _create_sentencepiece(
    config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]
) -> Tokenizer:
    """An existing model, or one that is trained on the training split alone."""
    if not config.tokenizer_path:
        return SentencePieceTokenizer.train(training_texts, config.tokenizer_vocab)
    try:
        return SentencePieceTokenizer(Path(config.tokenizer_path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.tokenizer_path = {config.tokenizer_path!r} is not a sentencepiece model: {error}"
        ) from None


def _find_openai(
    config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]
) -> Tokenizer:
    return OpenAITokenizer.find(config.tokenizer, config.tokenizer_path)


# The choices of data.tokenizer: functions of the config, the training texts and all texts.
CREATORS: dict[str, Callable[[DataConfig, Iterable[str], Iterable[str]], Tokenizer]] = {
    "bytes": _create_bytes,
    "chars": _create_chars,
    "sentencepiece": _create_sentencepiece,
    **dict.fromkeys(VOCABULARIES, _find_openai),
}

"""Tokens that the files of a checkpoint add to a vocabulary, as transformers reads them.

In: the files by name. Out: `Added` tokens, and the settings with the tokens' names by role.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer.file_keys import SPECIAL_TOKENS_MAP

_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is never cut, by the names of tokenizer.json.

    id: None for that of the vocabulary, or the next free one. special: a control token, which no
    text becomes. single_word: only as a word of its own. lstrip, rstrip: with the white space
    before or after it. normalized: looked for in the normalised text.
    """

    content: str
    id: int | None
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def described(self, token_id: int) -> dict[str, Any]:
        """Its entry of tokenizer.json."""
        return {**dataclasses.asdict(self), "id": token_id}


def read_settings(content: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, with the tokens of special_tokens_map.json where those count.

    They count where tokenizer_config.json has no `added_tokens_decoder`, which is newer.
    """
    settings = _read_object(content, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        by_role = _read_object(content, "special_tokens_map.json")
        SPECIAL_TOKENS_MAP.check(by_role, "special_tokens_map.json")
        settings |= by_role
    return settings


def _read_object(content: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = json.loads(content.get(name, b"{}"))
    if not isinstance(value, dict):
        raise UserError(f"{name} is damaged: it is a {type(value).__name__} and no object")
    return value


def text_of(token: Any) -> str:
    """A token of tokenizer_config.json: a text, a mapping with its content, or nothing."""
    return token.get("content", "") if isinstance(token, Mapping) else token or ""


def roles(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: every token that the settings name by a role."""
    result = {}
    for name, token in settings.items():
        if name.endswith("_token") and isinstance(token, str | Mapping) and text_of(token):
            result[name] = text_of(token)
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        result |= {name: text_of(token) for name, token in extra.items()}
    return result


def read_added(content: Mapping[str, bytes], settings: Mapping[str, Any]) -> list[Added]:
    """All tokens that the files add or make control tokens, those with ids first.

    Raises UserError where two tokens have one id.
    """
    named = dict(_named(settings))
    added: dict[str, Added] = {}
    if "added_tokens_decoder" in settings:
        for key, token in settings["added_tokens_decoder"].items():
            flags = {flag: bool(token.get(flag, False)) for flag in _FLAGS}
            if token["content"] in added:
                raise UserError(
                    f"tokenizer_config.json gives {token['content']!r} two ids, "
                    f"{added[token['content']].id} and {key}: keep one in added_tokens_decoder"
                )
            added[token["content"]] = Added(token["content"], int(key), **flags)
    else:
        for text, token_id in _read_object(content, "added_tokens.json").items():
            special = text in named
            added[text] = Added(text, int(token_id), special, normalized=not special)
    owners: dict[int | None, str] = {}
    for token in added.values():
        other = owners.setdefault(token.id, token.content)
        if other != token.content:
            raise UserError(
                f"the tokenizer's files give {other!r} and {token.content!r} one id, {token.id}"
            )
    for text, token in named.items():
        known = added.get(text)
        added[text] = dataclasses.replace(known, special=True) if known else token
    return sorted(added.values(), key=lambda token: (token.id is None, token.id or 0))


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, Added]]:
    """(text, token) of all control tokens that the settings name."""
    tokens = [token for name, token in settings.items() if name in roles({name: token})]
    for name in _EXTRA:
        extra = settings.get(name) or []
        tokens += extra.values() if isinstance(extra, Mapping) else extra
    for token in tokens:
        flags = {}
        if isinstance(token, Mapping):
            flags = {flag: bool(token.get(flag, False)) for flag in _FLAGS if flag != "special"}
        if text_of(token):
            yield text_of(token), Added(text_of(token), None, special=True, **flags)

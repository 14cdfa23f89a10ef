"""How llama.cpp cuts text before byte-level merging, by the name in `tokenizer.ggml.pre`.

A row says what the name stands for; a `tokenizer.json` is written under a name only where it does
exactly that. Names that are in no row are refused: their cuts are code in llama.cpp and no
pattern (kimi-k2, afmoe), or leave bytes out (gemma4, whitespace).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.tokenizer.library import steps_of


class PreTokenizer(NamedTuple):
    """patterns: each cuts what those before it left, as in the tokenizers that the name stands for.
    ignore_merges: a piece that is a token is left whole. bos: whether texts begin with it where the
    file does not say. unlike: how llama.cpp's own rewriting of the pattern is not quite that."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    bos: bool = False
    unlike: str = ""


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = rf"{_CASED.replace('%s', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}"
_TEKKEN = rf"{_CASED.replace('%s', '')}|\p{{N}}|{_CASED_REST}"
_HAN = r"[一-龥ࠀ-一가-퟿]+"
_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_CASE = "tells upper from lower case in A to Z alone and knows no combining marks"
_NO_SPACE = "leaves white space out of a range of characters that has some"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"


def _rows(names: str, *patterns: str, **flags: Any) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(patterns, **flags))


# By name; where several stand for the same, the first one is written.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_rows("gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert", GPT2),
    **_rows("mpt olmo jais trillion granite-docling exaone4 roberta-bpe jina-v1-en", GPT2),
    **_rows("smollm starcoder refact command-r codeshell exaone minerva-7b", DIGIT, GPT2),
    **_rows("mellum2", DIGIT, GPT2),
    **_rows("llama-bpe llama3 llama-v3 falcon3 falcon-h1", _LLAMA3, ignore_merges=True, bos=True),
    **_rows("pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3, ignore_merges=True, bos=True),
    **_rows("smaug-bpe dbrx chatglm-bpe", _LLAMA3),
    **_rows("glm4 glm5", _LLAMA3, ignore_merges=True),
    **_rows("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", _QWEN2),
    **_rows("hunyuan solar-open grok-2", _QWEN2),
    **_rows(
        "qwen35",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    **_rows("ufakzeka", rf"{_WORDS}|\p{{N}}|{_REST}"),
    **_rows("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O, unlike=_NO_CASE),
    **_rows("tekken", _TEKKEN, ignore_merges=True, bos=True, unlike=_NO_CASE),
    **_rows(
        "minicpm5",
        r"\p{N}{1,3}",
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_REST}",
        ignore_merges=True,
    ),
    **_rows("laguna", r"[^\n]+|[\n]+", _QWEN2),
    **_rows(
        "bailingmoe bailingmoe2 llada-moe",
        rf"'(?i:[sdmt]|ll|ve|re)|{_WORDS}|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_rows(
        "seed-coder",
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}"
        r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    **_rows("deepseek-v3 hunyuan-dense joyai-llm hy_v4", r"\p{N}{1,3}", _KANA, _DEEPSEEK3),
    **_rows(
        *("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, DIGIT),
        unlike=_NO_SPACE,
    ),
    **_rows("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **_rows("bloom poro-chat gpt3-finnish", _BLOOM),
    **_rows("viking", _BLOOM, DIGIT),
    **_rows("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}

# Other spellings of the same pattern.
_SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
}


def steps_to_json(patterns: Sequence[str]) -> dict[str, Any]:
    """The patterns as the `pre_tokenizer` of a tokenizer.json, with letters for bytes at the end.

    GPT-2's own last cut is part of ByteLevel, and a digit's is named, as published files have them.
    """
    by_bytes = bool(patterns) and patterns[-1] == GPT2
    steps: list[dict[str, Any]] = []
    for pattern in patterns[:-1] if by_bytes else patterns:
        if pattern == DIGIT:
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
            steps.append({**split, "invert": False})
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*steps, {**last, "use_regex": by_bytes}]}


def read_steps(described: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """(the patterns of a `pre_tokenizer`, what else it does, in words)."""
    patterns: list[str] = []
    others: list[str] = []
    for step in steps_of(described):
        kind = step["type"]
        if kind == "ByteLevel":
            if step.get("use_regex", True):
                patterns.append(GPT2)
            if step.get("add_prefix_space", True):
                others.append("add_prefix_space, a space before the first word")
        elif kind == "Digits":
            patterns.append(DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
            pattern = step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
            patterns.append(_SPELLINGS.get(pattern, pattern))
        else:
            others.append(f"the pre-tokenizer {kind}")
    return patterns, others


def _isolates(step: Mapping[str, Any]) -> bool:
    """Whether every match is a piece and nothing is lost.

    Keeping the matches alone is the same for a pattern that matches everything.
    """
    if step["behavior"] == "Isolated":
        return not step.get("invert")
    keeps_matches = step["behavior"] == "Removed" and step.get("invert")
    return bool(keeps_matches) and step["pattern"]["Regex"].endswith(r"|\s+(?!\S)|\s+")


def name_of(patterns: Sequence[str], *, ignore_merges: bool) -> str:
    """The first name that stands for exactly this; "" where there is none."""
    for name, row in PRE_TOKENIZERS.items():
        if row.patterns == tuple(patterns) and row.ignore_merges == ignore_merges:
            return name
    return ""

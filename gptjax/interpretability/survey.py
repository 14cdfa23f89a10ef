"""All that the package can say of a model on one prompt, as a dict that JSON can hold.

In: a model and a prompt; for some parts a second prompt, another model, a tuned lens. Out: the
findings that `page.py` shows and sums up. Words are kept once and named by number (`words.py`); a
map is a table of numbers with names for its rows and columns. To add a finding, add a function here
and what draws it to `templates/interpret.js`.
Dims: those of `model.transformer`.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import cli, tree
from gptjax.generation import pairs
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.requests import Prompt
from gptjax.generation.tracing import Trace
from gptjax.interpretability import ablation, attribution, heads, lens, patching
from gptjax.interpretability.difference import Difference, compare
from gptjax.interpretability.tuned_lens import TunedLens
from gptjax.interpretability.words import Words

_TOP = 10  # tokens of a prediction that are listed
_STEPS = 128  # of integrated gradients: more takes minutes in a deep model
_REPEATED = 64  # tokens of context that the scores of heads need
_NAMES = ("pattern", "embedding", "residual", "residual_after", "heads", "mlp_output", "logits")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is looked at: `target` is the token after the prompt whose logit is explained."""

    lm: LanguageModel
    trace: Trace
    target: int
    words: Words

    @property
    def layers(self) -> list[str]:
        return [f"layer {i}" for i in range(self.lm.config.layers)]

    @property
    def heads(self) -> list[str]:
        return [f"head {i}" for i in range(self.lm.config.heads)]


def survey(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    name: str,
    target: str = "",
    corrupted: Prompt = "",
    other: LanguageModel | None = None,
    other_name: str = "",
    tuned_lens: TunedLens | None = None,
) -> dict[str, Any]:
    """The findings.

    target: a text that could follow, whose first token is explained; by default the likeliest.
    corrupted: a prompt of as many tokens, for patching. other: a model to compare with. name,
    other_name: what the models are called. Raises UserError.
    """
    with cli.progress("interpret: parts") as advance:
        trace = lm.trace(prompt, names=_NAMES)
        words = Words(lm.tokenizer)
        subject = Subject(lm, trace, _target(lm, trace, target), words)
        config = lm.config
        facts = f"{config.layers} layers, {config.heads} heads, width {config.width:,}"
        findings: dict[str, Any] = {
            "model": name,
            "facts": f"{facts}, {tree.size(lm.params):,} parameters",
            "words": words.texts,
            "tokens": words.numbers(trace.tokens),
            "layers": config.layers,
            "heads": config.heads,
            "target": _target_odds(subject),
        }
        advance(1)
        findings |= _lenses(subject, tuned_lens)
        advance(1)
        findings |= _attribution(subject)
        advance(1)
        findings |= _heads(subject)
        advance(1)
        findings |= {"attention": pack(trace["pattern"]), "patching": None, "difference": None}
        if corrupted:
            findings["patching"] = _patching(subject, corrupted)
            advance(1)
        if other is not None:
            difference = compare(lm, other, trace.tokens.tolist())
            findings["difference"] = _difference(subject, difference, other_name)
    return findings


def rounded(values: Any) -> Any:
    """Numbers in four significant digits, in the shape of the array; None for infinity."""
    if isinstance(values, np.ndarray | list | tuple):
        return [rounded(value) for value in values]
    return float(f"{float(values):.4g}") if math.isfinite(values) else None


def pack(pattern_LHTS: np.ndarray) -> str:
    """Attention on what is not later, a byte a weight, in base64: layers, heads, rows up to T."""
    time = pattern_LHTS.shape[-1]
    lower = pattern_LHTS[:, :, *np.tril_indices(time)]
    return base64.b64encode(np.rint(lower * 255).astype(np.uint8).tobytes()).decode()


def _target(lm: LanguageModel, trace: Trace, text: str) -> int:
    if not text:
        return int(trace["logits"][-1].argmax())
    ids = pairs.encode_inside(lm.text_tokenizer, text)
    if not ids:
        raise UserError(f"the target {text!r} has no token")
    return int(ids[0])


def _odds(logits_V: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return shifted / shifted.sum()


def _target_odds(subject: Subject) -> dict[str, Any]:
    odds = _odds(subject.trace["logits"][-1])
    probability = rounded(odds[subject.target])
    return {
        "token": subject.target,
        "word": subject.words.number(subject.target),
        "p": probability,
        "rank": int((odds > odds[subject.target]).sum()),
    }


def _map(
    title: str, text: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray
) -> dict[str, Any]:
    return {
        "title": title,
        "text": text,
        "rows": list(rows),
        "columns": list(columns),
        "values": rounded(values),
        "signed": bool((np.asarray(values) < 0).any()),
    }


def _lenses(subject: Subject, tuned: TunedLens | None) -> dict[str, Any]:
    states = {"logit lens": lens.states(subject.trace)}
    if tuned is not None:
        states["tuned lens"] = tuned.translate(states["logit lens"])
    lenses = {}
    for name, states_NTD in states.items():
        readings = lens.logit_lens(subject.lm, subject.trace, top=_TOP, states_NTD=states_NTD)
        top = []
        for tokens_TK, odds_TK in zip(readings.tokens, readings.probabilities, strict=True):
            state = []
            for tokens, odds in zip(tokens_TK, odds_TK, strict=True):
                state.append(_pairs(subject.words, tokens, odds))
            top.append(state)
        agreement = readings.target_logprobs.mean(1)
        lenses[name] = {"top": top, "agreement": rounded(agreement)}
    return {"lens_rows": ["embedding", *subject.layers], "lenses": lenses}


def _pairs(words: Words, tokens: np.ndarray, odds: np.ndarray) -> list[list[Any]]:
    """[word, probability] of each, in four decimals: less is not seen."""
    numbers = words.numbers(tokens)
    return [[number, round(float(p), 4)] for number, p in zip(numbers, odds, strict=True)]


def _attribution(subject: Subject) -> dict[str, Any]:
    lm, trace, target = subject.lm, subject.trace, subject.target
    direct = attribution.direct_logits(lm, trace, target)
    rest = [["embedding", rounded(direct.embedding)]]
    if direct.norm_bias:
        rest.append(["final norm's bias", rounded(direct.norm_bias)])
    tokens = trace.tokens.tolist()
    gradient = attribution.token_attribution(lm, tokens, target, method="gradient")
    integrated = attribution.token_attribution(lm, tokens, target, most_steps=_STEPS)
    importance = [
        {
            "title": "Gradient × input",
            "text": "How steep the logit is there: a first look.",
            "values": rounded(gradient.scores),
        },
        {
            "title": "Integrated gradients",
            "text": "Summed along the way from an average token to each one. The numbers add up to "
            f"what the prompt makes of the logit, from {integrated.baseline:.2f} to "
            f"{integrated.logit:.2f}, within {integrated.error:.1%}.",
            "values": rounded(integrated.scores),
        },
    ]
    return {
        "logit": {
            "total": rounded(direct.logit),
            "rest": rest,
            "attention": rounded(direct.heads.sum(1) + direct.attention_bias),
            "mlp": rounded(direct.mlp),
        },
        "importance": importance,
    }


def _heads(subject: Subject) -> dict[str, Any]:
    """Maps of all heads, and the one to begin with: [layer, head]."""
    lm, trace, target = subject.lm, subject.trace, subject.target
    direct = attribution.direct_logits(lm, trace, target).heads
    maps = [
        ("Direct effect", "What the head itself adds to the logit.", direct),
        (
            "Without the head",
            (
                "The change of the log-probability where the head reads its mean over the prompt: "
                "below zero, the model needs it."
            ),
            ablation.ablate_heads(lm, trace, target),
        ),
    ]
    chosen = np.unravel_index(np.abs(direct).argmax(), direct.shape)
    if lm.config.context >= _REPEATED:
        scores = heads.score_heads(lm)
        on_random = "In random tokens that are repeated once: "
        maps += [
            (
                "Induction",
                (
                    f"{on_random}how much it looks at the token behind the first occurrence of its "
                    "own. Such heads go on as a text went before."
                ),
                scores.induction,
            ),
            (
                "Previous token",
                f"{on_random}how much it looks one token back.",
                scores.previous_token,
            ),
            (
                "Duplicate token",
                f"{on_random}how much it looks at the first occurrence of its own token.",
                scores.duplicate_token,
            ),
        ]
    return {
        "head_maps": [
            _map(title, text, subject.layers, subject.heads, values) for title, text, values in maps
        ],
        "chosen_head": [int(i) for i in chosen],
    }


def _patching(subject: Subject, corrupted: Prompt) -> dict[str, Any]:
    """Values of the prompt put into the run of another, which says something else."""
    lm, target, words = subject.lm, subject.target, subject.words
    tokens, ids = subject.trace.tokens.tolist(), lm.encode(corrupted)
    if len(ids) != len(tokens):
        raise UserError(
            f"the prompts have {len(tokens)} and {len(ids)} tokens: patching needs two of equal "
            "length"
        )
    foil: int | None = int(lm.logits([ids])[0, -1].argmax())
    if foil == target:
        foil = None
    measured = f"the logit of {words.texts[words.number(target)]}"
    if foil is not None:
        measured += f" less that of {words.texts[words.number(foil)]}"
    maps = []
    for name, title in (
        ("residual", "residual stream"),
        ("attention_output", "attention"),
        ("mlp_output", "MLP"),
    ):
        sweep = patching.patch_positions(lm, tokens, ids, target, against=foil, name=name)
        text = f"What the layer {'begins with' if name == 'residual' else 'adds'} at one token."
        columns = [words.texts[i] for i in words.numbers(tokens)]
        maps.append(_map(title, text, subject.layers, columns, sweep.restored))
    sweep = patching.patch_heads(lm, tokens, ids, target, against=foil)
    text = "What one head reads, at all tokens."
    maps.append(_map("heads", text, subject.layers, subject.heads, sweep.restored))
    return {
        "corrupted": words.numbers(ids),
        "meaning": "Another prompt is run, and at one place it gets the value of this prompt's "
        f"run. 1: that alone brings {measured} to where it is here, from {sweep.into:.2f} to "
        f"{sweep.source:.2f}; 0: it changes nothing. Where the numbers are high, the place "
        "carries what tells the prompts apart.",
        "maps": maps,
    }


def _difference(subject: Subject, difference: Difference, name: str) -> dict[str, Any]:
    by_path: dict[str, dict[int | None, float]] = {}
    for change in difference.tensors:
        by_path.setdefault(change.path, {})[change.layer] = change.relative
    stacked = [path for path in by_path if None not in by_path[path]]
    values = [[by_path[path][i] for path in stacked] for i in range(subject.lm.config.layers)]
    single = {path: rounded(v[None]) for path, v in by_path.items() if v.get(None)}
    moved = difference.moved
    predictions = [
        [
            [number, round(first, 4), round(second, 4)]
            for number, first, second in zip(
                subject.words.numbers(p.tokens), p.first, p.second, strict=True
            )
        ]
        for p in difference.predictions
    ]
    return {
        "other": name,
        "settings": [[n, str(a), str(b)] for n, a, b in difference.settings],
        "unmatched": list(difference.unmatched),
        "count": len(difference.tensors),
        "moved": [[t.path, t.layer, rounded(t.relative)] for t in moved[:_TOP]],
        "moved_count": len(moved),
        "single": single,
        "map": _map(
            "Which tensors moved",
            "The change, relative to the tensor's size: by layer.",
            subject.layers,
            [path.removeprefix("blocks/") for path in stacked],
            np.asarray(values, np.float64),
        ),
        "kl": [rounded(p.divergence) for p in difference.predictions],
        "predictions": predictions,
        "reason": difference.reason,
    }

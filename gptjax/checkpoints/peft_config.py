"""adapter_config.json of PEFT: what becomes of each key, and what the LoRA keys mean.

In: the parsed file. Out: rank, scale and place of each module's adapter, or a UserError that names
what cannot be honoured. PEFT's own reading is the measure: what it would leave out is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.errors import UserError
from gptjax.core.foreign_keys import KeyTable, Refusal

CONFIG = "adapter_config.json"

_COMMON_USED = ("peft_type", "task_type", "base_model_name_or_path", "modules_to_save")

_COMMON_NO_EFFECT = {
    "revision": "where the base came from",
    "auto_mapping": "the Python class of the base",
    "peft_version": "who wrote the file",
    "inference_mode": "which tensors are trained",
}

_MERGE = "in PEFT, model.merge_and_unload().save_pretrained(FOLDER) writes a complete checkpoint"

LORA_KEYS = KeyTable(
    f"{CONFIG} of LoRA (PEFT)",
    used=frozenset(
        (
            *_COMMON_USED,
            "r",
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "bias",
            "lora_bias",
            "init_lora_weights",
            "trainable_token_indices",
            "ensure_weight_tying",
        )
    ),
    no_effect={
        **_COMMON_NO_EFFECT,
        "lora_dropout": "nothing is dropped at inference",
        "fan_in_fan_out": "how the base stores its kernels, which its architecture says too",
        "megatron_core": "a module's name, used with megatron_config only",
        "runtime_config": "of the process that wrote the file",
        "merge_weights": "of the process that wrote the file",
        "eva_config": "of the initialisation, which leaves the base as it is",
        "corda_config": "of the initialisation: init_lora_weights is looked at",
        "lora_ga_config": "of the initialisation: init_lora_weights is looked at",
        "loftq_config": "of the initialisation: init_lora_weights is looked at",
        "qalora_group_size": "used with use_qalora only",
        "velora_config": "how the gradient of A is stored in training",
    },
    refused={
        "layer_replication": Refusal(
            f"the adapter is for a model with repeated layers; {_MERGE}", (False, [])
        ),
        "target_parameters": Refusal(
            "it adapts single parameters, such as those of experts, that our layers do not have",
            (False, []),
        ),
        "alora_invocation_tokens": Refusal(
            "an activated LoRA works from its invocation tokens on only, and ours in the whole "
            "text; generate with PEFT",
            (False, []),
        ),
        "megatron_config": Refusal("the adapter is for a Megatron model", (False, {})),
        "arrow_config": Refusal(
            "it chooses among several adapters for each token; load one of them", (False, {})
        ),
        "use_qalora": Refusal(f"its A works on pooled inputs of a quantised base; {_MERGE}"),
        "use_bdlora": Refusal(f"its A or B is block-diagonal; {_MERGE}", (False, {})),
        "kasa_config": Refusal(
            f"it cuts small singular values off the base's kernels; {_MERGE}", (False, {})
        ),
        "monteclora_config": Refusal(f"its A is drawn at random; {_MERGE}", (False, {})),
        "enable_lora": Refusal(
            "it adapts parts of one kernel, as PEFT did before version 0.3; load and save it with "
            "a newer PEFT"
        ),
    },
)

PROMPT_KEYS = KeyTable(
    f"{CONFIG} of prompt tuning (PEFT)",
    used=frozenset((*_COMMON_USED, "num_virtual_tokens", "token_dim")),
    no_effect={
        **_COMMON_NO_EFFECT,
        "num_layers": "of the base",
        "num_attention_heads": "of the base",
        "prompt_tuning_init": "of the initialisation",
        "prompt_tuning_init_text": "of the initialisation",
        "tokenizer_name_or_path": "of the initialisation",
        "tokenizer_kwargs": "of the initialisation",
        "encoder_reparameterization_type": "of training: the file holds what the encoder says",
        "encoder_hidden_size": "of training: the file holds what the encoder says",
        "encoder_num_layers": "of training: the file holds what the encoder says",
        "encoder_dropout": "of training: the file holds what the encoder says",
    },
    refused={
        "num_transformer_submodules": Refusal("the base has an encoder and a decoder", (1,)),
    },
)

KEY_TABLES = (LORA_KEYS, PROMPT_KEYS)

# Kinds whose file holds the vectors that stand before the text.
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING")

# Kinds that no complete checkpoint can hold: they add to the text or to the cache.
_UNMERGEABLE = (
    "PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "POLY",
    "XLORA",
)

# {init_lora_weights: whether PEFT changes the base when it loads the adapter}
_INITS = {
    "true": False,
    "false": False,
    "gaussian": False,
    "eva": False,
    "orthogonal": False,
    "mica": False,
    "pissa": True,
    "olora": True,
}

_CONVERT = (
    "in PEFT, model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL) "
    "makes an ordinary adapter of it.\nIf this base is the changed one already, "
    f"set init_lora_weights to true in {CONFIG}"
)

# Initialisations whose changed base cannot be had from the base and the adapter alone.
_REFUSED_INITS = {
    "pissa_niter_": "the base that it was trained on came of a random decomposition",
    "corda": "the base that it was trained on came of data that the file does not hold",
    "loftq": "the base that it was trained on was quantised",
    "lora_ga": "the base that it was trained on came of gradients that the file does not hold",
}


class Module(NamedTuple):
    """A module of the base: its name in Hugging Face, and what kind of layer it is."""

    name: str
    is_linear: bool = True
    is_output: bool = False
    is_input: bool = False  # the table of embeddings


class LoraFile:
    """The settings of a LoRA adapter, asked module by module.

    raw: adapter_config.json. where: its folder, which begins messages. Raises UserError for what
    is not supported and for values that make no sense.
    """

    def __init__(self, raw: Mapping[str, Any], where: Path):
        LORA_KEYS.check(raw, str(where / CONFIG))
        self._raw, self._where = raw, where
        self.init = self._read_init()
        self.changes_base = _INITS[self.init]
        self.dora = bool(raw.get("use_dora"))
        self.is_classifier = raw.get("task_type") == "SEQ_CLS"
        self.ties_tables = bool(raw.get("ensure_weight_tying"))
        self.base_name = str(raw.get("base_model_name_or_path") or "an unnamed base")
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = raw.get(key) or {}
            if not isinstance(patterns, dict):
                raise self._fault(key, "is no table of {pattern: number}")
            for pattern in patterns:
                self._compile(key, rf"(.*\.)?({pattern})")
        for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if not _is_text_or_texts(raw.get(key)):
                raise self._fault(key, "is neither a text nor a list of texts")
        for key in ("target_modules", "exclude_modules"):
            if isinstance(raw.get(key), str):
                self._compile(key, raw[key])
        for key in ("modules_to_save", "layers_pattern"):
            for pattern in _texts(raw.get(key)):
                self._compile(key, pattern)
        layers = raw.get("layers_to_transform")
        if not isinstance(layers, int | None) and not (
            isinstance(layers, list) and all(isinstance(i, int) for i in layers)
        ):
            raise self._fault("layers_to_transform", "is neither a number nor a list of numbers")

    def _fault(self, key: str, fault: str) -> UserError:
        return UserError(f"{self._where / CONFIG}: {key} = {json.dumps(self._raw[key])} {fault}")

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self._fault(key, f"holds no regular expression: {error}") from None

    def _read_init(self) -> str:
        value = self._raw.get("init_lora_weights", True)
        name = "true" if value is None else str(value).lower()
        if name in _INITS:
            return name
        for prefix, reason in _REFUSED_INITS.items():
            if name.startswith(prefix):
                raise self._fault("init_lora_weights", f"is not supported: {reason};\n{_CONVERT}")
        raise self._fault(
            "init_lora_weights",
            f"is not known here, and it could change the base; known: {', '.join(_INITS)}",
        )

    def _number(self, key: str, default: float) -> Any:
        value = self._raw.get(key)
        if value is None:
            return default
        if not _is_number(value):
            raise self._fault(key, "is no number")
        return value

    def _of_module(self, patterns_key: str, module: str, default: Any) -> Any:
        """The number of the first pattern that ends the module's name, or the default."""
        for pattern, value in (self._raw.get(patterns_key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                if not _is_number(value):
                    raise self._fault(patterns_key, f"gives no number to {pattern!r}")
                return value
        return default

    def rank(self, module: str) -> Any:
        """The rank that the file's settings give the module."""
        return self._of_module("rank_pattern", module, self._number("r", 8))

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised).

        PEFT's alpha is 8 where the file names none.
        """
        alpha = self._of_module("alpha_pattern", module, self._number("lora_alpha", 8))
        return float(alpha / (math.sqrt(rank) if self._raw.get("use_rslora") else rank))

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names the module or one that it is in."""
        patterns = _texts(self._raw.get("modules_to_save"))
        return any(re.match(rf"(.*\.)?{p}($|\.)", module) for p in patterns)

    def targets(self, module: Module) -> bool:
        """Whether PEFT gives the module an adapter.

        Where target_modules is null, PEFT chooses by architecture, and the tensors show the choice:
        True.
        """
        name, raw = module.name, self._raw
        if _names(raw.get("exclude_modules"), name) or self.saves(name):
            return False
        targets = raw.get("target_modules")
        if targets is None or (isinstance(targets, list) and name in targets):
            return True
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return module.is_linear and not module.is_output
        return _names(targets, name) and (isinstance(targets, str) or self._is_in_layers(name))

    @property
    def chooses_targets(self) -> bool:
        """Whether the file says which modules have an adapter."""
        return self._raw.get("target_modules") is not None

    def _is_in_layers(self, name: str) -> bool:
        layers = self._raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        for pattern in _texts(self._raw.get("layers_pattern")) or [r"[^.]*"]:
            if match := re.match(rf"(.*?\.)?{pattern}\.(?P<layer>\d+)\.", name):
                layer = int(match["layer"])
                return layer == layers if isinstance(layers, int) else layer in layers
        return False

    def token_ids(self, module: str, *, is_input: bool) -> list[int]:
        """trainable_token_indices of a table; a list is of the model's embeddings."""
        ids = self._raw.get("trainable_token_indices") or {}
        if isinstance(ids, list):
            ids = {module: ids} if is_input else {}
        if not isinstance(ids, dict):
            raise self._fault("trainable_token_indices", "is neither a list nor a table of lists")
        for name, of_module in ids.items():
            if module == name or module.endswith(f".{name}"):
                if not isinstance(of_module, list) or not all(
                    isinstance(i, int) for i in of_module
                ):
                    raise self._fault("trainable_token_indices", "holds what is no list of ids")
                return of_module
        return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text_or_texts(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(text, str) for text in value)
    return isinstance(value, str | None)


def _texts(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or []


def _names(modules: str | Sequence[str] | None, name: str) -> bool:
    """Whether a regular expression is the name, or one of a list of names ends it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == m or name.endswith(f".{m}") for m in modules or ())


def check_kind(raw: Mapping[str, Any], where: Path) -> str:
    """The file's peft_type, one that can be read here. Raises UserError for any other."""
    kind = raw.get("peft_type")
    if kind == "LORA" or kind in PROMPT_TYPES:
        task = raw.get("task_type")
        if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
            raise UserError(
                f"{where / CONFIG}: task_type = {json.dumps(task)} is not supported: adapters of "
                "language models (CAUSAL_LM) and classifiers of texts (SEQ_CLS) are (write that "
                "into the file if the base is one)"
            )
        return str(kind)
    way_out = f"; {_MERGE}"
    if kind in _UNMERGEABLE:
        way_out = ", and no complete checkpoint can hold this one: generate with PEFT"
    raise UserError(
        f"{where / CONFIG}: peft_type = {json.dumps(kind)} is not supported: "
        f"LORA, {' and '.join(PROMPT_TYPES)} are{way_out}"
    )

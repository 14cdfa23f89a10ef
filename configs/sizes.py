"""Published model shapes, as arguments of `c.model.update(**sizes.GPT2)`.

GPT-1: Radford et al. 2018 (its shape; the blocks here normalise before, as GPT-2 does).
GPT-2: Radford et al. 2019.
GPT-3: Brown et al. 2020, table 2.1, with its head widths as printed (some do not equal
width / heads).
SmolLM2-135M, Llama 3 8B and 70B: their config.json.
"""

GPT1 = dict(layers=12, width=768, heads=12, context=512, vocab_size=40478)

GPT2 = dict(layers=12, width=768, heads=12, context=1024, vocab_size=50257)
GPT2_MEDIUM = GPT2 | dict(layers=24, width=1024, heads=16)
GPT2_LARGE = GPT2 | dict(layers=36, width=1280, heads=20)
GPT2_XL = GPT2 | dict(layers=48, width=1600, heads=25)

GPT3_125M = GPT2 | dict(context=2048)
GPT3_350M = GPT3_125M | dict(layers=24, width=1024, heads=16)
GPT3_760M = GPT3_125M | dict(layers=24, width=1536, heads=16)
GPT3_1_3B = GPT3_125M | dict(layers=24, width=2048, heads=24, head_dim=128)
GPT3_2_7B = GPT3_125M | dict(layers=32, width=2560, heads=32)
GPT3_6_7B = GPT3_125M | dict(layers=32, width=4096, heads=32)
GPT3_13B = GPT3_125M | dict(layers=40, width=5140, heads=40, head_dim=128)
GPT3_175B = GPT3_125M | dict(layers=96, width=12288, heads=96)

LLAMA = dict(positions="rope", norm="rmsnorm", mlp="swiglu", bias="none")

SMOLLM2_135M = LLAMA | dict(
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    mlp_dim=1536,
    context=8192,
    vocab_size=49152,
    rope_theta=1e5,
    tie_embeddings=True,
)
LLAMA_1B = LLAMA | dict(
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    context=4096,
    vocab_size=0,
    rope_theta=5e5,
    tie_embeddings=True,
)
LLAMA3_8B = LLAMA | dict(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    mlp_dim=14336,
    context=8192,
    vocab_size=128256,
    rope_theta=5e5,
    tie_embeddings=False,
)
LLAMA3_70B = LLAMA3_8B | dict(layers=80, width=8192, heads=64, mlp_dim=28672)

ALL = {
    "gpt1": GPT1,
    "gpt2": GPT2,
    "gpt2-medium": GPT2_MEDIUM,
    "gpt2-large": GPT2_LARGE,
    "gpt2-xl": GPT2_XL,
    "gpt3-125m": GPT3_125M,
    "gpt3-350m": GPT3_350M,
    "gpt3-760m": GPT3_760M,
    "gpt3-1.3b": GPT3_1_3B,
    "gpt3-2.7b": GPT3_2_7B,
    "gpt3-6.7b": GPT3_6_7B,
    "gpt3-13b": GPT3_13B,
    "gpt3-175b": GPT3_175B,
    "smollm2-135m": SMOLLM2_135M,
    "llama-1b": LLAMA_1B,
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": LLAMA3_70B,
}

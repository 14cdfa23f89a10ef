"""A GPT on the Presidents' annual messages 1790-2026, with its own BPE of 4,096 tokens.

python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import base


def get_config():
    c = base.get_config()
    c.model.update(layers=3, width=128, heads=2, context=64, bias="none")
    c.data.update(
        source="sotu", tokenizer="sentencepiece", tokenizer_vocab=4096, eval_fraction=0.05
    )
    c.optim.update(
        name="muon", lr=1e-2, muon_lr=0.04, warmup_steps=20, min_lr_ratio=0.05, weight_decay=0.0
    )
    c.train.update(
        steps=430, batch_size=16, eval_every=0, save_every=0, log_every=20, sample_tokens=60
    )
    return c

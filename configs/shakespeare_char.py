r"""nanoGPT's character-level Shakespeare, on a text file (`input.txt` of char-rnn, 1.1 MB).

    python -m gptjax.train --config=configs/shakespeare_char.py --workdir=runs/shakespeare \
        --config.data.path=input.txt
    python -m gptjax.train --config=configs/shakespeare_char.py:gpu --workdir=runs/shakespeare_gpu \
        --config.data.path=input.txt

2 CPU cores: 3 minutes; validation loss 1.894 after 2,000 steps (published: 1.88). The recipe for
a GPU is published with a validation loss of 1.47 after 5,000 steps.
"""

from configs import base


def get_config(device="cpu"):
    c = base.get_config()
    c.model.update(layers=4, width=128, heads=4, context=64, mlp="gelu_exact", bias="none")
    c.data.update(source="text", tokenizer="chars", eval_fraction=0.1)
    c.optim.update(lr=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.1, min_lr_ratio=0.1)
    c.train.update(steps=2000, batch_size=12, eval_every=500, save_every=1000, log_every=50)
    if device == "gpu":
        c.model.update(layers=6, width=384, heads=6, context=256, dropout=0.2, dtype="bfloat16")
        c.train.update(steps=5000, batch_size=64, eval_every=250)
    return c

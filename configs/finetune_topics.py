"""Topics of news (Reuters-21578, R8): a small GPT and its tokenizer, trained on these texts alone.

    python experiments/finetune/data.py --from=DATA --only=reuters8
    python -m gptjax.train --config=configs/finetune_topics.py --workdir=runs/topics
    python -m gptjax.evaluate --checkpoint=runs/topics --path=data/reuters8/test.jsonl

2 CPU cores: 5 minutes; test accuracy 0.956 (majority 0.495).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.train.update(epochs=4.0, batch_size=16, eval_every=0, save_every=250, log_every=50)
    c.model.update(layers=2, width=128, heads=4, context=256, dropout=0.2)
    c.data.update(
        source="jsonl",
        path="data/reuters8/train.jsonl",
        eval_fraction=0.1,
        tokenizer="sentencepiece",
        tokenizer_vocab=6000,
    )
    c.task.update(name="classification", prompt="{text}", truncation="cut_end", eval_samples=0)
    c.optim.update(lr=1e-3, schedule="linear", warmup_steps=50, min_lr_ratio=0.0, weight_decay=0.1)
    return c

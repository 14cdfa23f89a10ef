r"""Llama 3 8B's shape, T = 8192, on prepared shards, split over all devices (fsdp).

    python -m gptjax.plan --config=configs/llama_8b.py --target=v5p-64
    python -m gptjax.data.prepare --config=configs/llama_8b.py --out=prepared \
        --config.data.source=jsonl --config.data.path=corpus/
    python -m gptjax.train --config=configs/llama_8b.py --workdir=runs/llama_8b \
        --config.data.path=prepared

Not run at that size, so no loss is known. Compiled for v5p-64 as it is (nothing computed again, 2
micro-batches), memory of a device as compiled and as planned: 68.09 and 68.23 GiB; with 64 rows and
remat full, v5p-64 8.45 and 8.70, fsdp 32 x tensor 2 9.15 and 9.34, h100-64 6.26 and 6.24. The
planner's time at 40 % of the peak: v5p-64 6.0 days, h100-8x8 2.8 days. The vocabulary has the size
of Llama 3's, whose tokenizer is a file of its authors; `cl100k` stands for it.
"""

from configs import base, sizes


def get_config():
    c = base.get_config()
    c.model.update(**sizes.LLAMA3_8B, dtype="bfloat16")
    c.data.update(source="shards", tokenizer="cl100k", eval_fraction=0.001)
    c.optim.update(lr=3e-4, schedule="wsd", warmup_steps=2000, min_lr_ratio=0.0, b2=0.95)
    c.train.update(
        steps=100_000,
        batch_size=128,
        eval_every=1000,
        eval_batches=20,
        save_every=500,
        keep_best=True,
        sample_tokens=0,
    )
    c.mesh.update(data=1, fsdp=-1)
    return c

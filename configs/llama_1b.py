r"""A Llama of 1.0 B parameters on prepared shards, split over all devices (fsdp).

    python -m gptjax.data.prepare --config=configs/llama_1b.py --out=prepared \
        --config.data.source=jsonl --config.data.path=corpus/
    python -m gptjax.train --config=configs/llama_1b.py --workdir=runs/llama_1b \
        --config.data.path=prepared

Not yet run at that size, so no loss is known. Compiled with a vocabulary of 32,000, memory of a
device as compiled and as planned, as it is (nothing computed again): v5e-16 11.59 and 11.58 GiB (16
micro-batches), v6e-16 21.22 and 21.49 (8), h100-8 39.95 and 40.04 (8).
The planner's time at 40 % of the peak: v5e-16 3.8 days, v6e-16 19 hours, h100-8 36 hours.
"""

from configs import base, sizes


def get_config():
    c = base.get_config()
    c.model.update(**sizes.LLAMA_1B, dtype="bfloat16")
    c.data.update(
        source="shards", tokenizer="sentencepiece", tokenizer_vocab=32000, eval_fraction=0.001
    )
    c.optim.update(lr=4e-4, schedule="wsd", warmup_steps=2000, min_lr_ratio=0.0, b2=0.95)
    c.train.update(
        steps=50_000,
        batch_size=256,
        eval_every=1000,
        eval_batches=20,
        save_every=500,
        keep_best=True,
    )
    c.mesh.update(data=1, fsdp=-1)
    return c

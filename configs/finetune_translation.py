"""English to Chinese (Tatoeba): LoRA on SmolLM2-135M, through its chat template.

python experiments/smollm2/fetch.py
python -m gptjax.train --config=configs/finetune_translation.py --config.data.path=DATA/tatoeba_en_zh/cmn.txt --workdir=runs/translation
python -m gptjax.evaluate --checkpoint=runs/translation,runs/smollm2.gguf --limit=100
"""

from configs import base


def get_config():
    c = base.get_config()
    c.train.update(init_from="runs/smollm2.gguf", steps=200, batch_size=4, eval_every=0, save_every=100, log_every=10)
    c.model.update(context=8192, scan=True, dtype="bfloat16")
    c.data.update(source="csv", path="data/cmn.txt", columns=("en", "zh"), eval_fraction=0.02, eval_limit=100, length=256)
    c.task.update(
        name="translation", prompt="Translate to Chinese: {en}", completion="{zh}", template="chat", overlong="drop", language="zh", answers=0
    )
    c.lora.update(rank=16, alpha=32.0)
    c.optim.update(lr=1e-3, schedule="linear", warmup_steps=20, final_lr=0.0, weight_decay=0.0)
    return c

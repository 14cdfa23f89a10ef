"""Makes tests/golden/generation.json, for users without PyTorch: what transformers' GPT-2 and Llama
compute with weights that a seed gives.

python tests/golden/make.py        (needs pip install -e '.[parity]')
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import tiny_checkpoint

from gptjax.checkpoints import formats

PROMPTS = [[5, 9, 30], [200, 1, 7, 7, 40, 41, 60, 3, 100]]
SETTINGS = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "beams": {"num_beams": 4, "length_penalty": 1.5},
    "early beams": {
        "num_beams": 3,
        "early_stopping": True,
        "eos_token_id": [11, 50, 3, 9, 120, 121, 122],
    },
}


def main() -> None:
    result = {}
    for family in ("gpt2", "llama"):
        with tempfile.TemporaryDirectory() as folder:
            formats.write_checkpoint(Path(folder) / "m", tiny_checkpoint(family))
            net = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "m").eval()
        net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
        with torch.no_grad():
            logits = net(torch.tensor([PROMPTS[1]])).logits[0, -1].numpy()
            texts = {
                name: [
                    net.generate(
                        torch.tensor([p]),
                        attention_mask=torch.ones(1, len(p), dtype=torch.long),
                        do_sample=False,
                        max_new_tokens=12,
                        **settings,
                    )[0, len(p) :].tolist()
                    for p in PROMPTS
                ]
                for name, settings in SETTINGS.items()
            }
        result[family] = {"logits": np.round(logits[:32], 5).tolist(), **texts}
    data = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "prompts": PROMPTS,
        "settings": SETTINGS,
        "families": result,
    }
    (Path(__file__).parent / "generation.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

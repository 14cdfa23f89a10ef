"""What happens inside a model on a prompt: one page to look at, and the main findings in words.

    python -m gptjax.interpret --checkpoint=runs/quickstart --prompt="The people of the"
        [--target=" United"] [--out=interpret.html] [--json]
    python -m gptjax.interpret --checkpoint=PATH --prompt="The capital of France is"
        --corrupted="The capital of Italy is"
    python -m gptjax.interpret --checkpoint=PATH --prompt=TEXT --against=OTHER
    python -m gptjax.interpret --checkpoint=PATH --prompt=TEXT --lens_text=FILE [--lens=lens.npz]

The page has what each layer would say next, what speaks for the prediction (by layer, head, MLP and
token), the attention of every head, what the model loses without a head, and heads by what they
look at. With a second prompt of as many tokens it shows where the difference of the two lies, with
a second checkpoint what changed. It is one file that fetches nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.core.characters import check_characters
from gptjax.data.readers.opening import read_text
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.interpretability import difference, page, tuned_lens
from gptjax.interpretability.survey import survey
from gptjax.interpretability.tuned_lens import TunedLens
from gptjax.runtime.compile_cache import enable_compile_cache

FLAGS = {
    "checkpoint": "a workdir, a step's folder in it, a Hugging Face folder or a .gguf file",
    "adapter": "run or PEFT folder whose adapters are put on the checkpoint",
    "prompt": "the text to look at; up to about a hundred tokens are easy to read",
    "target": "a text that could follow: its first token is explained (the likeliest token)",
    "corrupted": "a second prompt of as many tokens, for patching",
    "against": "another checkpoint of the same shape, or a PEFT adapter, to compare with",
    "lens_text": "a text file that a tuned lens is fitted to",
    "lens": "file of a tuned lens: used where it exists, else written (.npz)",
    "out": "the page (interpret.html)",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint", "prompt"))
    for name in ("prompt", "target", "corrupted"):
        check_characters(args[name], f"--{name}")
    out = Path(args["out"] or "interpret.html")
    enable_compile_cache()
    lm = language_model.load(args["checkpoint"])
    if args["adapter"]:
        lm = lm.with_adapter(args["adapter"])
    other = difference.load_other(args["against"], lm) if args["against"] else None
    findings = survey(
        lm,
        args["prompt"],
        name=Path(args["checkpoint"]).name,
        target=args["target"],
        corrupted=args["corrupted"],
        other=other,
        other_name=args["against"],
        tuned_lens=find_lens(lm, args),
    )
    files.write_text(out, page.to_html(findings))
    lines = page.summary(findings)
    if "json" in args:
        print(json.dumps({"page": str(out), **page.for_machines(findings)}))
        return
    cli.result({"page": out, **dict(lines)}, args)


def find_lens(lm: LanguageModel, args: cli.Args) -> TunedLens | None:
    """The tuned lens of the flags: read, or fitted and written."""
    path = Path(args["lens"]) if args["lens"] else None
    if path and path.exists():
        return tuned_lens.load(path, lm)
    if not args["lens_text"]:
        if path:
            raise UserError(f"{path} does not exist: --lens_text=FILE fits a lens and writes it")
        return None
    lens = tuned_lens.fit(lm, lm.encode(read_text(Path(args["lens_text"]))))
    if path:
        lens.save(path)
    return lens


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

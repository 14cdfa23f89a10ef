"""Text from a model: a workdir, a Hugging Face folder, a .gguf file.

    python -m gptjax.generate --checkpoint=runs/quickstart --prompt="My fellow citizens" [--max_new_tokens=100]
        [--temperature=0.8] [--top_k=0] [--top_p=1.0] [--seed=0] [--num_beams=4] [--stop="."] [--weights=int8] [--rolling]
    python -m gptjax.generate --checkpoint=PATH --chat [--system="You are brief."]

Streams to stdout. --chat is a conversation through the checkpoint's own template; /help in it lists its commands.
"""

from __future__ import annotations

import gc
import json
import sys

from gptjax.core import cli, files
from gptjax.generation import language_model
from gptjax.generation.conversation import converse
from gptjax.generation.flags import FLAGS, new_tokens, options
from gptjax.generation.language_model import LanguageModel
from gptjax.runtime.compile_cache import enable_compile_cache

if __name__ == "__main__":
    gc.disable()  # until the first token: looking for garbage takes a tenth of a start, and there is none


def complete(lm: LanguageModel, args: cli.Args) -> None:
    """One prompt, streamed; as JSON, or with several completions, at its end."""
    settings, prompt, n, limit = (
        options(args),
        args["prompt"],
        args.number("n", 1),
        new_tokens(lm, args),
    )
    if "json" in args or n > 1 or settings.get("num_beams"):
        found = lm.generate([prompt], max_new_tokens=limit, n=n, **settings)
        for one in found:
            data = {
                "prompt": prompt,
                "text": one.text,
                "tokens": one.tokens,
                "logprobs": one.logprobs,
                "finish_reason": one.finish_reason,
            }
            print(json.dumps(data) if "json" in args else prompt + one.text)
        return
    pieces = lm.stream(prompt, max_new_tokens=limit, **settings)
    echo = prompt
    for (
        piece
    ) in pieces:  # the first piece comes after all checks: the prompt is echoed once they passed
        sys.stdout.write(echo + piece)
        sys.stdout.flush()
        echo = ""
    print(echo)


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",))
    settings, n = options(args), args.number("n", 1)  # wrong numbers before the model is read
    enable_compile_cache()
    with language_model.load_lazily(
        args["checkpoint"], weights=args["weights"] or "float32", cache_dtype=args["cache_dtype"]
    ) as lm:
        if not (
            args["adapter"] or "chat" in args or settings.keys() & {"num_beams", "speculate_tokens"}
        ):
            lm.compile(
                args["prompt"],
                folder=files.cache_path("executables"),
                n=n,
                max_new_tokens=new_tokens(lm, args),
                **settings,
            )
    if not gc.isenabled():
        gc.freeze()  # what is here now stays
        gc.enable()
    if args["adapter"]:
        lm = lm.with_adapter(args["adapter"])
    if "chat" in args:
        converse(lm, args)
    else:
        complete(lm, args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

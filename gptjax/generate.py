"""Text from a model: a workdir, a Hugging Face folder, a .gguf file.

    python -m gptjax.generate --checkpoint=runs/quickstart --prompt="My fellow citizens"
        [--max_new_tokens=100] [--temperature=0.8] [--top_k=0] [--top_p=1.0] [--seed=0]
        [--num_beams=4] [--stop="."] [--weights=int8] [--context_shift]
        [--json_schema=FILE | --regex="[0-9]+" | --choices=yes,no | --grammar=FILE]
    python -m gptjax.generate --checkpoint=PATH --chat [--system="You are brief."]

Streams to stdout. --chat is a conversation through the checkpoint's own template; /help in it lists
its commands.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys

from gptjax.core import cli, files
from gptjax.generation import language_model
from gptjax.generation.conversation import converse
from gptjax.generation.flags import FLAGS, new_tokens, read_options
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import CALLED, GenerationOptions
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.tokenizer import chat_template

if __name__ == "__main__":
    gc.disable()  # until the first token: looking for garbage takes a tenth of a start


def complete(lm: LanguageModel, args: cli.Args, options: GenerationOptions) -> None:
    """Prints the prompt and its completion as it comes; as JSON, or with several, at its end."""
    prompt = args["prompt"]
    if "json" in args or options.n > 1 or options.num_beams > 1:
        for completion in lm.generate([prompt], options):
            data = {
                "prompt": prompt,
                "text": completion.text,
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
            }
            print(json.dumps(data) if "json" in args else prompt + completion.text)
        return
    echo = prompt  # with the first piece: that comes after all checks
    for piece in lm.stream(prompt, options):
        sys.stdout.write(echo + piece)
        sys.stdout.flush()
        echo = ""
    print(echo)


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",), called=CALLED)
    options = read_options(args)  # wrong numbers before the model is read
    enable_compile_cache()
    with language_model.load_lazily(
        args["checkpoint"],
        weights=args["weights"] or "float32",
        cache_dtype=args["cache_dtype"],
        mesh=args["mesh"],
    ) as lm:
        if "chat" not in args:
            options = dataclasses.replace(options, max_new_tokens=new_tokens(lm, args))
            if not args["adapter"] and options.num_beams <= 1 and not options.speculates:
                lm.compile(args["prompt"], options, folder=files.cache_path("executables"))
    if not gc.isenabled():
        gc.freeze()  # what is here now stays
        gc.enable()
    if args["adapter"]:
        lm = lm.with_adapter(args["adapter"])
    if args["chat_template"]:
        chat_template.choose(lm.text_tokenizer, args["chat_template"])
    if "chat" in args:
        converse(lm, args)
    else:
        complete(lm, args, options)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

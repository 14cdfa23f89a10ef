# The text of chat.ipynb; `python experiments/colab/build.py` makes the notebook from it.
# ruff: noqa: E402 - a cell imports what it is the first to need

# %% [markdown]
# # Talk to a language model, and look inside
#
# SmolLM2-135M-Instruct answers questions on your own machine, and you see the probabilities
# that its answers are drawn from.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/@REPOSITORY@/blob/main/experiments/colab/chat.ipynb)
#
# Run the cells from top to bottom. No account is needed: the model (93 MB, Apache-2.0, by
# Hugging Face) comes from the Python package index.

# %%
# If gptjax can be imported already, this cell does nothing. Otherwise it fetches and installs it,
# and the machine's own jax stays as it is: on Colab it is the one that fits the accelerator.
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDED, EXTRA = ["gptjax.train", "gguf"], "[gguf]"  # gguf reads the file of weights


def find_gptjax():
    """The folder that holds the package and its configs; None where something is missing."""
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except ImportError:
        return None
    folder = Path(sys.modules["gptjax"].__file__).parent.parent
    return folder if (folder / "configs").is_dir() else None


ROOT = find_gptjax()
if ROOT is None:
    # not "gptjax": Python would take the folder of the clone for the package in it
    clone = Path.cwd() / "gptjax-main"
    around = [Path.cwd(), *Path.cwd().parents, clone]
    ROOT = next(
        (folder for folder in around if (folder / "configs" / "quickstart.py").is_file()), None
    )
    commands = []
    if ROOT is None:
        ROOT = clone
        commands.append(
            ["git", "clone", "--quiet", "--depth=1", "https://github.com/@REPOSITORY@", str(ROOT)]
        )
    installed = {each.name for each in importlib.metadata.distributions() if each.name}
    pins = [
        f"{name}=={importlib.metadata.version(name)}"
        for name in sorted(installed)
        if name == "numpy" or name.startswith("jax")
    ]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{pin}\n" for pin in pins))
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--editable",
            f"{ROOT}{EXTRA}",
            "--constraint",
            str(constraints),
        ]
        for command in [*commands, pip]:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)} failed, while {', '.join(pins)} must stay:\n{done.stderr}"
                )
    sys.path.insert(0, str(ROOT))  # this process began before the installation
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "gptjax"]:
        del sys.modules[name]  # what the failed attempt above left half imported
    ROOT = find_gptjax()
    if ROOT is None:
        raise RuntimeError(
            "gptjax is installed and still cannot be imported: "
            "restart the runtime and run this cell again"
        )
print(f"gptjax is in {ROOT}")

# %%
import logging
import signal

# a rehearsal of a minute, for the test of this notebook; its numbers mean nothing
FAST = bool(os.environ.get("GPTJAX_FAST"))
RUNS = Path("runs/colab-fast" if FAST else "runs/colab")
# for the commands below
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# this notebook and the commands share one GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of a file that it does not need


def run(*arguments):
    """Runs `python ARGUMENTS` and shows its output as it comes.

    The stop button reaches it as Ctrl-C.
    """
    command = [sys.executable, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In a session of its own, so that the stop button is passed on once: a second Ctrl-C means
    # "end without saving".
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            print(process.stdout.read(), end="")
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command[1:])} ended with code {process.returncode}: see above"
        )


# %% [markdown]
# ## Fetch and load the model
#
# The file holds a network of the Llama family, its vocabulary and the template of its
# conversations. With 135 million parameters it is one of the smallest models that can chat: its
# English is good, and what it says is often wrong.

# %%
import gptjax

CHECKPOINT = RUNS / "smollm2.gguf"
run(ROOT / "experiments" / "smollm2" / "fetch.py", f"--to={CHECKPOINT}")
lm = gptjax.load(CHECKPOINT)
shape = lm.config
print(
    f"{shape.layers} layers, width {shape.width}, {shape.vocab_size:,} tokens, "
    f"a context of {shape.context:,}"
)

# %% [markdown]
# ## What comes next?
#
# A language model does one thing: it gives each token of its vocabulary a probability to be the
# next. `lm.logits` has one number for each token after each position of the text; the
# exponentials of the last row, divided by their sum, are those probabilities.

# %%
import numpy as np

prompt = "The capital of France is"
logits = lm.logits([lm.encode(prompt)])[0, -1]
odds = np.exp(logits - logits.max())
odds /= odds.sum()
best = np.argsort(odds)[::-1][:10]
words = [repr(lm.tokenizer.decode([int(i)])) for i in best]
three = [f"{word} {odds[i]:.1%}" for word, i in zip(words[:3], best[:3], strict=True)]
print(f"after {prompt!r}: {', '.join(three)}")
try:
    import matplotlib.pyplot as plt
except ImportError:
    print("(install matplotlib to see the bars)")
else:
    plt.barh(words[::-1], odds[best][::-1])
    plt.xlabel("probability")
    plt.title(prompt)
    plt.show()

# %% [markdown]
# ## How likely is a text?
#
# The probability of a longer continuation is the product of its tokens' probabilities, so their
# logarithms add up. `lm.score` returns that sum, and whether the model would write the text by
# itself if it always took the likeliest token. This is how multiple-choice tests of language
# models are marked: the answer with the highest score counts as the model's choice.

# %%
endings = [" Paris", " Rome", " a city in the north of the country", " banana"]
scores = lm.score([prompt] * len(endings), endings)
for ending, (score, greedy) in zip(endings, scores, strict=True):
    note = "  (what it would write)" if greedy else ""
    print(f"{score:8.2f}  {prompt}{ending}{note}")

# %% [markdown]
# ## A conversation
#
# The model itself remembers nothing. Before each answer the complete conversation is written
# down in the form that it was trained on, with marks for who speaks, and the model continues
# that text until it writes the mark for "I am done". Here is that form:

# %%
from gptjax.tokenizer import chat_template

history = [{"role": "user", "content": "What is the capital of France?"}]
ids = chat_template.encode(lm.tokenizer, history)
text = chat_template.render(lm.tokenizer.chat_template, history, **lm.tokenizer.special)
print(f"{len(ids)} tokens:\n{text}")


# %%
def ask(question, history, **options):
    """Appends question and answer to the conversation, and prints the answer as it comes."""
    history.append({"role": "user", "content": question})
    answer = ""
    for piece in lm.stream(
        chat_template.encode(lm.tokenizer, history), max_new_tokens=24 if FAST else 200, **options
    ):
        answer += piece
        print(piece, end="", flush=True)
    history.append({"role": "assistant", "content": answer})
    print("\n")


# The second question makes sense only with the first: the model has to look back. Temperature 0,
# the default, takes the likeliest token.
questions = [
    "What is the capital of France?",
    "Which river flows through it?",
    "Write one sentence about the sea.",
]
history = []
for question in questions[: 2 if FAST else None]:
    print(f"> {question}")
    ask(question, history)

# %% [markdown]
# ## Your turn
#
# An empty line ends the conversation. Answers are drawn here, with a temperature: another seed
# gives another answer to the same question.

# %%
history = []
while not FAST and (question := input("> ")):
    ask(question, history, temperature=0.7, top_p=0.9, seed=len(history))

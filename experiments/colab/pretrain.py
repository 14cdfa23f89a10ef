# The text of pretrain.ipynb; `python experiments/colab/build.py` makes the notebook from it.
# ruff: noqa: E402 - a cell imports what it is the first to need

# %% [markdown]
# # Train a GPT from nothing
#
# A GPT of 1.1 million parameters learns from 230 years of Presidents' messages to Congress, in
# a minute or two on two CPU cores.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/@REPOSITORY@/blob/main/experiments/colab/pretrain.ipynb)
#
# Run the cells from top to bottom. No account is needed, and the text comes with the
# installation.

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

NEEDED, EXTRA = ["gptjax.train"], ""


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
# ## The experiment is one short file
#
# It names what differs from the defaults: the number of layers, and the length of the vector that
# stands for a token; the text, and a vocabulary of 4,096 pieces that is learned from it; the
# optimizer; and how long to train.

# %%
CONFIG = ROOT / "configs" / "quickstart.py"
print(CONFIG.read_text())

# %% [markdown]
# ## Train
#
# This is the command that you would type in a terminal. It reads the text, learns the
# vocabulary, cuts the text into tokens, compiles the training step and then repeats it, with
# another batch of pieces of 64 tokens each time. A twentieth of the messages is held out and
# never learned from.
#
# If you press the stop button, the run saves itself, and the same cell goes on from there.

# %%
WORKDIR = RUNS / "quickstart"
flags = []
if FAST:
    flags = [
        "--config.train.steps=30",
        "--config.train.log_every=5",
        "--config.train.eval_every=15",
        "--config.train.eval_batches=8",
    ]
run("-m", "gptjax.train", f"--config={CONFIG}", f"--workdir={WORKDIR}", *flags)

# %% [markdown]
# ## The loss falls
#
# The run wrote a line of `metrics.jsonl` for each measurement. The loss is the negative
# logarithm of the probability that the model gave to the token that came next, averaged. A
# model that knows nothing gives each of the 4,096 tokens the same probability, a loss of 8.3.
# Where the held-out loss stays as low as the training loss, the model learned the language and
# not the pages by heart.

# %%
from gptjax.tracking.jsonl import read_jsonl

records = read_jsonl(WORKDIR / "metrics.jsonl")
train = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
held_out = [(r["step"], r["eval/loss"]) for r in records if "eval/loss" in r]
print(
    f"training loss {train[0][1]:.3f} after {train[0][0]} steps, "
    f"{train[-1][1]:.3f} after {train[-1][0]}; held out {held_out[-1][1]:.3f}"
)
try:
    import matplotlib.pyplot as plt
except ImportError:
    print("(install matplotlib to see the curve)")
else:
    plt.plot(*zip(*train, strict=True), label="training")
    plt.plot(*zip(*held_out, strict=True), "o-", label="held out")
    plt.xlabel("step")
    plt.ylabel("loss (nats per token)")
    plt.legend()
    plt.show()

# %% [markdown]
# ## Let it write
#
# The model gives a probability to each possible next token; one is drawn and appended, and the
# model is asked again. A temperature below 1 prefers the likelier ones, and `top_p` leaves out
# the unlikely rest. Another seed gives another text.

# %%
import gptjax

lm = gptjax.load(WORKDIR)
prompt = "The people of the United States"
print(prompt, end="")
for piece in lm.stream(prompt, max_new_tokens=40, temperature=0.7, top_p=0.9, seed=1):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# ## How good is that?
#
# Losses per token cannot be compared between vocabularies: whoever cuts the text into longer
# tokens has fewer and harder ones to guess. So count the bits that the model needs for each
# byte of the held-out text, as if it were a program that compresses files. On the same text,
# `xz -9` is such a program, and a bigram model guesses each token from the one before it: one
# has counted all of the training text, the other only what this model has read.

# %%
import json

run_json = json.loads((WORKDIR / "run.json").read_text())
bits = [r["eval/bits_per_byte"] for r in records if "eval/bits_per_byte" in r]
for name, value in {"this model": bits[-1], **run_json["baselines"]}.items():
    print(f"{value:.3f} bits per byte: {name}")

# %% [markdown]
# The model has read only a part of the text. What becomes of it with more training? Add `"--
# config.train.steps=2000"` to the flags and take another folder for `WORKDIR`.
#
# `report.html` in the run's folder shows curves, samples and settings on one page. The next
# notebook, `finetune.ipynb`, teaches this model a task.

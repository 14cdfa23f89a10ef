"""Wrong configs and inputs: at most six lines, exit code 2, no traceback, nothing lost."""

import gzip

import pytest
from conftest import TINY, make_config

from gptjax import convert, generate, train
from gptjax.core import cli
from gptjax.data import prepare, shards


@pytest.fixture
def files(tmp_path, corpus):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 and more".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tiny.txt").write_text("ab")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"body": "fine"}\n')
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "typo.py").write_text(
        "from configs import base\n\ndef get_config():\n    c = base.get_config()\n"
        "    c.model.widht = 3\n    return c\n"
    )
    (tmp_path / "none.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "surrogate.jsonl").write_text('{"text": "a\\ud800"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "fine and long enough"}\n' * 50)[:-20]
    )
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "precious.txt").write_text("mine")
    (tmp_path / "chars.txt").write_text("abc " * 200)
    return {"dir": tmp_path, "corpus": corpus}


CASES = {
    "misspelt setting": ("train", ["--config.model.widht=3"], "did you mean model.width"),
    "misspelt section": ("train", ["--config.modle.width=3"], "did you mean model"),
    "wrong type": ("train", ["--config.train.steps=many"], "must be int"),
    "wrong choice": ("train", ["--config.optim.schedule=cosin"], "did you mean 'cosine'"),
    "out of range": ("train", ["--config.model.dropout=1.5"], "at most 0.99"),
    "heads do not divide": ("train", ["--config.model.heads=3"], "does not divide model.width"),
    "two wildcards in the mesh": ("train", ["--config.mesh.fsdp=-1"], "only one axis"),
    "more devices than there are": ("train", ["--config.mesh.data=64"], "needs 64 devices"),
    "batch does not divide": (
        "train",
        [
            "--config.train.batch_size=6",
            "--config.train.grad_accum_steps=1",
            "--config.mesh.data=8",
        ],
        "does not divide train.batch_size",
    ),
    "accumulation does not divide": (
        "train",
        ["--config.train.grad_accum_steps=3"],
        "train.grad_accum_steps = 3",
    ),
    "vocabulary too small": (
        "train",
        ["--config.model.vocab_size=100"],
        "smaller than the tokenizer's 257",
    ),
    "not UTF-8": (
        "train",
        ["--config.data.path={dir}/latin.txt"],
        "is not UTF-8: byte 0xe9 at offset 3",
    ),
    "no such file": ("train", ["--config.data.path={dir}/nothing.txt"], "no file there"),
    "empty data": ("train", ["--config.data.path={dir}/empty.txt"], "empty.txt is empty"),
    "text shorter than the context": ("train", ["--config.data.path={dir}/tiny.txt"], "needs 17"),
    "bad json": (
        "train",
        ["--config.data.source=jsonl", "--config.data.path={dir}/bad.jsonl"],
        "bad.jsonl:2 is not JSON",
    ),
    "missing field": (
        "train",
        ["--config.data.source=jsonl", "--config.data.path={dir}/field.jsonl"],
        "fields are body",
    ),
    "no prepared data": (
        "train",
        ["--config.data.source=shards", "--config.data.path={dir}"],
        "no prepared data",
    ),
    "unknown tfds data set": (
        "train",
        ["--config.data.source=tfds", "--config.data.name=no_such_set"],
        "no_such_set",
    ),
    "frozen pattern without match": (
        "train",
        ["--config.optim.freeze=embd/.*"],
        "matches no parameter",
    ),
    "everything frozen": ("train", ["--config.optim.freeze=.*"], "nothing is left to train"),
    "warmup longer than the run": (
        "train",
        ["--config.optim.warmup_steps=1000"],
        "exceeds train.steps",
    ),
    "bad profile range": ("train", ["--config.train.profile_steps=5"], "first:last"),
    "unknown flag": ("train", ["--wrokdir=x"], "did you mean '--workdir'"),
    "no workdir": ("train", ["--workdir="], "missing --workdir"),
    "workdir is a file": ("train", ["--workdir={dir}/file"], "is a file"),
    "no such config": (
        "train",
        ["--config=configs/quikstart.py"],
        "did you mean configs/quickstart.py",
    ),
    "config that raises": ("train", ["--config={dir}/broken.py"], "ZeroDivisionError"),
    "typo in a config file": ("train", ["--config={dir}/typo.py"], "did you mean model.width"),
    "GPT-2 tokenizer missing": (
        "train",
        ["--config.data.tokenizer=gpt2", "--config.data.tokenizer_path={dir}"],
        "gptjax[gpt2]",
    ),
    "tokenizer larger than the text allows": (
        "train",
        [
            "--config.data.path={dir}/chars.txt",
            "--config.data.tokenizer=sentencepiece",
            "--config.data.tokenizer_path={dir}/file",
        ],
        "not a sentencepiece model",
    ),
    "bad pattern": ("train", ["--config.optim.freeze=*bias"], "not a valid regular expression"),
    "seed out of range": ("train", ["--config.train.seed=9223372036854775808"], "at most"),
    "config without return": ("train", ["--config={dir}/none.py"], "returned None"),
    "half a character": (
        "train",
        ["--config.data.source=jsonl", "--config.data.path={dir}/surrogate.jsonl"],
        "half of a UTF-16 pair",
    ),
    "cut gzip": (
        "train",
        ["--config.data.source=jsonl", "--config.data.path={dir}/cut.jsonl.gz"],
        "is a damaged or incomplete gzip file",
    ),
    "sample prompt too long": (
        "train",
        ["--config.train.sample_prompt=a prompt of more than sixteen bytes"],
        "longer than model.context",
    ),
    "workdir below a file": ("train", ["--workdir={dir}/file/run"], "Not a directory"),
    "prepare shards again": (
        "prepare",
        ["--config=configs/gpt2_124m.py", "--config.data.path={dir}", "--out={dir}/o"],
        "prepared already",
    ),
    "no checkpoint": ("generate", ["--checkpoint={dir}/keep"], "no config.json"),
    "missing checkpoint flag": ("generate", ["--prompt=x"], "missing --checkpoint"),
    "bad top_p": ("generate", ["--checkpoint={dir}/keep", "--top_p=0"], "top_p = 0"),
    "temperature is no number": (
        "generate",
        ["--checkpoint={dir}/keep", "--temperature=hot"],
        "must be float",
    ),
    "zero tokens": (
        "generate",
        ["--checkpoint={dir}/keep", "--max_new_tokens=0"],
        "at least 1",
    ),
    "unknown weights": (
        "generate",
        ["--checkpoint={dir}/keep", "--weights=int9"],
        "no config.json",
    ),
    "convert without to": ("convert", ["--from={dir}/keep"], "missing --to"),
    "convert to an unknown format": (
        "convert",
        ["--from={dir}/keep", "--to={dir}/x", "--format=onnx"],
        "no format 'onnx'",
    ),
    "convert to an unknown dtype": (
        "convert",
        ["--from={dir}/keep", "--to={dir}/x", "--dtype=int3"],
        "no dtype 'int3'",
    ),
    "convert from nowhere": (
        "convert",
        ["--from={dir}/absent", "--to={dir}/x"],
        "no such file or folder",
    ),
    "init_from nowhere": (
        "train",
        ["--config.train.init_from={dir}/absent"],
        "no such file or folder",
    ),
    "stray argument": ("generate", ["hello"], "unexpected argument"),
    "prepare without out": ("prepare", ["--config=configs/debug.py"], "missing --out"),
    "prepare onto other data": (
        "prepare",
        [
            "--config=configs/debug.py",
            "--config.data.source=text",
            "--config.data.path={corpus}",
            "--out={dir}/other",
        ],
        "other data",
    ),
}
MAINS = {
    "train": train.main,
    "generate": generate.main,
    "convert": convert.main,
    "prepare": prepare.main,
}


@pytest.mark.parametrize("name", list(CASES))
def test_wrong_input(name, files, capsys, tmp_path, monkeypatch):
    from conftest import ROOT

    monkeypatch.chdir(ROOT)
    command, flags, part = CASES[name]
    flags = [flag.format(**files) for flag in flags]
    if command == "train":
        flags = [
            *TINY,
            f"--config.data.path={files['corpus']}",
            f"--workdir={tmp_path / 'run'}",
            "--config.train.batch_size=16",
            *flags,
        ]
    if name == "prepare onto other data":
        shards.prepare(
            make_config(data=dict(source="text", path=str(files["dir"] / "chars.txt"))),
            files["dir"] / "other",
        )
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(SystemExit) as ended:
        cli.run(MAINS[command], flags)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert part in message
    error = message[message.index("error: ") :]
    assert len(error.strip().splitlines()) <= 6
    assert "Traceback" not in message
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )

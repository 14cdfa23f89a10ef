"""Tokenizers of published kinds give the ids and the text of their own libraries.

All 2,000 strings are compared in the parity tests; here it is the first few hundred.
"""

import pytest
from published_kinds import BUILDERS, NAMES, build, strings

from gptjax.tokenizer.base import StreamDecoder
from gptjax.tokenizer.kinds import load_tokenizer
from gptjax.tokenizer.pretrained import FILES, PretrainedTokenizer

STRINGS = strings(300)


def folder_of(kind, path):
    path.mkdir(exist_ok=True)
    for name, data in kind.files.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """{name: (kind, our tokenizer)}"""
    tokenizers = {}
    for name in NAMES:
        kind = build(name)
        folder = folder_of(kind, tmp_path_factory.mktemp(name) / "folder")
        tokenizers[name] = kind, PretrainedTokenizer.from_folder(folder, [])
    return tokenizers


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_are_the_library_s(opened, name):
    kind, ours = opened[name]
    assert ours.vocab_size == kind.size
    assert list(ours.bos_ids) == kind.prefix
    assert ours.eos_ids == (ours.control[kind.end],)
    for text, ids in zip(STRINGS, ours.encode_batch(STRINGS), strict=True):
        assert ids.tolist() == kind.encode(text), repr(text[:200])
        assert ours.decode(ids.tolist()) == kind.decode(ids.tolist()), repr(text[:200])


@pytest.mark.parametrize("name", NAMES)
def test_text_that_grows_is_the_text(opened, name):
    """Streams after a prompt, a token at a time, and counts of bytes."""
    _, ours = opened[name]
    for text in STRINGS[20:120]:
        ids = ours.encode(text)
        for start in (0, len(ids) // 2):
            decoder = StreamDecoder(ours, ids[:start])
            parts = [decoder.feed(i) for i in ids[start:]] + [decoder.finish()]
            if ours.joins_bytes:
                assert "".join(parts) == ours.decode_bytes(ids[start:]).decode(errors="replace")
            else:
                assert ours.decode(ids[:start]) + "".join(parts) == ours.decode(ids), repr(text)
            if not start and "\ufffd" not in ours.decode(ids):
                assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_that_are_typed_stay_text(opened, name):
    """Alone, in the midst of text, beside words; in a template they are the tokens."""
    kind, ours = opened[name]
    control = set(ours.control.values())
    unknown = {ours.control.get(name) for name in ("<unk>", "[UNK]")}
    for token in kind.control:
        for text in (token, f"the {token} king", f"a{token}b", f"{token}{token}", f" {token} "):
            ids = ours.encode(text)
            assert not (set(ids) & control) - unknown, text
            if not unknown & set(ids) and "clip" not in name and "lowercase" not in name:
                assert "".join(ours.decode(ids).split()) == "".join(text.split())
        assert ours.control[token] in ours.encode_template(f"the {token} king")
        guarded = f"{token[0]}\ufdd0{token[1:]}"
        assert ours.encode_template(f"the {guarded} king", "\ufdd0") == ours.encode(
            f"the {token} king"
        )


@pytest.mark.parametrize("name", NAMES)
def test_saving_keeps_everything(opened, name, tmp_path):
    """In a workdir, and in a Hugging Face folder."""
    _, ours = opened[name]
    ours.save(tmp_path / "run")
    for file, data in ours.files().items():
        if file in FILES:
            (tmp_path / file).write_bytes(data)
    for again in (
        load_tokenizer(tmp_path / "run"),
        PretrainedTokenizer.from_folder(tmp_path, ours.eos_ids),
    ):
        assert again.fingerprint == ours.fingerprint
        assert (again.bos_ids, again.eos_ids, again.control) == (
            ours.bos_ids,
            ours.eos_ids,
            ours.control,
        )
        for text in STRINGS[:100]:
            ids = again.encode(text)
            assert ids == ours.encode(text)
            assert again.decode(ids) == ours.decode(ids)


def test_no_kind_is_left_out():
    assert len(BUILDERS) == len(NAMES) >= 20

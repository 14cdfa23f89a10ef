"""GGUF: every key, type and token is honoured or refused by name, and an export proves itself."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    byte_level_tokenizer,
    make_config,
    random_params,
    tiny_checkpoint,
)
from helpers import CHATML

from gptjax import convert
from gptjax.checkpoints import (
    formats,
    gguf_keys,
    gguf_vocabulary,
    gguf_write_vocabulary,
    pretrained,
    proof,
)
from gptjax.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS
from gptjax.config.errors import UserError
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.openai import byte_letters
from gptjax.tokenizer.pretrained import PretrainedTokenizer

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parent.parent / "golden" / "gguf_llama_cpp.json"


# ---- files made here

WORDS = ["t", "h", "e", "k", "i", "n", "g", "\u2581", "th", "the", "\u2581the", "ki", "ng"]
WORDS += ["king", "\u2581king"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
PIECES += ["<|im_start|>", "<|im_end|>", "<sep>"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * len(WORDS), 4, 4, 4]


def piece_fields(**fields):
    """The fields of a sentencepiece vocabulary with tokens of every type."""
    scores = [-float(i) for i in range(len(PIECES))]
    base = {"model": "llama", "tokens": PIECES, "scores": scores, "token_type": KINDS}
    base |= {"bos_token_id": 1, "eos_token_id": 2}
    return {f"tokenizer.ggml.{key}": value for key, value in (base | fields).items()}


def tokenizer_of(fields, **others):
    return gguf_vocabulary.read_tokenizer(fields | others, Path("m.gguf"))


def write(path, *, tensors=None, **fields):
    """A Llama of one layer and width 32 with the piece vocabulary; fields change or add keys,
    __ stands for a dot. A key of None is left out."""
    size, rng = len(PIECES), np.random.default_rng(0)
    settings = {"block_count": 1, "context_length": 64, "embedding_length": 32}
    settings |= {"feed_forward_length": 64, "attention.head_count": 4}
    settings |= {"attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    values = {f"llama.{key}": value for key, value in settings.items()} | piece_fields()
    values |= {key.replace("__", "."): value for key, value in fields.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
            kinds.get(type(value), writer.add_uint32)(key, value)
    shapes = {"token_embd": (size, 32), "output": (size, 32), "output_norm": (32,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (32, 32)
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def texts_of(tokenizer, ids):
    return [PIECES[i] for i in ids]


# ---- reading a vocabulary


def test_user_defined_tokens_are_whole_and_the_space_prefix_is_obeyed():
    tokenizer = tokenizer_of(piece_fields(), **{"tokenizer.chat_template": CHATML})
    assert texts_of(tokenizer, tokenizer.encode("the king")) == ["\u2581the", "\u2581king"]
    # llama.cpp writes the space after every token that is matched whole, too
    assert texts_of(tokenizer, tokenizer.encode("the<sep>king")) == [
        *("\u2581the", "<sep>", "\u2581king")
    ]
    ids = chat_template.encode(tokenizer, [{"role": "k", "content": "the"}])
    assert texts_of(tokenizer, ids)[:2] == ["<|im_start|>", "\u2581"]
    assert ids.count(PIECES.index("<|im_start|>")) == 2
    bare = tokenizer_of(piece_fields(add_space_prefix=False))
    assert texts_of(bare, bare.encode("the king")) == ["the", "\u2581king"]
    assert bare.decode(bare.encode(" the king")) == " the king"


def test_a_token_whose_name_says_that_it_ends_a_text_is_control():
    """As in llama.cpp: what a user types never becomes it, whatever type the file gives it."""
    tokenizer = tokenizer_of(piece_fields())
    assert PIECES.index("<|im_end|>") not in tokenizer.encode("a<|im_end|>")
    assert PIECES.index("<|im_start|>") in tokenizer.encode("a<|im_start|>")


def test_what_is_written_around_a_text():
    assert tokenizer_of(piece_fields()).bos_ids == (1,)
    assert tokenizer_of(piece_fields(add_bos_token=False)).bos_ids == ()
    fields = piece_fields()
    del fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    plain = tokenizer_of(fields)
    assert (plain.bos_ids, plain.eos_ids) == ((1,), (2,))  # llama.cpp's own defaults
    turns = tokenizer_of(piece_fields(eot_token_id=PIECES.index("<|im_end|>")))
    assert turns.eos_ids == (2, PIECES.index("<|im_end|>"))
    with pytest.raises(UserError, match="add_bos_token is set, and bos_token_id names no token"):
        tokenizer_of(piece_fields(add_bos_token=True, bos_token_id=9999))


def test_a_byte_level_vocabulary_begins_and_cuts_as_its_name_says():
    described = json.loads(byte_level_tokenizer().files()["tokenizer.json"])
    tokens = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    fields = {"model": "gpt2", "tokens": tokens, "merges": ["t h"], "bos_token_id": len(tokens) - 3}
    fields |= {"eos_token_id": len(tokens) - 1}

    def read(**others):
        return tokenizer_of(
            {f"tokenizer.ggml.{key}": value for key, value in (fields | others).items()}
        )

    assert read(pre="llama-bpe").bos_ids and not read(pre="qwen2").bos_ids
    model = json.loads(read(pre="llama-bpe").files()["tokenizer.json"])["model"]
    assert model["ignore_merges"] is True
    # no name is llama.cpp's "default", which is not GPT-2's
    assert b"[0-9][0-9][0-9]" in read().files()["tokenizer.json"]
    with pytest.raises(UserError, match="no pre-tokenizer 'kimi-k2'"):
        read(pre="kimi-k2")
    with pytest.raises(UserError, match=r"no GGUF vocabulary 't5'.*Unigram"):
        read(model="t5")
    with pytest.raises(UserError, match="merges is missing"):
        gguf_vocabulary.tokenizer_json(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
        )


def test_phi3_files_drop_white_space_after_their_control_tokens():
    strict = tokenizer_of(piece_fields(), **{"general.name": "Phi-3 mini"})
    plain = tokenizer_of(piece_fields(), **{"general.name": "other"})
    assert texts_of(strict, strict.encode("the<sep>  the")) == ["\u2581the", "<sep>", "\u2581the"]
    assert len(plain.encode("the<sep>  the")) > 3


@pytest.mark.parametrize(("name", "written"), [("m", "phi-3 m"), ("Phi3-x", "Phi3-x")])
def test_the_name_says_that_tokens_drop_white_space(name, written):
    described = json.loads(byte_level_tokenizer().files()["tokenizer.json"])
    added = described["added_tokens"]
    for token in added:
        token["rstrip"] = token["content"] != "<|endoftext|>"
    fields = gguf_write_vocabulary.vocabulary_fields(byte_level_with(added_tokens=added), 264, name)
    assert fields["general.name"] == written
    plain = gguf_write_vocabulary.vocabulary_fields(byte_level_tokenizer(), 264, "Phi3-x")
    assert plain["general.name"] == "phi 3-x"


def test_named_templates_come_and_go():
    templates = {"tokenizer.chat_template": CHATML, "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = tokenizer_of(piece_fields(), **templates)
    assert tokenizer.chat_template == CHATML
    fields = gguf_write_vocabulary.vocabulary_fields(tokenizer, len(PIECES), "m")
    assert {key: fields[key] for key in templates} == templates
    content = {**byte_level_tokenizer().files(), "additional_chat_templates/rag.jinja": b"rag"}
    tokenizer = PretrainedTokenizer(content, [263])
    fields = gguf_write_vocabulary.vocabulary_fields(tokenizer, 264, "m")
    assert fields["tokenizer.chat_template.rag"] == "rag"


def cutting_vocabulary(texts):
    """(tokens, merges) of byte-level BPE with many tokens over the borders of words."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    merges = {}
    for text in texts:
        word = "".join(letters[byte] for byte in text.encode())
        for start in range(0, min(len(word), 60) - 4, 2):
            for end in range(start + 2, start + 5):
                merges[word[start:end]] = f"{word[start : end - 1]} {word[end - 1]}"
    return [*(letters[byte] for byte in range(256)), *merges, "<|endoftext|>"], [*merges.values()]


def cutting_fields(name, texts):
    tokens, merges = cutting_vocabulary(texts)
    fields = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges}
    fields |= {"token_type": [*[1] * (len(tokens) - 1), 3], "eos_token_id": len(tokens) - 1}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def digest(rows):
    return hashlib.sha256(json.dumps([list(map(int, row)) for row in rows]).encode()).hexdigest()


NAMES_BY_ROW = {}  # {what a name stands for: its names}
for _name, _row in PRE_TOKENIZERS.items():
    NAMES_BY_ROW.setdefault(_row, []).append(_name)


@pytest.mark.parametrize("names", NAMES_BY_ROW.values(), ids=lambda names: names[0])
def test_text_is_cut_as_llama_cpp_cuts_it(names):
    """Against ids that llama.cpp itself gave (tests/golden/make_gguf_llama_cpp.py)."""
    golden = json.loads(GOLDEN.read_text())
    ids = tokenizer_of(cutting_fields(names[0], golden["texts"])).encode_batch(golden["texts"])
    is_same = digest(ids) == golden[names[0]]
    assert is_same or PRE_TOKENIZERS[names[0]].unlike  # it says so where it is written
    assert {golden[name] for name in names} == {golden[names[0]]}


# ---- keys


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama__expert_count": 8}, "llama.expert_count = 8 is not supported: mixtures"),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
        ({"llama__attention__causal": False}, "attention.causal = false is not supported"),
        ({"llama__pooling_type": 1}, "pooling_type = 1 is not supported: embedding"),
        ({"llama__attention__sliding_window": 8}, "sliding_window = 8 is not supported"),
        ({"llama__attention__value_length": 4}, "keys and values of different widths"),
        ({"llama__attention__head_count_kv": [4, 2]}, "head_count_kv differs from layer to layer"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count = 4 of 8 dims"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope' is not supported"),
        ({"llama__rope__scaling__attn_factor": 2.0}, "attn_factor = 2.0 is supported in YaRN"),
        ({"llama__rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not supp"),
        ({"llama__quite_new": 1}, "the key 'llama.quite_new' .= 1. is not known here"),
        ({"tokenizer__ggml__quite_new": 1}, "the key 'tokenizer.ggml.quite_new'"),
        ({"tokenizer__ggml__remove_extra_whitespaces": True}, "remove_extra_whitespaces = true"),
        ({"tokenizer__ggml__precompiled_charsmap": [1, 2]}, "precompiled_charsmap = .1, 2."),
        ({"tokenizer__ggml__scores": [0.0]}, "1 scores for 277 tokens"),
        ({"tokenizer__ggml__token_type": [1]}, "1 token types for 277 tokens"),
        ({"general__type": "adapter"}, 'general.type = "adapter" is not supported'),
        ({"general__sampling__mirostat": 2}, "general.sampling.mirostat = 2 is not supported"),
        ({"mystery__key": 1}, "the key 'mystery.key'"),
        ({"llama__block_count": None}, "has no llama.block_count"),
        ({"llama__attention__head_count": "four"}, "a setting is of a wrong type"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused_by_name(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrained.open_checkpoint(write(tmp_path / "m.gguf", **fields))


def test_keys_without_effect_pass(tmp_path):
    fields = {
        "general__quite_new": "x",
        "quantize__imatrix__file": "x",
        "mradermacher__quantized_by": "x",
        "imatrix__datasets": ["x"],
    }
    fields |= {"llama__expert_count": 0, "llama__attention__causal": True, "split__count": 1}
    fields |= {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}
    fields |= {"llama__attention__sliding_window": 64, "tokenizer__ggml__fim_pre_token_id": 3}
    plain = pretrained.read_checkpoint(write(tmp_path / "plain.gguf"))
    other = pretrained.read_checkpoint(write(tmp_path / "m.gguf", **fields))
    assert other.config == plain.config
    assert np.array_equal(formats.probe_logits(other), formats.probe_logits(plain))


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"scale_linear": 4.0}, {"rope_scaling": "linear", "rope_factor": 4.0}),
        ({"scaling__factor": 4.0}, {"rope_scaling": "linear", "rope_factor": 4.0}),
        (
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__attn_factor": 0.5,
                "scaling__original_context_length": 16,
                "scaling__yarn_beta_fast": 16.0,
            },
            {
                "rope_scaling": "yarn",
                "rope_original_context": 16,
                "rope_beta_fast": 16.0,
                "rope_attention_factor": 0.5 * (0.1 * np.log(4.0) + 1.0),
            },
        ),
    ],
)
def test_scalings_of_rope(fields, settings, tmp_path):
    path = write(tmp_path / "m.gguf", **{f"llama__rope__{k}": v for k, v in fields.items()})
    config = pretrained.open_checkpoint(path).config
    for name, value in settings.items():
        assert getattr(config, name) == pytest.approx(value), name


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (16.0, 4096), (4.0, 1000)])
def test_divisors_of_any_llama3_scaling_come_back(factor, original, tmp_path):
    checkpoint = tiny_checkpoint("llama3", tokenizer=byte_level_tokenizer())
    checkpoint.config = dataclasses.replace(
        checkpoint.config, rope_factor=factor, rope_original_context=original, rope_theta=5e5
    )
    formats.write_checkpoint(tmp_path / "m.gguf", checkpoint, form="gguf")
    again = pretrained.open_checkpoint(tmp_path / "m.gguf").config
    assert not gguf_keys.find_lost_settings(checkpoint.config, again)


def test_recommended_sampling_goes_both_ways(tmp_path, capsys):
    path = write(tmp_path / "m.gguf", general__sampling__temp=0.7, general__sampling__top_k=40)
    checkpoint = pretrained.read_checkpoint(path)
    assert checkpoint.generation == {"do_sample": True, "temperature": 0.7, "top_k": 40}
    checkpoint.generation["max_new_tokens"] = 5
    formats.write_checkpoint(tmp_path / "n.gguf", checkpoint, form="gguf")
    assert "no place for max_new_tokens" in capsys.readouterr().err
    again = pretrained.open_checkpoint(tmp_path / "n.gguf")
    assert again.generation == {"do_sample": True, "temperature": 0.7, "top_k": 40}


# ---- damaged, foreign and split files


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    extra = {"blk.0.attn_q.scale": np.ones(4, np.float32)}
    with pytest.raises(UserError, match=r"tensor blk.0.attn_q.scale has no place"):
        pretrained.open_checkpoint(write(tmp_path / "m.gguf", tensors=extra))


def test_a_type_that_cannot_be_unpacked_is_named_with_a_way_out(tmp_path):
    path = write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", 24)  # I8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"output_norm.weight is stored as I8.*llama-quantize"):
        pretrained.open_checkpoint(path)
    data[at : at + 4] = struct.pack("<I", 250)
    path.write_bytes(data)
    with pytest.raises(UserError, match="type 250, which the installed package gguf does not know"):
        pretrained.open_checkpoint(path)


def test_a_truncated_file_says_where_it_ends(tmp_path):
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    last = rf"ends at byte {len(data) - 100:,} inside the tensor \S+.weight, which lies at bytes"
    with pytest.raises(UserError, match=last):
        pretrained.open_checkpoint(path)
    path.write_bytes(data[:3000])
    with pytest.raises(UserError, match=r"ends at byte 3,000 inside its header \(tokenizer"):
        pretrained.open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<I", 1), "of GGUF's version 1.*convert the model again"),
        (struct.pack("<I", 4), "of GGUF's version 4, and 2 and 3 are read"),
        (struct.pack(">I", 3), "big-endian GGUF file: turn it"),
        (struct.pack("<IQ", 3, 1 << 60), "the number of tensors at byte 8 is 1,152,921,504"),
    ],
)
def test_other_versions_and_orders_of_bytes(header, message, tmp_path):
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(b"GGUF" + header + data[4 + len(header) :])
    with pytest.raises(UserError, match=message):
        pretrained.open_checkpoint(path)


def split(path, count):
    """The file in `count` parts, as llama-gguf-split makes them."""
    reader = gguf.GGUFReader(path)
    paths = []
    for number in range(count):
        paths.append(path.with_name(f"s-{number + 1:05d}-of-{count:05d}.gguf"))
        writer = gguf.GGUFWriter(paths[-1], "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for key, field in reader.fields.items():
            if number == 0 and key.startswith(("llama.", "tokenizer.")):
                items = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], items)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_the_parts_of_a_split_file_are_read_together(tmp_path):
    whole = write(tmp_path / "m.gguf")
    paths = split(whole, 3)
    again = pretrained.read_checkpoint(paths[0])
    plain = pretrained.read_checkpoint(whole)
    assert np.array_equal(formats.probe_logits(again), formats.probe_logits(plain))
    assert again.tokenizer.fingerprint == plain.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"part 2 of 3: name .*s-00001-of-00003.gguf"):
        pretrained.open_checkpoint(paths[1])
    paths[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(UserError, match=r"s-00003-of-00003.gguf is missing"):
        pretrained.open_checkpoint(paths[0])
    _, second, third = split(whole, 3)
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(content)
    with pytest.raises(UserError, match=r"s-00002-of-00003.gguf is not part 2"):
        pretrained.open_checkpoint(paths[0])


# ---- writing


def byte_level_with(**changes):
    """conftest's byte-level tokenizer with parts of its tokenizer.json replaced."""
    content = dict(byte_level_tokenizer().files())
    described = json.loads(content["tokenizer.json"])
    for key, value in changes.items():
        if key == "added":
            described["added_tokens"][-1].update(value)
        elif key == "model":
            described["model"].update(value)
        else:
            described[key] = value
    content["tokenizer.json"] = json.dumps(described).encode()
    return PretrainedTokenizer(content, [263])


def split_step(pattern, behavior="Isolated", invert=False):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [step, last | {"use_regex": False}]}


LLAMA3 = PRE_TOKENIZERS["llama-bpe"].patterns[0]
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": split_step(r"\p{N}{1,2}")}, r"no name for \(.p.N..1,2.\)"),
        ({"pre_tokenizer": split_step(LLAMA3, "MergedWithNext")}, "the pre-tokenizer Split"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer Whitespace"),
        ({"pre_tokenizer": PREFIXED}, "add_prefix_space, a space before"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalisation Lowercase instead of none"),
        ({"model": {"end_of_word_suffix": "</w>"}}, 'end_of_word_suffix = "</w>"'),
        ({"model": {"ignore_merges": True}}, "ignore_merges = true with its pre-tokenizer"),
        ({"added": {"lstrip": True}}, "lstrip = true of the token '<.im_end.>'"),
        ({"added": {"single_word": True}}, "single_word = true of the token"),
    ],
)
def test_what_a_file_cannot_hold_of_a_tokenizer_is_refused(changes, message, tmp_path):
    checkpoint = tiny_checkpoint("llama", tokenizer=byte_level_with(**changes))
    with pytest.raises(UserError, match="a GGUF file cannot hold this tokenizer: .*" + message):
        formats.write_checkpoint(tmp_path / "m.gguf", checkpoint, form="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "gpt-2"),
        ({"pre_tokenizer": split_step(LLAMA3)}, "smaug-bpe"),
        ({"pre_tokenizer": split_step(LLAMA3), "model": {"ignore_merges": True}}, "llama-bpe"),
        ({"pre_tokenizer": split_step(LLAMA3, "Removed", True)}, "smaug-bpe"),
        ({"pre_tokenizer": split_step(PRE_TOKENIZERS["qwen2"].patterns[0])}, "qwen2"),
        ({"pre_tokenizer": split_step(PRE_TOKENIZERS["gpt-4o"].patterns[0])}, "gpt-4o"),
        ({"normalizer": {"type": "NFC"}}, "gpt-2"),
    ],
)
def test_the_name_that_is_written_is_the_one_that_is_meant(changes, name, capsys):
    fields = gguf_write_vocabulary.vocabulary_fields(byte_level_with(**changes), 264, "m")
    assert fields["tokenizer.ggml.pre"] == name
    said = capsys.readouterr().err
    assert ("note:" in said) == (name == "gpt-4o" or "normalizer" in changes)


def test_pieces_are_written_with_scores_that_say_the_same_merges():
    tokenizer = tokenizer_of(piece_fields())
    fields = gguf_write_vocabulary.vocabulary_fields(tokenizer, len(PIECES) + 2, "m")
    assert fields["tokenizer.ggml.token_type"][: len(KINDS)] == [
        3 if name == "<|im_end|>" else kind for name, kind in zip(PIECES, KINDS, strict=True)
    ]
    again = tokenizer_of(fields)
    texts = proof.probe_texts(tokenizer)
    proof.compare_tokenizers(
        proof.probe_tokenizer(tokenizer, texts), proof.probe_tokenizer(again, texts)
    )


def test_settings_that_a_file_cannot_hold_are_refused_by_name(tmp_path):
    checkpoint = tiny_checkpoint("yarn", tokenizer=byte_level_tokenizer())
    checkpoint.config = dataclasses.replace(checkpoint.config, rope_attention_factor=0.7)
    formats.write_checkpoint(tmp_path / "held.gguf", checkpoint, form="gguf")
    again = pretrained.open_checkpoint(tmp_path / "held.gguf").config
    assert again.rope_attention_factor == pytest.approx(0.7)
    checkpoint.config = dataclasses.replace(
        checkpoint.config, rope_beta_fast=512.0, rope_original_context=8192
    )
    with pytest.raises(UserError, match="does not carry the RoPE settings"):
        formats.write_checkpoint(tmp_path / "m.gguf", checkpoint, form="gguf")
    exact = tiny_checkpoint("gpt2", tokenizer=byte_level_tokenizer())
    exact.config = dataclasses.replace(exact.config, mlp="gelu_exact")
    with pytest.raises(UserError, match="does not carry mlp = 'gelu_exact'"):
        formats.write_checkpoint(tmp_path / "m.gguf", exact, form="gguf")


@pytest.mark.parametrize(("family", "bias"), [("llama", "all"), ("llama", "mlp")])
def test_biases_follow_from_the_tensors(family, bias, tmp_path):
    settings = dict(vocab_size=264, context=64, layers=2, **{**FAMILIES[family], "bias": bias})
    config = make_config(model=settings).model
    params = jax.tree.map(np.asarray, random_params(config))
    checkpoint = pretrained.Pretrained(config, params, byte_level_tokenizer())
    formats.write_checkpoint(tmp_path / "m.gguf", checkpoint, form="gguf")
    again = pretrained.read_checkpoint(tmp_path / "m.gguf")
    assert again.config.bias == bias
    np.testing.assert_allclose(
        formats.probe_logits(again), formats.probe_logits(checkpoint), atol=1e-5
    )


# ---- proof


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_an_export_that_cuts_text_otherwise_is_removed(form, tmp_path, monkeypatch):
    """Whatever a writer gets wrong, the copy is read again before success is reported."""
    source, target = tmp_path / "source", tmp_path / f"copy.{form}"
    checkpoint = tiny_checkpoint("llama", tokenizer=byte_level_tokenizer())
    formats.write_checkpoint(source, checkpoint)
    assert formats.convert(source, target, form=form)["texts cut alike"] == proof.TEXTS

    def lose_a_merge(tokenizer, *args):
        content = dict(tokenizer.files())
        described = json.loads(content["tokenizer.json"])
        described["model"]["merges"].pop()
        content["tokenizer.json"] = json.dumps(described).encode()
        return PretrainedTokenizer(content, tokenizer.eos_ids)

    monkeypatch.setattr(formats, "_hf_tokenizer", lose_a_merge)
    lost = tmp_path / f"lost.{form}"
    with pytest.raises(UserError, match=r"gives ids of .* instead of \[.*\nSo it was"):
        formats.convert(source, lost, form=form)
    assert not lost.exists()


def test_the_texts_of_a_proof_are_the_same_every_time_and_of_the_vocabulary():
    tokenizer = byte_level_tokenizer()
    texts = proof.probe_texts(tokenizer)
    assert texts == proof.probe_texts(byte_level_tokenizer()) and len(texts) == 1000
    seen = set(np.concatenate(tokenizer.encode_batch(texts)).tolist())
    assert len(seen) > 0.8 * tokenizer.vocab_size
    assert sum("<|im_end|>" in text for text in texts) > 20


def test_the_command_refuses_and_leaves_nothing(tmp_path):
    tokenizer = byte_level_with(normalizer={"type": "Lowercase"})
    formats.write_checkpoint(tmp_path / "source", tiny_checkpoint("llama", tokenizer=tokenizer))
    with pytest.raises(UserError, match="normalisation Lowercase"):
        convert.main([f"--from={tmp_path / 'source'}", f"--to={tmp_path / 'm.gguf'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

"""Files of tokenizers are honoured or refused by name, key by key."""

import json
import logging

import numpy as np
import pytest
from published_kinds import build

from gptjax.config.errors import UserError
from gptjax.tokenizer import chat_template, file_keys
from gptjax.tokenizer.pretrained import PretrainedTokenizer


def open_files(path, files, **changed):
    """The tokenizer of a folder. changed: {file with __ for its dot: content}."""
    path.mkdir(exist_ok=True)
    for name, data in {**files, **{k.replace("__", "."): v for k, v in changed.items()}}.items():
        (path / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return PretrainedTokenizer.from_folder(path, [])


def edited(kind, change):
    """The files of a kind, its tokenizer.json changed in place by `change`."""
    files = dict(build(kind).files)
    described = json.loads(files["tokenizer.json"])
    change(described)
    return files | {"tokenizer.json": json.dumps(described).encode()}


def added(token_id, content, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def template(*parts):
    """A post-processor; the parts are "A" for the text, or ids."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if part == "A"
        else {"SpecialToken": {"id": str(part), "type_id": 0}}
        for part in parts
    ]
    tokens = {str(i): {"id": str(i), "ids": [i], "tokens": ["x"]} for i in parts if i != "A"}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


REFUSED = {
    "dropout": ("gpt2", lambda d: d["model"].update(dropout=0.1), r"model.BPE.dropout = 0.1"),
    "a part": ("gpt2", lambda d: d.update(normalizer={"type": "NFKX"}), "no normalizer 'NFKX'"),
    "a part of a sequence": (
        "gpt2",
        lambda d: d["pre_tokenizer"]["pretokenizers"].append({"type": "Moon"}),
        "no pre-tokenizer 'Moon'",
    ),
    "a key of a part": (
        "llama",
        lambda d: d["pre_tokenizer"].update(moon=1),
        "the key 'pre_tokenizer.Metaspace.moon'",
    ),
    "a key of a model": ("gpt2", lambda d: d["model"].update(moon=1), "the key 'model.BPE.moon'"),
    "a key of the file": ("gpt2", lambda d: d.update(moon=1), "the key 'moon'"),
    "a key of a token": (
        "gpt2",
        lambda d: d["added_tokens"][0].update(moon=1),
        "the key 'added_tokens.moon'",
    ),
    "a suffix that is no end": (
        "gpt2",
        lambda d: d.update(post_processor=template("A", 5)),
        "writes 'token 5' after every text",
    ),
    "an id of two tokens": (
        "gpt2",
        lambda d: d["added_tokens"].append(added(7, "<g>")),
        r"give '\(' and '<g>' one id, 7",
    ),
    "a gap in a list": (
        "unigram_t5",
        lambda d: d["added_tokens"].append(added(700, "<g>")),
        "'<g>' the id 700: ids of added tokens must follow",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_honoured_in_a_tokenizer_json(case, tmp_path):
    kind, change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        open_files(tmp_path, edited(kind, change))


OLDER = {
    "an unknown class": (
        "gpt2_older_files",
        {"tokenizer_class": "Moon"},
        "tokenizer_class = 'Moon'",
    ),
    "no class of vocab.json": (
        "gpt2_older_files",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        "not known for vocab.json",
    ),
    "an unknown key": (
        "gpt2_older_files",
        {"tokenizer_class": "GPT2Tokenizer", "moon": True},
        "the key 'moon'",
    ),
    "a program": ("gpt2_older_files", {"auto_map": {"AutoTokenizer": "x.Y"}}, "its own program"),
    "ids of another class": (
        "sentencepiece_unigram",
        {"tokenizer_class": "T5Tokenizer"},
        "not known for tokenizer.model",
    ),
    "sampling": ("sentencepiece_bpe", {"sp_model_kwargs": {"alpha": 0.1}}, "sp_model_kwargs = "),
    "words that are never cut": ("bert_older_files", {"never_split": ["a"]}, "never_split = "),
    "two ids": (
        "gpt2",
        {"added_tokens_decoder": {"601": {"content": "a"}, "602": {"content": "a"}}},
        "'a' two ids, 601 and 602",
    ),
    "one id": (
        "gpt2",
        {"added_tokens_decoder": {"601": {"content": "a"}, " 601": {"content": "b"}}},
        "'a' and 'b' one id, 601",
    ),
    "a template's entry": (
        "gpt2",
        {"chat_template": [{"name": "default"}]},
        r"an entry of chat_template is \{'name': 'default'\}",
    ),
    "a template of numbers": ("gpt2", {"chat_template": {"rag": 3, "x": ""}}, "'rag' is a int"),
}


@pytest.mark.parametrize("case", OLDER)
def test_what_is_not_honoured_in_the_settings(case, tmp_path):
    kind, settings, message = OLDER[case]
    with pytest.raises(UserError, match=message):
        open_files(tmp_path, build(kind).files, tokenizer_config__json=settings)


# fields of protobuf, appended: (number << 3 | wire type), length, content
SENTENCEPIECE = {
    "spaces after words": (b"\x12\x03\xc0\x01\x01", "trainer_spec.treat_whitespace_as_suffix = 1"),
    "a newer field of the normaliser": (b"\x1a\x03\xa0\x06\x01", "'normalizer_spec.field 100'"),
    "a newer field of the file": (b"\x32\x01\x00", "the key 'field 6'"),
    "rules for decoding": (b"\x2a\x03\x12\x01\x41", "denormalizer_spec.precompiled_charsmap = 1"),
    "half a field": (b"\x1a\x09\x18", "tokenizer.model is damaged"),
}


@pytest.mark.parametrize("case", SENTENCEPIECE)
def test_what_is_not_honoured_in_a_tokenizer_model(case, tmp_path):
    files = build("sentencepiece_bpe").files
    appended, message = SENTENCEPIECE[case]
    with pytest.raises(UserError, match=message):
        open_files(tmp_path, files, tokenizer__model=files["tokenizer.model"] + appended)


@pytest.mark.parametrize("table", file_keys.TOKENIZER_TABLES, ids=lambda table: table.file)
def test_an_unknown_key_is_refused_or_cannot_matter(table, caplog):
    """Beside a tokenizer.json, which says all about ids and text, settings are only listed."""
    if table is file_keys.SETTINGS:
        with caplog.at_level(logging.DEBUG, logger="gptjax"):
            table.check({"moon": 1}, "there")
        assert "there: moon has no effect: tokenizer.json alone says" in caplog.text
        return
    with pytest.raises(UserError, match="there: the key 'moon'"):
        table.check({"moon": 1}, "there")


@pytest.mark.parametrize(
    ("parts", "prefix"),
    [
        (("A",), ()),
        ((3, "A"), (3,)),
        ((3, "A", 600), (3,)),
        (("A", 600), ()),
        ((3, 4, "A"), (3, 4)),
    ],
)
def test_a_prompt_begins_as_the_template_says_and_does_not_end(parts, prefix, tmp_path):
    files = edited("gpt2", lambda d: d.update(post_processor=template(*parts)))
    assert open_files(tmp_path, files).bos_ids == prefix


def test_the_settings_ask_for_a_first_token_that_the_template_lacks(tmp_path, capsys):
    settings = {"add_bos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    ours = open_files(tmp_path, build("gpt2").files, tokenizer_config__json=settings)
    assert ours.bos_ids == ()
    assert "add_bos_token = true and tokenizer.json false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "settings", "notes"),
    [
        ("gpt2", {"add_prefix_space": True}, "add_prefix_space = true and tokenizer.json false"),
        ("gpt2_with_prefix_space", {"add_prefix_space": True}, ""),
        ("llama", {"add_prefix_space": False}, "add_prefix_space = false and tokenizer.json true"),
        ("llama_legacy", {"add_prefix_space": True, "add_bos_token": True}, ""),
        ("bert_chinese", {"do_lower_case": False}, "do_lower_case = false and tokenizer.json true"),
        ("bert_chinese", {"do_lower_case": True, "strip_accents": None}, ""),
    ],
)
def test_settings_that_say_otherwise_are_named(kind, settings, notes, tmp_path, capsys):
    files = dict(build(kind).files)
    own = json.loads(files["tokenizer_config.json"])
    open_files(tmp_path, files, tokenizer_config__json=own | settings)
    said = capsys.readouterr().err
    assert notes in said
    assert bool(said) == bool(notes)


def test_a_control_token_that_merges_make_stays_text(tmp_path):
    """Its name is the product of a merge, as where a vocabulary was made of pieces alone."""

    def change(described):
        described["model"]["merges"] += [["<", "|"], ["<|", "end"], ["<|end", ">"], ["<|end>", "Ġ"]]
        new = ("<|", "end", "<|end", "<|end>", "<|end>Ġ")
        described["model"]["vocab"] |= {token: 700 + i for i, token in enumerate(new)}
        described["model"]["merges"] += [["e", "n"], ["en", "d"]]
        described["model"]["vocab"] |= {"en": 720}
        described["added_tokens"].append(added(703, "<|end>"))

    ours = open_files(tmp_path, edited("gpt2", change))
    ids = ours.encode("a<|end> b")
    assert 703 not in ids
    assert ours.decode(ids) == "a<|end> b"
    assert 703 in ours.encode_template("a<|end> b")


@pytest.mark.parametrize("kind", ["gpt2_older_files", "sentencepiece_bpe"])
def test_first_tokens_of_older_folders(kind, tmp_path):
    """GPT-2's class writes one where it is asked to, and Llama's unless it is told not to."""
    files = dict(build(kind).files)
    settings = json.loads(files["tokenizer_config.json"])
    for asked, expected in ((True, 1), (False, 0), (None, int(kind != "gpt2_older_files"))):
        changed = {**settings, "add_bos_token": asked, "bos_token": settings["eos_token"]}
        ours = open_files(tmp_path, files, tokenizer_config__json=changed)
        assert len(ours.bos_ids) == expected
        assert not expected or ours.bos_ids == ours.eos_ids


def test_truncation_and_padding_have_no_effect(tmp_path):
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    ours = open_files(tmp_path, edited("gpt2", lambda d: d.update(truncation=cut, padding=fill)))
    assert ours.encode("the king said") == build("gpt2").encode("the king said")


def test_a_gap_before_an_added_token_is_kept(tmp_path):
    """The library would number it anew."""
    ours = open_files(
        tmp_path, edited("gpt2", lambda d: d["added_tokens"].append(added(700, "<g>")))
    )
    assert ours.vocab_size == 701
    assert ours.encode_template("a<g>")[-1] == ours.control["<g>"] == 700
    assert ours.encode("a<g>")[-1] != 700


def test_the_class_is_that_of_the_model_where_none_is_named(tmp_path):
    files = build("qwen2_older_files").files
    settings = {"eos_token": "<|im_end|>"}
    for model_type, count in (("qwen2", 4), ("gpt2", 3)):
        ours = open_files(
            tmp_path,
            files,
            tokenizer_config__json=settings,
            config__json={"model_type": model_type},
        )
        assert len(ours.encode("10:4")) == 4
        assert (len(ours.encode("e\u0301")) == len(ours.encode("é"))) == (count == 4)


class TestTokensPastTheTable:
    """A tokenizer with more tokens than the model's table has rows."""

    @pytest.fixture
    def ours(self, tmp_path):
        files = edited("gpt2", lambda d: d["added_tokens"].append(added(601, "queen", False)))
        settings = {"pad_token": "[PAD]", "eos_token": "<|endoftext|>"}
        tokenizer = open_files(tmp_path, files, tokenizer_config__json=settings)
        assert tokenizer.vocab_size == 603
        tokenizer.restrict(601)
        return tokenizer

    def test_they_are_refused_where_they_are_used(self, ours):
        assert ours.vocab_size == len(ours.token_bytes) == 601
        assert max(ours.encode("a [PAD]")) < 601  # typed: stays text
        with pytest.raises(UserError, match=r"holds '\[PAD\]', token 602, .* has 601 rows"):
            ours.encode_template("a [PAD]")
        with pytest.raises(UserError, match="holds 'queen', token 601"):
            ours.encode("the queen")

    def test_a_run_keeps_the_limit(self, ours):
        again = PretrainedTokenizer.from_files(ours.files())
        assert (again.vocab_size, again.fingerprint) == (601, ours.fingerprint)
        with pytest.raises(UserError, match="queen"):
            again.encode("the queen")

    def test_the_text_s_own_tokens_must_fit(self, ours):
        with pytest.raises(UserError, match=r"cuts text into 600 tokens .* 500 rows: they do not"):
            ours.restrict(500)
        with pytest.raises(UserError, match=r"the end token's id 600 is past .* 600 rows"):
            ours.restrict(600)


def test_text_without_bytes_is_counted_in_the_text_around_it(tmp_path):
    ours = open_files(tmp_path, build("bert_chinese").files)
    assert not ours.joins_bytes
    with pytest.raises(UserError, match="decodes words, not bytes"):
        _ = ours.token_bytes
    ids = np.array([ours.encode("the king said"), ours.encode("我喜欢")])[:1]
    counts = ours.byte_counts(ids)
    assert counts.shape == ids.shape
    assert counts.sum() == len("the king said")
    assert ours.decode_bytes(ids[0].tolist()) == b"the king said"


def test_templates_by_name(tmp_path):
    """The one for tools where there are tools; without a default, their names are said."""
    named = {"default": "d {{ messages[0].content }}"}
    named["tool_use"] = "t {{ messages[0].content }} {{ tools | length }}"
    settings = {"eos_token": "<|endoftext|>", "chat_template": named}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    message = [{"role": "user", "content": "hi"}]
    for value in (named, listed):
        changed = settings | {"chat_template": value}
        ours = open_files(tmp_path, build("gpt2").files, tokenizer_config__json=changed)
        assert ours.decode(chat_template.encode(ours, message)) == "d hi"
        assert ours.decode(chat_template.encode(ours, message, tools=[{"x": 1}])) == "t hi 1"
    settings["chat_template"] = {"tool_use": "t", "rag": "r"}
    ours = open_files(tmp_path, build("gpt2").files, tokenizer_config__json=settings)
    with pytest.raises(UserError, match="named tool_use, rag, and none is named 'default'"):
        chat_template.encode(ours, message)


def token(content, **flags):
    return {"__type": "AddedToken", "content": content, "lstrip": False, **flags}


# The keys of tokenizer_config.json in published folders, by the files that stand beside it.
PUBLISHED = {
    "GPT-2": ("gpt2", {"add_prefix_space": False, "model_max_length": 1024, "vocab_size": 50257}),
    "Llama 3": (
        "llama3",
        {"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids"]},
    ),
    "Qwen 2.5": (
        "qwen2",
        {"add_bos_token": False, "add_prefix_space": False, "errors": "replace", "unk_token": None}
        | {"split_special_tokens": False, "bos_token": None, "extra_special_tokens": {}},
    ),
    "a processor of images": (
        "qwen2",
        {"processor_class": "XProcessor", "image_token": "<|image|>", "auto_map": {"A": "b.C"}}
        | {"fix_mistral_regex": True, "is_local": True, "backend": "tokenizers", "max_pixels": 9},
    ),
    "Mistral": (
        "llama_legacy",
        {"additional_special_tokens": [], "spaces_between_special_tokens": False, "from_slow": True}
        | {"use_default_system_prompt": False, "model_max_length": 1e30, "sp_model_kwargs": {}},
    ),
    "GPT-2, older": (
        "gpt2_older_files",
        {"tokenizer_class": "GPT2Tokenizer", "errors": "replace", "add_bos_token": False}
        | {"unk_token": token("<|endoftext|>"), "name_or_path": "gpt2", "pad_token": None}
        | {"special_tokens_map_file": None, "tokenizer_file": None, "model_max_length": 1024},
    ),
    "Qwen 2, older": (
        "qwen2_older_files",
        {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "split_special_tokens": False}
        | {"clean_up_tokenization_spaces": False, "padding_side": "left", "bos_token": None},
    ),
    "Llama 2, older": (
        "sentencepiece_bpe",
        {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, "legacy": False}
        | {"bos_token": token("<s>"), "eos_token": token("</s>"), "sp_model_kwargs": {}}
        | {"clean_up_tokenization_spaces": False, "model_max_length": 4096, "pad_token": None},
    ),
    "Code Llama, older": (
        "sentencepiece_bpe",
        {"tokenizer_class": "CodeLlamaTokenizer", "fill_token": "<FILL_ME>", "suffix_first": False}
        | {"eot_token": "\u2581<EOT>", "prefix_token": "\u2581<PRE>"},
    ),
    "Chinese GPT-2": (
        "bert_older_files",
        {"tokenizer_class": "BertTokenizer", "do_basic_tokenize": True, "never_split": None}
        | {"tokenize_chinese_chars": True, "max_len": 1024, "cls_token": "[CLS]"},
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_settings_are_read(case, tmp_path):
    kind, settings = PUBLISHED[case]
    files = build(kind).files
    own = json.loads(files["tokenizer_config.json"])
    ours = open_files(tmp_path, files, tokenizer_config__json=own | settings)
    assert ours.encode("the king said") == build(kind).encode("the king said")


def test_a_token_with_a_role_is_a_control_token(tmp_path):
    """Whatever tokenizer.json says of it, as in transformers."""
    files = edited("gpt2", lambda d: d["added_tokens"].append(added(601, "<|im_end|>", False)))
    ours = open_files(tmp_path, files, tokenizer_config__json={"eos_token": "<|im_end|>"})
    assert ours.eos_ids == (601,)
    assert 601 not in ours.encode("a<|im_end|>")
    assert ours.decode([*ours.encode("a"), 601]) == "a"
    plain = open_files(tmp_path, files, tokenizer_config__json={"eos_token": "<|endoftext|>"})
    assert plain.encode("a<|im_end|>")[-1] == 601  # no control token: a word that is never cut


@pytest.mark.parametrize("legacy", [True, False, None])
def test_added_tokens_of_a_tokenizer_model(legacy, tmp_path):
    """Text after one begins with a space of its own where it is legacy."""
    kind = build("sentencepiece_bpe")
    files = kind.files | {"added_tokens.json": json.dumps({"<x>": 600, "<end>": 601}).encode()}
    settings = json.loads(kind.files["tokenizer_config.json"])
    settings |= {"legacy": legacy, "additional_special_tokens": ["<end>"]}
    ours = open_files(tmp_path, files, tokenizer_config__json=settings)
    bare = open_files(
        tmp_path / "bare", files, tokenizer_config__json=settings | {"add_prefix_space": False}
    )
    assert bare.encode("king") != kind.encode("king")
    after = bare.encode("king") if legacy is False else kind.encode("king")
    assert ours.encode("the<x>king") == [*kind.encode("the"), 600, *after]
    assert ours.encode_template("the<end>king") == [*kind.encode("the"), 601, *after]
    assert 601 not in ours.encode("the<end>king")
    assert ours.decode(ours.encode("the <x>")) == "the <x>"


def test_a_vocabulary_of_tiktoken_is_told_from_a_model_of_sentencepiece(tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    files = {"tokenizer.model": b"IQ== 0\nIg== 1\n", "tokenizer_config.json": settings}
    with pytest.raises(UserError, match=r"is a vocabulary of tiktoken.*use the tokenizer\.json"):
        open_files(tmp_path, files)


@pytest.mark.parametrize("name", ["spiece.model", "tekken.json", "qwen.tiktoken", "vocab.json"])
def test_files_that_make_no_tokenizer_are_named(name, tmp_path, capsys):
    assert open_files(tmp_path, {}) is None
    assert capsys.readouterr().err == ""
    assert open_files(tmp_path, {name: {}}) is None
    assert f"has {name}, of which no tokenizer is made here" in capsys.readouterr().err

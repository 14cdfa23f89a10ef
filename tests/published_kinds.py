"""Tokenizers of the kinds that are published, rebuilt small, and strings that are hard for them.

Imports `tokenizers` and `sentencepiece` alone, so that any test can use it:

    kind = build("llama3")
    kind.files     # what stands in a Hugging Face folder, by file name
    kind.encode(text), kind.decode(ids)  # the library's own, without control tokens

To add a kind, write a function and decorate it with `_kind`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import random
from collections.abc import Callable, Sequence

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "The king said to the people that he will be here, and the people said no more of this.",
    "An ill deed of the old king and the queen; who goes there? A friend -- who?",
    "It's the 21st of May 2024, at 10:45; they'll pay $1,234.50 (that's 3.5% more).",
    "Der König sagte: schöne Grüße, Äpfel und Öl. Le château où l'été déjà vu, ça va.",
    "我喜欢你，天下没有不散的筵席。春眠不觉晓，处处闻啼鸟。日本語のテキストもあります。",
    "Привет, как дела? Мы говорим по-русски. Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "def add(first, second):\n    return first + second  # sum\n\nfor i in range(10):\n\tprint(i)",
    "🎉 emoji 👩‍👩‍👧 here 😀 नमस्ते दुनिया 안녕하세요 세계",
]
_WORDS = (
    "the king said people The KING don't They'LL playing played. camelCase a_b_c x "
    "Grüße château e\u0301te\u0301 ﬁne ＡＢＣ Ⅷ naïve İstanbul ß Σας Привет שלום مرحبا नमस्ते ไทย "
    "我 喜欢 天下没有 日本語 テキスト 안녕하세요 𝔘𝔫𝔦 🎉 😀 👩\u200d👩\u200d👧 🏽 🇩🇪 ☃\ufe0f "
    "\u200b \ufeff \u2581 \x00 \x7f \x85 \u2028 0 7 42 2024 1234567 3.14159 1,000 0x1F １２ "
    "def return x+1; if(a&&b){ } </div> #include <a.h> <0x41> \\n . , ! ? ... -- \" ' ( ) [ ] "
    "##ing < > | @ </w>"
)
WORDS = _WORDS.split(" ")
SPACES = [*("", "", " ", " ", " ", "  ", "    ", "\n", "\n\n"), *("\r\n", "\t", " \n ")]
SPACES += [" ", "\u00a0", "\u3000", "\u2003"]


def strings(count: int = 2000, seed: int = 0) -> list[str]:
    """Texts of all sorts, the same ones each time; none spells a control token of a kind."""
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", "a", " a", "a ", " a b ", *TEXT, "x" * 3000, "the king " * 400]
    while len(texts) < count:
        size = rng.choice((1, 2, 3, 5, 8, 20))
        parts = [rng.choice(SPACES)]
        for _ in range(size):
            parts += [rng.choice(WORDS), rng.choice(SPACES)]
        texts.append("".join(parts))
    return texts[:count]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A small tokenizer of a published kind.

    files: of a Hugging Face folder. encode, decode: the library's own, for texts that spell no
    control token. prefix: ids before every prompt. control: names of the control tokens. end: the
    end token. size: ids of the vocabulary.
    """

    name: str
    files: dict[str, bytes]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    prefix: list[int]
    control: list[str]
    end: str
    size: int


BUILDERS: dict[str, Callable[[], Kind]] = {}


def _kind(function: Callable[[], Kind]) -> Callable[[], Kind]:
    BUILDERS[function.__name__.strip("_")] = function
    return function


@functools.cache
def build(name: str) -> Kind:
    """The kind of this name; NAMES has them all."""
    return BUILDERS[name]()


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _of_library(
    name: str,
    tokenizer: Tokenizer,
    *,
    end: str,
    prefix: Sequence[str] = (),
    template: str = "",
    files: dict[str, bytes] | None = None,
    **settings: object,
) -> Kind:
    """A kind that is a tokenizer.json. template: of its post-processor."""
    if template:
        names = [part for part in template.split() if part != "$A"]
        ids = [(part, tokenizer.token_to_id(part)) for part in dict.fromkeys(names)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=ids
        )
    text = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(text)  # with the scores that the file has, to the last bit
    added = tokenizer.get_added_tokens_decoder()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, **settings}
    return Kind(
        name=name,
        files=files
        or {
            "tokenizer.json": text.encode(),
            "tokenizer_config.json": _json(config),
        },
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        prefix=[tokenizer.token_to_id(token) for token in prefix],
        control=[token.content for token in added.values() if token.special],
        end=end,
        size=max(tokenizer.get_vocab().values()) + 1,
    )


# ---- byte-level BPE

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|"
    r"'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _byte_level(cuts: list, special: Sequence[str] = CHATML, normalizer=None, size=600, **model):
    """A byte-level BPE with its control tokens at the end, as GPT-2, Llama 3 and Qwen have them."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def _split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@_kind
def gpt2() -> Kind:
    tokenizer = _byte_level([_GPT2], ["<|endoftext|>"])
    return _of_library("gpt2", tokenizer, end="<|endoftext|>", add_prefix_space=False)


@_kind
def gpt2_with_prefix_space() -> Kind:
    tokenizer = _byte_level([pre_tokenizers.ByteLevel(add_prefix_space=True)], ["</s>", "<s>"])
    return _of_library(
        "gpt2_with_prefix_space", tokenizer, end="</s>", template="</s> $A", prefix=["</s>"]
    )


@_kind
def llama3() -> Kind:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _byte_level([_split(LLAMA3), _BYTES], special, ignore_merges=True)
    bos = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", pair=None, special_tokens=bos
            ),
        ]
    )
    return _of_library(
        "llama3",
        tokenizer,
        end="<|end_of_text|>",
        prefix=["<|begin_of_text|>"],
        bos_token="<|begin_of_text|>",
        clean_up_tokenization_spaces=True,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )


@_kind
def qwen2() -> Kind:
    tokenizer = _byte_level([_split(QWEN2), _BYTES], normalizer=normalizers.NFC())
    return _of_library(
        "qwen2", tokenizer, end="<|im_end|>", add_prefix_space=False, errors="replace"
    )


@_kind
def o200k() -> Kind:
    tokenizer = _byte_level([_split(O200K), _BYTES], ["<|endoftext|>", "<|endofprompt|>"])
    return _of_library("o200k", tokenizer, end="<|endoftext|>")


@_kind
def smollm() -> Kind:
    """Cuts off each digit."""
    cuts = [pre_tokenizers.Digits(individual_digits=True), _GPT2]
    return _of_library("smollm", _byte_level(cuts), end="<|im_end|>")


@_kind
def neox() -> Kind:
    """NFC, and runs of spaces as tokens that are not special."""
    tokenizer = _byte_level([_GPT2], ["<|endoftext|>", "<|padding|>"], normalizers.NFC())
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    return _of_library("neox", tokenizer, end="<|endoftext|>")


@_kind
def nfkc_lowercase() -> Kind:
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer = _byte_level([_GPT2], normalizer=normalizers.Sequence(steps))
    return _of_library("nfkc_lowercase", tokenizer, end="<|endoftext|>")


@_kind
def added_tokens() -> Kind:
    """Tokens that swallow white space, are whole words, and are looked for in normalised text."""
    tokenizer = _byte_level([_GPT2], normalizer=normalizers.Lowercase())
    tokenizer.add_tokens(
        [
            AddedToken("king", single_word=True, normalized=False),
            AddedToken("people", lstrip=True, normalized=False),
            AddedToken("...", rstrip=True, normalized=False),
            AddedToken("playing", normalized=True),
            AddedToken("42", lstrip=True, rstrip=True, normalized=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return _of_library("added_tokens", tokenizer, end="<|endoftext|>")


# ---- pieces with U+2581 for a space


def _piece_trainer(special: Sequence[str], size: int = 700):
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )


def _plain_added(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """The tokenizer with only `special` as control tokens: training made some of the bytes too."""
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["content"] in special
    ]
    return Tokenizer.from_str(json.dumps(described))


def _byte_fallback(normalizer, pre_tokenizer, strip: bool, special=("<unk>", "<s>", "</s>")):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1, right=0)] if strip else []
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator(TEXT * 5, _piece_trainer(special))
    return _plain_added(tokenizer, special)


_PREPEND = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]


@_kind
def llama_legacy() -> Kind:
    tokenizer = _byte_fallback(normalizers.Sequence(_PREPEND), None, strip=True)
    return _of_library(
        "llama_legacy",
        tokenizer,
        end="</s>",
        template="<s> $A",
        prefix=["<s>"],
        add_bos_token=True,
        add_eos_token=False,
        legacy=True,
        bos_token={
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
        },
        pad_token=None,
        sp_model_kwargs={},
    )


@_kind
def llama() -> Kind:
    """Not legacy: the space is written before the first word alone."""
    cut = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _byte_fallback(None, cut, strip=True)
    return _of_library(
        "llama", tokenizer, end="</s>", template="<s> $A", prefix=["<s>"], legacy=False
    )


@_kind
def llama_with_bos_and_eos() -> Kind:
    tokenizer = _byte_fallback(normalizers.Sequence(_PREPEND), None, strip=True)
    return _of_library(
        "llama_with_bos_and_eos",
        tokenizer,
        end="</s>",
        template="<s> $A </s>",
        prefix=["<s>"],
        add_eos_token=True,
    )


@_kind
def gemma() -> Kind:
    """No space before the first word; line ends as tokens of their own."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = _byte_fallback(normalizers.Replace(" ", "\u2581"), cut, False, special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "\n", "\u2581\u2581")])
    return _of_library(
        "gemma", tokenizer, end="<eos>", template="<bos> $A", prefix=["<bos>"], bos_token="<bos>"
    )


@_kind
def metaspace_bpe() -> Kind:
    """No bytes: what is not in the alphabet becomes the unknown token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return _of_library("metaspace_bpe", tokenizer, end="</s>")


# ---- Unigram


def _unigram(**options) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    for name, value in options.items():
        setattr(tokenizer, name, value)
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return tokenizer


@_kind
def unigram_t5() -> Kind:
    """Metaspace, NFKC, and </s> after every text, as T5 has them."""
    steps = [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer = _unigram(
        normalizer=normalizers.Sequence(steps),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoder=decoders.Metaspace(prepend_scheme="always"),
    )
    return _of_library("unigram_t5", tokenizer, end="</s>", template="$A </s>")


@_kind
def unigram_without_metaspace() -> Kind:
    tokenizer = _unigram(pre_tokenizer=pre_tokenizers.UnicodeScripts(), decoder=decoders.Fuse())
    return _of_library("unigram_without_metaspace", tokenizer, end="</s>")


# ---- words


@_kind
def bert_chinese() -> Kind:
    """WordPiece, as Chinese GPT-2 models have it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return _of_library(
        "bert_chinese",
        tokenizer,
        end="[SEP]",
        template="[CLS] $A [SEP]",
        prefix=["[CLS]"],
        sep_token="[SEP]",
        cls_token="[CLS]",
        do_lower_case=True,
    )


def _word_level(name: str, cut) -> Kind:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = cut
    trainer = trainers.WordLevelTrainer(
        vocab_size=200, special_tokens=["<|endoftext|>", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return _of_library(name, tokenizer, end="<|endoftext|>")


@_kind
def word_level() -> Kind:
    """No decoder: the words are joined with spaces."""
    return _word_level("word_level", pre_tokenizers.Whitespace())


@_kind
def word_level_by_spaces() -> Kind:
    return _word_level("word_level_by_spaces", pre_tokenizers.WhitespaceSplit())


def _end_of_word(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<unk>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return tokenizer


@_kind
def gpt1() -> Kind:
    """BPE with </w> at the end of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _of_library("gpt1", _end_of_word(tokenizer), end="<|endoftext|>")


@_kind
def clip() -> Kind:
    """Bytes as letters, with </w> at the end of a word."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _of_library("clip", _end_of_word(tokenizer), end="<|endoftext|>")


# ---- the files before tokenizer.json


def _older(name: str, kind: Kind, tokenizer_class: str, **settings: object) -> Kind:
    """The same tokenizer as vocab.json, merges.txt, added_tokens.json and names of tokens."""
    described = json.loads(kind.files["tokenizer.json"])
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    special = [token["content"] for token in described["added_tokens"] if token["special"]]
    vocabulary = {t: i for t, i in described["model"]["vocab"].items() if t not in added}
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]
    ]
    config = {"tokenizer_class": tokenizer_class, "eos_token": kind.end, **settings}
    files = {
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "added_tokens.json": _json(added),
        "special_tokens_map.json": _json(
            {"eos_token": kind.end, "additional_special_tokens": special}
        ),
        "tokenizer_config.json": _json(config),
    }
    return dataclasses.replace(kind, name=name, files=files)


@_kind
def gpt2_older_files() -> Kind:
    return _older("gpt2_older_files", gpt2(), "GPT2Tokenizer", errors="replace")


@_kind
def qwen2_older_files() -> Kind:
    return _older("qwen2_older_files", qwen2(), "Qwen2Tokenizer", unk_token=None)


@_kind
def neox_older_files() -> Kind:
    return _older("neox_older_files", neox(), "GPTNeoXTokenizer")


@_kind
def bert_older_files() -> Kind:
    kind = bert_chinese()
    vocabulary = json.loads(kind.files["tokenizer.json"])["model"]["vocab"]
    files = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)).encode(),
        "tokenizer_config.json": _json(
            {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "eos_token": "[SEP]"}
        ),
    }
    return dataclasses.replace(kind, name="bert_older_files", files=files)


# ---- sentencepiece's own files


def _sentencepiece(name: str, settings: dict[str, object] | None = None, **options) -> Kind:
    """A folder with tokenizer.model alone. settings: of its tokenizer_config.json."""
    writer = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    lines = [line for text in TEXT * 5 for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=writer, **(defaults | options)
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **(settings or {}),
    }
    return Kind(
        name=name,
        files={
            "tokenizer.model": writer.getvalue(),
            "tokenizer_config.json": _json(config),
        },
        encode=sp.encode,
        decode=lambda ids: sp.decode([i for i in ids if not sp.is_unknown(i)]),
        prefix=[1],
        control=["<s>", "</s>"],
        end="</s>",
        size=sp.vocab_size(),
    )


@_kind
def sentencepiece_bpe() -> Kind:
    """Llama 2's settings."""
    return _sentencepiece("sentencepiece_bpe", split_digits=True, allow_whitespace_only_pieces=True)


@_kind
def sentencepiece_bpe_without_prefix() -> Kind:
    """Gemma's settings."""
    return _sentencepiece(
        "sentencepiece_bpe_without_prefix", add_dummy_prefix=False, split_digits=True
    )


@_kind
def sentencepiece_user_defined() -> Kind:
    symbols = ["<sep>", "\n", "playing", "\u2581\u2581"]
    return _sentencepiece(
        "sentencepiece_user_defined", user_defined_symbols=symbols, control_symbols=["<ctl>"]
    )


@_kind
def sentencepiece_unigram() -> Kind:
    return _sentencepiece("sentencepiece_unigram", model_type="unigram", vocab_size=480)


@_kind
def sentencepiece_defaults() -> Kind:
    """The trainer's own defaults: nmt_nfkc, extra white space removed, no bytes."""
    return _sentencepiece(
        "sentencepiece_defaults",
        model_type="unigram",
        vocab_size=300,
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )


@_kind
def sentencepiece_characters() -> Kind:
    return _sentencepiece("sentencepiece_characters", model_type="char", byte_fallback=False)


@_kind
def sentencepiece_words() -> Kind:
    return _sentencepiece("sentencepiece_words", model_type="word", byte_fallback=False)


NAMES = tuple(BUILDERS)

"""Tokenizers: round trips, identity, and refusals. References: plain Python, tiktoken on a small ranks file, tokenizers."""

import base64
import json
import os
import random
import socket
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from nanogpt import tokenizer as module
from nanogpt.errors import UserError
from nanogpt.tokenizer import from_json, from_name, from_tokenizer_json, make, train_bpe

ROOT = Path(__file__).parents[1]

TEXTS = [
    "",
    "the cat in the hat",
    "line\r\nline\r\n\r\n\ttab  \n trailing  ",
    "NUL \0 and bell \a and \x7f",
    "Grüße, 東京, e\u0301, 🙂👩‍👩‍👧",
    "a literal <|endoftext|> in the text",
    "\ufeffwith a BOM and \u2028 and \U0010ffff",
]
# 256 bytes, then what they merge to; ids in the order of merging, as tiktoken wants them.
MERGED = [b"th", b"he", b"in", b"the", b" the", b" in", b"\r\n", "é".encode(), b"at", b" c", b" cat", "🙂".encode()[:2]]
RANKS = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + MERGED)}


def write_ranks(path, ranks=RANKS):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items()))
    return str(path)


@pytest.fixture
def ranks_file(tmp_path):
    return write_ranks(tmp_path / "small.tiktoken")


@pytest.fixture(params=["byte", "char", "ranks"])
def tokenizer(request, ranks_file):
    return from_name({"ranks": ranks_file}.get(request.param, request.param), TEXTS)


# ---- text to ids and back -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.shape == (len(ids),)
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_end_of_text(tokenizer):
    ids = [*tokenizer.encode("the"), tokenizer.eot, *tokenizer.encode("hat")]
    assert tokenizer.decode(ids) == "the<|endoftext|>hat"
    assert tokenizer.decode_bytes(ids) == b"thehat"
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.eot == tokenizer.vocab_size - 1


def test_byte_ids_are_the_bytes():
    byte = from_name("byte")
    assert byte.encode("é\r\n").tolist() == [0xC3, 0xA9, 13, 10]
    assert (byte.vocab_size, byte.eot) == (257, 256)
    assert byte.decode([0xC3]) == "\ufffd" and byte.decode_bytes([0xC3]) == b"\xc3"


def test_char_ids_are_places_in_the_sorted_alphabet():
    char = from_name("char", ["banana", "é🙂a"])
    assert char.alphabet == "abné🙂"
    assert char.encode("🙂nab").tolist() == [4, 2, 0, 1]
    assert (char.vocab_size, char.eot) == (6, 5)
    assert char.token_bytes().tolist() == [1, 1, 1, 2, 4, 0]


def test_char_without_end_of_text_as_nanogpts():
    char = module.CharTokenizer("abné🙂", with_eot=False)
    assert (char.vocab_size, char.eot, char.decode(char.encode("🙂nab"))) == (5, None, "🙂nab")
    assert char.token_bytes().tolist() == [1, 1, 1, 2, 4]
    stored = json.loads(json.dumps(char.to_json()))
    assert from_json(stored).to_json() == stored
    assert char.fingerprint != from_name("char", ["abné🙂"]).fingerprint
    for change in ({"eot": 4}, {"eot": 5}, {"vocab_size": 6}):
        with pytest.raises(UserError, match="stored tokenizer"):
            from_json({**stored, **change})
    with pytest.raises(UserError, match="id 5"):
        char.decode([5])


def test_ranks_ids_are_tiktokens(ranks_file):
    ours = from_name(ranks_file)
    special = {"<|endoftext|>": 268}
    tiktokens = tiktoken.Encoding("x", pat_str=r50k_pat_str, mergeable_ranks=RANKS, special_tokens=special)
    for text in TEXTS:
        assert ours.encode(text).tolist() == tiktokens.encode_ordinary(text)
    assert ours.encode("the").tolist() == [RANKS[b"the"]]
    assert (ours.name, ours.vocab_size, ours.eot) == ("small", 269, 268)


def test_uint32_above_65536_ids(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(255) for b in range(256)]  # 65,536
    for n, dtype in ((65535, np.uint16), (65536, np.uint32)):  # and end-of-text
        ranks = {token: i for i, token in enumerate(tokens[:n])}
        tokenizer = from_name(write_ranks(tmp_path / str(n), ranks))
        assert (tokenizer.vocab_size, tokenizer.dtype) == (n + 1, dtype)
        assert tokenizer.encode("a").dtype == dtype


def test_unused_ids_decode_to_something(tmp_path):
    gap = from_name(write_ranks(tmp_path / "gap", RANKS | {b"hat": 270}))  # 268 and 269 are no tokens
    assert gap.eot == 271 and gap.decode([268, 270]) == "\ufffdhat"
    assert gap.token_bytes()[[268, 269, 270, 271]].tolist() == [0, 0, 3, 0]
    assert from_json(gap.to_json()).fingerprint == gap.fingerprint


def test_long_runs_are_quick(ranks_file):
    start = time.monotonic()
    for text in ("t" * 300_000, "=" * 300_000, " " * 300_000 + "the", "the\n" * 100_000):
        assert from_name(ranks_file).decode(from_name(ranks_file).encode(text)) == text
    assert time.monotonic() - start < 10  # quadratic: minutes


def test_text_that_cannot_be_encoded(tokenizer):
    with pytest.raises(UserError, match=r"character 3 .*U\+DC80"):
        tokenizer.encode("the\udc80")


def test_unknown_character():
    with pytest.raises(UserError, match=r"character 2, 'z' \(U\+007A\).* 3 characters.*byte"):
        from_name("char", ["abc"]).encode("abz")


@pytest.mark.parametrize("bad", [-1, 100_000])
def test_id_out_of_range(tokenizer, bad):
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(UserError, match=f"id {bad} .*{tokenizer.name}"):
            decode([0, bad])


# ---- a long text taken in two ---------------------------------------------------------------------------------------

# As Hugging Face spells them in the tokenizer.json of Llama 3, Qwen 2 and 3, and GPT-4o and its kin.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+")
GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ATOMS = ["the", "Größe", "É", "e\u0301", "東京", "हिन्दी", "שלום", "x1", "٣", "12345", "'", "'s", "'LL", "!", "/", "...",
         "🙂", "_", "、", "。", "，", "\u00a0", "<|endoftext|>", " ", " ", "  ", "\n", "\n", "\r\n", "\t", " \n",
         "\u2028", "\0"]
MIXED = "".join(random.Random(0).choices(ATOMS, k=1500))


def safe_cuts(text):
    """Where documents.py may cut: before these, after a letter or digit that always was one, and is one in NFC."""
    old = unicodedata.ucd_3_2_0.category
    return [i for i in range(1, len(text)) if text[i] in " \n、。，" and unicodedata.is_normalized("NFC", text[i - 1])
            and (old(text[i - 1])[0] == "L" or old(text[i - 1]) == "Nd")]


def cuts_in_two(tokenizer, text=MIXED):
    """Whether the ids of a text are those of its two parts, at every safe cut."""
    ids = tokenizer.encode(text).tolist()
    assert ids and tokenizer.encode(text).dtype == tokenizer.dtype
    return all(tokenizer.encode(text[:i]).tolist() + tokenizer.encode(text[i:]).tolist() == ids for i in safe_cuts(text))


def trained_json(*before, normalizer=None, added=(), **byte_level):
    """A JSONTokenizer of the tokenizers library itself: trained on MIXED, so that it merges whatever is not cut."""
    encoder = Tokenizer(models.BPE())
    encoder.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": not before, **byte_level})
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator([MIXED], trainer)
    encoder.add_tokens(list(added))
    return from_tokenizer_json(encoder.to_str(), "x", "x")


def split_by(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def published(monkeypatch, name):
    """A published encoding's pattern, with a vocabulary that joins what it does not cut."""
    ranks = trained_json().pieces[:1000]
    ranks = sorted(filter(None, ranks), key=len) + [b".\n", b"a ", b"e ", b"1 ", b"s\n", b"\n ", b" \n", b"/\n"]
    ranks = {piece: i for i, piece in enumerate(dict.fromkeys(ranks))}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    pattern = getattr(openai_public, name)()["pat_str"]
    special = {"<|endoftext|>": len(ranks)}
    return module.BPETokenizer(name, tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


@pytest.mark.parametrize("name", ["byte", "char", "bpe-350", *openai_public.ENCODING_CONSTRUCTORS])
def test_a_long_text_can_be_taken_in_two(monkeypatch, name):
    tokenizer = published(monkeypatch, name) if name in openai_public.ENCODING_CONSTRUCTORS else make(name, [MIXED])
    assert tokenizer.cuttable and len(safe_cuts(MIXED)) > 100 and cuts_in_two(tokenizer)


@pytest.mark.parametrize("arguments", [
    {}, {"before": LLAMA3}, {"before": QWEN, "normalizer": normalizers.NFC()}, {"before": GPT4O}, {"trim_offsets": False},
    {"added": [AddedToken("<think>", special=False)]},
], ids=["gpt2", "llama3", "qwen", "gpt4o", "gpt2 otherwise", "added"])
def test_a_known_tokenizer_json_too(arguments):
    arguments = dict(arguments)
    before = [split_by(arguments.pop("before"))] if "before" in arguments else []
    tokenizer = trained_json(*before, **arguments)
    assert tokenizer.cuttable and cuts_in_two(tokenizer)
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.cuttable and again.fingerprint == tokenizer.fingerprint


def test_exported_encodings_too(monkeypatch):
    from nanogpt.hf_tokenizer import _byte_level
    for name in ("cl100k_base", "o200k_base"):
        exported = _byte_level({character: i for character, i in module.byte_table().items()}, [], [],
                               published(monkeypatch, name).pattern)
        assert from_tokenizer_json(exported.to_str(), "x", "x").cuttable


@pytest.mark.parametrize("arguments, harmful", [
    ({"before": [split_by(r"\p{L}+\s?|.")]}, True),
    ({"before": [split_by(r"\S+\s*|\s+")]}, True),
    ({"use_regex": False}, True),
    ({"added": [AddedToken("the <", special=False)]}, True),
    ({"added": [AddedToken("东"), AddedToken("東京", special=False, rstrip=True)]}, True),
    ({"before": [pre_tokenizers.Digits(individual_digits=True)], "use_regex": True}, False),  # nobody has thought it over
    ({"normalizer": normalizers.Sequence([normalizers.NFC()])}, False),
], ids=["letters and blank", "words and blanks", "uncut", "added with blank", "added strips", "digits", "normalizers"])
def test_others_are_not_taken_in_two(arguments, harmful):
    arguments = dict(arguments)
    tokenizer = trained_json(*arguments.pop("before", ()), **arguments)
    assert not tokenizer.cuttable
    assert not (harmful and cuts_in_two(tokenizer, MIXED + "the < the <" * 9 + "東京 \n東京  "))


def test_an_unknown_pattern_of_tiktoken_is_not():
    special = {"<|endoftext|>": len(RANKS) + 1}
    ranks = RANKS | {b"the ": len(RANKS)}
    encoding = tiktoken.Encoding("x", pat_str=r"\S+\s?|\s", mergeable_ranks=ranks, special_tokens=special)
    tokenizer = module.BPETokenizer("x", encoding)
    assert not tokenizer.cuttable and not cuts_in_two(tokenizer, "the the the")


def test_no_python_integer_a_token(ranks_file):
    tokenizer, text = from_name(ranks_file), "the cat in the hat " * 20_000
    tracemalloc.start()
    try:
        ids = tokenizer.encode(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.flags.writeable and peak < 8 * len(ids)  # 4 bytes as they come, 2 as they go; a list: 8, and 28 each


# ---- a vocabulary of one's own --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus():
    """(texts to learn from, a text that is held out)"""
    files = sorted((ROOT / "nanogpt").glob("*.py"))[:12]
    texts = [file.read_text(encoding="utf-8") for file in files] + [MIXED, " \n" * 999]
    return texts, (ROOT / "tests" / "test_generate.py").read_text(encoding="utf-8") + "".join(TEXTS) + MIXED[::-1]


def test_trained_ids_are_those_of_the_tokenizers_library(corpus, tmp_path):
    texts, held_out = corpus
    ours = train_bpe(iter(texts), 1500)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1499, min_frequency=2, initial_alphabet=alphabet,
                                                          show_progress=False))
    merges = json.loads(theirs.to_str())["model"]["merges"]
    assert len(merges) == 1499 - 256
    table = module.byte_table()
    in_order = [bytes([i]) for i in range(256)] + [bytes(table[c] for c in a + b) for a, b in merges]
    assert ours.pieces == [*in_order, b""]
    assert (ours.name, ours.vocab_size, ours.eot, ours.dtype) == ("bpe-1500", 1500, 1499, np.uint16)
    for text in (*texts, held_out):
        tokens = [bytes(table[c] for c in token) for token in theirs.encode(text).tokens]
        assert [ours.pieces[i] for i in ours.encode(text)] == tokens
    assert len(ours.encode(held_out)) < 0.6 * len(held_out.encode())

    (tmp_path / "mine.tiktoken").write_bytes(ours.ranks_file())
    of_file = from_name(str(tmp_path / "mine.tiktoken"))
    assert (of_file.name, of_file.fingerprint) == ("mine", ours.fingerprint)
    assert from_json(json.loads(json.dumps(ours.to_json()))).to_json() == ours.to_json()
    assert make("bpe-1500", texts).fingerprint == ours.fingerprint
    assert make("char", texts).fingerprint == from_name("char", texts).fingerprint and make("byte").name == "byte"


@pytest.mark.parametrize("alphabet", ["ab", "aaab ", "ab1 é\n"])
def test_trained_ids_on_runs_and_ties(alphabet):
    """Text in which the same letters can be joined in many ways: where tiktoken, which keeps no merges, might go astray."""
    choose = random.Random(len(alphabet))
    texts = ["".join(choose.choices(alphabet, k=3000)) for _ in range(2)]
    ours, theirs = train_bpe(texts[:1], 320), Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts[:1], trainers.BpeTrainer(vocab_size=319, show_progress=False, min_frequency=2,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    table = module.byte_table()
    for text in (*texts, *(texts[1][i:i + 40] for i in range(0, 2900, 7))):
        tokens = [bytes(table[c] for c in token) for token in theirs.encode(text).tokens]
        assert [ours.pieces[i] for i in ours.encode(text)] == tokens


def test_training_is_the_same_in_any_process(corpus, monkeypatch):
    texts, _ = corpus
    code = "import sys; from nanogpt.tokenizer import train_bpe; from pathlib import Path\n" \
           "texts = [Path(name).read_text(encoding='utf-8') for name in sys.argv[1:]]\n" \
           "print(train_bpe(texts, 700).fingerprint)"
    names = [str(file) for file in sorted((ROOT / "nanogpt").glob("*.py"))[:12]]
    found = [subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads})
             for threads in ("1", "3")]
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) == 65
    assert {done.stderr for done in found} == {""}  # no bar where there is no terminal
    assert train_bpe(texts[:12], 700).fingerprint == found[0].stdout.strip()
    monkeypatch.setattr(module, "TRAINED_PIECE", 1000)  # what it is given at a time changes nothing; more than a line of dashes
    assert train_bpe(["\n".join(texts[:12])], 700).fingerprint == train_bpe(texts[:12], 700).fingerprint


def test_the_trainer_gets_a_text_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "TRAINED_PIECE", 100)
    for text in (MIXED, "", "a" * 1234, "a " * 600, " " * 500 + "a\n" * 300):
        pieces = list(module._pieces([text]))
        assert "".join(pieces) == text and all(0 < len(piece) <= 200 for piece in pieces)
    assert next(module._pieces(["a " * 75 + "b" * 60])) == "a " * 50 + "a"  # between words


@pytest.mark.parametrize("texts, size, message", [
    (["ab ab abc"], 1000, "too small for a vocabulary of 1000 ids: it gives 259.*take --train-bpe 259 or less"),
    ([], 258, "too small for a vocabulary of 258 ids: it gives 257"),
    (["ab ab"], 256, "256 ids is out of range; take 257"),
    (["ab ab"], 10**12, "out of range"),
    (["fine", "ab\ud800"], 300, r"character 2 .*U\+D800"),
])
def test_no_vocabulary(texts, size, message):
    with pytest.raises(UserError, match=message) as error:
        train_bpe(texts, size)
    assert "\n" not in str(error.value)


def test_what_the_texts_raise_is_passed_on():
    def texts():
        yield "ab " * 1000
        raise UserError("b.txt: is not UTF-8")
    with pytest.raises(UserError, match="b.txt: is not UTF-8"):
        train_bpe(texts(), 258)
    assert train_bpe(["ab ab"], 258).encode(" ab").tolist() == [32, 256]
    assert train_bpe([], 257).vocab_size == 257


# ---- identity -------------------------------------------------------------------------------------------------------

def test_json_round_trip(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.to_json() == tokenizer.to_json()
    assert again.encode(TEXTS[4]).tolist() == tokenizer.encode(TEXTS[4]).tolist()


def test_fingerprint_is_of_the_content(tmp_path):
    one = from_name(write_ranks(tmp_path / "one"))
    shuffled = from_name(write_ranks(tmp_path / "two.x", dict(reversed(RANKS.items()))))
    assert (one.name, shuffled.name) == ("one", "two")
    assert one.fingerprint == shuffled.fingerprint
    assert from_name("char", ["ab", "c"]).fingerprint == from_name("char", ["cba"]).fingerprint


def test_fingerprints_differ(tmp_path):
    swapped = RANKS | {b"at": RANKS[b" c"], b" c": RANKS[b"at"]}
    alphabets = ["abc", "abd", "abcd", bytes(range(128)).decode()]
    tokenizers = [from_name("byte")] + [from_name("char", [alphabet]) for alphabet in alphabets]
    tokenizers += [from_name(write_ranks(tmp_path / str(i), ranks)) for i, ranks in
                   enumerate([RANKS, swapped, {bytes([b]): b for b in range(256)}])]
    assert len({t.fingerprint for t in tokenizers}) == len(tokenizers)


def test_fingerprint_tells_patterns_apart_but_not_their_spelling():
    def fingerprint(pattern):
        special = {"<|endoftext|>": len(RANKS)}
        encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=RANKS, special_tokens=special)
        return module.BPETokenizer("x", encoding).fingerprint

    gpt2_of_2019 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    assert fingerprint(gpt2_of_2019) == fingerprint(r50k_pat_str)
    assert fingerprint(r"\s|\S+") != fingerprint(r50k_pat_str)


@pytest.mark.parametrize("change", [
    {"alphabet": "abcdf"}, {"alphabet": "abcde"[::-1]}, {"alphabet": "abcd"}, {"alphabet": ""}, {"alphabet": 5},
    {"alphabet": None}, {"alphabet": ["a"]}, {"vocab_size": 7}, {"eot": 0}, {"eot": None},
    {"fingerprint": "0" * 64}, {"name": "byte"},
    {"alphabet": "abcd\udc80"},
])
def test_changed_char_is_refused(change):
    stored = from_name("char", ["abcde"]).to_json()
    assert from_json(stored)
    with pytest.raises(UserError, match="stored tokenizer"):
        from_json({**stored, **change})


def test_changed_ranks_are_refused(ranks_file):
    stored = from_name(ranks_file).to_json()
    ranks = stored["ranks"]
    swapped = [*ranks[:256], ranks[257], ranks[256], *ranks[258:]]
    for bad in (swapped, ranks[:-1], ranks[1:], [*ranks, "YWJj"], [*ranks[:-1], "?"], [*ranks, 5], [], None, "abc", 3):
        with pytest.raises(UserError, match="stored tokenizer"):
            from_json({**stored, "ranks": bad})


def test_damaged_json_is_refused(ranks_file, tmp_path):
    byte = from_name("byte").to_json()
    for bad in (None, [], "byte", {}, {"name": 3}, {"name": []}, {**byte, "name": "gtp2"}, {**byte, "name": "char"},
                {**byte, "name": ranks_file},  # a description never opens a file
                {key: byte[key] for key in ("name", "eot", "vocab_size")}):
        with pytest.raises(UserError, match="stored tokenizer"):
            from_json(bad)


# ---- where tokenizers come from -------------------------------------------------------------------------------------

def test_char_of_no_text():
    with pytest.raises(UserError, match="empty"):
        from_name("char", ["", ""])


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="did you mean gpt2"):
        from_name("gtp2")
    with pytest.raises(UserError, match="neither a tokenizer nor a ranks file; take char, byte, gpt2"):
        from_name(str(tmp_path))


@pytest.mark.parametrize("content, problem", [
    (b"", "no token for byte 0"),
    (b"YQ== 0\n", "no token for byte 0, 255 of 256"),
    (b"YQ== 0\nno ranks file at all\n", "line 2 is b'no ranks file"),
    (b"YQ== one\n", "line 1"),
    (b"Y? 1\n", "line 1"),
    (b"YQ== 0\nYQ== 1\n", "line 2"),
    (b"\xff\xfe\x00", "line 1"),
])
def test_bad_ranks_files(tmp_path, content, problem):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.tiktoken: .*{problem}") as error:
        from_name(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{b"the": 0}, {b"the": -1}, {b"the": 10**12}])
def test_bad_numbering(tmp_path, change):
    with pytest.raises(UserError, match="does not number its tokens"):
        from_name(write_ranks(tmp_path / "bad", RANKS | change))


@pytest.fixture
def no_vocabulary(monkeypatch, tmp_path):
    """An empty cache, and a proxy in place of the network: (folder, function that sets the proxy's port)."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def proxy(port):
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    return proxy


def check_gpt2_is_explained(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        from_name("gpt2")
    message = str(error.value)
    assert time.monotonic() - start < 5
    assert "\n" not in message and str(tmp_path) in message and "TIKTOKEN_CACHE_DIR" in message
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):
        assert name in message  # under which tiktoken looks for the two files: sha1sum of their addresses
    assert list(tmp_path.iterdir()) == []


def test_gpt2_without_a_network(no_vocabulary, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        no_vocabulary(unused.getsockname()[1])
        check_gpt2_is_explained(tmp_path)


def test_gpt2_behind_a_network_that_never_answers(no_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.3)
    own = tiktoken.load.read_file
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        no_vocabulary(silent.getsockname()[1])
        check_gpt2_is_explained(tmp_path)
    assert tiktoken.load.read_file is own


def test_gpt2_with_a_damaged_cache(no_vocabulary, tmp_path):
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(b"#version: 0.2\nt h\n")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        no_vocabulary(unused.getsockname()[1])
        check_gpt2_is_explained(tmp_path)

"""Tokenizers: round trips, identity, and refusals. References: plain Python, and tiktoken on a small ranks file."""

import base64
import json
import socket
import time

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from nanogpt import tokenizer as module
from nanogpt.errors import UserError
from nanogpt.tokenizer import from_json, from_name

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

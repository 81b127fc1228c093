"""Documents: whatever the chunks are, what is read is what is there, byte for byte; and where a text may be cut.

References: bytes.split, bytes.decode and json of Python on whole files; ids of whole texts by tiktoken.
"""

import gzip
import io
import json
import os
import pickle
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tiktoken_ext.openai_public as openai
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import documents
from nanogpt.documents import InMemory, Source, Task, is_utf8, spool_stdin, text_files, unescape
from nanogpt.errors import UserError
from nanogpt.hub import HuggingFace

NASTY = ["", "a", "\ufeffBOM", "\r\n\r\n", "\0\0", "🙂" * 40, "one two\nthree " * 30, "<|endoftext|>", "é", "x" * 300,
         "語。語、語，" * 30, "١٢٣ ١٢٣\n" * 9, "last \t"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Chunks and blocks of so few bytes that every text has many."""
    monkeypatch.setattr(documents, "CHUNK", 50)


def texts_of(inputs, val_fraction=0.0, cuttable=True):
    """{number: text or why it is left out} of all documents, read as the engine does: in order, and each task alone."""
    source = inputs.scan(val_fraction, cuttable, progress=False)
    tasks = [Task(*row) for row in source.tasks.tolist()]
    assert all(task.documents == 1 for task in tasks if not (task.begins and task.ends))
    found = {}
    for reader, order in ((source, range(len(tasks))), (pickle.loads(pickle.dumps(source)), reversed(range(len(tasks))))):
        pieces = {}
        for task, data in reader.feed(order):
            its = list(pickle.loads(pickle.dumps(reader)).read(task, data) if reader is source else reader.read(task, data))
            if task.begins and task.ends:
                assert [document.number for document in its] == list(range(task.first, task.first + task.documents))
            for document in its:
                assert document.name == source.name(document.number)
                assert (document.text is None) == bool(document.left_out)
                pieces.setdefault(document.number, []).append((task.start, document))
        for number, parts in pieces.items():
            parts = [document for _, document in sorted(parts, key=lambda part: part[0])]
            assert len(parts) == 1 or not any(part.left_out for part in parts)  # is counted once
            assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
            assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
            text = parts[0].left_out or ("".join(part.text for part in parts) if isinstance(parts[0].text, str)
                                         else parts[0].text)
            assert found.setdefault(number, text) == text
    assert sorted(found) == list(range(source.documents))
    return [found[number] for number in sorted(found)], source


def pack(path, data: bytes):
    """Writes data, packed as the name says, in two frames."""
    middle = len(data) // 2
    if path.suffix == ".gz":
        data = gzip.compress(data[:middle]) + gzip.compress(data[middle:])
    elif path.suffix == ".zst":
        data = b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:middle], data[middle:]))
    path.write_bytes(data)
    return path


def parquet(path, texts, group=7, **columns):
    table = pyarrow.table({"id": range(len(texts)), "text": texts, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


# ---- every document, exactly ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("cuttable", [True, False])
def test_text_files(tmp_path, suffix, cuttable):
    paths = [str(pack(tmp_path / f"{i:02}.txt{suffix}", text.encode())) for i, text in enumerate(NASTY)]
    found, source = texts_of(text_files(paths), cuttable=cuttable)
    assert found == [text or "empty" for text in NASTY]
    assert source.bytes == sum(len(text.encode()) for text in NASTY) and source.seekable == (not suffix)
    assert source.name(6) == paths[6] and source.files == paths and list(source.texts()) != []
    assert "".join(source.texts()) == "".join(NASTY)
    lengths = source.tasks[:, 2] - source.tasks[:, 1]
    assert [source.weight(Task(*row)) for row in source.tasks.tolist()] == lengths.tolist()
    assert (len(source.tasks) > len(paths)) == cuttable
    if cuttable:  # a text with blanks comes in pieces of a chunk and a word
        assert lengths[source.tasks[:, 3] == 6].max() < 60
        assert lengths[source.tasks[:, 3] == 10].max() < 60
    assert lengths[source.tasks[:, 3] == 9].tolist() == [300]


SEPARATORS = [b"\n", b"\r\n", b"\n\n", b"<|endoftext|>", b"aba", "—§—".encode(), b"\0", b"\xff", b"#" * 70]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_separators(tmp_path, separator, suffix):
    data = [separator.join(text.encode() for text in NASTY), separator.join(text.encode() for text in NASTY * 3) + separator,
            b"ababab" * 20 + separator * 5, b"\n" * 501, separator[:-1] or b"x", b"", separator]
    paths = [str(pack(tmp_path / f"{i}{suffix}", each)) for i, each in enumerate(data)]
    expected = []
    for each in data:
        parts = each.split(separator)
        expected += parts[:-1] if parts[-1] == b"" else parts
    found, source = texts_of(text_files(paths, separator=separator, errors="replace"))
    assert found == [text.decode("utf-8", "replace") or "empty" for text in expected]
    assert (source.tasks[:, 4] > 1).any() == (len(separator) < 50) and source.identity["separator"] is not None
    where = [row[0] for row in source.tasks.tolist() for _ in range(row[4]) if row[5]]
    for number in (0, len(expected) // 2, len(expected) - 1):
        in_file = number - where.index(where[number])
        assert source.name(number) == f"{paths[where[number]]}, document {in_file + 1}"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2) for i, text in enumerate(NASTY)]
    lines[3:3] = ["", "  ", '{"text": null}']
    data = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    expected = NASTY[:3] + ["", "", ""] + NASTY[3:]
    for end in (b"", b"\n"):
        found, source = texts_of(text_files([str(pack(tmp_path / f"a.jsonl{suffix}", data + end))]))
        assert found == [text or "empty" for text in expected]
        assert source.name(4).endswith(f"a.jsonl{suffix}:5") and len(source.tasks) > 5
    assert texts_of(text_files([str(pack(tmp_path / f"b.ndjson{suffix}", data))], format="text"))[0] == [data.decode()]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
@pytest.mark.parametrize("chunk, limit", [(50, 8), (50, 1), (10**6, 8)])
def test_parquet(tmp_path, monkeypatch, kind, chunk, limit):
    monkeypatch.setattr(documents, "CHUNK", chunk)
    monkeypatch.setattr(documents, "GROUP", limit)
    texts = [None, *NASTY, *map(str, range(100)), None]
    column = pyarrow.array([text and text.encode() for text in texts] if kind == pyarrow.binary() else texts).cast(kind)
    paths = [str(parquet(tmp_path / f"{group}.parquet", column, group)) for group in (1, 7, 1000)]
    found, source = texts_of(text_files(paths))
    assert found == [text or "empty" for text in texts] * 3
    assert source.name(2 * len(texts) + 5) == f"{paths[2]}, row 5" and source.documents == 3 * len(texts)
    fed = {task.file for task, data in source.feed(range(len(source.tasks))) if data is not None}
    groups = sum(-(-len(texts) // group) for group in (1, 7, 1000))
    assert (2 in fed) == (chunk == 50) != source.seekable and (len(source.tasks) > groups) == (chunk == 50)
    assert {source.weight(Task(*row)) for row in source.tasks.tolist()} == {chunk}


@pytest.mark.parametrize("kind", ["json", "csv", "arrow", "text"])
def test_what_datasets_reads(tmp_path, monkeypatch, kind):
    """Other files of a dataset than Parquet, through load_dataset and its Arrow files."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"line {i} é🙂" * (1 + i % 3) for i in range(50)]
    folder = tmp_path / "data"
    folder.mkdir()
    data = datasets.Dataset.from_dict({"text": texts})
    if kind == "arrow":
        with pyarrow.OSFile(str(folder / "train.arrow"), "wb") as sink, \
                pyarrow.ipc.new_stream(sink, data.data.table.schema) as writer:
            for batch in data.data.table.to_batches(max_chunksize=9):
                writer.write_batch(batch)
    elif kind == "text":
        (folder / "train.txt").write_text("\n".join(texts))
    else:
        getattr(data, f"to_{kind}")(folder / f"train.{'jsonl' if kind == 'json' else kind}")
    found, source = texts_of(HuggingFace(str(folder)))
    assert found == texts and len(source.tasks) > 5
    assert source.identity["files"] == 1
    assert source.identity["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    with pytest.raises(UserError, match="^--streaming: reads Parquet files in place, and .* has files like train"):
        HuggingFace(str(folder), streaming=True).scan(0, True, progress=False)


def test_in_memory():
    for items in ([(f"doc {i}", text) for i, text in enumerate(NASTY)], [("a", ("", "c")), ("b", ("p" * 99, "c"))]):
        found, source = texts_of(InMemory(items))
        assert found == [text or "empty" for _, text in items] and source.name(1) == items[1][0]
        assert source.pairs == isinstance(items[0][1], tuple)


# ---- one text for both splits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("alphabet", ["a b", "é🙂語 ", "a\xe9"])
def test_the_last_part_of_a_single_text(tmp_path, suffix, alphabet):
    text = (alphabet * 400)[:401]
    data = text.encode("latin-1" if alphabet == "a\xe9" else "utf-8")
    text = data.decode("utf-8", "replace")
    path = str(pack(tmp_path / f"a{suffix}", data))
    for fraction in (0.1, 0.5, 0.999, 0.0001):
        cut = int(len(text) * (1 - fraction))  # as in nanoGPT
        found, source = texts_of(text_files([path], errors="replace"), fraction)
        assert found == [text[:cut] or "empty", text[cut:]] and source.single
        assert source.name(0) == source.name(1) == path
    assert texts_of(text_files([path], errors="replace"))[0] == [text]
    pack(tmp_path / f"b{suffix}", data + b"--")
    for name, separator in (("a", b"--"), ("b", b"--")):  # that does not come, or only at the end
        inputs = text_files([str(tmp_path / f"{name}{suffix}")], errors="replace", separator=separator)
        found, source = texts_of(inputs, 0.1)
        assert found == [text[:int(len(text) * (1 - 0.1))], text[int(len(text) * (1 - 0.1)):]] and source.single
    assert texts_of(text_files([path, path], errors="replace"), 0.1)[0] == found  # the same file twice is one
    found, source = texts_of(InMemory([("a", text)]), 0.1)
    assert found == [text[:int(len(text) * (1 - 0.1))], text[int(len(text) * (1 - 0.1)):]] and source.single
    with pytest.raises(UserError, match=f"^{path}: is not UTF-8") if data != text.encode() else io.BytesIO():
        texts_of(text_files([path], errors="skip"), 0.1)


# ---- what is not UTF-8, or no record --------------------------------------------------------------------------------

def test_text_that_is_not_utf8(tmp_path):
    data = [b"good " * 40, b"good " * 40 + b"\xe9\xe9 " * 30, b"\xff", "é".encode()[:1] + b" ok", b"\xed\xa0\x80 " * 20,
            b"ok"]
    for each in (*data, b"", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xf4\x8f\xbf\xbf", "é🙂".encode()[:-1], b"\0", b"a" * 99 + b"\x80"):
        assert is_utf8(each, much=True) == is_utf8(each, much=False) == (each.decode(errors="ignore").encode() == each)
    for separator in (None, b"=="):
        if separator:
            (tmp_path / "all").write_bytes(separator.join(data))
            paths = [str(tmp_path / "all")]
        else:
            paths = [str(tmp_path / str(i)) for i in range(len(data))]
            for path, each in zip(paths, data):
                with open(path, "wb") as file:
                    file.write(each)
        for cuttable in (True, False):
            found, _ = texts_of(text_files(paths, errors="replace", separator=separator), cuttable=cuttable)
            assert found == [each.decode("utf-8", "replace") for each in data]
            found, _ = texts_of(text_files(paths, errors="skip", separator=separator), cuttable=cuttable)
            assert found == [data[0].decode(), *["undecodable"] * 4, "ok"]
            where = f"{paths[0]}, document 2" if separator else paths[1]
            at = 200 + (len(data[0] + separator) if separator else 0)  # in the file
            with pytest.raises(UserError, match=f"^{where}: is not UTF-8 at byte {at}; leave it out, or take --errors r"):
                text_files(paths, separator=separator).scan(0, cuttable, progress=False)  # before anything is tokenized


BAD_LINES = [(b"{'text': 1}", "is not JSON"), (b'["text"]', "is no JSON object"),
             (b'{"txt": "a", "b": 1}', "has no text, but 'txt', 'b'"),
             (b'{"text": 7}', "its text is no string, but int"), (b'{"text": "a\xff"}', "is not UTF-8 at byte 11"),
             (b'{"text": "a\\ud800b"}', "its text holds half of a surrogate pair"), (b"[" * 9999, "is not JSON")]


@pytest.mark.parametrize("line, said", BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_bad_lines(tmp_path, line, said):
    good = b'{"text": "a\\ud83d\\ude42"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(UserError, match=rf"^{path}:2: {said}.*; a line is {{\"text\": \"…\"}}, and --errors skip"):
        texts_of(text_files([str(path)]))
    assert texts_of(text_files([str(path)], errors="skip"))[0] == ["a🙂", "undecodable", "a🙂"]
    if b"\xff" in line or b"ud800" in line:
        assert texts_of(text_files([str(path)], errors="replace"))[0][1] in ("a\ufffd", "a\ufffdb")
    else:
        with pytest.raises(UserError, match=f"^{path}:2: {said}"):
            texts_of(text_files([str(path)], errors="replace"))


def test_cells_that_are_not_utf8(tmp_path):
    path = str(parquet(tmp_path / "a.parquet", pyarrow.array([b"a", b"\xff\xe9", b"b"])))
    assert texts_of(text_files([path], errors="replace"))[0] == ["a", "\ufffd\ufffd", "b"]
    assert texts_of(text_files([path], errors="skip"))[0] == ["a", "undecodable", "b"]
    with pytest.raises(UserError, match=f"^{path}, row 1: is not UTF-8 at byte 0"):
        texts_of(text_files([path]))


def test_pairs(tmp_path):
    half = '{"prompt": "", "completion": "\\udc00"}'
    (tmp_path / "a.txt").write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": ""}\n' + half)
    inputs = text_files([str(tmp_path / "a.txt")], pairs=True, errors="skip")
    found, source = texts_of(inputs)
    assert inputs.pairs and source.pairs and found == [("p", "c"), "empty", "no pair", "no pair"]
    (tmp_path / "a.txt").write_text(half)
    assert texts_of(text_files([str(tmp_path / "a.txt")], pairs=True, errors="replace"))[0] == [("", "\ufffd")]


# ---- refusals -------------------------------------------------------------------------------------------------------

def test_damaged_files_are_named(tmp_path):
    data = np.random.default_rng(0).bytes(2000)
    for suffix in (".gz", ".zst"):
        whole = pack(tmp_path / f"a{suffix}", data).read_bytes()
        damages = [whole[:-3], whole[:400], b"garbage", whole + b"garbage"]
        if suffix == ".gz":  # the frames of the others here have no checksum
            damages.append(whole[:700] + bytes([whole[700] ^ 255]) + whole[701:])
        for damage in damages:
            (tmp_path / f"a{suffix}").write_bytes(damage)
            with pytest.raises(UserError, match=rf"^{tmp_path}/a{suffix}: is damaged, or of another kind than its name"):
                texts_of(text_files([str(tmp_path / f"a{suffix}")], errors="replace"))
    whole = parquet(tmp_path / "a.parquet", NASTY).read_bytes()
    for damage in (whole[:-3], b"", b"garbage " * 9):
        (tmp_path / "a.parquet").write_bytes(damage)
        with pytest.raises(UserError, match=rf"^{tmp_path}/a.parquet: is damaged, or of another kind"):
            texts_of(text_files([str(tmp_path / "a.parquet")]))
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match="a.parquet.gz: a Parquet file is read from its end on; unpack it first"):
        text_files([str(tmp_path / "a.parquet.gz")])


def test_columns(tmp_path):
    path = str(parquet(tmp_path / "a.parquet", ["x", "y"], more=["other", "text"], lists=[[1], [2]]))
    assert texts_of(text_files([path], column="more"))[0] == ["other", "text"]
    with pytest.raises(UserError, match=f"^{path}: has no column 'txt', but 'id', 'text', 'more', 'lists'; name the"):
        texts_of(text_files([path], column="txt"))
    for column in ("id", "lists"):
        with pytest.raises(UserError, match=f"^{path}: its column '{column}' is of type .*, no text; name"):
            texts_of(text_files([path], column=column))


def test_nothing_there(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst"):
        path = str(pack(tmp_path / name, b""))
        with pytest.raises(UserError, match=f"^{path}: holds no text; give files that are not empty$"):
            text_files([path]).scan(0.1, True, progress=False)
    with pytest.raises(UserError, match="^--document-separator: is for text files, and there is none"):
        text_files([str(tmp_path / "a.jsonl")], separator=b"\n")


def test_separators_as_typed():
    assert unescape(r"\n--\t\r\0\\n\x41é\xFF ") == b"\n--\t\r\0\\nA\xc3\xa9\xff "
    for wrong in (r"\q", r"\x4", "a\\", r"\é"):
        with pytest.raises(UserError, match=r"^--document-separator: \\.* is none of \\n \\t \\r \\0 \\\\ \\xNN"):
            unescape(wrong)
    with pytest.raises(UserError, match="^--document-separator: is empty"):
        unescape("")


# ---- the same or not ------------------------------------------------------------------------------------------------

def test_identity(tmp_path):
    """Contents, order and boundaries count, names and packing do not; and a source comes back from a folder as it was."""
    def digest(*contents, suffix=".txt", **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for i, content in enumerate(contents):
            pack(folder / f"{i}{suffix}", content)
        source = text_files([str(folder)], **options).scan(0, True, progress=False)
        assert source.identity["files"] == len(contents) == len(source.files)
        assert source.identity["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        source.save(folder)
        again = Source.load(folder)
        assert (again.tasks == source.tasks).all() and list(again.texts()) == list(source.texts())
        assert again.identity == source.identity and again.name(0) == source.name(0) and again.changed() is None
        return source.identity["xxh3_128"]

    same = digest(b"one", b"two" * 99)
    assert same == digest(b"one", b"two" * 99) == digest(b"one", b"two" * 99, suffix=".gz")
    others = [digest(b"two" * 99, b"one"), digest(b"onet", b"wo" + b"two" * 98), digest(b"one" + b"two" * 99),
              digest(b"one"), digest(b"one", b"", b"two" * 99), digest(b"one", b"two" * 98 + b"twO")]
    assert len({same, *others}) == 7
    lines = b'{"text": "a"}\n'
    assert digest(lines, suffix=".jsonl") != digest(lines)


def test_a_changed_file_is_named(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("text")
    inputs = text_files(list(map(str, paths)))
    source = inputs.scan(0, True, progress=False)
    assert source.changed() is None and inputs.newest >= paths[1].stat().st_mtime and inputs.bytes == 8
    os.utime(paths[1], (1, 1))
    assert source.changed() == str(paths[1])
    paths[0].write_text("tex")
    assert source.changed() == str(paths[0])
    with pytest.raises(UserError, match=f"^{paths[0]}: was changed while it was read"):
        list(source.texts())
    paths[0].unlink()
    assert source.changed() == str(paths[0])


def test_standard_input(tmp_path, monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return spool_stdin(tmp_path / "spool")

    path = pipe(b"\xff" * 1000)
    source = text_files([str(path)], errors="replace").scan(0, True, progress=False)
    path.unlink()
    assert source.changed() == str(path)
    assert pipe(b"\xff" * 1000) == path and path.read_bytes() == b"\xff" * 1000 and source.changed() is None
    assert pipe(b"else") != path and len(os.listdir(tmp_path / "spool")) == 2


# ---- safe cuts ------------------------------------------------------------------------------------------------------

PATTERNS = {"gpt2": openai.r50k_pat_str}
for name in ("cl100k_base", "o200k_base"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: {})
        PATTERNS[name] = getattr(openai, name)()["pat_str"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ALL_PAIRS = {bytes([i]): i for i in range(256)} | {bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)}
SPECIAL = ("aZ09 \n\r\t'.,-_/\u00a0\u2003\u3000、。，語éǅʰ"
           "\u0301ः\u0e33\u1885\u1886١½Ⅷ🙂\ufeff\0\x85\u2028")
CHARACTERS = st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"]))
WORDS = st.sampled_from(["'s", "'LL", "don't ", "x \n", "\r\n", "  ", "12 345"])


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def encoding(request):
    """A split pattern, and merges of all two bytes: a cut anywhere inside of a piece would show."""
    return tiktoken.Encoding(request.param, pat_str=PATTERNS[request.param], mergeable_ranks=ALL_PAIRS, special_tokens={})


def cuts_of(data: bytes) -> list[int]:
    cuts, at = [], 0
    while 0 <= (at := documents._safe_cut(data, at, len(data))):
        cuts.append(at)
        at += 1
    return cuts


@settings(max_examples=400, deadline=None)
@given(text=st.lists(st.one_of(CHARACTERS, WORDS), max_size=40))
def test_ids_of_the_pieces_are_those_of_the_whole(encoding, text):
    text = "".join(text)
    data = text.encode()
    whole = encoding.encode_ordinary(text)
    for cut in cuts_of(data):
        a, b = data[:cut].decode(), data[cut:].decode()
        assert encoding.encode_ordinary(a) + encoding.encode_ordinary(b) == whole, (a, b)


def test_a_letter_that_nfc_takes_apart():
    """Behind a mark, the line feed would belong to the piece before it: seen with Qwen's rules, by another library."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [(letter, "\u010a") for letter in letters]  # any byte with a line feed behind it: so a cut there would show
    vocabulary = {piece: i for i, piece in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    text = "abc \ufb2a\n \ufb2a\nxyz"
    data, whole = text.encode(), tokenizer.encode(text).ids

    def halves(cut):
        return tokenizer.encode(data[:cut].decode()).ids + tokenizer.encode(data[cut:].decode()).ids

    assert cuts_of(data) == [3] and halves(3) == whole
    assert any(halves(i) != whole for i in range(len(data)) if data[i:i + 1] == b"\n")  # what is to be avoided


def test_where_cuts_are():
    text = "one two\nthree, 4\n\nfive.  six\u0301 \u1885 語。語，語、 é\n🙂 x\r\n"
    expected = [text.index(part) for part in (" two", "\nthree", " 4", "\n\nfive", "。", "，", "、", "\n🙂", )]
    expected = [len(text[:at].encode()) for at in expected]
    assert cuts_of(text.encode()) == [cut for cut in expected if text.encode()[cut - 1:cut] != b","]
    assert cuts_of(b"\xa9 \xff\xa9 \xe2\x82 ") == []

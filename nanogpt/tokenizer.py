"""Text to token ids and back: bytes, characters, tiktoken's encodings, a tiktoken ranks file or a tokenizer.json.

`train_bpe` makes a vocabulary of a text.

A dataset keeps its tokenizer as JSON (`to_json`), a checkpoint copies that, and whoever reads either rebuilds it with
`from_json`, which refuses a tokenizer whose fingerprint is not the stored one.
"""

import base64
import difflib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nanogpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, and to wait for the next piece of an answer

# tiktoken has respelt GPT-2's split pattern twice without changing what it does. A fingerprint must outlive such an
# update, so it takes the ids of this text, which has every case the patterns tell apart, and not the pattern's letters.
PROBE = (
    "I'll we've They'RE don't IT'S 3.14159 12345678 x=f(y);\t\tfoo_barBaz  qux   \n \n\r\n\n  if a!=b:\r\n\t# ...//\n"
    "Größe ÉTÉ Ελλάδα Привет 東京タワー हिन्दी e\u0301 ١٢٣ ½ 🙂\u00a0\u2003end \t \n  "
)

# How the tokenizers of GPT-2, GPT-4, Llama 3, Qwen and GPT-4o cut text before they merge, as OpenAI and Hugging Face spell
# it. After a letter or a digit all of them cut before a blank, a line feed, or punctuation as in 東京、大阪, and what
# stands on one side has no say in how the other is cut: there, a long text can be taken in two.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
_GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
         r"|\s+(?!\S)|\s")
_GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
          r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CUTTABLE = {_GPT2, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
            _LLAMA3, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),  # Qwen's
            _GPT4, _GPT4.replace("{1,3}+", "{1,3}"), _GPT4O}  # the second as hf_tokenizer.py writes it

MAX_TRAINED = 1_000_000  # ids of a vocabulary of one's own
TRAINED_PIECE = 1 << 16  # characters that the trainer gets at a time, of which it holds 256 at once; at most twice as many


class Tokenizer:
    """What every tokenizer shares: a table of the bytes each id stands for. Its kinds below add `_encode`.

    name         "byte", "char", an encoding's name, a ranks file's stem, or the folder of a tokenizer.json
    vocab_size   ids run from 0 to vocab_size - 1, end-of-text included
    eot          the end-of-text id; None: there is none, as in nanoGPT's character vocabularies
    bos          the id to put before a text that a model goes on from; None, but for Llama 3 and the like
    dtype        numpy's type for the ids: uint16 up to 65,536 of them, else uint32
    fingerprint  sha256 over the bytes of every id, the special tokens, and how text is cut; not over names or paths
    pieces       the bytes of each id, b"" for special tokens
    specials     id -> name
    cuttable     ids(a) + ids(b) == ids(a + b) where a ends in a letter or a digit, and b begins with a blank, a line feed or
                 one of 、。，
    """

    cuttable = False

    def __init__(self, name: str, pieces: list[bytes], specials: dict[int, str], rule):
        """pieces: the bytes of each id, b"" for none; specials: id -> name; rule: JSON that tells how text is cut."""
        self.name = name
        self.vocab_size = len(pieces)
        self.eot = next((i for i, special in specials.items() if special == END_OF_TEXT), None)
        self.bos = None
        self.dtype: np.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        identity = json.dumps([rule, [piece.hex() for piece in pieces], sorted(specials.items())])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.pieces, self.specials = pieces, specials
        # What decode shows: special tokens by name, and U+FFFD for the few ids that some vocabularies leave unused.
        self._shown = [piece or specials.get(i, "\ufffd").encode() for i, piece in enumerate(pieces)]

    def _encode(self, text: str) -> np.ndarray:
        """Ids (n,). Each kind of tokenizer has its own."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) of type self.dtype. A literal <|endoftext|> stays text. UserError: text that has no ids."""
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise _half_of_a_pair(text, error.start) from None

    def decode(self, ids) -> str:
        """The text of ids (n,): special tokens by name, invalid UTF-8 as U+FFFD. UserError: an id out of range."""
        return b"".join(self._shown[i] for i in self._checked(ids)).decode("utf-8", errors="replace")

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes of ids (n,), nothing for special tokens. UserError: an id out of range."""
        return b"".join(self.pieces[i] for i in self._checked(ids))

    def _checked(self, ids) -> list[int]:
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise UserError(f"token id {wrong[0]} is not in the vocabulary of {self.name}, 0 to {self.vocab_size - 1}; "
                            "decode with the tokenizer that made it")
        return ids.tolist()

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: the number of bytes each id stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def to_json(self) -> dict:
        """What dataset.json and state.json keep, and `from_json` turns back."""
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot, "fingerprint": self.fingerprint}


def _half_of_a_pair(text: str, at: int) -> UserError:
    return UserError(f"character {at} of the text is half of a surrogate pair (U+{ord(text[at]):04X}), not Unicode text; "
                     "read it as UTF-8")


class ByteTokenizer(Tokenizer):
    """256 bytes, then end-of-text."""

    cuttable = True

    def __init__(self):
        super().__init__("byte", [bytes([i]) for i in range(256)] + [b""], {256: END_OF_TEXT}, "byte")

    def _encode(self, text):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)


class CharTokenizer(Tokenizer):
    """One id for each character of a sorted alphabet, then end-of-text; nanoGPT's vocabularies are without that."""

    cuttable = True

    def __init__(self, alphabet: str, with_eot: bool = True):
        pieces = [character.encode("utf-8", "surrogatepass") for character in alphabet]
        specials = {len(pieces): END_OF_TEXT} if with_eot else {}
        super().__init__("char", pieces + [b""] * with_eot, specials, "char")
        self.alphabet = alphabet
        self._none = np.iinfo(self.dtype).max  # at most end-of-text has this id
        self._id_of = np.full(0x110000, self._none, dtype=self.dtype)  # codepoint -> id
        self._id_of[[ord(character) for character in alphabet]] = np.arange(len(alphabet))

    def _encode(self, text):
        ids = self._id_of[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if (ids == self._none).any():
            at = int(np.argmax(ids == self._none))
            raise UserError(f"character {at}, {text[at]!r} (U+{ord(text[at]):04X}), is not among the "
                            f"{len(self.alphabet)} characters of this char tokenizer; leave it out, or convert the "
                            "data again from a text that has it, or with --tokenizer byte")
        return ids

    def to_json(self):
        return {**super().to_json(), "alphabet": self.alphabet}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by a tiktoken.Encoding; `ranks` (bytes -> id) only where it is not a published encoding."""

    def __init__(self, name: str, encoding, ranks: dict[bytes, int] | None = None):
        specials = {encoding.encode_single_token(special): special for special in encoding.special_tokens_set}
        pieces = [b""] * encoding.n_vocab
        for i in set(range(encoding.n_vocab)) - set(specials):
            try:
                pieces[i] = encoding.decode_single_token_bytes(i)
            except KeyError:
                pass  # an id that the vocabulary leaves unused, as cl100k_base does with some
        super().__init__(name, pieces, specials, ["bpe", encoding.encode_ordinary(PROBE)])
        self._ranks, self._no_special, self._uint32 = ranks, frozenset(), np.dtype(np.uint32)
        self.pattern = encoding._pat_str
        self.cuttable = self.pattern in CUTTABLE
        # What encode_to_numpy calls, without what that does before it: as quick as encode_ordinary on short texts too, and
        # without a Python integer for each token a fraction of its memory.
        self._buffer = encoding._core_bpe.encode_to_tiktoken_buffer

    def _encode(self, text):
        try:
            return np.frombuffer(self._buffer(text, self._no_special), self._uint32).astype(self.dtype)
        except UnicodeEncodeError:
            raise
        except ValueError as error:  # seen with a million blanks on end; cutting the text elsewhere changes its tokens
            raise UserError(f"tiktoken cannot split the text ({error}); shorten its longest run of blanks") from None

    def to_json(self):
        if self._ranks is None:
            return super().to_json()
        tokens = [base64.b64encode(piece).decode() for piece in self.pieces[:self.eot]]
        return {**super().to_json(), "ranks": tokens}  # in the order of their ids, "" for an unused one

    def ranks_file(self) -> bytes:
        """tiktoken's ranks file: a line `base64 id` a token. Of ranks of one's own, from_name makes the same tokenizer."""
        return b"".join(b"%s %d\n" % (base64.b64encode(piece), i) for i, piece in enumerate(self.pieces) if piece)


class JSONTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, of the byte-level kind: GPT-2's, Llama 3's, Qwen's.

    Nothing is put around a text, and the names of special tokens stay text, as with the other kinds. What a model of this
    kind wants before each text that it goes on from, as Llama 3 does, is `bos`.
    """

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")  # the first that is there is end-of-text

    def __init__(self, name: str, encoder, text: str):
        """encoder: a tokenizers.Tokenizer made of `text`. ValueError: not byte-level, or it changes what it reads."""
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True  # as text
        self._encoder, self.text = encoder, text
        ids, added = encoder.get_vocab(with_added_tokens=True), encoder.get_added_tokens_decoder()
        if not ids or max(ids.values()) >= 2 * len(ids):
            raise ValueError("it leaves large gaps between its ids")
        pieces, byte_of = [b""] * (max(ids.values()) + 1), byte_table()
        for token, i in ids.items():
            if i not in added:
                try:
                    pieces[i] = bytes(byte_of[character] for character in token)
                except KeyError:
                    raise ValueError(f"it is not a byte-level one like those of GPT-2, Llama 3 and Qwen: its token {i} "
                                     f"is {token!r:.40}") from None
            elif not added[i].special:
                pieces[i] = token.encode()
        if missing := {bytes([i]) for i in range(256)} - set(pieces):
            raise ValueError(f"it is not a byte-level one: it has no token for {min(missing)!r}")
        probe = self._ids(PROBE)
        specials = {i: token.content for i, token in added.items() if token.special}
        super().__init__(name, pieces, specials, ["bpe", probe])
        known = {special: i for i, special in specials.items()}
        self.eot = next((known[end] for end in self.ENDS if end in known), None)
        before = encoder.encode("").ids
        self.bos = before[0] if before and encoder.encode("a").ids == [before[0], *self._ids("a")] else None
        self.cuttable = _cuts_as_known(encoder, added.values())
        if self.decode_bytes(probe).decode(errors="replace") not in (PROBE, unicodedata.normalize("NFC", PROBE)):
            raise ValueError("it changes the text that it reads")

    def _ids(self, text):
        text.encode()  # a UnicodeEncodeError, where tokenizers says something else
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode(self, text):
        return np.array(self._ids(text), dtype=self.dtype)

    def to_json(self):
        return {**super().to_json(), "tokenizer_json": self.text}


def _cuts_as_known(encoder, added) -> bool:
    """Whether a tokenizers.Tokenizer cuts text in a way of CUTTABLE, and nothing that it does before looks over a cut."""
    normalizer, cut = (part and json.loads(part.__getstate__()) for part in (encoder.normalizer, encoder.pre_tokenizer))
    if normalizer not in (None, {"type": "NFC"}) or cut is None:
        return False
    if any(token.lstrip or token.rstrip or token.single_word or re.search(r"\w[ \n、。，]", token.content)
           for token in added):
        return False  # added tokens are looked for in the text before it is cut
    *before, last = cut.get("pretokenizers") or [cut]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == bool(before):
        return False
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return not before or before in ([{**split, "pattern": {"Regex": known}}] for known in CUTTABLE)  # none before: GPT-2's


def byte_table() -> dict[str, int]:
    """The character by which GPT-2 writes each byte: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def from_tokenizer_json(text: str, name: str, where: str) -> JSONTokenizer:
    """The tokenizer of the text of a tokenizer.json. UserError: damaged, or not of the byte-level kind."""
    from tokenizers import Tokenizer as Encoder
    try:
        return JSONTokenizer(name, Encoder.from_str(text), text)
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{where}: cannot be used ({' '.join(str(error).split())[:200]})") from None


def read_tokenizer_json(file: Path, name: str) -> JSONTokenizer:
    """The same, of a file. UserError, too: it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return from_tokenizer_json(text, name, str(file))


def from_name(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer called `byte` or `char`, a tiktoken encoding by its name, a ranks file or a tokenizer.json by its path.

    char takes its alphabet, sorted, from `texts`.
    UserError: unknown name, bad ranks file, or a vocabulary neither cached nor to be downloaded.
    """
    if name == "char":
        seen = np.zeros(0x110000, dtype=bool)  # a set would take one character at a time
        for text in texts:
            seen[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)] = True
        if not seen.any():
            raise UserError("char takes its alphabet from the text, and the text is empty; give it some")
        return CharTokenizer("".join(map(chr, np.flatnonzero(seen))))
    if name in (known := _fixed_names()):
        return _fixed(name)
    if not Path(name).is_file():
        near = difflib.get_close_matches(name, ["char", *known], n=1)
        raise UserError(f"{name!r} is neither a tokenizer nor a ranks file; "
                        + (f"did you mean {near[0]}?" if near else f"take char, {', '.join(known)} or a file"))
    if name.endswith(".json"):
        return read_tokenizer_json(Path(name), Path(name).resolve().parent.name)
    return _from_ranks(Path(name).stem, _read_ranks(name), where=name)


def make(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer called "bpe-N", trained on `texts`, or what `from_name` makes of another name. UserError: as theirs."""
    trained = re.fullmatch(r"bpe-(\d{1,18})", spec)
    return train_bpe(texts, int(trained[1])) if trained else from_name(spec, texts)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE with GPT-2's split pattern, of `texts`; vocab_size counts the 256 bytes and end-of-text.

    The same of the same texts in any process, on any number of cores. Memory grows with the number of different words, not
    with the length of the text. Its ids are those that the tokenizers library gives with the merges it found. tiktoken
    keeps no merges, and joins any two neighbours that make up a token, at that token's rank; but training makes each token
    of one pair only, and no other pair of that sum outlives the merges before. (What may differ is where the split
    patterns cut at characters that are newer than the Unicode tables of one of the two libraries.)

    UserError: vocab_size out of range, a text too small for so many merges, or not Unicode.
    """
    from tokenizers import Tokenizer as Encoder
    from tokenizers import models, pre_tokenizers, trainers
    if not 257 <= vocab_size <= MAX_TRAINED:
        raise UserError(f"a vocabulary of {vocab_size} ids is out of range; take 257 (256 bytes and end-of-text) to "
                        f"{MAX_TRAINED}")
    byte_of = byte_table()
    encoder = Encoder(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=sorted(byte_of),
                                  show_progress=sys.stderr.isatty())
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None  # else Ctrl-C waits for the library, for minutes
    try:
        encoder.train_from_iterator(_pieces(texts), trainer)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    tokens = [bytes([i]) for i in range(256)]
    for pair in json.loads(encoder.to_str())["model"]["merges"]:
        tokens.append(bytes(byte_of[character] for character in "".join(pair).replace(" ", "")))
    if len(tokens) + 1 < vocab_size:
        raise UserError(f"the text is too small for a vocabulary of {vocab_size} ids: it gives {len(tokens) + 1}, the pairs "
                        f"that occur twice or more; take --train-bpe {len(tokens) + 1} or less, or more text")
    return _from_ranks(f"bpe-{vocab_size}", {token: i for i, token in enumerate(tokens)}, where=f"bpe-{vocab_size}")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of about TRAINED_PIECE characters, between words (of a longer word, somewhere)."""
    between = re.compile(r"\S(?=[ \n])")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _half_of_a_pair(text, error.start) from None
        start = 0
        while start < len(text):
            nominal, last = start + TRAINED_PIECE, start + 2 * TRAINED_PIECE
            found = between.search(text, nominal, last) if nominal < len(text) else None
            end = found.end() if found else min(last, len(text))
            yield text[start:end]
            start = end


def from_json(obj: dict) -> Tokenizer:
    """The tokenizer that `to_json` described. UserError: not such a description, or no longer the same tokenizer."""
    name = obj.get("name") if isinstance(obj, dict) else None
    where = f"the stored tokenizer {name!r:.60}"
    try:
        if "alphabet" in obj:
            if obj["alphabet"] != "".join(sorted(set(obj["alphabet"]))):
                raise ValueError("its alphabet is not sorted")
            tokenizer = CharTokenizer(obj["alphabet"], with_eot=obj["eot"] is not None)
        elif "tokenizer_json" in obj:
            tokenizer = from_tokenizer_json(obj["tokenizer_json"], name, where)
        elif "ranks" in obj:
            tokens = [base64.b64decode(token, validate=True) for token in obj["ranks"]]
            tokenizer = _from_ranks(name, {token: i for i, token in enumerate(tokens) if token}, where)
        elif name in _fixed_names():
            tokenizer = _fixed(name)
        else:
            raise ValueError("there is no tokenizer of that name")
        for key in ("name", "vocab_size", "eot", "fingerprint"):
            if obj[key] != (ours := getattr(tokenizer, key)):
                raise ValueError(f"its {key} is {obj[key]!r:.80}, and should be {ours!r:.80}")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where} is not what was written ({error}); convert the data again") from None
    return tokenizer


def _fixed_names() -> list[str]:
    import tiktoken
    return ["byte", *tiktoken.list_encoding_names()]


def _fixed(name: str) -> Tokenizer:
    """byte, or a published encoding through tiktoken's cache or download. UserError, in seconds, when both fail."""
    if name == "byte":
        return ByteTokenizer()
    import requests
    import tiktoken.load

    def read_file(url):  # tiktoken's own waits for ever where a firewall swallows the connection
        if not url.startswith("https://"):
            return tiktokens_own(url)
        response = requests.get(url, timeout=DOWNLOAD_TIMEOUT)
        response.raise_for_status()
        return response.content

    tiktokens_own, tiktoken.load.read_file = tiktoken.load.read_file, read_file
    try:
        return BPETokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        # tiktoken's cache names a file by the sha1 of its address; the addresses are literals of the constructor.
        constants = tiktoken.registry.ENCODING_CONSTRUCTORS[name].__code__.co_consts
        urls = [text for text in constants if str(text).startswith("https://")]
        files = ", ".join(f"{hashlib.sha1(url.encode()).hexdigest()} from {url}" for url in urls)
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise UserError(
            f"the vocabulary of {name} is not in TIKTOKEN_CACHE_DIR ({folder}) and cannot be downloaded "
            f"({str(error).splitlines()[0][:100]}); where there is a network, run "
            f"TIKTOKEN_CACHE_DIR=tiktoken_cache python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", copy "
            f"that folder here and set TIKTOKEN_CACHE_DIR to its path (files: {files})") from None
    finally:
        tiktoken.load.read_file = tiktokens_own


def _read_ranks(path: str) -> dict[bytes, int]:
    """bytes -> id from a file of lines `base64 id`. UserError names the file and the line."""
    ranks = {}
    try:
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            if line:
                token, i = line.split()
                token = base64.b64decode(token, validate=True)
                if token in ranks:
                    raise ValueError("given twice")
                ranks[token] = int(i)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: line {number} is {line[:40]!r}; a tiktoken ranks file has a new token in base64, a "
                        "blank and the token's id in each line") from None
    return ranks


def _from_ranks(name: str, ranks: dict[bytes, int], where: str) -> BPETokenizer:
    """A tokenizer of ranks (bytes -> id) with GPT-2's split pattern, and end-of-text after the last rank."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise UserError(f"{where}: has no token for byte {missing[0]}, {len(missing)} of 256 are missing; take a ranks "
                        "file that can encode any text")
    ids = set(ranks.values())
    if len(ids) < len(ranks) or min(ids) < 0 or max(ids) >= 2 * len(ranks) or b"" in ranks:
        raise UserError(f"{where}: does not number its tokens from 0 on; give each its own id, without large gaps")
    end = max(ids) + 1
    encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})
    return BPETokenizer(name, encoding, ranks)

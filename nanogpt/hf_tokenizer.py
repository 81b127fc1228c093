"""Tokenizers as files of Hugging Face: tokenizer.json and its companions, from ours, and GPT-2's own pair of files.

How a tokenizer.json is read stands in tokenizer.py, with the other kinds.
"""

import json
import re
from pathlib import Path

from nanogpt.errors import UserError
from nanogpt.tokenizer import END_OF_TEXT, PROBE, BPETokenizer, ByteTokenizer, JSONTokenizer, byte_table, from_tokenizer_json


def tokenizer_files(tokenizer, block_size: int) -> dict[str, str]:
    """Name -> content of the files from which transformers makes the same tokenizer. ValueError: why there are none."""
    from tokenizers import Tokenizer as Encoder
    from tokenizers import processors
    files, its_class = {}, "PreTrainedTokenizerFast"
    if isinstance(tokenizer, JSONTokenizer):
        encoder = Encoder.from_str(tokenizer.text)
        encoder.no_truncation()
        encoder.no_padding()
        if tokenizer.bos is None and encoder.encode("a").ids != tokenizer.encode("a").tolist():
            encoder.post_processor = processors.ByteLevel(trim_offsets=False)  # as here, nothing is put around a text
    elif isinstance(tokenizer, (ByteTokenizer, BPETokenizer)):
        from tiktoken_ext.openai_public import r50k_pat_str
        vocab = {_written(piece): i for i, piece in enumerate(tokenizer.pieces) if piece}
        vocab |= {special: i for i, special in tokenizer.specials.items()}
        ranks = {piece: i for i, piece in enumerate(tokenizer.pieces) if piece}
        merges = [_halves(piece, ranks) for piece in ranks if len(piece) > 1]
        found = [tuple(map(_written, halves)) for halves in merges if halves]
        pattern = getattr(tokenizer, "pattern", r50k_pat_str)  # bytes may be cut in any way
        pattern = None if pattern == r50k_pat_str else pattern
        encoder = _byte_level(vocab, found, list(tokenizer.specials.values()), pattern, len(found) < len(merges))
        if pattern is None and found:
            its_class = "GPT2Tokenizer"
            files = {"vocab.json": json.dumps(vocab, ensure_ascii=False),
                     "merges.txt": "".join(f"{a} {b}\n" for a, b in [("#version:", "0.2"), *found])}
    else:
        raise ValueError(f"transformers has no tokenizer of the kind {tokenizer.name}")
    everything = b"\n".join(tokenizer.pieces).decode(errors="ignore")
    for text in (PROBE, everything):
        if encoder.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist():
            raise ValueError(f"the tokenizers library gives other ids than {tokenizer.name}")
    said = dict(tokenizer_class=its_class, model_max_length=block_size, add_prefix_space=False,
                clean_up_tokenization_spaces=False)
    if tokenizer.eot is not None:
        said |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.decode([tokenizer.eot]))
    if tokenizer.bos is not None:
        said["bos_token"] = tokenizer.decode([tokenizer.bos])
    return files | {"tokenizer.json": encoder.to_str(pretty=True), "tokenizer_config.json": as_json(said)}


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, ...]], specials: list[str], pattern: str | None = None,
                ignore_merges: bool = False):
    """A tokenizers.Tokenizer that cuts text by `pattern` (None: GPT-2's) and merges as listed.

    ignore_merges: what is in the vocabulary as a whole is taken so, as tiktoken does, though no merges lead to it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    encoder = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:  # {1,3}+ is possessive in tiktoken and something else in Oniguruma; plain {1,3} finds the same
        pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), cut])
    encoder.pre_tokenizer, encoder.decoder = cut, decoders.ByteLevel()
    encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    encoder.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    return encoder


OF_BYTE = {byte: character for character, byte in byte_table().items()}


def _written(piece: bytes) -> str:
    return "".join(OF_BYTE[byte] for byte in piece)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The two tokens that merge into this one, when lower ranks merge first; None where no merges lead to it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def of_vocab_and_merges(folder: Path, name: str) -> JSONTokenizer:
    """From vocab.json and merges.txt, GPT-2's own format. Raises UserError where they are damaged."""
    vocab, where = read_object(folder / "vocab.json"), f"{folder}/vocab.json, merges.txt"
    if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{where}: ids are not 0 to {len(vocab) - 1}, each once")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        encoder = _byte_level(vocab, merges, [END_OF_TEXT] if END_OF_TEXT in vocab else [])
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{where}: cannot be used ({short(error)})") from None
    return from_tokenizer_json(encoder.to_str(), name, where)


# ---- files ----------------------------------------------------------------------------------------------------------

def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {type(content).__name__}, and should hold keys and values")
    return content


def as_json(content) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def short(error) -> str:
    said = " ".join(str(error).split())[:200]
    return said if said.isprintable() else ascii(said)

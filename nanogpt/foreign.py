"""MDS folders without a dataset.json, as llm-foundry's converters write them: train/ and val/, or other names, of samples
whose column `tokens` is an array of ids, or the bytes of int64 ones. The config names the tokenizer.

All samples have as many tokens as the first, L, which is their block: neighbours share none, so the last of a sample is
an input without a target.
"""

import re
from pathlib import Path

import numpy as np

from nanogpt.errors import UserError
from nanogpt.shards import FORMAT, MAX_BLOCK, read_index

ENCODING = re.compile(r"bytes|ndarray(:u?int(8|16|32|64)(:(?P<length>[1-9]\d{0,6}))?)?")


def check_index(file: Path, path: str) -> int | None:
    """Checks what an index.json says before streaming acts on it. Returns L, or None where only the samples tell.

    UserError names `path`, where the file came from.
    """
    encodings = set()

    def check(shard):
        names = shard["column_names"]
        if "tokens" not in names:
            raise UserError(f"{path}: its samples have {', '.join(names):.200}, and no tokens; make them with "
                            "llm-foundry's --concat_tokens and --tokenizer, or with tools/convert_owt_to_mds.py")
        if len(set(names)) < len(names) or {len(shard["column_encodings"]), len(shard["column_sizes"])} != {len(names)}:
            raise ValueError("its columns are of the wrong kind")
        encodings.add(shard["column_encodings"][names.index("tokens")])

    read_index(file, path, check)
    if len(encodings) != 1 or not (found := ENCODING.fullmatch(f"{min(encodings)}")):
        raise UserError(f"{path}: its tokens are {' and '.join(sorted(map(str, encodings))) or 'none':.60}, and not all "
                        "ndarray of integers, or all bytes; convert the text again")
    return int(found["length"]) if found["length"] else None


def ignore_other_columns(dataset):
    """Only the tokens of a sample are decoded; the others stay the bytes that they are."""
    for shard in dataset.shards:
        shard.column_encodings = [encoding if name == "tokens" else "bytes"
                                  for name, encoding in zip(shard.column_names, shard.column_encodings)]


def ids(stored: np.ndarray | bytes) -> np.ndarray:
    """(L,) of what a sample holds. ValueError: no row of integers."""
    tokens = np.frombuffer(stored, "<i8") if isinstance(stored, bytes) else stored
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 1 <= len(tokens) <= MAX_BLOCK:
        raise ValueError(f"its tokens are {tokens.dtype} {tokens.shape}, and not a row of up to {MAX_BLOCK} integers")
    return tokens.astype(np.int64)


def card(name: str, samples: int, length: int, tok) -> dict:
    """What dataset.json would say of a split, as far as it is known."""
    return {"format": FORMAT, "tokenizer": tok.to_json(), "block_size": length, "dtype": "foreign", "source": {},
            "splits": {name: {"stride": length, "tokens": samples * length, "samples": samples}}}

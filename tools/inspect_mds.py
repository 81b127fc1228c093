"""What is in a dataset folder, and whether its shards are what was written; how two of them differ; or what a step of a
run was trained on.

    python tools/inspect_mds.py data/owt
    python tools/inspect_mds.py data/owt --samples 0 --verify
    python tools/inspect_mds.py --diff data/owt data/owt-again
    python tools/inspect_mds.py data/from-llm-foundry --tokenizer gpt2
    python tools/inspect_mds.py --run runs/owt --step 1234

No run logs its data: what a step took is a function of the step, worked out here once more from the run's own record.
Steps count from 1, as in the log; samples, parts, tokens, documents and the sequences of a step from 0.
"""

import json
import os
import sys
import tempfile
from argparse import SUPPRESS
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run

WIDTH = 240  # characters of a sequence that are shown without --full: its beginning and its end
HISTOGRAM = 1 << 28  # bytes of each split whose documents are measured, unless all are asked for
PIECE = 1 << 22  # tokens that are looked at at a time
CONTEXT = 24  # tokens that are shown before and after the first difference

# ---- the shards of a split ------------------------------------------------------------------------------------------


def read_index(folder: Path, card: dict) -> list[dict]:
    """The shards of a split as index.json lists them. UserError: missing, damaged, or not what dataset.json says."""
    from nanogpt.shards import load_index

    shards = load_index(folder / "index.json", card, folder.name)
    if not all("xxh64" in info["hashes"] for shard in shards for info in (shard["raw_data"], shard["zip_data"]) if info):
        raise UserError(f"{folder / 'index.json'}: lists a file without its xxh64; convert the text again")
    return shards


def files_there(folder: Path, shard: dict) -> list[dict]:
    """Of the two forms of a shard, plain and compressed, those that are in the folder. UserError: none is."""
    found = [info for info in (shard["raw_data"], shard["zip_data"]) if info and (folder / info["basename"]).is_file()]
    if not found:
        raise UserError(f"{folder / (shard['zip_data'] or shard['raw_data'])['basename']}: is missing")
    return found


def read_shard(folder: Path, shard: dict, card: dict):
    """The samples of a shard, (samples, block_size + 1): all of one size, they lie at the end of its file.

    Those of another tool, (samples, block_size), may have other columns, and lie where the file's table of offsets says.
    """
    import numpy as np

    from nanogpt.shards import import_streaming

    info = files_there(folder, shard)[0]
    path = folder / info["basename"]
    try:
        data = path.read_bytes()
        if info is shard["zip_data"]:
            import_streaming()
            from streaming.base.compression import decompress
            data = decompress(shard["compression"], data)  # another tool may have taken gz, or one of its kind
        if card["dtype"] == "foreign":
            return np.stack([foreign_tokens(data, shard, i) for i in range(shard["samples"])])
        dtype = np.dtype(card["dtype"])
        size = shard["samples"] * (card["block_size"] + 1) * dtype.itemsize
        return np.frombuffer(data[-size:], dtype).reshape(shard["samples"], card["block_size"] + 1)
    except Exception as error:  # damage shows as whatever numpy and zstd make of it
        raise UserError(f"{path}: cannot be read ({error})") from None


def foreign_tokens(data: bytes, shard: dict, i: int):
    """The tokens of sample i of a shard's content: its columns one after another, first the sizes of those that vary."""
    import numpy as np

    from nanogpt import foreign
    from nanogpt.shards import import_streaming

    import_streaming()
    from streaming.base.format.mds.encodings import mds_decode

    start, end = np.frombuffer(data, "<u4", 2, 4 + 4 * i)
    sizes, varying = shard["column_sizes"], sum(size is None for size in shard["column_sizes"])
    given = iter(np.frombuffer(data, "<u4", varying, start).tolist())
    at = int(start) + 4 * varying
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes):
        size = next(given) if size is None else size
        if name == "tokens":
            if at + size > end:
                raise ValueError(f"sample {i} goes beyond its end")
            return foreign.ids(mds_decode(encoding, data[at:at + size]))
        at += size


# ---- a dataset ------------------------------------------------------------------------------------------------------

def show_samples(folder: Path, shards: list[dict], card: dict, tokenizer, n: int):
    """Prints the first n samples of a split. repr keeps control characters of the text away from the terminal."""
    stride = card["splits"][folder.name]["stride"]
    last = card["block_size"] - (card["dtype"] == "foreign")
    samples = (sample for shard in shards for sample in read_shard(folder, shard, card))
    for i, tokens in enumerate(islice(samples, n)):
        print(f"{folder.name} sample {i}, tokens {i * stride} to {i * stride + last}: "
              f"{decoded(tokenizer, tokens)!r}")


def decoded(tokenizer, tokens) -> str:
    """The text of tokens (n,). Of pairs, what is no target stands between [[ and ]]."""
    import numpy as np

    text = ""
    for piece in np.split(tokens, np.flatnonzero(np.diff(tokens < 0)) + 1):
        if piece[0] >= 0:
            text += tokenizer.decode(piece)
        elif (piece == ~tokenizer.eot).all():
            text += f"[[{len(piece)} x <|endoftext|>]]"  # padding
        else:
            text += f"[[{tokenizer.decode(~piece)}]]"
    return text


def count_pairs(folder: Path, shards: list[dict], card: dict) -> dict:
    """What the shards of a split of pairs hold, under the names that dataset.json has for it."""
    import numpy as np

    eot, counts = card["tokenizer"]["eot"], dict.fromkeys(("targets", "padding", "documents"), 0)
    for shard in shards:
        rows = read_shard(folder, shard, card)
        for name, those in (("targets", rows >= 0), ("padding", rows == ~eot), ("documents", rows == eot)):
            counts[name] += int(np.count_nonzero(those))
    return counts


def examine(splits: dict[Path, list[dict]], card: dict, hashing: bool, histogram: str) -> tuple[list[str], dict]:
    """Reads the shards of all splits (folder -> shards) once: (a line for each problem, {folder: its Lengths}).

    hashing: a problem is each shard that is missing or not what its index says; of pairs, too, a split that does not hold
    the targets that dataset.json says. histogram: which documents are measured, "all", "some" (of the first shards), "none".
    """
    from tqdm import tqdm

    from nanogpt.shards import PAIRS

    problems, found, reading = [], {}, {}
    for folder, shards in splits.items():
        some = next((i for i in range(1, len(shards)) if total_bytes(shards[:i]) >= HISTOGRAM), len(shards))
        measured = {"all": len(shards), "some": some, "none": 0}[histogram] if card["tokenizer"]["eot"] is not None else 0
        reading[folder] = shards[:len(shards) if hashing else measured]
        if measured:
            found[folder] = Lengths(card, measured)
    with tqdm(total=sum(map(total_bytes, reading.values())), unit="B", unit_scale=True, disable=None,  # None: only on a
              desc="hashing" if hashing else "measuring documents") as bar:                            # terminal
        for folder, shards in reading.items():
            for i, shard in enumerate(shards):
                try:
                    for info in files_there(folder, shard) if hashing else ():
                        check_file(folder / info["basename"], info)
                    if folder in found and i < found[folder].shards:
                        rows = read_shard(folder, shard, card)
                        for piece in stream_pieces(rows, card, folder.name, i + 1 == len(splits[folder])):
                            found[folder].add(piece)
                except UserError as error:
                    problems.append(str(error))
                    found.pop(folder, None)
                    if not hashing:
                        break
                bar.update(shard["raw_data"]["bytes"])
    if hashing and card["dtype"] == PAIRS and not problems:
        for folder, shards in splits.items():
            for name, counted in count_pairs(folder, shards, card).items():
                if counted != (said := card["splits"][folder.name][name]):
                    problems.append(f"{folder}: holds {name} {counted:,}, and {said:,} by dataset.json; convert it again")
    return problems, found


def total_bytes(shards: list[dict]) -> int:
    return sum(shard["raw_data"]["bytes"] for shard in shards)


def stream_pieces(rows, card: dict, split: str, last: bool):
    """Yields the tokens, (n,) at a time, that the samples of a shard have in the stream of their split, each once.

    What a sample shares with the next one is left to that; `last` tells that there is none. Of pairs, without padding.
    """
    from nanogpt.shards import PAIRS

    stride, size = card["splits"][split]["stride"], rows.shape[1]
    step = max(1, PIECE // size)
    for start in range(0, len(rows), step):
        piece = rows[start:start + step, :stride]
        yield piece[piece != ~card["tokenizer"]["eot"]] if card["dtype"] == PAIRS else piece.reshape(-1)
    if last and stride < size:
        yield rows[-1, stride:]


class Lengths:
    """How many documents of a split have 0, 1, 2 to 3, 4 to 7, … tokens, their end-of-text not counted."""

    def __init__(self, card: dict, shards: int):
        import numpy as np

        self.eot, self.shards = card["tokenizer"]["eot"], shards
        self.documents, self.tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)  # i: those below 2**i, not 2**(i - 1)
        self.open = 0  # tokens since the last end-of-text

    def add(self, tokens):
        """Goes on with tokens (n,) of the stream."""
        import numpy as np

        ends = np.flatnonzero(tokens == self.eot)
        if len(ends):
            lengths = np.diff(ends, prepend=-1 - self.open) - 1
            group = np.frexp(lengths)[1]
            self.documents += np.bincount(group, minlength=64)
            self.tokens += np.bincount(group, weights=lengths, minlength=64).astype(np.int64)
            self.open = len(tokens) - 1 - int(ends[-1])
        else:
            self.open += len(tokens)

    def show(self, name: str, of: int):
        """Prints the histogram of a split that has `of` shards."""
        what = "of all shards" if self.shards == of else f"of the first {self.shards:,} of {of:,} shards " \
                                                                 "(--histogram all: of all)"
        print(f"{name} documents by length in tokens, {what}")
        there, everything = self.documents.nonzero()[0], max(1, self.tokens.sum())
        if len(there):
            print(f"  {'length':>21}  {'documents':>13}  {'share':>6}  tokens up to here")
            for i in range(there[0], there[-1] + 1):
                length = f"{1 << i - 1:,} to {(1 << i) - 1:,}" if i > 1 else str(i)
                share = self.documents[i] / self.documents.sum()
                bar = "#" * round(40 * self.documents[i] / self.documents.max())
                so_far = self.tokens[:i + 1].sum() / everything
                print(f"  {length:>21}  {self.documents[i]:>13,}  {share:>6.1%}  {so_far:>6.1%}  {bar}".rstrip())
        if self.open:
            print(f"  one more goes on where {'the samples' if self.shards == of else 'these shards'} end, after "
                  f"{self.open:,} tokens")


def check_file(path: Path, info: dict):
    """UserError: the size or the hash of a shard's file is not that of its index."""
    import hashlib

    import xxhash

    from nanogpt.shards import file_hash

    name = min(info["hashes"], key=lambda name: name != "xxh64", default=None)  # other tools may write others, or none
    try:
        digest = name and (getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name))
        size, found = path.stat().st_size, name and file_hash(path, digest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: its index has a hash of kind {name!r:.40}, which is not known here") from None
    if size != info["bytes"]:
        raise UserError(f"{path}: has {size} of {info['bytes']} bytes")
    if name and found != info["hashes"][name]:
        raise UserError(f"{path}: is damaged ({name} {found}, was {info['hashes'][name]})")


def show_dataset(dataset: Path, samples: int, hashing: bool, histogram: str):
    """The counts of a dataset, the lengths of its documents (`examine`: histogram) and its first samples.

    UserError for each shard that cannot be read, or, with hashing, is not as written.
    """
    from nanogpt.shards import PAIRS, load_dataset_card, pair_counts  # here, where `run` tells what is not installed

    if not (dataset / "dataset.json").exists() and next(dataset.glob("*/index.json"), None):
        raise UserError(f"{dataset}/dataset.json: is missing; where another tool wrote this, name its --tokenizer")
    card = load_dataset_card(dataset)
    stored = card["tokenizer"]
    print(f"{dataset}")
    print(f"  tokenizer  {stored['name']!r}, {stored['vocab_size']:,} ids, end-of-text "
          f"{'none' if stored['eot'] is None else stored['eot']}, fingerprint {stored['fingerprint'][:16]}")
    pairs = card["dtype"] == PAIRS
    print(f"  sample     {card['block_size']} + 1 tokens, {card['dtype']}"
          + (", whole pairs; below, what is between [[ and ]] is not trained on" if pairs else ""))
    print(f"  source     {', '.join(f'{key} {value!r}' for key, value in card['source'].items())}")
    splits, problems = {}, []
    for name, split in card["splits"].items():
        folder = dataset / name
        try:
            splits[folder] = read_index(folder, card)
        except UserError as error:
            problems.append(str(error))
        if pairs:
            print(f"  {name:9}  {pair_counts(split, card['block_size'])}, bytes {split['bytes']:,}, shards "
                  f"{len(splits.get(folder, ())):,}")
            continue
        print(f"  {name:9}  documents {split['documents']:,}, bytes {split['bytes']:,}, tokens {split['tokens']:,}, "
              f"dropped at the end {split['dropped_tokens']:,}, samples {split['samples']:,}, stride "
              f"{split['stride']}, shards {len(splits.get(folder, ())):,}")
    if left_out := {why: n for why, n in card.get("left_out", {}).items() if n}:
        print(f"  left out   {', '.join(f'{why} {n:,}' for why, n in left_out.items())}")
    show_contents(splits, card, samples, hashing, histogram, problems)


def show_contents(splits: dict, card: dict, samples: int, hashing: bool, histogram: str, problems: list[str]):
    """What the shards of a dataset (folder -> shards) hold, as in show_dataset. problems: what the UserError says, too."""
    from nanogpt.tokenizer import from_json

    found, lengths = examine(splits, card, hashing, histogram)
    problems += found
    for folder, measured in lengths.items():
        measured.show(folder.name, len(splits[folder]))
    if samples > 0:
        tokenizer = from_json(card["tokenizer"])
        for folder, shards in splits.items():
            try:
                show_samples(folder, shards, card, tokenizer, samples)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if hashing:
        shards = [shard for shards in splits.values() for shard in shards]
        hashed = all(info["hashes"] for shard in shards for info in (shard["raw_data"], shard["zip_data"]) if info)
        print(f"verified: {len(shards):,} shards " + ("hold what was written" if hashed else
              "have the sizes that were written; their index has no hashes to compare"))


def show_foreign(dataset: Path, names: list[str] | None, tokenizer: str, samples: int, hashing: bool, histogram: str):
    """As show_dataset, of a folder that another tool has written: its splits, by default the folders with an index.json.

    UserError, too: there is none, or its samples are not all of one length.
    """
    from nanogpt import foreign
    from nanogpt.tokenizer import from_name

    if (dataset / "dataset.json").exists():
        raise UserError(f"--tokenizer, --split: {dataset} has a dataset.json, which knows; leave them out")
    folders = [dataset / name for name in names] if names else [path.parent for path in sorted(dataset.glob("*/index.json"))]
    if not folders and (dataset / "index.json").exists():
        folders = [dataset]
    if not folders:
        raise UserError(f"{dataset}: holds no folder with an index.json; give the folder above those of the splits")
    tok, splits, cards = from_name(tokenizer), {}, []
    for folder in folders:
        length = foreign.check_index(folder / "index.json", str(folder / "index.json"))
        splits[folder] = shards = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
        card = foreign.card(folder.name, sum(shard["samples"] for shard in shards), length or 1, tok)
        if length is None:
            first = {**shards[0], "samples": 1}
            length = read_shard(folder, first, card).shape[1]
        cards.append(foreign.card(folder.name, sum(shard["samples"] for shard in shards), length, tok))
    card = cards[0] | {"splits": {name: split for each in cards for name, split in each["splits"].items()}}
    if len({each["block_size"] for each in cards}) > 1:
        raise UserError(f"{dataset}: its splits have samples of {' and '.join(str(each['block_size']) for each in cards)} "
                        "tokens; name one of them with --split")
    print(f"{dataset}, written by another tool")
    print(f"  tokenizer  {tok.name!r}, {tok.vocab_size:,} ids, as you say")
    first = splits[folders[0]][0]
    columns = [f"{name} {kind}" for name, kind in zip(first["column_names"], first["column_encodings"])]
    print(f"  sample     {card['block_size']} tokens; columns: {', '.join(columns)}")
    for folder, shards in splits.items():
        split = card["splits"][folder.name]
        print(f"  {folder.name:9}  tokens {split['tokens']:,}, samples {split['samples']:,}, shards {len(shards):,}")
    show_contents(splits, card, samples, hashing, histogram, [])


# ---- two datasets -------------------------------------------------------------------------------------------------------

def show_difference(paths: list[Path]):
    """What two dataset folders differ in. UserError, at the end, if that is their tokens."""
    from nanogpt.shards import PAIRS, load_dataset_card
    from nanogpt.tokenizer import from_json

    cards = [load_dataset_card(path) for path in paths]
    for letter, path in zip("AB", paths):
        print(f"{letter} = {path}")
    a, b = map(flat, cards)
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            print(f"  {key}: {' and '.join(f'{card[key]!r:.70}' if key in card else 'nothing' for card in (a, b))}")
    different = [f"only {'BA'[name in cards[0]['splits']]} has a {name} split" for name in ("train", "val")
                 if (name in cards[0]["splits"]) != (name in cards[1]["splits"])]
    if a["tokenizer.fingerprint"] != b["tokenizer.fingerprint"]:
        different.append("their tokenizers differ, so that no token of one can be compared with one of the other")
    elif (cards[0]["dtype"] == PAIRS) != (cards[1]["dtype"] == PAIRS):
        different.append("one is of pairs, the other of text")
    else:
        tokenizer = from_json(cards[0]["tokenizer"])
        for name in cards[0]["splits"]:
            if name in cards[1]["splits"] and (problem := compare_split(name, paths, cards, tokenizer)):
                different.append(problem)
    if different:
        raise UserError(f"{paths[0]} and {paths[1]} differ: {'; '.join(different)}")
    print("they hold the same tokens")


def flat(card: dict, before: str = "") -> dict:
    """The fields of a card under names like splits.train.tokens, without the contents of the tokenizer."""
    found = {}
    for key, value in card.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        elif before != "tokenizer." or key not in ("alphabet", "ranks", "tokenizer_json"):
            found[before + key] = value
    return found


def compare_split(name: str, paths: list[Path], cards: list[dict], tokenizer) -> str | None:
    """Prints how a split of two datasets differs. Returns in short how its tokens do, None if they do not."""
    from tqdm import tqdm

    folders = [path / name for path in paths]
    indexes = [read_index(folder, card) for folder, card in zip(folders, cards)]
    digests = [[shard["raw_data"]["hashes"]["xxh64"] for shard in shards] for shards in indexes]
    shared = len(set(digests[0]) & set(digests[1]))
    print(f"  {name}: A has {len(digests[0]):,} shards, B {len(digests[1]):,}; {shared:,} are the same by index.json")
    if digests[0] == digests[1] and cards[0]["splits"][name] == cards[1]["splits"][name]:
        return None
    total = sum(map(total_bytes, indexes))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc=f"comparing {name}") as bar:
        place, before, after = first_difference(*(stream(*its, bar) for its in zip(folders, indexes, cards)))
    said = [card["splits"][name]["tokens"] for card in cards]
    held = [card["splits"][name]["tokens"] - card["splits"][name]["dropped_tokens"] for card in cards]
    if said[0] == said[1] and place >= min(held):
        print(f"  {name}: the tokens are the same as far as both have them: of {said[0]:,} A holds the first {held[0]:,}, B "
              f"{held[1]:,}, without those dropped at the end")
        return None
    where = ", ".join(f"in {letter} {at}" for letter, at in
                      zip("AB", (where_is(place, *its) for its in zip(folders, indexes, cards))))
    print(f"  {name}: the first {place:,} tokens are the same, the next one is {where}")
    if len(before):
        print(f"    both  … {decoded(tokenizer, before)!r}")
    for letter, tokens in zip("AB", after):
        print(f"    {letter}     {f'{decoded(tokenizer, tokens)!r} …' if len(tokens) else 'nothing more'}")
    return f"{name} from token {place} on ({where})"


def stream(folder: Path, shards: list[dict], card: dict, bar):
    """Yields the tokens of a split, (n,) at a time."""
    for i, shard in enumerate(shards, 1):
        yield from stream_pieces(read_shard(folder, shard, card), card, folder.name, i == len(shards))
        bar.update(shard["raw_data"]["bytes"])


def first_difference(one, other):
    """Of two iterators of arrays: (how many tokens are the same, the last CONTEXT of these, the next CONTEXT of each)."""
    import numpy as np

    rest, same, before = [np.empty(0, np.int64)] * 2, 0, np.empty(0, np.int64)
    sources = (one, other)

    def fill(least):
        for i, source in enumerate(sources):
            while len(rest[i]) < least and (more := next(source, None)) is not None:
                rest[i] = np.concatenate([rest[i], more.astype(np.int64)])

    while True:
        fill(1)
        n = min(map(len, rest))
        unequal = np.flatnonzero(rest[0][:n] != rest[1][:n])
        equal = int(unequal[0]) if len(unequal) else n
        same, before = same + equal, np.concatenate([before, rest[0][:equal]])[-CONTEXT:]
        rest[:] = [tokens[equal:] for tokens in rest]
        if len(unequal) or not n:
            fill(CONTEXT)
            return same, before, [tokens[:CONTEXT] for tokens in rest]


def where_is(place: int, folder: Path, shards: list[dict], card: dict) -> str:
    """The sample of token `place` of a split's stream, and where in that it is; both from 0."""
    import numpy as np

    from nanogpt.shards import PAIRS

    split = card["splits"][folder.name]
    if card["dtype"] != PAIRS:
        sample = min(place // max(1, split["stride"]), split["samples"] - 1)
        at = place - sample * split["stride"]
        return f"token {at} of sample {sample}" if at <= card["block_size"] else "after the last sample"
    first = 0
    for shard in shards:
        rows = read_shard(folder, shard, card)
        there = np.flatnonzero(rows != ~card["tokenizer"]["eot"])
        if place < len(there):
            sample, at = divmod(int(there[place]), rows.shape[1])
            return f"token {at} of sample {first + sample}"
        place, first = place - len(there), first + len(rows)
    return "after the last sample"


# ---- a step of a run ------------------------------------------------------------------------------------------------

def show_step(run_folder: Path, step: int, limit: int, full: bool, data: str | None, documents: bool):
    """The sequences of optimizer step `step` (from 1), as the run read them. UserError where they are not there now."""
    if step < 1:
        raise UserError(f"--step: {step} is out of range; steps count from 1, as in log.txt")
    if limit < 1:
        raise UserError(f"--limit: {limit} is out of range; take 1 or more")
    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such folder; --run takes a run folder, as runs/NAME, or a checkpoint")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # in the shell of a job streaming would wait for the other ranks
    import numpy as np

    from nanogpt.tokenizer import from_json

    with tempfile.TemporaryDirectory(prefix="inspect_mds-") as cache:  # the run's own is left alone: it may be training
        stream, state = stream_of_step(run_folder, step, data, cache)
        sequences = stream.sequences(step - 1)
        n, T = len(sequences), stream.block_size
        # Those of a mixture lie together by dataset: what is shown is spread over the step.
        chosen = np.arange(n) if n <= limit else np.arange(limit) * n // limit
        tokens = stream.read(sequences[chosen]).numpy()
        found = [(*stream.find(sample), part) for sample, part in sequences[chosen].tolist()]
        described = describe_documents(found, tokens, T) if documents else [""] * len(found)

        print(f"{run_folder}: step {step} takes {n} sequences of {T} + 1 tokens")
        if len(stream.splits) > 1:
            which = np.searchsorted(stream.first_sample, sequences[:, 0], "right") - 1
            for split, count in zip(stream.splits, np.bincount(which, minlength=len(stream.splits))):
                print(f"  {count:4} of {split.path}")
        show_metrics(run_folder, step, state)
        tokenizer = from_json(stream.card["tokenizer"])
        for i, row, (split, sample, part), of in zip(chosen, tokens, found, described):
            start = sample * split.card["splits"][split.name]["stride"] + part * T
            if split.card["dtype"] == "foreign" and part == split.parts - 1:
                row = row[:-1]  # made up, and no target
            parts = f", part {part} of {split.parts}" if split.parts > 1 else ""
            print(f"sequence {i}: {shard_file(split, sample)}, sample {sample}{parts}, "
                  f"tokens {start} to {start + len(row) - 1}{of}")
            print(f"  {shown(decoded(tokenizer, row), full)}")
        if n > len(chosen):
            print(f"{n - len(chosen)} more sequences are left out; --limit {n} shows all")


def stream_of_step(run_folder: Path, step: int, data: str | None, cache: str):
    """(the TrainStream that step `step` (from 1) was read from, state.json of the newest checkpoint or None).

    The checkpoint tells which data was read when. Steps after it, and runs without one, go by config.yaml, which each
    start of the run writes. UserError where the data is not what it was.
    """
    from nanogpt import checkpoint

    alone = (run_folder / "manifest.json").is_file()  # a checkpoint was named, and speaks for itself
    saved = run_folder if alone else next(reversed(checkpoint.complete_steps(run_folder / "checkpoints")), None)
    started = None if alone else read_config(run_folder / "config.yaml")
    if saved is None and started is None:
        raise UserError(f"{run_folder}: holds neither a checkpoint nor a config.yaml; --run takes a run folder, as "
                        "runs/NAME, or a checkpoint")
    if saved is None:
        stream = open_stream(run_folder / "config.yaml", started, 0, step, data, cache)
        note(f"{run_folder} has no checkpoint yet, which would tell whether the data has changed since: shown is what "
             "config.yaml names, as it is now")
        return stream, None

    state, here = checkpoint.read_state(saved), saved / "state.json"
    done, history = state["step"], state["data_history"]
    try:
        era = [era for era in history if era["from_step"] < step][-1]
        first_step, was, values = era["from_step"], dict(era["identity"]), state["config"]
        anew = False
        if step > done and started is not None:
            here = run_folder / "config.yaml"
            anew, values = started_otherwise(started, values), started
        elif era is not history[-1]:  # of the last one, the config knows better where the data lies
            values = {**values, "data": era["data"],
                      "model": {**values["model"], "block_size": was["model.block_size"]},
                      "train": {**values["train"], "global_batch_size": was["train.global_batch_size"],
                                "batch_schedule": era.get("batch_schedule"), "block_schedule": None}}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{here}: is damaged ({type(error).__name__}: {error})") from None
    stream = open_stream(here, values, first_step, step, data, cache)
    different = [f"{key} is {now} and was {before}" for key, (before, now) in stream.differences(was).items()]
    if different and anew:
        note(f"the run was started again after step {done}, with other data, and has saved nothing since: shown is "
             "what config.yaml names, as it is now")
        stream.first_step = done
    elif different:
        raise UserError(f"{' + '.join(split.path for split in stream.splits)}: is not what step {step} of {run_folder} "
                        f"was trained on: {', '.join(different)}; put back what was there")
    elif era is history[-1] and stream.fingerprint(done) != state["next_samples"]:
        libraries = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
        raise UserError(f"{here}: with the libraries installed here, the order of its samples comes out another; the "
                        f"run had {libraries}")
    return stream, state


def started_otherwise(started: dict, saved: dict) -> bool:
    """Whether the run was started since its checkpoint with other settings of the data, and allowed to change that.

    Where no setting differs, nobody can tell whether a dataset was changed before the steps after it, or after them.
    """
    def settings(config):
        return (config["run"]["allow_data_change"], config["data"], config["model"]["block_size"],
                config["train"]["global_batch_size"], config["train"].get("batch_schedule"))
    return started["run"]["allow_data_change"] and settings(started) != settings(saved)


def open_stream(here: Path, values: dict, first_step: int, step: int, data: str | None, cache: str):
    """TrainStream by the settings `values` of the file `here`. UserError: they, or the data, are not good any more."""
    from pydantic import ValidationError

    from nanogpt.config import Config
    from nanogpt.stream import TrainStream
    try:
        config = Config.model_validate(values)
        if data is not None:
            if len(config.data.sources) > 1:
                raise UserError(f"--data: is for a single dataset, and step {step} is of {len(config.data.sources)}")
            config.data.path, config.data.train = data, None
        sources = config.data.sources
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{here}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; it is damaged, or of another "
                        "version") from None
    config.data.cache_dir, config.data.cache_limit, config.model.vocab_size = cache, None, None
    for source in sources:
        path = source.path
        indexes = Path(path, "dataset.json"), Path(path, source.split, "index.json")  # the second of another tool's
        if "://" not in path and not any(index.is_file() for index in indexes):
            remedy = "put it back" if len(sources) > 1 else "--data PATH tells where it is now"
            if not Path(path).is_absolute():
                remedy = f"{remedy}, or call this from the folder that the run was started in"
            raise UserError(f"{path}: there is no dataset, and step {step} needs the one that was there; {remedy}")
    try:
        return TrainStream(config, first_step)
    except UserError as error:
        raise UserError(f"the data of step {step} cannot be opened as it was: {error}") from None


def read_config(path: Path) -> dict | None:
    """config.yaml of a run; None: there is none."""
    from nanogpt.config import read_yaml
    return read_yaml(path)[0] if path.exists() else None


def show_metrics(run_folder: Path, step: int, state: dict | None):
    """What the run noted down of a step: with log.interval above 1, not each one's loss."""
    if (run_folder / "manifest.json").is_file():
        run_folder = run_folder.resolve().parent.parent
    try:
        lines = (run_folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        lines = []
    records, skipped, done = {}, set(), 0
    if state:
        skipped, done = {s + 1 for s in state["skipped_steps"]}, state["step"]
    for line in lines:
        try:
            record = json.loads(line)
            records[record["step"]] = record
            skipped.update(record.get("skipped_steps", ()))
            done = max(done, record["step"])
        except (ValueError, KeyError, TypeError, AttributeError):  # a line that a crash has cut short
            pass
    record = records.get(step, {})
    numbers = {key: record[key] for key in ("loss", "grad_norm", "learning_rate") if key in record}
    told = ", ".join(f"{key} {'not finite' if value is None else f'{value:.6g}'}" for key, value in numbers.items())
    print(f"  {told or 'no loss of this step is logged'}")
    if step in skipped:
        print("  loss or gradient was not finite: the step was left out, and changed no weights")
    if step > done:
        note(f"step {step} is not done yet, as far as is saved or logged: the run is at {done}")


def note(text: str):
    print(f"note: {text}", file=sys.stderr, flush=True)


def shard_file(split, sample: int) -> str:
    """The file in which a sample lies; of a dataset here, the one that is there: plain or compressed."""
    plain = split.shard_of(sample)
    packed = split.dataset.shards[split.shard_ends.searchsorted(sample, "right")].zip_data
    return plain if packed is None or Path(plain).exists() else f"{split.path}/{split.name}/{packed.basename}"


def shown(text: str, full: bool) -> str:
    """Text for the terminal; repr keeps control characters away from it."""
    if full or len(text) <= WIDTH:
        return repr(text)
    half = WIDTH // 2
    return f"{text[:half]!r} … {len(text) - 2 * half} characters … {text[-half:]!r}"


# ---- documents ------------------------------------------------------------------------------------------------------

def describe_documents(found: list[tuple], tokens, T: int) -> list[str]:
    """For each sequence, (split, sample, part) with its tokens (T + 1,): the documents it is of, by number and name."""
    from tqdm import tqdm

    from nanogpt.shards import PAIRS

    counted, names, indexes = {}, {}, {}
    for split in dict.fromkeys(split for split, _, _ in found):
        if "://" in split.path:
            note(f"{split.path}: its documents are not counted, which would take every shard over the network")
        elif split.card["dtype"] == "foreign":
            note(f"{split.path}: its documents are not counted, since another tool wrote it, and they may be cut in any way")
        else:
            indexes[split] = read_index(Path(split.path) / split.name, split.card)
            names[split] = names_of_documents(split.card)
    wanted = {split: {(sample, part * T) for of, sample, part in found if of is split} for split in indexes}
    with tqdm(unit="B", unit_scale=True, disable=None, desc="counting documents") as bar:  # None: only on a terminal
        bar.total = sum(shard["raw_data"]["bytes"] for split, shards in indexes.items()
                        for shard in up_to(shards, max(wanted[split])[0]))
        for split, shards in indexes.items():
            counted[split] = ends_before(Path(split.path) / split.name, shards, split.card, wanted[split], bar)
    described = []
    for (split, sample, part), row in zip(found, tokens):
        if split not in counted:
            described.append("")
            continue
        first = counted[split][sample, part * T]
        ends, what = row == split.card["tokenizer"]["eot"], "document"  # an end-of-text is of what it ends
        last = first + int(ends[:-1].sum())
        if split.card["dtype"] == PAIRS:  # no other begins after the last end
            last, what = first + int(ends.sum()) - 1, "pair"
        numbers = f"{what} {first}" if first == last else f"{what}s {first} to {last}"
        its = names[split](first, last)
        its = [repr(name) for name in its] if len(its) <= 4 else [repr(its[0]), "…", repr(its[-1])]
        described.append(f", {numbers}" + (f" ({', '.join(its)})" if its else ""))
    return described


def up_to(shards: list[dict], sample: int) -> list[dict]:
    """The shards from the first to the one that holds a sample."""
    first, needed = 0, []
    for shard in shards:
        if first > sample:
            break
        needed.append(shard)
        first += shard["samples"]
    return needed


def ends_before(folder: Path, shards: list[dict], card: dict, wanted: set[tuple[int, int]], bar) -> dict:
    """{(sample, offset): how many end-of-text ids of the split lie before this token of this sample}."""
    import numpy as np

    stride, eot = card["splits"][folder.name]["stride"], card["tokenizer"]["eot"]
    counts, before, first = {}, 0, 0
    for shard in up_to(shards, max(wanted)[0]):
        rows = read_shard(folder, shard, card)
        ends = rows[:, :stride] == eot  # what follows in a row is the beginning of the next
        for sample, offset in wanted:
            row = sample - first
            if 0 <= row < len(rows):
                inside = np.count_nonzero(ends[:row]) + np.count_nonzero(rows[row, :offset] == eot)
                counts[sample, offset] = before + int(inside)
        before += int(np.count_nonzero(ends))
        first += len(rows)
        bar.update(shard["raw_data"]["bytes"])
    return counts


def names_of_documents(card: dict):
    """A function (first, last) -> names of these documents of the train split; none where that is not certain.

    A dataset keeps what the converter was given, and a hash of all contents in their order, but no list. Where the same
    search finds the same contents, it is the same list.
    """
    import numpy as np

    from nanogpt import documents
    from nanogpt.convert import validation

    said = card["source"]
    try:
        kinds = "text files", "pair files"
        if said["kind"] not in kinds or said["shuffle"] is not None or card["left_out"].get("too long"):
            return lambda first, last: []
        separator = said["separator"]
        inputs = documents.text_files(said["paths"], said["glob"], errors=said["errors"], format=said["format"],
                                      column=said["column"], separator=separator and separator.encode(),
                                      pairs=said["kind"] == "pair files")
        source = inputs.scan(said["val_fraction"], cuttable=True)
        if any(said[key] != value for key, value in source.identity.items() if key != "paths"):
            return lambda first, last: []
        val = validation(source.documents, said["val_fraction"], said["seed"], said["like_nanogpt"], source.single)
        left_out = []
        if any(card["left_out"].values()):  # which ones, only reading tells
            tasks = source.feed(range(len(source.tasks)))
            left_out = [document.number for task in tasks for document in source.read(*task) if document.text is None]
        numbers = np.setdiff1d(np.arange(source.documents), np.concatenate([val, left_out]))
        assert len(numbers) == card["splits"]["train"]["documents"]
        return lambda first, last: [source.name(int(number)) for number in numbers[first:last + 1]]
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError, AssertionError):
        return lambda first, last: []  # not there any more, or of another converter


def main():
    parser = Parser(description=__doc__, argument_default=SUPPRESS, usage="%(prog)s DIR [--samples N] "
                    "[--histogram all|none] [--verify]\n                      "
                    "[--tokenizer T [--split NAME…]]\n       %(prog)s --diff DIR DIR\n"
                    "       %(prog)s --run RUN --step K [--limit N] [--full] [--no-documents] [--data P]")
    add = parser.add_argument_group("a dataset").add_argument
    add("dataset", nargs="?", metavar="DIR", help="dataset folder")
    add("--samples", type=int, metavar="N", help="show the first N of each split as text (default: 3)")
    add("--verify", action="store_true", help="hash every shard; status 1 if one is not as written")
    add("--histogram", choices=["all", "none"], help="measure the lengths of all documents (default: of those in the first "
        f"{HISTOGRAM >> 20} MiB of each split; with --verify, all), or none")
    add("--tokenizer", metavar="T", help="of MDS that another tool wrote, as llm-foundry: gpt2, a ranks file or a "
        "tokenizer.json")
    add("--split", nargs="+", metavar="NAME", help="of such, the folders to look at (default: all)")
    add = parser.add_argument_group("two datasets").add_argument
    add("--diff", nargs=2, type=Path, metavar="DIR", help="in what they differ; status 1 if in their tokens")
    add = parser.add_argument_group("a step of a run").add_argument
    add("--run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    add("--step", type=int, metavar="K", help="the step, from 1, as in the log")
    add("--limit", type=int, metavar="N", help="show at most N sequences, spread over the step (default: 16)")
    add("--full", action="store_true", help="the whole text of each")
    add("--no-documents", action="store_true", help="leave out which documents they are of; to count these, all shards "
        "that lie before are read")
    add("--data", metavar="P", help="where the dataset is now, if it was moved")
    given = vars(parser.parse_args())
    of_dataset = {"dataset", "samples", "histogram", "verify", "tokenizer", "split"}
    of_step = {"run", "step", "limit", "full", "no_documents", "data"}
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    if "dataset" in given and given.keys() <= of_dataset:
        hashing = "verify" in given
        how = given.get("samples", 3), hashing, given.get("histogram", "all" if hashing else "some")
        if "tokenizer" in given:
            show_foreign(Path(given["dataset"]), given.get("split"), given["tokenizer"], *how)
        elif "split" in given:
            parser.error("--split goes with --tokenizer")
        else:
            show_dataset(Path(given["dataset"]), *how)
    elif given.keys() == {"diff"}:
        show_difference(given["diff"])
    elif {"run", "step"} <= given.keys() <= of_step:
        show_step(given["run"], given["step"], given.get("limit", 16), "full" in given, given.get("data"),
                  "no_documents" not in given)
    else:
        parser.error("give either DIR, with --samples, --histogram or --verify, or --diff DIR DIR, or --run RUN with "
                     "--step K and what goes with these")


if __name__ == "__main__":
    run(main)

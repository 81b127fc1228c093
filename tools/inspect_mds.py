"""What is in a dataset folder, its first samples as text, and with --verify whether every shard is what was written.

    python tools/inspect_mds.py data/owt
    python tools/inspect_mds.py data/owt --samples 0 --verify
"""

import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run  # noqa: E402


def read_index(folder: Path, card: dict) -> list[dict]:
    """The shards of a split as index.json lists them. UserError: missing, damaged, or not what dataset.json says."""
    path = folder / "index.json"
    column = f"ndarray:{card['dtype']}:{card['block_size'] + 1}"
    samples = card["splits"][folder.name]["samples"]
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
        for shard in shards:
            if shard["column_encodings"] != [column]:
                raise ValueError(f"its column is {shard['column_encodings']}, not {column}")
            for info in filter(None, (shard["raw_data"], shard["zip_data"])):
                if Path(info["basename"]).name != info["basename"] or "xxh64" not in info["hashes"]:
                    raise ValueError("it lists a file elsewhere, or without its xxh64")
        if (found := sum(shard["samples"] for shard in shards)) != samples:
            raise ValueError(f"it lists {found} samples, dataset.json {samples}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it or convert the text again") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); copy it or convert the text again") from None
    return shards


def files_there(folder: Path, shard: dict) -> list[dict]:
    """Of the two forms of a shard, plain and compressed, those that are in the folder. UserError: none is."""
    found = [info for info in (shard["raw_data"], shard["zip_data"]) if info and (folder / info["basename"]).is_file()]
    if not found:
        raise UserError(f"{folder / (shard['zip_data'] or shard['raw_data'])['basename']}: is missing")
    return found


def read_samples(folder: Path, shards: list[dict], card: dict):
    """Yields the samples of a split, each (block_size + 1,): all of one size, they lie at the end of a shard's file."""
    import numpy as np

    dtype = np.dtype(card["dtype"])
    for shard in shards:
        info = files_there(folder, shard)[0]
        path = folder / info["basename"]
        try:
            data = path.read_bytes()
            if info is shard["zip_data"]:
                import zstd
                data = zstd.decompress(data)
            size = shard["samples"] * (card["block_size"] + 1) * dtype.itemsize
            yield from np.frombuffer(data[-size:], dtype).reshape(shard["samples"], card["block_size"] + 1)
        except Exception as error:  # damage shows as whatever numpy and zstd make of it
            raise UserError(f"{path}: cannot be read ({error})") from None


def show_samples(folder: Path, shards: list[dict], card: dict, tokenizer, n: int):
    """Prints the first n samples of a split. repr keeps control characters of the text away from the terminal."""
    stride = card["splits"][folder.name]["stride"]
    for i, tokens in enumerate(islice(read_samples(folder, shards, card), n)):
        print(f"{folder.name} sample {i}, tokens {i * stride} to {i * stride + card['block_size']}: "
              f"{tokenizer.decode(tokens)!r}")


def verify(splits: dict[Path, list[dict]]) -> list[str]:
    """A line for each shard, of all splits (folder -> shards), that is missing or not what its index says."""
    from tqdm import tqdm

    problems = []
    total = sum(shard["raw_data"]["bytes"] for shards in splits.values() for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:  # None: only on a terminal
        for folder, shards in splits.items():
            for shard in shards:
                try:
                    for info in files_there(folder, shard):
                        check_file(folder / info["basename"], info)
                except UserError as error:
                    problems.append(str(error))
                bar.update(shard["raw_data"]["bytes"])
    return problems


def check_file(path: Path, info: dict):
    """UserError: the size or the hash of a shard's file is not that of its index."""
    import xxhash

    digest = xxhash.xxh64()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size != info["bytes"]:
        raise UserError(f"{path}: has {size} of {info['bytes']} bytes")
    if digest.hexdigest() != info["hashes"]["xxh64"]:
        raise UserError(f"{path}: is damaged (xxh64 {digest.hexdigest()}, was {info['hashes']['xxh64']})")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, metavar="DIR", help="dataset folder")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="show the first N of each split as text")
    parser.add_argument("--verify", action="store_true", help="hash every shard; status 1 if one is not as written")
    args = parser.parse_args()
    from nanogpt.shards import load_dataset_card  # here, where `run` tells what is not installed
    from nanogpt.tokenizer import from_json
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks

    card = load_dataset_card(args.dir)
    stored = card["tokenizer"]
    print(f"{args.dir}")
    print(f"  tokenizer  {stored['name']!r}, {stored['vocab_size']:,} ids, end-of-text {stored['eot']}, "
          f"fingerprint {stored['fingerprint'][:16]}")
    print(f"  sample     {card['block_size']} + 1 tokens, {card['dtype']}")
    print(f"  source     {', '.join(f'{key} {value!r}' for key, value in card['source'].items())}")
    splits, problems = {}, []
    for name, split in card["splits"].items():
        folder = args.dir / name
        try:
            splits[folder] = read_index(folder, card)
        except UserError as error:
            problems.append(str(error))
        print(f"  {name:9}  documents {split['documents']:,}, bytes {split['bytes']:,}, tokens {split['tokens']:,}, "
              f"dropped at the end {split['dropped_tokens']:,}, samples {split['samples']:,}, stride "
              f"{split['stride']}, shards {len(splits.get(folder, ())):,}")
    if args.samples > 0:
        tokenizer = from_json(stored)
        for folder, shards in splits.items():
            try:
                show_samples(folder, shards, card, tokenizer, args.samples)
            except UserError as error:
                problems.append(str(error))
    if args.verify:
        problems += verify(splits)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if args.verify:
        print(f"verified: {sum(map(len, splits.values())):,} shards hold what was written")


if __name__ == "__main__":
    run(main)

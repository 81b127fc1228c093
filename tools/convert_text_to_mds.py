"""Text files and folders -> a dataset folder of MDS shards, split into train and val.

    python tools/convert_text_to_mds.py --input notes.txt --out data/notes --tokenizer byte --block-size 256
    python tools/convert_text_to_mds.py --input src docs --glob '*.py' --out data/code --tokenizer gpt2 --workers 8
    python tools/convert_text_to_mds.py --input 'books/*.txt' --out data/books --tokenizer char --val-fraction 0.1
    python tools/convert_text_to_mds.py --input pairs.jsonl --pairs --out data/sft --tokenizer gpt2 --val-fraction 0.1

Every file is a document. Run again, it finds its work done; a folder that holds anything else is left alone.

With --pairs every line of a file is one, {"prompt": "…", "completion": "…"}, for finetuning: only the completion and the
end-of-text after it are trained on. The two are tokenized apart, as sampling has them: with gpt2 the blank between words
belongs to the completion. A sample is filled with whole pairs, in their order.
"""

import fnmatch
import glob
import hashlib
import json
import os
import sys
from argparse import SUPPRESS
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run  # noqa: E402


class TextFiles:
    """The documents, (name, text) pairs, read from disk each time they are gone through."""

    def __init__(self, paths: list[Path], errors: str):
        """errors: what to do with a file that is not UTF-8: strict (UserError), replace, or skip it."""
        self.errors = "strict" if errors == "skip" else errors
        self.paths, self.bytes, digest = [], 0, hashlib.sha256()
        for path in paths:
            data = _read(path)
            if errors == "skip" and not _is_utf8(data) or not data:
                continue
            self.paths.append(path)
            self.bytes += len(data)
            digest.update(hashlib.sha256(data).digest())
        self.sha256 = digest.hexdigest()  # of the contents and their order

    def __len__(self):
        return len(self.paths)

    def __iter__(self):
        for path in self.paths:
            try:
                yield str(path), _read(path).decode("utf-8", self.errors)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: is not UTF-8 at byte {error.start}; leave it out (--glob), or take --errors "
                                "replace or --errors skip") from None


class PairFiles:
    """The pairs, (file:line, (prompt, completion)), of JSONL files, read from disk each time they are gone through."""

    def __init__(self, paths: list[Path], errors: str):
        """errors: what to do with a line that is no pair: strict (UserError), replace what is not UTF-8, or skip it."""
        from nanogpt.shards import file_hash
        self.errors = errors
        self.paths, self.bytes, digest = [], 0, hashlib.sha256()
        for path in paths:
            try:
                self.bytes += path.stat().st_size
                digest.update(bytes.fromhex(file_hash(path, hashlib.sha256())))
            except OSError as error:
                raise _unreadable(path, error) from None
            self.paths.append(path)
        self.sha256 = digest.hexdigest()  # of the contents and their order
        self.pairs = sum(1 for _ in self)

    def __len__(self):
        return self.pairs

    def __iter__(self):
        self.bad_lines = 0
        for path in self.paths:
            for number, line in _lines(path):
                try:
                    pair = parse_pair(line, "replace" if self.errors == "replace" else "strict")
                except ValueError as error:
                    if self.errors != "skip":
                        raise UserError(f"{path}:{number}: {error}; a line is {{\"prompt\": \"…\", \"completion\": \"…\"}}, "
                                        "and --errors skip leaves out what is none") from None
                    self.bad_lines += 1
                else:
                    yield f"{path}:{number}", pair


def _lines(path: Path):
    """Yields (number from 1, bytes) of the lines that are not blank."""
    try:
        with open(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise _unreadable(path, error) from None


def parse_pair(line: bytes, errors: str) -> tuple[str, str]:
    """(prompt, completion) of a line of JSONL; errors as in bytes.decode. ValueError: what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig", errors))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    for key in ("prompt", "completion"):
        if key not in record:
            raise ValueError(f"has no {key}")
        if not isinstance(record[key], str):
            raise ValueError(f"its {key} is no string, but {type(record[key]).__name__}")
        try:
            record[key].encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"its {key} holds half of a surrogate pair, which is not Unicode text") from None
    if not record["completion"]:
        raise ValueError("its completion is empty, so that there is nothing to learn")
    return record["prompt"], record["completion"]


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror})")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()  # not read_text, which would turn \r\n into \n
    except OSError as error:
        raise _unreadable(path, error) from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


def find_files(inputs: list[str], pattern: str, out: Path) -> list[Path]:
    """The files of all inputs in their order, those of a folder or of a glob sorted by path, each once."""
    files = {}
    for given in inputs:
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not paths:
            raise UserError(f"{given}: is not there; --input takes files, folders and quoted globs")
        for path in map(Path, paths):
            if path.is_dir():
                if out.resolve().is_relative_to(path.resolve()):
                    raise UserError(f"{out}: lies inside the input {path}; take an --out elsewhere")
                walk = os.walk(path, onerror=_stop)
                found = [Path(folder, name) for folder, _, names in walk for name in fnmatch.filter(names, pattern)]
                found = sorted(file for file in found if file.is_file())
                if not found:
                    raise UserError(f"{path}: holds no file that matches {pattern}; take another folder or --glob")
            elif path.is_file():
                found = [path]
            else:
                raise UserError(f"{path}: is neither a file nor a folder")
            files.update((file.resolve(), file) for file in found if file.resolve() not in files)
    return list(files.values())


def _stop(error: OSError):
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def pair_counts(split: dict, block_size: int) -> str:
    """What dataset.json counts of a split of pairs, for people."""
    share = split["padding"] / max(1, split["samples"] * (block_size + 1))
    return (f"pairs {split['documents']:,}, tokens {split['tokens']:,}, targets {split['targets']:,}, samples "
            f"{split['samples']:,}, padding {share:.1%}, left out as too long {split['left_out']:,}")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, default=SUPPRESS, metavar="PATH",
                        help="text files, folders, quoted globs")
    parser.add_argument("--out", required=True, default=SUPPRESS, type=Path, metavar="DIR",
                        help="dataset folder to make")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="byte, char, gpt2 or another tiktoken name, a ranks file, or a tokenizer.json")
    parser.add_argument("--pairs", action="store_true",
                        help="the files are JSONL of prompts and completions, and only completions are trained on")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens a sample trains on")
    parser.add_argument("--stride", type=int, default=SUPPRESS,
                        help="tokens from one training sample to the next (default: the block size)")
    parser.add_argument("--val-fraction", type=float, default=0.01,
                        help="of the documents, or of the text of a single one; 0: no validation split")
    parser.add_argument("--seed", type=int, default=2357, help="chooses the validation documents")
    parser.add_argument("--glob", default="*", help="names of the files to take from folders")
    parser.add_argument("--errors", choices=["strict", "replace", "skip"], default="strict",
                        help="a file that is not UTF-8: stop, replace what is wrong, or skip it; with --pairs, skip "
                        "leaves out every line that is no pair, or longer than a sample")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--compression", choices=["none", "zstd"], default="none", help="of the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset in --out")
    args = parser.parse_args()

    from nanogpt.shards import check_options, convert, whole  # here, where `run` tells what is not installed
    from nanogpt.tokenizer import from_name
    stride = getattr(args, "stride", None)
    check_options(args.block_size, stride, args.val_fraction, args.seed, args.workers, args.pairs)

    for path in args.out.parent.glob(f".{glob.escape(args.out.name)}.partial-*"):
        print(f"note: {path} belongs to another conversion; remove it if that was killed", file=sys.stderr)
    kind, what = (PairFiles, "pair") if args.pairs else (TextFiles, "text")
    documents = kind(find_files(args.input, args.glob, args.out), args.errors)
    if not documents:
        raise UserError(f"{' '.join(args.input)}: holds no {what}; give files that are not empty")
    tokenizer = from_name(args.tokenizer, (whole(text) for _, text in documents))
    source = {"kind": f"{what} files", "paths": args.input, "glob": args.glob, "errors": args.errors,
              "bytes": documents.bytes, "sha256": documents.sha256}
    card, written = convert(documents, args.out, tokenizer, args.block_size, stride=stride,
                            val_fraction=args.val_fraction, seed=args.seed, workers=args.workers,
                            compression=None if args.compression == "none" else args.compression,
                            overwrite=args.overwrite, source=source, pairs=args.pairs, skip_long=args.errors == "skip")
    print(f"{args.out}: {'written' if written else 'is there already (--overwrite would make it anew)'}, "
          f"tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, block size {args.block_size}")
    if args.pairs and documents.bad_lines:
        print(f"  left out: {documents.bad_lines:,} lines that are no pair")
    for name, split in card["splits"].items():
        if args.pairs:
            print(f"  {name:5}  {pair_counts(split, args.block_size)}, bytes/token {split['bytes'] / split['tokens']:.3f}")
            continue
        print(f"  {name:5}  documents {split['documents']:,}, tokens {split['tokens']:,}, samples "
              f"{split['samples']:,}, dropped at the end {split['dropped_tokens']:,}, bytes/token "
              f"{split['bytes'] / split['tokens']:.3f}")


if __name__ == "__main__":
    run(main)

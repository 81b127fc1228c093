"""Text, JSONL and Parquet files -> a dataset folder of MDS shards, split into train and val.

    python tools/convert_text_to_mds.py --input notes.txt --out data/notes --tokenizer byte --block-size 256
    python tools/convert_text_to_mds.py --input src docs --glob '*.py' --out data/code
    python tools/convert_text_to_mds.py --input 'books/*.txt.gz' --out data/books --tokenizer char --val-fraction 0.1
    python tools/convert_text_to_mds.py --input tales.txt --document-separator "\\n\\n" --train-bpe 4096 --out data/tales
    python tools/convert_text_to_mds.py --input dump --glob '*.jsonl' --column body --shuffle-documents 1 --out s3://bucket/dump
    python tools/convert_text_to_mds.py --input pairs.jsonl --pairs --out data/sft --val-fraction 0.1
    zcat *.gz | python tools/convert_text_to_mds.py --input - --document-separator '\\0' --out data/piped

A file is a document; of .jsonl each line is one, of .parquet each row; .gz and .zst are unpacked on the way. Killed at any
moment, the same command goes on where it was; run again, it finds its work done; a folder that holds anything else is left
alone. The result depends neither on --workers nor on interruptions.

With --pairs every line of a file is one, {"prompt": "…", "completion": "…"}, for finetuning: only the completion and the
end-of-text after it are trained on. The two are tokenized apart, as sampling has them: with gpt2 the blank between words
belongs to the completion. A sample is filled with whole pairs, in their order.
"""

import os
import shutil
import sys
from argparse import SUPPRESS
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run


def add_shared(parser: Parser, val_fraction: float, column: str):
    """The options of all converters; `column`: what --column is of."""
    add = parser.add_argument
    add("--tokenizer", default="gpt2", help="byte, char, gpt2 or another tiktoken name, a ranks file, or a tokenizer.json")
    add("--train-bpe", type=int, default=SUPPRESS, metavar="N",
        help="instead: train a byte-level BPE of N tokens on this text; it is stored with the dataset")
    add("--block-size", type=int, default=1024, help="tokens a sample trains on")
    add("--stride", type=int, default=SUPPRESS,
        help="tokens from one training sample to the next (default: the block size)")
    add("--val-fraction", type=float, default=val_fraction,
        help="of the documents, or of the text of a single one; 0: no validation split")
    add("--seed", type=int, default=2357, help="chooses the validation documents")
    add("--shuffle-documents", type=int, default=SUPPRESS, metavar="SEED",
        help="put the documents into another order, for sources that come sorted")
    add("--column", default="text", help=f"of {column}: which one is the text")
    add("--errors", choices=["strict", "replace", "skip"], default="strict",
        help="a document that is not UTF-8: stop, replace what is wrong, or skip it; skip also leaves out lines of JSONL "
        "without such a text, and with --pairs every line that is no pair, or longer than a sample")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=cores, help="processes that read and tokenize")
    add("--compression", choices=["none", "zstd"], default="none", help="of the shards")
    add("--overwrite", action="store_true", help="replace the dataset in --out, or what is begun there")


def convert_inputs(args, inputs, like_nanogpt: bool = False):
    """Converts them as the options say, and prints what came out."""
    from nanogpt.convert import convert
    from nanogpt.tokenizer import from_name

    size, seed = getattr(args, "train_bpe", None), getattr(args, "shuffle_documents", None)
    if seed is not None and seed < 0:
        raise UserError(f"--shuffle-documents: {seed} is out of range; take 0 or more")
    if size is not None and size < 1:
        raise UserError(f"--train-bpe: {size} is out of range; take a number of tokens, like 4096")
    if size is not None and args.tokenizer != "gpt2":
        raise UserError("--train-bpe: makes a tokenizer; leave out --tokenizer")
    tokenizer = f"bpe-{size}" if size is not None else args.tokenizer
    if tokenizer != "char" and size is None:
        tokenizer = from_name(tokenizer)
    card, written = convert(inputs, args.out, tokenizer, args.block_size, stride=getattr(args, "stride", None),
                            val_fraction=args.val_fraction, seed=args.seed, workers=args.workers,
                            compression=None if args.compression == "none" else args.compression, overwrite=args.overwrite,
                            skip_long=inputs.pairs and args.errors == "skip", shuffle=seed, like_nanogpt=like_nanogpt)
    tell(args.out, card, written)


def tell(out, card: dict, written: bool):
    """Prints what is in a dataset now."""
    from nanogpt.shards import PAIRS, pair_counts

    made_of, again = card["tokenizer"], "" if "://" in str(out) else " (--overwrite would make it anew)"
    print(f"{out}: {'written' if written else 'is there already' + again}, "
          f"tokenizer {made_of['name']} with {made_of['vocab_size']:,} ids, block size {card['block_size']}")
    what = {"empty": "empty documents", "undecodable": "documents that are not UTF-8 or have no text",
            "no pair": "lines that are no pair", "too long": "pairs that are longer than a sample"}
    if left_out := [f"{n:,} {what.get(why, why)}" for why, n in card.get("left_out", {}).items() if n]:
        print(f"  left out: {', '.join(left_out)}")
    for name, split in card["splits"].items():
        if card["dtype"] == PAIRS:
            print(f"  {name:5}  {pair_counts(split, card['block_size'])}, bytes/token {split['bytes'] / split['tokens']:.3f}")
            continue
        print(f"  {name:5}  documents {split['documents']:,}, tokens {split['tokens']:,}, samples "
              f"{split['samples']:,}, dropped at the end {split['dropped_tokens']:,}, bytes/token "
              f"{split['bytes'] / split['tokens']:.3f}")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, default=SUPPRESS, metavar="PATH",
        help="files, folders, quoted globs; - is standard input")
    add("--out", required=True, default=SUPPRESS, metavar="DIR", help="dataset folder to make, or s3://…, gs://…")
    add("--glob", default="*", help="names of the files to take from folders")
    add("--format", choices=["text", "jsonl", "parquet"], default=SUPPRESS,
        help="of all files (default: by their names, .jsonl, .ndjson, .parquet, or else text)")
    add("--document-separator", default=SUPPRESS, metavar="STR",
        help=r"what stands between the documents of a text file, with \n \t \r \0 \\ \xNN (default: a file is a document)")
    add("--pairs", action="store_true",
        help="the files are JSONL of prompts and completions, and only completions are trained on")
    add_shared(parser, val_fraction=0.01, column="JSONL and Parquet")
    args = parser.parse_args()

    from nanogpt.convert import partial_folder
    from nanogpt.documents import spool_stdin, text_files, unescape  # here, where `run` tells what is not installed
    from nanogpt.shards import check_options
    check_options(args.block_size, getattr(args, "stride", None), args.val_fraction, args.seed, args.workers, args.pairs)
    separator, format = getattr(args, "document_separator", None), getattr(args, "format", None)
    if args.pairs and (separator is not None or format is not None):
        raise UserError("--pairs: its files are JSONL; leave out --format and --document-separator")
    if separator is not None:
        separator = unescape(separator)
    partial = partial_folder(args.out)
    spool = partial.with_suffix(".stdin")
    try:
        paths = [str(spool_stdin(spool)) if path == "-" else path for path in args.input]
        inputs = text_files(paths, args.glob, args.out, errors=args.errors, format=format, column=args.column,
                            separator=separator, pairs=args.pairs)
        inputs.options["paths"] = args.input
        if not inputs.bytes:  # before a vocabulary is looked for
            raise UserError(f"{' '.join(args.input)}: holds no {'pair' if args.pairs else 'text'}; give files that are not empty")
        convert_inputs(args, inputs)
    finally:
        if "-" in args.input and not partial.exists():  # else the same text, piped again, goes on there
            shutil.rmtree(spool, ignore_errors=True)


if __name__ == "__main__":
    run(main)

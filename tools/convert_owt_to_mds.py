"""OpenWebText, or another dataset of the Hugging Face hub -> a dataset folder of MDS shards, split into train and val.

    python tools/convert_owt_to_mds.py --out data/owt
    python tools/convert_owt_to_mds.py --hf-dataset HuggingFaceFW/fineweb-edu --hf-config sample-10BT --streaming --out edu
    python tools/convert_owt_to_mds.py --hf-dataset roneneldan/TinyStories --train-bpe 4096 --block-size 256 --out data/tales
    python tools/convert_owt_to_mds.py --hf-dataset copies/openwebtext --out s3://bucket/owt

By default this is nanoGPT's OpenWebText: tokens of gpt2, and its very validation documents, 0.05 % by seed 2357. Parquet
files are taken as they are, downloaded first or with --streaming read in place. HF_TOKEN, HF_HOME and HF_ENDPOINT as usual.
A folder laid out like a dataset of the hub may take its place, where there is no network.

Killed at any moment, the same command goes on where it was; run again, it finds its work done. The result depends neither on
--workers nor on interruptions.
"""

import sys
from argparse import SUPPRESS
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for the converter beside this

from nanogpt.errors import Parser, run  # noqa: E402


def main():
    from convert_text_to_mds import add_shared, convert_inputs
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--hf-dataset", default="Skylion007/openwebtext", metavar="NAME", help="of the hub, or a folder laid out like one")
    add("--hf-config", default=SUPPRESS, metavar="NAME", help="which of its configurations, where it has several")
    add("--split", default="train", help="which of its splits is converted, and split anew")
    add("--revision", default=SUPPRESS, help="branch, tag or commit (default: main)")
    add("--streaming", action="store_true", help="read Parquet files in place, without downloading them all first")
    add("--out", default="data/owt", metavar="DIR", help="dataset folder to make, or s3://…, gs://…")
    add_shared(parser, val_fraction=0.0005, column="the dataset")
    args = parser.parse_args()

    from nanogpt.hub import HuggingFace  # here, where `run` tells what is not installed
    from nanogpt.shards import check_options
    check_options(args.block_size, getattr(args, "stride", None), args.val_fraction, args.seed, args.workers)
    inputs = HuggingFace(args.hf_dataset, getattr(args, "hf_config", None), args.split, args.column,
                         getattr(args, "revision", None), args.streaming, args.errors)
    convert_inputs(args, inputs, like_nanogpt=True)


if __name__ == "__main__":
    run(main)

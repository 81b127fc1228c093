"""nanoGPT's own files: ckpt.pt -> a run; train.bin, val.bin and meta.pkl -> a dataset folder.

    python tools/convert_nanogpt.py --checkpoint out/ckpt.pt --out runs/nano_gpt2
    python tools/convert_nanogpt.py --checkpoint out-char/ckpt.pt --meta data/shakespeare_char/meta.pkl --out runs/nano_char
    python tools/convert_nanogpt.py --data data/shakespeare_char --block-size 256 --out data/nano_shakespeare_char

The run holds weights alone: to sample, evaluate and export, and to finetune with run.init_from. Both kinds of file hold
pickles; of these only tensors, numbers, strings, lists and dicts are read, and nothing is executed.
"""

import hashlib
import io
import math
import os
import pickle
import shutil
import sys
import zipfile
from argparse import SUPPRESS
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for the converter beside this

from nanogpt.errors import Parser, UserError, run  # noqa: E402

# ---- meta.pkl -------------------------------------------------------------------------------------------------------


class PlainUnpickler(pickle._Unpickler):  # the one in C fills the memory where a damaged file asks it to
    """Reads dicts, lists, strings and numbers."""

    def find_class(self, module, name):
        raise UserError(f"it names {module + '.' + name!r:.100}, and could run code; it is refused unread")


def read_meta(path: Path):
    """The CharTokenizer of a meta.pkl. UserError: it cannot be read, or is none that nanoGPT's prepare.py writes."""
    from nanogpt.tokenizer import CharTokenizer
    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        alphabet = "".join(meta["itos"][i] for i in range(meta["vocab_size"]))
        if meta["itos"] != dict(enumerate(alphabet)) or meta["stoi"] != {c: i for i, c in enumerate(alphabet)}:
            raise ValueError("itos and stoi do not turn ids into characters and back")
        if alphabet != "".join(sorted(alphabet)):
            raise ValueError("its characters are not sorted")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise anything
        said = str(error) if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is no meta.pkl of characters ({' '.join(said.split())[:200]})") from None
    return CharTokenizer(alphabet, with_eot=False)


# ---- ckpt.pt --------------------------------------------------------------------------------------------------------

def read_file(path: Path):
    """What torch.save wrote: tensors, which stay in the file until they are used, and plain values. Raises UserError."""
    import torch
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch writes checksums, and does not look at them
                raise UserError(f"{path}: is damaged ({damaged!r:.60}); copy it again")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, and could run code; it is refused "
                        "unread") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damage shows as whatever zipfile and torch make of it
        raise UserError(f"{path}: is cut short, or no checkpoint of nanoGPT ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:100]})") from None


def read_checkpoint(path: Path):
    """(Config, tensors by the names of a checkpoint, steps, validation loss or None). UserError: none of nanoGPT's."""
    import torch

    from nanogpt.config import Config
    from nanogpt.model import GPT
    saved = read_file(path)
    try:
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}")
        theirs, steps, loss = saved["config"], saved["iter_num"], float(saved["best_val_loss"])
        weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()   # torch.compile's prefix
                   if not name.endswith(".attn.bias")}                                        # older ones: a mask
        config = Config.model_validate(dict(
            data=dict(path=f"data/{theirs['dataset']}"), model=saved["model_args"],
            train=dict(max_steps=steps, micro_batch_size=theirs["batch_size"],
                       global_batch_size=theirs["batch_size"] * theirs["gradient_accumulation_steps"])))
        if any(config.model.contradictions()) or config.model.n_layer > len(weights):
            raise ValueError("its model_args are of no model")
        with torch.device("meta"):
            model = GPT(config.model)
    except Exception as error:  # anything can stand in the place of anything
        raise UserError(f"{path}: is no checkpoint of nanoGPT ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]})") from None

    vocab_size, head = config.model.vocab_size, "lm_head.weight"
    shapes = {name: tuple(w.shape) for name, w in model.named_parameters()}
    rows = shapes["transformer.wte.weight"]  # of which the last are padding
    shapes["transformer.wte.weight"] = shapes[head] = (vocab_size, config.model.n_embd)
    for name in sorted(shapes.keys() ^ weights.keys()):
        raise UserError(f"{path}: {name!r:.80} is " + ("missing" if name in shapes else "no tensor of its model_args"))
    for name, shape in shapes.items():
        w = weights[name]
        if not (isinstance(w, torch.Tensor) and w.is_floating_point() and w.layout is torch.strided and w.is_cpu):
            raise UserError(f"{path}: {name} is no tensor of floating-point numbers")
        if w.shape != shape:
            raise UserError(f"{path}: {name} is {tuple(w.shape)}, and {shape} by its model_args")
    if not torch.equal(weights[head], weights["transformer.wte.weight"]):
        raise UserError(f"{path}: {head} is not transformer.wte.weight, and in nanoGPT they are one")
    del weights[head]
    if sum(w.nbytes for w in weights.values()) > path.stat().st_size:  # tensors that repeat a few numbers
        raise UserError(f"{path}: its tensors are larger than the file")
    embedding = torch.zeros(rows)
    embedding[:vocab_size] = weights["transformer.wte.weight"]
    tensors = {f"model.{name}": w.float() for name, w in (weights | {"transformer.wte.weight": embedding}).items()}
    return config, tensors, steps, loss if math.isfinite(loss) else None


def tokenizer_of(path: Path, config, meta: Path | None):
    """That of --meta, or gpt2's where the model has as many ids. Raises UserError."""
    from nanogpt.tokenizer import from_name
    ids = config.model.vocab_size
    if meta is None:
        if ids not in (50257, 50304):  # 50304: rounded up, nanoGPT's default
            raise UserError(f"{path}: its model has {ids} ids, and gpt2 has 50257; --meta {config.data.path}/meta.pkl "
                            "tells which characters they are")
        return from_name("gpt2")
    tok = read_meta(meta)
    if tok.vocab_size != ids:
        raise UserError(f"{meta}: has {tok.vocab_size} characters, and the model of {path} {ids} ids; give the one of its "
                        "data")
    return tok


def convert_checkpoint(path: Path, meta: Path | None, out: Path):
    """Makes the run folder `out` of a ckpt.pt: config.yaml and one checkpoint."""
    import torch
    import yaml

    from nanogpt import __version__, checkpoint
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out}: is there already; take another --out")
        config, tensors, steps, loss = read_checkpoint(path)
        tok = tokenizer_of(path, config, meta)
        config.run.dir = str(out)
        # What nanoGPT trained on was drawn at random, and no step of it can be taken again.
        data = dict(from_step=0, tokens=0, parts=1, data=config.data.model_dump(),
                    identity={"train.global_batch_size": config.train.global_batch_size,
                              "model.block_size": config.model.block_size,
                              "tokenizer fingerprint": tok.fingerprint})
        state = dict(step=steps, tokens=steps * config.tokens_per_step, config=config.model_dump(), data_history=[data],
                     next_samples="drawn by nanoGPT", tokenizer=tok.to_json(), world_size=1, skipped_steps=[],
                     held_out=dict(before=None, best=loss, best_step=None, since=0), recent_losses=[],
                     versions=dict(nanogpt=__version__, torch=torch.__version__))
        partial = out.resolve().parent / f".{out.name}.partial-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
            checkpoint.save_alone(partial / "checkpoints" / f"step-{steps:08d}", tensors, state)
            checkpoint.read_state(checkpoint.find(partial))  # whatever the file said of its data, it can be read again
            os.rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); take another --out") from None
    print(f"{out}: written, step {steps}, {sum(t.numel() for t in tensors.values()) / 1e6:.2f}M parameters, tokenizer "
          f"{tok.name} with {tok.vocab_size:,} ids, lowest validation loss {'not known' if loss is None else f'{loss:.4f}'}")


# ---- .bin -----------------------------------------------------------------------------------------------------------

def read_bin(path: Path):
    """The ids (n,) of a .bin, uint16, read as they are needed. Raises UserError."""
    import numpy as np
    try:
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise UserError(f"{path}: has {size} bytes, and its ids take two each; prepare.py makes it anew")
        return np.memmap(path, np.dtype("<u2"), mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); --data takes a folder with train.bin and "
                        "val.bin") from None


def convert_data(folder: Path, out: Path, block_size: int, stride: int | None, compression: str | None, overwrite: bool):
    """Makes the dataset folder `out` of train.bin, val.bin and, where there is one, meta.pkl."""
    from convert_text_to_mds import tell

    from nanogpt.convert import convert_tokens
    from nanogpt.shards import file_hash
    from nanogpt.tokenizer import from_name
    splits = {name: read_bin(folder / f"{name}.bin") for name in ("train", "val")}
    meta = folder / "meta.pkl"
    tok = read_meta(meta) if meta.exists() else from_name("gpt2")  # as nanoGPT does
    source = {"kind": "nanoGPT .bin", "paths": [str(folder)],
              "sha256": {name: file_hash(folder / f"{name}.bin", hashlib.sha256()) for name in splits}}
    card, written = convert_tokens(splits, out, tok, block_size, stride=stride, compression=compression,
                                   overwrite=overwrite, source=source)
    tell(out, card, written)


def main():
    parser = Parser(description=__doc__, argument_default=SUPPRESS, usage="%(prog)s --checkpoint FILE "
                    "[--meta FILE] --out RUN\n       %(prog)s --data DIR [--block-size N] [--stride N] [--compression zstd] "
                    "[--overwrite] --out DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run or dataset folder to make")
    add = parser.add_argument_group("a checkpoint").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="ckpt.pt")
    add("--meta", type=Path, metavar="FILE", help="meta.pkl of the data it was trained on (without: gpt2's tokens)")
    add = parser.add_argument_group("a dataset").add_argument
    add("--data", type=Path, metavar="DIR", help="folder with train.bin, val.bin and meta.pkl (without: gpt2's tokens)")
    add("--block-size", type=int, metavar="N", help="tokens a sample trains on (default: 1024)")
    add("--stride", type=int, metavar="N", help="tokens from one training sample to the next (default: the block size)")
    add("--compression", choices=["none", "zstd"], help="of the shards (default: none)")
    add("--overwrite", action="store_true", help="replace the dataset in --out")
    given = vars(parser.parse_args())
    if {"checkpoint"} <= given.keys() <= {"checkpoint", "meta", "out"}:
        convert_checkpoint(given["checkpoint"], given.get("meta"), given["out"])
    elif {"data"} <= given.keys() <= {"data", "out", "block_size", "stride", "compression", "overwrite"}:
        compression = given.get("compression", "none")
        convert_data(given["data"], given["out"], given.get("block_size", 1024), given.get("stride"),
                     None if compression == "none" else compression, "overwrite" in given)
    else:
        parser.error("give either --checkpoint, with --meta, or --data, with --block-size, --stride, --compression or "
                     "--overwrite")


if __name__ == "__main__":
    run(main)

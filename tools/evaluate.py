"""How good a model is: loss on a dataset, HellaSwag, LAMBADA.

    python tools/evaluate.py --run runs/quickstart                                        loss on its whole val split
    python tools/evaluate.py --hf gpt2-xl --task hellaswag --task lambada_openai          a model of the hub, or a folder
    python tools/evaluate.py --run runs/gpt2_124m --task hellaswag=hellaswag_val.jsonl --limit 1000 --out results.json
    torchrun --nproc_per_node 8 -- tools/evaluate.py --run runs/gpt2_124m --task loss     8 GPUs, the same numbers
"""

import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, die_with_torchrun, run


def main():
    parser = Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="RUN", help="run folder, or one of its checkpoints")
    which.add_argument("--hf", metavar="MODEL", help="folder of a Hugging Face model, or its name on the hub, as gpt2-xl")
    parser.add_argument("--task", action="append", metavar="TASK", help="loss, hellaswag, lambada_openai, or as "
                        "hellaswag=FILE.jsonl, in place of the hub, its published file; several times for several; "
                        "nothing: loss")
    parser.add_argument("--data", action="append", metavar="DATASET", help="of the loss: dataset folder or URL, several "
                        "times for several; nothing: what the run was trained on")
    parser.add_argument("--split", choices=["train", "val"], default="val", help="of the loss")
    parser.add_argument("--tokenizer", metavar="NAME", help="of --data that has no dataset.json: gpt2, a ranks file or a "
                        "tokenizer.json; nothing: the run's data.tokenizer")
    parser.add_argument("--sequences", type=int, help="of the loss: so many of the split's first; nothing: all")
    parser.add_argument("--block-size", type=int, help="of the loss: tokens of a sequence; nothing: the model's context")
    parser.add_argument("--limit", type=int, help="of the other tasks: so many of their first documents; nothing: all")
    parser.add_argument("--batch-size", type=int, default=16, help="texts that a rank puts through the model at once")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of weights and activations")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--cache-dir", metavar="DIR", help="where shards of a URL are kept; nothing: the run's")
    parser.add_argument("--out", metavar="FILE.json", help="write the results there too")
    args = parser.parse_args()
    for option in ("sequences", "block_size", "limit", "batch_size"):
        if (value := getattr(args, option)) is not None and not 0 < value < 1 << 31:
            raise UserError(f"--{option.replace('_', '-')}: {value} is not a number from 1 on")
    tasks = dict(task.partition("=")[::2] for task in args.task or ["loss"])  # name -> file or ""
    if args.data:
        tasks.setdefault("loss", "")
    for task, file in tasks.items():
        if task not in ("loss", "hellaswag", "lambada_openai") or task == "loss" and file:
            raise UserError(f"--task: {task}{file and '='}{file} is none; take loss, hellaswag or lambada_openai, or as "
                            "hellaswag=FILE.jsonl where there is no network")
    out = args.out and Path(args.out)
    if out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"--out: {out} is a folder, or in none that can be written; take another file")

    import torch
    import torch.distributed as dist

    from nanogpt import evaluate
    from nanogpt.config import Config
    from nanogpt.ranks import init_process_group
    from nanogpt.resume import versions
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is asked for, and PyTorch finds none here")
    device = init_process_group(Config(run=dict(device=args.device)))
    documents = {task: evaluate.read_documents(task, file, args.limit) for task, file in tasks.items() if task != "loss"}
    path, text = load(args, device)
    splits = open_splits(args, text) if "loss" in tasks else []

    results = []
    for task in tasks:
        if task == "loss":
            for split in splits:
                found = evaluate.split_loss(text.model, text.tokenizer, split, args.sequences, args.batch_size)
                results += rows(found, task=task, data=split.path, split=split.name)
        else:
            found = evaluate.run_task(task, text.model, text.tokenizer, documents[task], args.batch_size)
            results += rows(found, task=task)
    if dist.get_rank() == 0:
        show(results)
        if out:
            said = dict(
                model=dict(path=path, step=text.state.get("step"), parameters=text.model.num_params(),
                           tokenizer=text.tokenizer.name, tokenizer_fingerprint=text.tokenizer.fingerprint),
                results=results,
                data=[dict(path=split.path, split=split.name, index_sha256=split.index_sha256) for split in splits]
                + [dict(task=task, source=tasks[task] or evaluate.TASKS[task].hub[0], documents=len(documents[task]),
                        sha256=evaluate.fingerprint(documents[task])) for task in documents],
                settings=dict(sequences=args.sequences, block_size=args.block_size or text.model.config.block_size,
                              limit=args.limit, batch_size=args.batch_size, precision=args.precision,
                              device=device.type, ranks=dist.get_world_size()),
                versions=versions())
            write(out, said)
    dist.destroy_process_group()


def load(args, device):
    """(where the model was found, generate.Text)"""
    from nanogpt import checkpoint, generate
    from nanogpt.resume import agreed
    path = args.hf
    if args.run:
        path = str(agreed(lambda: checkpoint.find(args.run)))  # a run that goes on may save another one just now
    elif not Path(path).exists() and not path.startswith("hf:"):
        path = f"hf:{path}"
    return path, generate.load(path, str(device), args.precision)


def open_splits(args, text) -> list:
    """The datasets whose loss is asked for."""
    import torch.distributed as dist

    from nanogpt.config import Config
    from nanogpt.stream import NoSplit, Split
    longest = text.model.config.block_size
    if args.block_size and args.block_size > longest:
        raise UserError(f"--block-size: {args.block_size} is above the {longest} of the model's context")
    its = text.state.get("config", dict(run=dict(name="evaluate")))
    try:
        config = Config(run=its.get("run", {}), data=its.get("data", {}), model=dict(block_size=args.block_size or longest))
    except ValueError as error:
        raise UserError(f"{args.run}: its config is damaged ({' '.join(str(error).split())[:200]})") from None
    if not (args.data or config.data.path or config.data.train):
        raise UserError(f"--data: {args.run or args.hf} comes without a dataset; name one that was made with its "
                        "tokenizer, or another --task")
    config.data.cache_dir = args.cache_dir or config.data.cache_dir
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
    folders = [(args.split, path) for path in args.data or ()]
    folders = folders or [({"train": s.split, "val": s.val_split}[args.split], s.path) for s in config.data.sources]
    found, missing = [], []
    for name, path in folders:
        try:
            found.append(Split(config, name, path))
        except NoSplit as error:  # a run, too, goes without those of its datasets that have none
            missing.append(error)
        except UserError as error:
            said = str(error).replace("model.block_size", "--block-size").replace("--data.tokenizer", "--tokenizer")
            raise UserError(said.replace("data.tokenizer:", "--tokenizer:")) from None
    if missing and (args.data or not found):
        raise missing[0]
    if dist.get_rank() == 0:
        for error in missing:
            print(f"note: left out: {error}", file=sys.stderr)
    return found


def rows(metrics, **what) -> list[dict]:
    return [what | dict(metric=m.name, value=m.value, stderr=m.stderr, n=m.n) for m in metrics]


def show(results: list[dict]):
    """The results as a table."""
    table = [("task", "metric", "value", "stderr", "n")]
    for r in results:
        where = f"{r['task']} {r['data']}/{r['split']}" if "data" in r else r["task"]
        error = "-" if r["stderr"] is None else f"{r['stderr']:.4f}"
        table.append((where, r["metric"], f"{r['value']:.4f}", error, f"{r['n']:,}"))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    for row in table:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def write(out: Path, said: dict):
    """JSON, written aside and renamed; null where a number is not finite."""
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(v) for key, v in value.items()}
        if isinstance(value, list):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    aside = out.with_name(f".{out.name}.partial")
    try:
        aside.write_text(json.dumps(finite(said), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); take another --out") from None


def one_voice():
    """main, but what goes wrong on all ranks is told by rank 0 alone: the others wait for torchrun to end them."""
    try:
        main()
    except UserError:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)
        raise


if __name__ == "__main__":
    die_with_torchrun()
    run(one_voice)

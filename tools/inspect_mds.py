"""What is in a dataset folder, and whether its shards are what was written; or what a step of a run was trained on.

    python tools/inspect_mds.py data/owt
    python tools/inspect_mds.py data/owt --samples 0 --verify
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

sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for the converter beside this

from nanogpt.errors import Parser, UserError, run  # noqa: E402

WIDTH = 240  # characters of a sequence that are shown without --full: its beginning and its end

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
    """The samples of a shard, (samples, block_size + 1): all of one size, they lie at the end of its file."""
    import numpy as np

    dtype = np.dtype(card["dtype"])
    info = files_there(folder, shard)[0]
    path = folder / info["basename"]
    try:
        data = path.read_bytes()
        if info is shard["zip_data"]:
            import zstd
            data = zstd.decompress(data)
        size = shard["samples"] * (card["block_size"] + 1) * dtype.itemsize
        return np.frombuffer(data[-size:], dtype).reshape(shard["samples"], card["block_size"] + 1)
    except Exception as error:  # damage shows as whatever numpy and zstd make of it
        raise UserError(f"{path}: cannot be read ({error})") from None


# ---- a dataset ------------------------------------------------------------------------------------------------------

def show_samples(folder: Path, shards: list[dict], card: dict, tokenizer, n: int):
    """Prints the first n samples of a split. repr keeps control characters of the text away from the terminal."""
    stride = card["splits"][folder.name]["stride"]
    samples = (sample for shard in shards for sample in read_shard(folder, shard, card))
    for i, tokens in enumerate(islice(samples, n)):
        print(f"{folder.name} sample {i}, tokens {i * stride} to {i * stride + card['block_size']}: "
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


def verify(splits: dict[Path, list[dict]], card: dict) -> list[str]:
    """A line for each shard, of all splits (folder -> shards), that is missing or not what its index says.

    Of pairs, also for each split that does not hold the targets that dataset.json says.
    """
    from tqdm import tqdm

    from nanogpt.shards import PAIRS

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
    if card["dtype"] == PAIRS and not problems:
        for folder, shards in splits.items():
            for name, found in count_pairs(folder, shards, card).items():
                if found != (said := card["splits"][folder.name][name]):
                    problems.append(f"{folder}: holds {name} {found:,}, and {said:,} by dataset.json; convert it again")
    return problems


def check_file(path: Path, info: dict):
    """UserError: the size or the hash of a shard's file is not that of its index."""
    import xxhash

    from nanogpt.shards import file_hash

    try:
        size, found = path.stat().st_size, file_hash(path, xxhash.xxh64())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size != info["bytes"]:
        raise UserError(f"{path}: has {size} of {info['bytes']} bytes")
    if found != info["hashes"]["xxh64"]:
        raise UserError(f"{path}: is damaged (xxh64 {found}, was {info['hashes']['xxh64']})")


def show_dataset(dataset: Path, samples: int, hashing: bool):
    """The counts of a dataset and its first samples; with hashing, UserError for each shard that is not as written."""
    from convert_text_to_mds import pair_counts

    from nanogpt.shards import PAIRS, load_dataset_card  # here, where `run` tells what is not installed
    from nanogpt.tokenizer import from_json

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
    if samples > 0:
        tokenizer = from_json(stored)
        for folder, shards in splits.items():
            try:
                show_samples(folder, shards, card, tokenizer, samples)
            except UserError as error:
                problems.append(str(error))
    if hashing:
        problems += verify(splits, card)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if hashing:
        print(f"verified: {sum(map(len, splits.values())):,} shards hold what was written")


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
            start = sample * split.card["splits"]["train"]["stride"] + part * T
            parts = f", part {part} of {split.parts}" if split.parts > 1 else ""
            print(f"sequence {i}: {shard_file(split, sample)}, sample {sample}{parts}, "
                  f"tokens {start} to {start + T}{of}")
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
                      "train": {**values["train"], "global_batch_size": was["train.global_batch_size"]}}
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
                config["train"]["global_batch_size"])
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
    for path in (source.path for source in sources):
        if "://" not in path and not (Path(path) / "dataset.json").is_file():
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
    from nanogpt.config import _read_yaml
    return _read_yaml(path)[0] if path.exists() else None


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
        else:
            indexes[split] = read_index(Path(split.path) / split.name, split.card)
            names[split] = names_of_documents(split.path, split.card)
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
        its = names[split][first:last + 1]
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


def names_of_documents(path: str, card: dict) -> list[str]:
    """The files (lines, of pairs) that the documents of the train split were, in order; empty where that is not certain.

    A dataset keeps what the converter was given, and a hash of all contents in their order, but no list. Where the same
    search finds the same contents, it is the same list.
    """
    import convert_text_to_mds as converter
    from tqdm import tqdm

    from nanogpt.shards import _assign
    source = card["source"]
    try:
        if source["kind"] not in ("text files", "pair files"):
            return []
        files = converter.find_files(source["paths"], source["glob"], Path(path))
        with tqdm(files, unit=" files", disable=None, desc="comparing what was converted") as bar:
            kind = converter.PairFiles if source["kind"] == "pair files" else converter.TextFiles
            files = kind(bar, source["errors"])
        if (files.sha256, files.bytes, len(files)) != (source["sha256"], source["bytes"], source["documents"]):
            return []
        names = [name for name, _ in files] if kind is converter.PairFiles else map(str, files.paths)
        documents = [(name, "") for name in names]
        pieces = _assign(documents, source["val_fraction"], source["seed"])
        names = [name for split, name, _ in pieces if split == "train"]
        return names if len(names) == card["splits"]["train"]["documents"] else []
    except (UserError, OSError, LookupError, TypeError, ValueError):  # not there any more, or of another converter
        return []


def main():
    parser = Parser(description=__doc__.splitlines()[0], argument_default=SUPPRESS, usage="%(prog)s DIR [--samples N] "
                    "[--verify]\n       %(prog)s --run RUN --step K [--limit N] [--full] [--no-documents] [--data P]")
    add = parser.add_argument_group("a dataset").add_argument
    add("dataset", nargs="?", metavar="DIR", help="dataset folder")
    add("--samples", type=int, metavar="N", help="show the first N of each split as text (default: 3)")
    add("--verify", action="store_true", help="hash every shard; status 1 if one is not as written")
    add = parser.add_argument_group("a step of a run").add_argument
    add("--run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    add("--step", type=int, metavar="K", help="the step, from 1, as in the log")
    add("--limit", type=int, metavar="N", help="show at most N sequences, spread over the step (default: 16)")
    add("--full", action="store_true", help="the whole text of each")
    add("--no-documents", action="store_true", help="leave out which documents they are of; to count these, all shards "
        "that lie before are read")
    add("--data", metavar="P", help="where the dataset is now, if it was moved")
    given = vars(parser.parse_args())
    of_dataset, of_step = {"dataset", "samples", "verify"}, {"run", "step", "limit", "full", "no_documents", "data"}
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    if "dataset" in given and given.keys() <= of_dataset:
        show_dataset(Path(given["dataset"]), given.get("samples", 3), "verify" in given)
    elif {"run", "step"} <= given.keys() <= of_step:
        show_step(given["run"], given["step"], given.get("limit", 16), "full" in given, given.get("data"),
                  "no_documents" not in given)
    else:
        parser.error("give either DIR, with --samples or --verify, or --run RUN with --step K and what goes with these")


if __name__ == "__main__":
    run(main)

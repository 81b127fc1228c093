"""The position contract: what a step trains on is a function of the step, each sample once an epoch, whoever reads it."""

import json
import os

import numpy as np
import pytest
import torch

from nanogpt import convert as convert_module
from nanogpt import stream as stream_module
from nanogpt.config import load_config
from nanogpt.documents import InMemory
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.stream import Split, TrainStream
from nanogpt.tokenizer import from_name


def make_config(tmp_path, dataset, *options):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{path: {dataset}}}\ntrain: {{max_steps: 100, global_batch_size: 12, micro_batch_size: 2}}\n"
                    f"model: {{block_size: 64}}\nrun: {{dir: {tmp_path}/run}}")
    return load_config([str(file), *options])


def convert(text, out, tokenizer="byte", block_size=64, **options):
    """A dataset of one text, or of (prompt, completion) pairs, as tools/convert_text_to_mds.py writes it."""
    named = [("text.txt", text)] if isinstance(text, str) else [(f"pairs.jsonl:{i}", pair) for i, pair in enumerate(text)]
    tok = tokenizer if tokenizer == "char" else from_name(tokenizer)
    convert_module.convert(InMemory(named), out, tok, block_size, val_fraction=0.1, **options)


def whole_text(dataset) -> np.ndarray:
    """All tokens of the train split, as the source text has them."""
    text = (dataset.parent / "text.txt").read_text()
    return np.frombuffer(text[:int(len(text) * 0.9)].encode(), np.uint8)


@pytest.mark.parametrize("options", [
    [], ["--data.num_canonical_nodes=1"], ["--data.num_canonical_nodes=7", "--data.shuffle_algo=py1br"],
    ["--data.shuffle=false"], ["--data.shuffle_block_size=50"]], ids=str)
def test_each_sample_once_an_epoch_in_an_order_of_its_own(tmp_path, text_dataset, options):
    stream = TrainStream(make_config(tmp_path, text_dataset, *options))
    n = stream.splits[0].samples
    assert n % 12  # an epoch does not divide into steps: the step at its end takes the beginning of the next
    seen = np.concatenate([stream.samples(s) for s in range(3 * n // 12 + 1)])
    epochs = []
    for epoch in range(3):
        order = stream.splits[0].order(epoch).tolist()
        assert sorted(order) == list(range(n))
        # Within a step, samples lie in another order than in the epoch: whole steps are the same sets.
        first, last = -(-epoch * n // 12), (epoch + 1) * n // 12
        assert sorted(seen[first * 12:last * 12]) == sorted(order[first * 12 - epoch * n:last * 12 - epoch * n])
        epochs.append(order)
    counts = np.bincount(seen, minlength=n)
    assert counts.min() >= 3 and counts.sum() == len(seen)  # three whole epochs, and the beginning of a fourth
    if stream.data.shuffle:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_of_streaming_itself(tmp_path, text_dataset):
    """With one canonical node nothing is padded: the order is the one that StreamingDataset iterates in."""
    from nanogpt.shards import import_streaming
    config = make_config(tmp_path, text_dataset, "--data.num_canonical_nodes=1")
    stream = TrainStream(config)
    dataset = import_streaming().StreamingDataset(
        local=str(text_dataset), split="train", batch_size=1, num_canonical_nodes=1, shuffle=True, shuffle_algo="py1e",
        shuffle_seed=config.data.shuffle_seed, shuffle_block_size=config.data.shuffle_block_size)
    theirs = np.stack([sample["tokens"] for sample in dataset])
    ours = stream.read(np.stack([stream.splits[0].order(0), np.zeros_like(stream.splits[0].order(0))], 1))
    assert np.array_equal(theirs, ours.numpy())


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2])
def test_any_ranks_and_micro_batches_share_the_same_step(tmp_path, text_dataset, world_size, micro):
    stream = TrainStream(make_config(tmp_path, text_dataset, f"--train.micro_batch_size={micro}"))
    for step in (0, 5, stream.splits[0].samples // 12, 10_000):  # the third is at the end of the first epoch
        shares = [np.concatenate(stream.micro_batches(step, rank, world_size)) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), stream.sequences(step))


def test_batches_hold_the_text_and_start_anywhere(tmp_path, text_dataset):
    """Through the reading threads: tokens are those of the text at the place that the sample's number says."""
    text = whole_text(text_dataset)
    stream = TrainStream(make_config(tmp_path, text_dataset))
    first = stream.splits[0].samples // 12 - 2  # across the end of an epoch
    batches = list(stream.batches(first, first + 4, 1, 3, torch.device("cpu")))
    expected = [m for step in range(first, first + 4) for m in stream.micro_batches(step, 1, 3)]
    assert len(batches) == len(expected) == 4 * 2
    for batch, sequences in zip(batches, expected):
        for row, (sample, part) in zip(batch.numpy(), sequences):
            assert part == 0 and np.array_equal(row, text[sample * 64:sample * 64 + 65])


def test_a_shorter_block_takes_the_same_samples_in_parts(tmp_path, text_dataset):
    text = whole_text(text_dataset)
    stream = TrainStream(make_config(tmp_path, text_dataset, "--model.block_size=16", "--train.global_batch_size=24"))
    sequences = stream.sequences(3)
    assert sequences.shape == (24, 2) and len(set(map(tuple, sequences.tolist()))) == 24
    for row, (sample, part) in zip(stream.read(sequences).numpy(), sequences):
        start = sample * 64 + part * 16
        assert np.array_equal(row, text[start:start + 17])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_counts_each_sequence_once_on_any_number_of_ranks(tmp_path, text_dataset, world_size):
    split = Split(make_config(tmp_path, text_dataset), "val", str(text_dataset))
    n = split.samples - 3
    rows, batches = [], set()
    for rank in range(world_size):
        mine = list(split.fixed_batches(n, 4, rank, world_size))
        batches.add(len(mine))
        for x, y in mine:
            assert x.shape == y.shape == (4, 64)
            for a, b in zip(x, y):
                if (b != IGNORE).all():
                    assert torch.equal(a[1:], b[:-1])
                    rows.append(bytes(a.tolist()))
                else:
                    assert (b == IGNORE).all()
    assert len(batches) == 1  # a rank with fewer would leave the others waiting for ever
    assert sorted(rows) == sorted(bytes(split.read(np.array([[i, 0]]))[0, :-1].tolist()) for i in range(n))


def test_compressed_shards_are_read_and_left_as_they_are(tmp_path, text_dataset):
    convert((text_dataset.parent / "text.txt").read_text(), tmp_path / "zstd", compression="zstd")
    before = sorted(p.name for p in (tmp_path / "zstd" / "train").iterdir())
    plain, packed = (TrainStream(make_config(tmp_path, d)) for d in (text_dataset, tmp_path / "zstd"))
    for a, b in zip(plain.batches(0, 3, 0, 1, torch.device("cpu")), packed.batches(0, 3, 0, 1, torch.device("cpu"))):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "zstd" / "train").iterdir()) == before


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_a_batch_opens_each_shard_once_and_marks_it_as_used(tmp_path, kind, monkeypatch):
    """The samples are those that streaming reads one by one; the shard that was not used for longest is evicted first."""
    monkeypatch.setattr("nanogpt.shards.SHARD_BYTES", 4000)
    text = "all work and no play " * 400
    convert(text if kind == "text" else [(text[i:i + 9], text[i + 9:i + 40]) for i in range(300)], tmp_path / "mds")
    split = TrainStream(make_config(tmp_path, tmp_path / "mds")).splits[0]
    shards = split.dataset.shards
    assert len(shards) > 2 and split.card["dtype"] == {"text": "uint16", "pairs": "int32"}[kind]
    samples = np.concatenate([[0, split.samples - 1], np.arange(split.shard_ends[0] - 5, split.shard_ends[1])[::-3]])
    one_by_one = np.stack([split.dataset[int(sample)]["tokens"] for sample in samples])
    opened, before = [], split.dataset._shard_access_times.numpy().copy()
    plain_open = open
    monkeypatch.setattr("builtins.open", lambda file, *args: opened.append(str(file)) or plain_open(file, *args))
    read = split.read(np.stack([samples, 0 * samples], 1)).numpy()
    monkeypatch.undo()
    assert np.array_equal(read, one_by_one)
    used = np.unique(np.searchsorted(split.shard_ends, samples, "right"))
    assert [file.rsplit("/", 1)[1] for file in opened] == [shards[i].raw_data.basename for i in used]
    assert np.flatnonzero(split.dataset._shard_access_times.numpy() > before).tolist() == used.tolist()


@pytest.mark.parametrize("left, said", [(None, "is missing"), (0, "sample 0 cannot be read"), (-1, "sample 1 cannot be read")])
def test_a_shard_that_is_damaged_while_it_is_used(tmp_path, text_dataset, left, said):
    """Its hash was compared before."""
    copy = damaged(tmp_path, text_dataset)
    split = TrainStream(make_config(tmp_path, copy)).splits[0]
    file = copy / "train" / "shard.00000.mds"
    begin = int(np.fromfile(file, "<u4", 3)[2])  # of sample 1
    os.truncate(file, begin + 100 if left else 0)
    if left is None:
        file.unlink()
    with pytest.raises(UserError, match=f"shard.00000.mds: {said}"):
        split.read(np.array([[0, 0], [1, 0]]))


# ---- mixtures -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def three(text_dataset, tmp_path_factory):
    """Three datasets of one text: whole, a part with shifted windows (stride below the block), and a small one."""
    folder = tmp_path_factory.mktemp("three")
    text = (text_dataset.parent / "text.txt").read_text()
    (folder / "b.txt").write_text(text[5000:20000])
    convert(text[5000:20000], folder / "b", stride=24)
    (folder / "c.txt").write_text(text[:3000])
    convert(text[:3000], folder / "c")
    return [text_dataset, folder / "b", folder / "c"]


def mixed(tmp_path, three, *options):
    file = tmp_path / "mixed.yaml"
    sources = ", ".join(f"{{path: {path}, proportion: {share}}}" for path, share in zip(three, (6, 3, 1)))
    file.write_text(f"data: {{train: [{sources}]}}\nmodel: {{block_size: 64}}\nrun: {{dir: {tmp_path}/run}}\n"
                    "train: {max_steps: 100, global_batch_size: 24, micro_batch_size: 2}")
    return TrainStream(load_config([str(file), *options]))


@pytest.mark.parametrize("method", ["random", "stratified"])
def test_each_dataset_of_a_mixture_goes_through_its_own_epochs(tmp_path, three, method):
    """Each sample once before any comes again, in the dataset's own order, in the proportions asked for."""
    stream = mixed(tmp_path, three, f"--data.mixture={method}")
    steps = 3000  # 72,000 samples: past the end of a round of the pattern
    taken = np.stack([stream.samples(s) for s in range(steps)])
    for i, share in enumerate((0.6, 0.3, 0.1)):
        n, first = stream.splits[i].samples, stream.first_sample[i]
        mine = (taken >= first) & (taken < first + n)
        per_step = mine.sum(1)
        assert per_step.sum() == pytest.approx(share * taken.size, abs=60)
        if method == "stratified":
            assert abs(per_step - share * 24).max() <= 2
        else:
            assert per_step.std() == pytest.approx((24 * share * (1 - share)) ** 0.5, rel=0.1)  # binomial
        # The samples of a step lie together: hold whole epochs of the dataset against its order, step by step.
        order = np.concatenate([stream.splits[i].order(e) for e in range(per_step.sum() // n + 1)]) + first
        ends = np.cumsum(per_step)
        for s in range(0, steps, 7):
            assert sorted(taken[s][mine[s]]) == sorted(order[ends[s] - per_step[s]:ends[s]])
        counts = np.bincount(taken[mine] - first, minlength=n)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("method", ["random", "stratified"])
def test_a_mixture_does_not_depend_on_ranks_nor_on_where_one_begins(tmp_path, three, method):
    whole = mixed(tmp_path, three, f"--data.mixture={method}")
    for step in (0, 1, 2730, 2731, 100_000):  # a round of the pattern ends in step 2730
        late = mixed(tmp_path, three, f"--data.mixture={method}", "--train.micro_batch_size=1")
        expected = whole.sequences(step)
        for world_size in (1, 2, 3, 12):
            shares = [np.concatenate(late.micro_batches(step, rank, world_size)) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(shares), expected)
    texts = [np.frombuffer((path.parent / name).read_bytes(), np.uint8)
             for path, name in zip(three, ("text.txt", "b.txt", "c.txt"))]
    batch = next(whole.batches(2730, 2731, 1, 2, torch.device("cpu")))
    for row, (sample, _) in zip(batch.numpy(), whole.micro_batches(2730, 1, 2)[0]):
        split, number = whole.find(int(sample))
        start = number * split.card["splits"]["train"]["stride"]
        assert np.array_equal(row, texts[whole.splits.index(split)][start:start + 65])


@pytest.mark.parametrize("kind, values, weights", [
    ("repeat", (0.5, 2, 4), lambda sizes: (0.5 * sizes[0], 2 * sizes[1], 4 * sizes[2])),
    ("samples", (500, 300, 200), lambda sizes: (500, 300, 200)), (None, (1, 1, 1), lambda sizes: (1, 1, 1))],
    ids=["repeat", "samples", "paths alone"])
def test_repeats_and_samples_are_proportions(tmp_path, three, kind, values, weights):
    """Gone through as often as `repeat` says while one of repeat 1 is gone through once; `samples` of each in a round."""
    file = tmp_path / "mixed.yaml"
    given = [f"{{path: {path}, {kind}: {value}}}" if kind else str(path) for path, value in zip(three, values)]
    file.write_text(f"data: {{train: [{', '.join(given)}]}}\nmodel: {{block_size: 64}}\n"
                    "train: {max_steps: 100, global_batch_size: 24, micro_batch_size: 2}")
    stream = TrainStream(load_config([str(file)]))
    sizes = [split.samples for split in stream.splits]
    wanted = np.array(weights(sizes))
    assert stream.proportions == pytest.approx(wanted / wanted.sum())
    steps = 2731  # a round of the pattern
    samples = np.concatenate([stream.samples(s) for s in range(steps)])
    taken = np.bincount(np.searchsorted(stream.first_sample, samples, "right") - 1)
    assert taken / taken.sum() == pytest.approx(wanted / wanted.sum(), abs=1e-4)
    if kind == "repeat":
        passes = taken / sizes
        assert passes / passes[1] * 2 == pytest.approx(values, rel=2e-3)
        assert stream.epochs(steps) == pytest.approx(passes, rel=2e-3)
    same = mixed(tmp_path, three)
    assert not {key for key in same.differences(stream.identity()) if "proportion" not in key}


def test_a_share_that_would_never_come_is_refused(tmp_path, three):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{train: [{{path: {three[0]}, samples: 1000000}}, {{path: {three[2]}, samples: 3}}]}}\n"
                    "model: {block_size: 64}\ntrain: {max_steps: 1, global_batch_size: 12}")
    with pytest.raises(UserError, match=f"^data.train: 3e-06 of the samples would come from {three[2]}, and 1.5e-05 is the "):
        TrainStream(load_config([str(file)]))


def test_what_the_losses_of_datasets_are_called(tmp_path, three):
    a, b, c = (str(path) for path in three)
    for paths, names in (([a], [""]), ([a, b + "/", a], ["mds", "b", "mds"]), ([a, a + "/"], ["mds", "mds"]),
                         ([a, f"{{path: {a}, split: val}}", b], [f"{a}/train", f"{a}/val", f"{b}/train"])):
        (tmp_path / "c.yaml").write_text(f"data: {{train: [{', '.join(paths)}]}}\nmodel: {{block_size: 64}}\n"
                                         "train: {max_steps: 1, global_batch_size: 2, micro_batch_size: 1}")
        assert [split.label for split in TrainStream(load_config([str(tmp_path / "c.yaml")])).splits] == names


def test_a_mixture_needs_one_tokenizer_and_one_block(tmp_path, three):
    convert("abc " * 999, tmp_path / "char", "char")
    with pytest.raises(UserError, match="char: its tokenizer is .* the datasets of a mixture need the same one"):
        mixed(tmp_path, [three[0], tmp_path / "char", three[2]])
    convert("abc " * 999, tmp_path / "long", block_size=128)
    with pytest.raises(UserError, match="long: its block_size is 128"):
        mixed(tmp_path, [three[0], tmp_path / "long", three[2]])


# ---- how much is in use at once -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, nodes, machines", [
    (["--data.shuffle_block_size=80"], 1, 1), (["--data.shuffle_block_size=80"], 6, 3),
    (["--data.shuffle_block_size=80", "--data.shuffle_algo=py1br"], 6, 2), (["--data.shuffle_algo=naive"], 2, 1),
    (["--data.shuffle=false"], 6, 2), (["--data.shuffle_block_size=80"], 2, 4)], ids=str)
def test_the_working_set_is_that_of_the_shards_read(tmp_path, many_shards, options, nodes, machines):
    """By hand: each machine's reads in an epoch, one after the other, and from when to when each shard is read."""
    config = make_config(tmp_path, many_shards, f"--data.num_canonical_nodes={nodes}", "--data.tokenizer=byte",
                         f"--train.global_batch_size={max(nodes, machines)}", "--train.micro_batch_size=1", *options)
    stream = TrainStream(config)
    split, sizes = stream.splits[0], [(many_shards / "train" / f"shard.{i:05}.mds").stat().st_size for i in range(12)]
    steps = split.samples // max(nodes, machines)
    most = 0
    for machine in range(machines):
        reads = np.concatenate([np.split(stream.samples(step), machines)[machine] for step in range(steps)])
        shards = np.searchsorted(split.shard_ends, reads, "right").tolist()
        first, last = ({shard: place for place, shard in way} for way in (
            list(enumerate(shards))[::-1], enumerate(shards)))
        for place in range(len(shards)):
            most = max(most, sum(sizes[shard] for shard in first if first[shard] <= place <= last[shard]))
    found = split.working_set(0, 1, machines)
    if machines <= nodes:
        assert found == most
    else:  # several machines share a node, and each may need any shard of it
        assert most <= found <= split.working_set(0, 1, 1)
    # Half of each step, in a mixture: of two machines, one has all of it.
    assert split.working_set(0, 0.5, 2) == split.working_set(0.5, 1, 1) == split.working_set(0, 1, 1)


@pytest.fixture(scope="module")
def many_shards(text_dataset, tmp_path_factory):
    """600 samples in 12 shards, as another tool writes them."""
    from nanogpt.shards import import_streaming
    folder = tmp_path_factory.mktemp("many") / "mds"
    text = np.frombuffer((text_dataset.parent / "text.txt").read_bytes(), np.uint8).astype(np.int32)
    with import_streaming().MDSWriter(columns={"tokens": "ndarray:int32:64"}, out=str(folder / "train"),
                                      size_limit=14000) as out:
        for row in text[:600 * 64].reshape(600, 64):
            out.write({"tokens": row})
    assert len(list((folder / "train").glob("*.mds"))) == 12
    return folder


# ---- what is refused ------------------------------------------------------------------------------------------------

def damaged(tmp_path, dataset):
    import shutil
    return shutil.copytree(dataset, tmp_path / "damaged")


def test_missing_and_truncated_shards_are_named(tmp_path, text_dataset):
    copy = damaged(tmp_path, text_dataset)
    shard = next((copy / "train").glob("*.mds"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{shard.name}: has .* of {len(content)} bytes"):
        TrainStream(make_config(tmp_path, copy))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{shard.name}: has changed since it was written"):
        TrainStream(make_config(tmp_path, copy))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: is missing"):
        TrainStream(make_config(tmp_path, copy))


def test_a_shard_of_a_large_dataset_is_hashed_before_its_first_use(tmp_path, text_dataset, monkeypatch):
    monkeypatch.setattr(stream_module, "HASHED_AT_START", 0)  # too large to be hashed at each start
    copy = damaged(tmp_path, text_dataset)
    shard = next((copy / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    stream = TrainStream(make_config(tmp_path, copy))
    with pytest.raises(UserError, match=f"{shard.name}: has changed since it was written"):
        next(stream.batches(0, 5, 0, 1, torch.device("cpu")))


def test_an_id_out_of_the_vocabulary_is_named(tmp_path, text_dataset):
    copy = damaged(tmp_path, text_dataset)
    index = json.loads((copy / "train" / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}  # made elsewhere
    (copy / "train" / "index.json").write_text(json.dumps(index))
    shard = next((copy / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-2:] = b"\xff\xff"
    shard.write_bytes(content)
    stream = TrainStream(make_config(tmp_path, copy))
    with pytest.raises(UserError, match=f"{shard.name}: sample {stream.splits[0].samples - 1} holds id 65535"):
        list(stream.batches(0, stream.splits[0].samples // 12 + 2, 0, 1, torch.device("cpu")))


def test_dataset_json_and_config_must_fit(tmp_path, text_dataset):
    for options, said in ((["--model.block_size=48"], "neither the 64"),
                          (["--model.vocab_size=200"], "is below the 257 ids"),
                          (["--train.global_batch_size=6", "--model.block_size=16"],
                           "^train.global_batch_size: 6 sequences of 16 tokens do not fill whole samples of 64; take 4 or 8$"),
                          (["--data.path=null", f"--data.train={{path: {text_dataset}, split: nope}}"],
                           "^.*: has no nope split, but train and val$"),
                          (["--train.global_batch_size=5000"], "lower train.global_batch_size"),
                          (["--data.path=/nowhere"], "/nowhere")):
        with pytest.raises(UserError, match=said):
            TrainStream(make_config(tmp_path, text_dataset, *options))
    copy = damaged(tmp_path, text_dataset)
    card = json.loads((copy / "dataset.json").read_text())
    card["splits"]["train"]["samples"] += 1
    (copy / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="convert the text again"):
        TrainStream(make_config(tmp_path, copy))


def test_too_small_shared_memory(tmp_path, text_dataset, monkeypatch):
    free = os.statvfs_result((4096, 4096, 100, 16, 16, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(UserError, match="/dev/shm: 64 KiB are free"):
        TrainStream(make_config(tmp_path, text_dataset))

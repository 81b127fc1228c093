"""Damaged and hostile files, thousands of them: each is refused in clear lines, or gives just what the good one gives.

Hypothesis breaks every file that is read: random bytes, bits flipped, pieces cut out and put in, and in JSON and YAML
values of another kind, keys removed and doubled. Checkpoints also with a manifest made anew, so that the damage passes
the hashes, as it would in a file that somebody made up.

The suite draws the same few hundred each time. Many more, and others each time:

    FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py
"""

import atexit
import contextlib
import datetime
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt import checkpoint, console, health, stream, tokenizer
from nanogpt import resume as resuming
from nanogpt.config import Config, load_config
from nanogpt.errors import UserError
from nanogpt.generate import generate, load_run
from nanogpt.meter import Meter
from nanogpt.optim import learning_rate, make_optimizer
from nanogpt.shards import load_dataset_card
from nanogpt.sharding import build

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
TIMEOUT_S = 120  # of one example
CPU = torch.device("cpu")
CONFIG = {
    "run": {"name": "fuzz", "seed": 1, "resume": "auto", "timeout_s": 60.0},
    "data": {"path": "mds", "shuffle_algo": "py1e", "num_canonical_nodes": 2},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, "dropout": 0.0, "bias": True},
    "optim": {"learning_rate": 1e-3, "warmup_steps": 1, "schedule": "wsd"},
    "train": {"max_steps": 9, "global_batch_size": 4, "micro_batch_size": 2, "compile": False, "precision": "float32"},
    "eval": {"interval": 5, "sequences": 7}, "log": {"interval": 3, "wandb": "off"},
}


def examples(n):
    return settings(max_examples=EXAMPLES or n, derandomize=not EXAMPLES, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- damage ---------------------------------------------------------------------------------------------------------

ODD = ["null", "true", "0", "1", "-1", "7", "0.5", "-0.0", "1e308", "NaN", "Infinity", "9" * 30, "-" + "9" * 30,
       "9" * 5000, '""', '"x"', '"0"', '".."', '"../../x"', '"/etc/passwd"', r'"a\u0000b"', r'"\ud800"', r'"a\nb"',
       '"' + "x" * 20000 + '"', "[]", "{}", "[null]", "[1]", '["x"]', '{"x": {}}', "[" * 50 + "]" * 50,
       "[" * 5000 + "]" * 5000, '{"a":' * 5000]
ODD_YAML = [".nan", ".inf", "0x" + "f" * 3000, "2001-99-99", "2001-01-01", "!!int ''", "!!bool x", "!!binary '='", "=",
            "<<", "*a", "&a 1", "!!set {a}", "!!python/name:os.system", "1:1:1", "[[", "? []",
            "s3://user:secret@host/x"]
MARK = "the place"


@st.composite
def damaged(draw, content: bytes):
    """Other bytes, or these with a few bits flipped, pieces cut out, overwritten or put in."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "cut", "cut off", "put in", "overwrite"]))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1:]
        elif kind == "cut":
            content = content[:at] + content[at + draw(st.integers(1, 20)):]
        elif kind == "cut off":
            content = content[:at]
        else:
            piece = draw(st.binary(min_size=1, max_size=9))
            content = content[:at] + piece + content[at + (len(piece) if kind == "overwrite" else 0):]
    return content


def places(value, path=()):
    """(keys that lead to it) of everything within a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, v in inside for place in places(v, (*path, key))]


@st.composite
def altered(draw, document, odd=ODD):
    """JSON text of a document in which a value is another, a key is gone, or stands twice."""
    every = places(document)
    document = json.loads(json.dumps(document))
    *way, last = draw(st.sampled_from(every[1:]))
    parent = document
    for key in way:
        parent = parent[key]
    other = document
    for key in draw(st.sampled_from(every)):
        other = other[key]
    other = draw(st.one_of(st.sampled_from(odd), st.just(json.dumps(other)), st.integers().map(str),
                           st.text(max_size=20).map(json.dumps)))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
    if kind == "remove":
        del parent[last]
    elif kind == "double" and isinstance(parent, dict):
        parent[MARK + "!"] = MARK
    else:
        parent[last] = MARK
    text = json.dumps(document).replace(f'"{MARK}!"', json.dumps(last)).replace(f'"{MARK}"', other)
    return text.encode("utf-8", "surrogatepass")


def broken(document, odd=ODD):
    return st.one_of(altered(document, odd), altered(document, odd), damaged(json.dumps(document).encode()))


def outcome(function, *args):
    """What it returns, or None where it is refused, in lines that a terminal shows. All else fails, and a hang."""
    def hangs(*_):
        raise AssertionError("hangs")
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(TIMEOUT_S)
    try:
        return function(*args)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(line.strip() and len(line) < 2500 and not re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in lines)
        assert "secret" not in str(error)
        return None
    finally:
        signal.alarm(0)


def contents(folder):
    """Of all files below, but for a run's cache."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts}


# ---- config ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def usable(config):
    """What the run will ask of its settings, before the model and the data come in."""
    assert Config.model_validate(config.model_dump()) == config
    assert config.max_steps >= 1 and config.tokens_per_step >= 1 and config.accumulation(1) >= 1
    assert all(math.isfinite(learning_rate(step, config)) for step in (0, config.max_steps - 1))
    assert datetime.timedelta(seconds=config.run.first_timeout_s) and "\0" not in str(config.run_dir)
    assert not any("secret" in source.path for source in config.data.sources)


@examples(300)
@given(broken(CONFIG | {"base": "base.yaml"}, ODD + ODD_YAML))
def test_config_files(here, text):
    (here / "base.yaml").write_text(json.dumps(CONFIG))
    (here / "c.yaml").write_bytes(text)
    if config := outcome(load_config, [str(here / "c.yaml")]):
        usable(config)


KEYS = [f"{section}.{key}" for section, fields in Config().model_dump().items() for key in fields]
TEXT = st.one_of(st.text(max_size=9),
                 st.sampled_from([json.loads(x) for x in ODD if x[0] == '"'] + ODD[:14] + ODD_YAML))


@examples(300)
@given(st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), TEXT), st.sampled_from(["=", None, ""]), TEXT), max_size=3))
def test_options(here, options):
    (here / "base.yaml").write_text(json.dumps(CONFIG))
    argv = [str(here / "base.yaml")]
    for key, between, value in options:
        argv += [f"--{key}", value] if between is None else [f"--{key}{between}{value}"]
    if config := outcome(load_config, argv):
        usable(config)


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(here, text_dataset):
    """(folder of a dataset that may be broken, its config, all its tokens)."""
    folder = shutil.copytree(text_dataset, here / "mds")
    places = {"data": {"path": str(folder)}, "run": {"dir": str(here / "run")}}
    (here / "good.yaml").write_text(json.dumps(CONFIG | places))
    config = load_config([str(here / "good.yaml")])
    return folder, config, everything(config)


def everything(config):
    """All tokens of the train split, after what train.py looks at first."""
    endings = []  # streaming gives its shared memory back when the process ends: until then, ten open files a dataset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, "register", endings.append)
        try:
            data = stream.TrainStream(config)
            tokenizer.from_json(data.card["tokenizer"])
            samples = np.arange(data.splits[0].samples)
            return data.read(np.stack([samples, samples * 0], 1))
        finally:
            for end in endings:
                end()


def same_or_refused(data, file, content):
    """Reads the dataset with this content in a file, and leaves all as it was."""
    folder, config, tokens = data
    good = (folder / file).read_bytes()
    (folder / file).write_bytes(content)
    before = contents(folder.parent)
    try:
        found = outcome(everything, config)
        assert found is None or torch.equal(found, tokens)
        assert contents(folder.parent) == before
        return found
    finally:
        (folder / file).write_bytes(good)


@examples(100)
@given(st.data())
def test_dataset_json(data, draw):
    content = draw.draw(broken(load_dataset_card(data[0])))
    same_or_refused(data, "dataset.json", content)


@examples(200)
@given(st.data())
def test_index_json(data, draw):
    content = draw.draw(broken(json.loads((data[0] / "train" / "index.json").read_bytes())))
    same_or_refused(data, "train/index.json", content)


@pytest.mark.parametrize("hashed_at_start", [True, False])
@examples(30)
@given(st.data())
def test_shards(data, hashed_at_start, draw):
    shard = next((data[0] / "train").glob("*.mds"))
    good = shard.read_bytes()
    content = draw.draw(damaged(good))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "HASHED_AT_START", 1 << 30 if hashed_at_start else 0)
        found = same_or_refused(data, f"train/{shard.name}", content)
    assert (found is None) == (content != good)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(alone, data):
    """(checkpoint of step 3, config, stream, model, what was saved of it): saved as train.py does."""
    _, config, _ = data
    source = stream.TrainStream(config)
    config = config.model_copy(update=dict(model=config.model.model_copy(update=dict(vocab_size=source.vocab_size))))
    tok, start = tokenizer.from_json(source.card["tokenizer"]), resuming.new_state(source)
    model = build(config, CPU)
    meter = Meter(config, CPU, 1, 1, writes=False, state=start)
    state = resuming.run_state(config, 3, source, tok, start, health.Numbers(config, start, CPU), meter)
    saver = checkpoint.Saver(config.run_dir / "checkpoints", 2, 0, async_save=False)
    saver.save(model, make_optimizer(model, config.optim), state)
    assert saver.wait()
    return checkpoint.find(config.run_dir), config, source, model, [p.full_tensor().clone() for p in model.parameters()]


@contextlib.contextmanager
def changed(path, content: bytes, fitting: bool):
    """A file of a checkpoint with another content; fitting: and with a manifest that says so."""
    manifest, good = path.parent / "manifest.json", path.read_bytes()
    was = manifest.read_bytes()
    path.write_bytes(content)
    if fitting:
        files = json.loads(was)["files"]
        files[path.name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
        manifest.write_text(json.dumps({"files": files}))
    try:
        yield
    finally:
        manifest.write_bytes(was)
        path.write_bytes(good)


@examples(200)
@given(st.data())
def test_manifest(run, draw):
    folder = run[0]
    file = draw.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    good = (folder / file).read_bytes()
    content = draw.draw(broken(json.loads(good)) if file == "manifest.json" else damaged(good))
    with changed(folder / file, content, fitting=False):
        if outcome(lambda: checkpoint.verify(folder) or "whole") and content != good:
            assert file == "manifest.json" and json.loads(content)["files"] == json.loads(good)["files"]


def resume(run, **options):
    """What train() does with a checkpoint's state before the first step: (step, where its data begins, tokens)."""
    _, config, source, *_ = run
    config = config.model_copy(update=dict(run=config.run.model_copy(update=options)))
    source.first_step = 0
    path, state = resuming.starting_point(config, source, [])
    health.Numbers(config, state, CPU).recent(state["step"])
    meter = Meter(config, CPU, 1, 1, writes=False, state=state)
    assert f"{state['step']} on {state['world_size']} {console.changes(state['config'], config.model_dump())}"
    assert source.fingerprint(state["step"]) and json.dumps(state)
    return state["step"], source.first_step, meter.tokens(state["step"])


@examples(300)
@given(st.data())
def test_state_json_that_passes_the_hash(run, draw):
    folder, _, source, _, weights = run
    content = draw.draw(broken(json.loads((folder / "state.json").read_bytes())))
    with changed(folder / "state.json", content, fitting=True):
        assert outcome(resume, run) in (None, (3, 0, 3 * 4 * 64))
        outcome(lambda: resume(run, allow_data_change=True))
        if loaded := outcome(load_run, folder):
            assert loaded[1].fingerprint == source.card["tokenizer"]["fingerprint"]
            assert all(map(torch.equal, loaded[0].parameters(), weights))
            assert generate(loaded[0], torch.zeros(1, 1, dtype=torch.int64), 2).shape == (1, 3)


def filled_or_refused(run, file, content):
    """Nothing can say that another content which fits its manifest is a wrong one, but no weight stays as it was."""
    folder, _, _, model, _ = run
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    with changed(folder / file, content, fitting=True), limited_memory():
        if outcome(lambda: checkpoint.load(folder, model) or "loaded"):
            assert file.endswith(".distcp") or not any(p.full_tensor().isnan().any() for p in model.parameters())


@contextlib.contextmanager
def limited_memory():
    """3 GiB more than now: a pickle may ask for any amount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@examples(100)
@given(st.data())
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_tensors_that_pass_the_hash(run, file, draw):
    filled_or_refused(run, file, draw.draw(damaged((run[0] / file).read_bytes())))


VALUES = [None, -1, 0, 10**6, 10**30, "", "x", "..", "../x", "/etc/passwd", b"x", [], (), ("zstd",), (0,), {},
          torch.Size([7]), torch.Size([-1, 16]), torch.Size([10**9, 10**9]), torch.float16]


@examples(100)
@given(st.data())
def test_an_index_of_tensors_that_lies(run, draw):
    metadata = checkpoint.SafeReader(run[0]).read_metadata()
    name = draw.draw(st.sampled_from(sorted(k for k in metadata.state_dict_metadata if k.startswith("model."))))
    tensor = metadata.state_dict_metadata[name]
    place = next(place for key, place in metadata.storage_data.items() if key.fqn == name)
    thing, field = draw.draw(st.sampled_from(
        [(metadata, "state_dict_metadata"), (metadata, "storage_data"), (metadata, "storage_meta"),
         (metadata, "planner_data"), (metadata.state_dict_metadata, name), (tensor, "size"), (tensor, "chunks"),
         (tensor, "properties"), (tensor.chunks[0], "offsets"), (tensor.chunks[0], "sizes"),
         (place, "relative_path"), (place, "offset"), (place, "length"), (place, "transform_descriptors")]))
    value = draw.draw(st.sampled_from(VALUES))
    if isinstance(thing, dict):
        thing[field] = value
    else:
        object.__setattr__(thing, field, value)
    filled_or_refused(run, ".metadata", pickle.dumps(metadata))

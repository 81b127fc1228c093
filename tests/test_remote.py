"""Shards in an S3 bucket that fails: the very tokens of the local folder, or one clear line in bounded time.

moto serves the buckets on loopback, in this process. In front of it stands Faults, which can refuse (400, 500, 503), drop
the connection, cut a body short, flip a bit in it, or never answer.
"""

import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from test_bad_input import OWN_MOUNTS, may_mount
from test_launch import ENV, ROOT, TORCHRUN
from test_stream import make_config
from test_train import SMALL, train_run
from werkzeug.serving import WSGIRequestHandler, make_server

from nanogpt import convert, shards
from nanogpt import cache
from nanogpt.documents import InMemory
from nanogpt.errors import UserError
from nanogpt.stream import TrainStream
from nanogpt.tokenizer import from_name

STEPS = 12  # of 12 sequences each: all shards, some of them many times
AWS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1",
       "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_EC2_METADATA_DISABLED": "true",
       "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


# ---- a server that fails --------------------------------------------------------------------------------------------

class Faults:
    """WSGI middleware. `rule` gives for (method, object, how often it was asked for before) the fault, or None."""

    def __init__(self):
        self.app, self.rule, self.asked, self.end = DomainDispatcherApplication(create_backend_app), None, Counter(), \
            threading.Event()

    def __call__(self, environ, start_response):
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/")
        fault = self.rule(method, key, self.asked[method, key]) if self.rule else None
        self.asked[method, key] += 1
        if fault in ("400", "500", "503"):
            start_response(f"{fault} Sorry", [("Content-Length", "0")])
            return []
        if fault == "hang":
            self.end.wait(60)
        if fault in ("hang", "drop"):
            environ["werkzeug.socket"].shutdown(2)
            return []
        body = b"".join(self.app(environ, start_response))  # its Content-Length is told before it is damaged
        if fault == "cut":
            return [body[:len(body) // 2]]
        if fault == "stall":
            return self.stalling(body)
        if fault == "flip":
            return [body[:-50] + bytes([body[-50] ^ 1]) + body[-49:]]
        return [body]

    def stalling(self, body):
        yield body[:len(body) // 2]
        self.end.wait(60)

    def shards_fetched(self):
        return sum(n for (method, key), n in self.asked.items() if method == "GET" and "/train/shard" in key)


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


def serve():
    """(address, faults, function that ends it) of a server of its own; the buckets are the same in all."""
    faults = Faults()
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def end():
        faults.end.set()
        server.shutdown()
    return f"http://127.0.0.1:{server.port}", faults, end


@pytest.fixture(scope="module")
def folders(text_dataset, tmp_path_factory):
    """Folder of one text as plain/ and zstd/, in about ten shards each."""
    folder = tmp_path_factory.mktemp("remote")
    text = (text_dataset.parent / "text.txt").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1 << 13)
        for name, compression in (("plain", None), ("zstd", "zstd")):
            convert.convert(InMemory([("text.txt", text)]), folder / name, from_name("byte"), 64, val_fraction=0.1,
                            compression=compression)
    assert 8 <= len(list((folder / "plain" / "train").glob("*.mds"))) <= 12
    return folder


def upload(folder: Path, bucket: str, leave_out=()):
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket=bucket)
    for file in folder.rglob("*.*"):
        if file.is_file() and file.name not in leave_out:
            client.put_object(Bucket=bucket, Key=f"{folder.name}/{file.relative_to(folder)}", Body=file.read_bytes())
    return client


@pytest.fixture(scope="module")
def buckets(folders):
    """Faults of the server at S3_ENDPOINT_URL, which has s3://good/plain, s3://good/zstd, and s3://holey/plain."""
    with pytest.MonkeyPatch.context() as patch:
        address, faults, end = serve()
        for name, value in (AWS | {"S3_ENDPOINT_URL": address}).items():
            patch.setenv(name, value)
        for name in ("plain", "zstd"):
            upload(folders / name, "good")
        upload(folders / "plain", "holey", leave_out=["shard.00003.mds"])
        yield faults
        end()


@pytest.fixture
def faults(buckets, monkeypatch):
    """The same, for one test, with short pauses. boto does not try again, so that it is we who do.

    Its clients come from one session, which saves them 0.1 s each.
    """
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(cache, "PAUSE_S", 0.01)
    session = boto3.session.Session()
    session.client("s3")  # its parts are made now: not by four threads at once
    monkeypatch.setattr(boto3.session, "Session", lambda: session)
    buckets.asked.clear()
    yield buckets
    buckets.rule = None


def read_all(stream, steps=STEPS) -> torch.Tensor:
    return torch.cat(list(stream.batches(0, steps, 0, 1, torch.device("cpu"))))


def open_stream(tmp_path, path, *options):
    return TrainStream(make_config(tmp_path, path, f"--data.cache_dir={tmp_path}/cache", *options))


@pytest.fixture(scope="module")
def expected(tmp_path_factory, folders):
    return read_all(open_stream(tmp_path_factory.mktemp("expected"), folders / "plain"))


def cached(tmp_path) -> list[Path]:
    return sorted(file for file in (tmp_path / "cache").glob("*/train/*") if file.name != "index.json")


# ---- what passes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_the_very_tokens_of_the_local_folder(tmp_path, folders, faults, expected, name, capsys):
    assert torch.equal(read_all(open_stream(tmp_path, f"s3://good/{name}")), expected)
    fetched = faults.shards_fetched()
    assert torch.equal(read_all(open_stream(tmp_path, f"s3://good/{name}")), expected)
    assert faults.shards_fetched() == fetched == len(cached(tmp_path))  # each once, and then from the cache
    assert {file.suffix for file in cached(tmp_path)} == {".mds"}  # unpacked
    assert capsys.readouterr().err == ""


FAULTS = {
    "503": lambda method, n: "503" if n % 3 == 0 else None,
    "drop": lambda method, n: "drop" if n % 3 == 0 else None,
    "cut": lambda method, n: "cut" if method == "GET" and n < 6 else None,  # boto takes five
    "flip": lambda method, n: "flip" if method == "GET" and n < 2 else None,
}


@pytest.mark.parametrize("name, fault", zip(("plain", "zstd", "plain", "zstd"), FAULTS))
def test_what_passes_is_tried_again(tmp_path, faults, expected, name, fault, capsys):
    faults.rule = lambda method, key, n: FAULTS[fault](method, n) if key.split("shard.")[-1] < "00004" else None
    assert torch.equal(read_all(open_stream(tmp_path, f"s3://good/{name}")), expected)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) >= 4
    assert all(line.startswith(f"warning: s3://good/{name}/") and "; trying again (" in line for line in warnings)


def flip(content):
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_a_damaged_cache_is_mended(tmp_path, faults, expected, name, capsys):
    """Bits flip on a disk; a run that is killed while it fetches, or its machine with it, leaves less than it meant."""
    read_all(open_stream(tmp_path, f"s3://good/{name}"))
    for file, damage in zip(cached(tmp_path), (flip, lambda c: c[:-1], lambda c: b"", lambda c: bytes(len(c)))):
        file.write_bytes(damage(file.read_bytes()))
    gone, half = cached(tmp_path)[4], cached(tmp_path)[5]
    gone.unlink()
    (half.parent / f"{half.name}.zstd").write_bytes(half.read_bytes()[:100])
    old, new = (half.parent / f".{half.name}.{age}.partial.0Ab1" for age in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    faults.asked.clear()
    assert torch.equal(read_all(open_stream(tmp_path, f"s3://good/{name}")), expected)
    assert faults.shards_fetched() == 5 + (name == "zstd")  # streaming throws away what it finds beside half of it
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4 and all("; fetched again" in line for line in warnings)
    assert not old.exists() and new.exists()  # which another run may just be writing


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_shards_are_evicted_and_come_again(tmp_path, folders, faults, name):
    """The limit is what the order has in use at once; a byte less is refused."""
    options = ["--data.num_canonical_nodes=1", "--data.shuffle_block_size=320"]
    whole = open_stream(tmp_path, folders / "plain", *options)
    steps = whole.splits[0].samples * 2 // 12  # two epochs
    limit = open_stream(tmp_path, f"s3://good/{name}", *options).splits[0].working_set(0, 1, 1)
    stream = open_stream(tmp_path, f"s3://good/{name}", *options, f"--data.cache_limit={limit}b")
    assert torch.equal(read_all(stream, steps), read_all(whole, steps))
    sizes = [file.stat().st_size for file in cached(tmp_path)]
    assert faults.shards_fetched() > stream.splits[0].dataset.num_shards > len(sizes)  # it has happened
    assert sum(sizes) <= limit + 5 * max(sizes)  # what five threads are just fetching comes on top
    with pytest.raises(UserError, match=f"^data.cache_limit: {limit - 1}b does not hold the shards of s3://good/{name} that "
                       f"the shuffle has in use at once .* take at least {-(-limit >> 10)}kb, or a data.shuffle_block_size "
                       "below 320$"):
        open_stream(tmp_path, f"s3://good/{name}", *options, f"--data.cache_limit={limit - 1}b")


def test_a_shard_that_is_evicted_before_it_is_read(tmp_path, folders, faults, monkeypatch):
    split = open_stream(tmp_path, "s3://good/plain").splits[0]
    rows = np.array([[0, 0], [1, 0]])
    tokens = split.read(rows)
    monkeypatch.setattr(split, "make_sure_of", lambda shard: None)
    cached(tmp_path)[0].unlink()
    faults.rule = lambda method, key, n: "503" if n % 3 == 0 else None
    assert torch.equal(split.read(rows), tokens)
    cached(tmp_path)[0].unlink()
    faults.rule = lambda method, key, n: "503"
    with pytest.raises(UserError, match="s3://good/plain/train/shard.00000.mds: cannot be fetched"):
        split.read(rows)


@pytest.fixture
def own_bucket(faults):
    """Function of a dataset folder that uploads it to s3://own, anew."""
    return lambda folder: upload(folder, "own")


def test_shards_without_hashes(tmp_path, folders, own_bucket, expected, capsys):
    """Made elsewhere; then at least their length must be right."""
    folder = shutil.copytree(folders / "plain", tmp_path / "bare")
    index = folder / "train" / "index.json"
    index.write_text(re.sub(r'"hashes": \{[^}]+\}', '"hashes": {}', index.read_text()))
    own_bucket(folder)
    assert torch.equal(read_all(open_stream(tmp_path, "s3://own/bare")), expected)
    os.truncate(cached(tmp_path)[2], 1000)
    assert torch.equal(read_all(open_stream(tmp_path, "s3://own/bare")), expected)
    assert capsys.readouterr().err.count("warning: ") == 1


def test_shards_of_llm_foundry(tmp_path, own_bucket, faults):
    """No dataset.json, no hashes, no val split; and a third of all requests fail."""
    text = (np.arange(300 * 64, dtype=np.int32) ** 2 % 251).reshape(300, 64)
    with shards.import_streaming().MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(tmp_path / "theirs" / "train"),
                                             compression="zstd", size_limit=1 << 13) as out:
        for row in text:
            out.write({"tokens": row})
    own_bucket(tmp_path / "theirs")
    draw = random.Random(1)
    faults.rule = lambda method, key, n: draw.choice(("500", "drop", "cut")) if draw.random() < 1 / 3 else None
    config = make_config(tmp_path, "s3://own/theirs", f"--data.cache_dir={tmp_path}/cache", "--data.tokenizer=byte")
    stream = TrainStream(config)
    assert torch.equal(read_all(stream), read_all(open_stream(tmp_path, tmp_path / "theirs", "--data.tokenizer=byte")))
    assert (stream.splits[0].samples, stream.validation(config)) == (len(text), [])
    with pytest.raises(UserError, match="^s3://own/theirs/dataset.json: cannot be fetched .*not found.*; copy .*. MDS that "
                       "other tools wrote, as llm-foundry's, has none: name its tokenizer, as --data.tokenizer gpt2"):
        open_stream(tmp_path, "s3://own/theirs")


# ---- what does not --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, file", [("plain", "shard.00002.mds"), ("zstd", "shard.00002.mds.zstd")])
def test_what_is_missing_or_wrong_for_good(tmp_path, folders, own_bucket, expected, name, file, capsys, monkeypatch):
    monkeypatch.setattr(cache, "ATTEMPTS", 3)
    client = own_bucket(folders / name)
    key = f"{name}/train/{file}"
    content = client.get_object(Bucket="own", Key=key)["Body"].read()
    stream = open_stream(tmp_path, f"s3://own/{name}")

    client.delete_object(Bucket="own", Key=key)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^s3://own/{key}: cannot be fetched \(.*not found.*\); copy it there again"):
        read_all(stream)
    assert time.monotonic() - start < 10 and capsys.readouterr().err == ""  # at once

    for wrong, said in ((flip(content), "it has changed"), (content[:-10], "it has"), (content + b"more", "it has")):
        client.put_object(Bucket="own", Key=key, Body=wrong)
        with pytest.raises(UserError, match=rf"^s3://own/{key}: cannot be fetched .*{said} .*; tried 3 times; copy "):
            read_all(stream)
        assert f"{key}: " in capsys.readouterr().err  # it might have been the way here

    client.put_object(Bucket="own", Key=key, Body=content)
    assert torch.equal(read_all(stream), expected)  # no thread left anything behind that another would wait for


@pytest.mark.parametrize("fault", ["400", "503", "hang", "stall"])
def test_a_server_that_is_down_for_good(tmp_path, faults, fault, monkeypatch):
    monkeypatch.setattr(cache, "ATTEMPTS", 3)
    stream = open_stream(tmp_path, "s3://good/plain")
    monkeypatch.setattr(cache, "TIMEOUT_S", 0.1)
    faults.rule = lambda method, key, n: fault if method == "GET" or fault != "stall" else None
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^s3://good/plain/train/shard.000\d\d.mds: cannot be fetched .*; tried 3 "
                                        "times; once that is mended, the same command goes on$"):
        stream.read(stream.sequences(0))
    monkeypatch.setattr(cache, "PATIENCE_S", 0)
    with pytest.raises(UserError, match="^s3://good/plain/dataset.json: cannot be fetched .*; tried 2 times; "):
        open_stream(tmp_path, "s3://good/plain")
    assert time.monotonic() - start < 30


def test_settings_that_cannot_work(tmp_path, faults, monkeypatch):
    (tmp_path / "file").touch()
    plain, cannot = "s3://good/plain", "cannot be written .*; set data.cache_dir"
    for path, option, said in (
            (plain, "data.cache_limit=20kb", f"data.cache_limit: 20kb does not hold four of the shards of {plain}"),
            (plain, "data.cache_limit=60kb", f"data.cache_limit: 60kb does not hold the shards of {plain} that .*take at "
             r"least 8\dkb, or a data.shuffle_block_size below 262144"),
            (plain, "data.cache_limit=lots", "data.cache_limit: 'lots' is no size; write it as 200gb"),
            (plain, f"data.cache_dir={tmp_path}/file/new", f"file/new/.*: {cannot}"),
            (plain, "data.cache_dir=/sys/nanogpt", f"/sys/nanogpt/.*: {cannot}"),
            ("s3://absent/plain", "run.seed=1", "s3://absent/plain/dataset.json: .*not found.*mend data.path"),
            ("s3://good/absent", "run.seed=1", "s3://good/absent/dataset.json: .*not found.*mend data.path")):
        with pytest.raises(UserError, match=said) as error:
            open_stream(tmp_path, path, f"--{option}")
        assert "\n" not in str(error.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(boto3.session, "Session", boto3.Session)
    with pytest.raises(UserError, match=f"{plain}/dataset.json: .*Unable to locate credentials.*; set AWS_ACCESS"):
        open_stream(tmp_path, plain)


# ---- whole runs -----------------------------------------------------------------------------------------------------

RUN = ["launch/train.sh", "c.yaml", *SMALL, "--train.max_steps=16", "--train.micro_batch_size=6", "--run.dir=run",
       "--train.global_batch_size=48", "--data.num_canonical_nodes=1", "--data.shuffle_block_size=120"]
RUNS = {  # the command, where the data is, and the share of requests that fail
    "shaky": ([*TORCHRUN, *RUN, "--data.cache_limit=40kb"], "s3://good/plain", 1 / 3),  # the shards take 80
    "missing": ([*TORCHRUN, *RUN, "--run.timeout_s=900"], "s3://holey/plain", 0),
    "full": ([*OWN_MOUNTS, 'mount -t tmpfs -o size=48k none cache && exec "$@"', "-", "bash", *RUN,
              "--data.cache_dir=cache"], "s3://good/plain", 0),
}


@pytest.fixture(scope="module", autouse=True)
def runs(request, buckets, folders, tmp_path_factory):
    """What became of each run, (status, stderr, seconds, folder). They go on while the other tests do."""
    servers = []

    def run(name):
        command, path, share = RUNS[name]
        address, faults, end = serve()
        servers.append(end)
        draw = random.Random(0)
        faults.rule = lambda method, key, n: draw.choice(("500", "503", "drop", "cut")) if draw.random() < share else None
        here = tmp_path_factory.mktemp(name)
        (here / "cache").mkdir()
        for source in ("launch", "nanogpt"):
            (here / source).symlink_to(ROOT / source)
        (here / "c.yaml").write_text(f"data: {{path: {path}}}")
        env = ENV | AWS | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "S3_ENDPOINT_URL": address}
        start = time.monotonic()
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=400)
        return done.returncode, done.stderr, time.monotonic() - start, here

    wanted = [name for name in RUNS for item in request.session.items
              if item.module is request.module and name in getattr(item.function, "runs", ())]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in wanted}
        pool.shutdown(cancel_futures=True)
    for end in servers:
        end()


def needs(*names):
    def mark(function):
        function.runs = names
        return function
    return mark


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.mark.skipif(not may_mount(), reason="needs mounts of its own, and unshare -m is not permitted here")
@needs("full")
def test_a_full_disk(runs):
    status, stderr, _, _ = runs["full"].result()
    assert status == 1 and len(stderr.splitlines()) == 1, stderr
    assert re.search(r"^error: s3://good/plain/\w+/shard\S* cannot be fetched .*No space left on device.*; make room, "
                     "set data.cache_limit, or move data.cache_dir$", stderr)


@needs("shaky")
def test_two_ranks_from_a_shaky_server(runs, ranks, folders, tmp_path):
    """A third of all requests fail, in all ways, and the cache is too small for the dataset: not one loss is another."""
    (tmp_path / "c.yaml").write_text(f"data: {{path: {folders / 'plain'}}}")
    local = ranks(2, train_run, [str(tmp_path / "c.yaml"), *RUN[2:], f"--run.dir={tmp_path / 'run'}"])[0]
    status, stderr, _, here = runs["shaky"].result()
    assert status == 0 and not errors(stderr), stderr
    shaky = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    for key in ("step", "loss", "grad_norm"):
        assert [m[key] for m in shaky] == [m[key] for m in local]
    assert len(local) == 16 and shaky[-1]["val_loss"] == local[-1]["val_loss"]


@needs("missing")
def test_two_ranks_end_when_a_shard_is_missing(runs):
    status, stderr, seconds, _ = runs["missing"].result()
    assert status != 0 and seconds < 300  # well before run.timeout_s
    assert len(errors(stderr)) == 1, stderr
    assert "s3://holey/plain/train/shard.00003.mds: cannot be fetched" in errors(stderr)[0]

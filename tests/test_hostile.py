"""No code runs from a file that somebody hands over, no path leads out of a folder, and no secret comes into a run's.

Every pickle here makes a folder when it is loaded, its trace; that it would, is proven first.
"""

import base64
import json
import os
import pickle
import re
import runpy
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
import yaml
from test_fuzz import CONFIG, alone, changed, data, here, run  # noqa: F401

from nanogpt import checkpoint, resume, tokenizer
from nanogpt.config import load_config
from nanogpt.errors import UserError
from nanogpt.generate import load_run
from nanogpt.shards import import_streaming, load_dataset_card
from nanogpt.stream import TrainStream

ROOT = Path(__file__).parents[1]


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    """Where it must not appear. Afterwards it has not."""
    trace = tmp_path / "it-ran"
    yield trace
    assert not trace.exists()


def proven(load, trace):
    """That this does run what Malicious holds."""
    try:
        load()
    except Exception:  # what was made is no tensor, no tokens …
        pass
    trace.rmdir()


class Member:
    """What it is pickled as: Python 3.11.0 to 3.11.3 do so with members of enums."""

    def __init__(self, kind, name):
        self.of = kind, name

    def __reduce__(self):
        return getattr, self.of


def test_getattr_reaches_members_of_one_enum_alone():
    import io

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as FORMATS
    from torch.distributed.checkpoint.metadata import Metadata

    def load(what):
        return checkpoint._MetadataUnpickler(io.BytesIO(pickle.dumps(what))).load()
    assert load(Member(FORMATS, "TORCH_CONTIGUOUS_FORMAT")) is FORMATS.TORCH_CONTIGUOUS_FORMAT
    for kind, name in ((FORMATS, "__class__"), (FORMATS, "mro"), (Metadata, "__init__")):
        with pytest.raises(UserError, match="names 'builtins.getattr'"):
            load(Member(kind, name))


def refused(said, function, *args):
    with pytest.raises(UserError, match=said) as caught:
        function(*args)
    assert len(str(caught.value).splitlines()) == 1


def tool(monkeypatch, name, *arguments):
    """A command of tools/, without the seconds that a process of its own would import for."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]()


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["alone", "within"])
def test_an_index_of_tensors_that_is_a_pickle_of_more(run, trace, how):  # noqa: F811
    metadata = checkpoint.SafeReader(run[0]).read_metadata()
    metadata.planner_data = Malicious(trace)
    content = pickle.dumps(Malicious(trace) if how == "alone" else metadata)
    proven(lambda: pickle.loads(content), trace)
    with changed(run[0] / ".metadata", content, fitting=True):
        refused("names 'posix.mkdir', which .* refused unread", checkpoint.load, run[0], run[3])
        refused("refused unread", load_run, run[0])


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_tensors_that_are_pickles_of_more(run, tmp_path, trace, how):  # noqa: F811
    copy = shutil.copytree(run[0], tmp_path / "step-00000003")
    evil = copy / "__1_0.distcp"
    evil.write_bytes(pickle.dumps(Malicious(trace))) if how == "pickle" else torch.save({"x": Malicious(trace)}, evil)
    proven(lambda: torch.load(evil, weights_only=False), trace)
    metadata = checkpoint.SafeReader(run[0]).read_metadata()
    place = next(place for key, place in metadata.storage_data.items() if key.fqn == "model.transformer.wte.weight")
    place.relative_path, place.offset, place.length = evil.name, 0, evil.stat().st_size
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint.write_manifest(copy)
    refused("cannot be loaded", checkpoint.load, copy, run[3])
    refused("cannot be loaded", load_run, copy)


def test_checkpoints_of_nanogpt_are_not_opened(run, data, tmp_path, trace, monkeypatch):  # noqa: F811
    file = tmp_path / "out" / "ckpt.pt"
    file.parent.mkdir()
    torch.save({"model": {}, "config": Malicious(trace)}, file)
    proven(lambda: torch.load(file, weights_only=False), trace)
    _, config, stream, model, _ = run
    for path in (file, file.parent):
        options = [f"--data.path={data[0]}", "--model.block_size=64", f"--run.dir={tmp_path / 'run'}"]
        resuming, tuning = (load_config([str(data[0].parent / "good.yaml"), *options, f"--run.{key}={path}"])
                            for key in ("resume", "init_from"))
        refused("no complete checkpoint there", resume.starting_point, resuming, stream, [])
        refused("no complete checkpoint there", resume.take_shape, tuning)
        refused("no complete checkpoint there", tool, monkeypatch, "sample", "--run", path, "--device", "cpu")


def test_files_of_nanogpt_that_are_pickles_of_more(tmp_path, trace, monkeypatch):
    file, meta, out = tmp_path / "ckpt.pt", tmp_path / "meta.pkl", tmp_path / "out"
    torch.save({"model": {}, "config": Malicious(trace)}, file)
    meta.write_bytes(pickle.dumps({"stoi": Malicious(trace)}))
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(99 * 2))
    proven(lambda: torch.load(file, weights_only=False), trace)
    proven(lambda: pickle.loads(meta.read_bytes()), trace)
    refused("ckpt.pt: holds more than", tool, monkeypatch, "convert_nanogpt", "--checkpoint", file, "--out", out)
    refused("posix.mkdir.*refused unread", tool, monkeypatch, "convert_nanogpt", "--data", tmp_path, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["../../secret", "/{}/secret", "..", "", "deeper/secret"])
def test_a_manifest_lists_files_of_its_own_folder(run, tmp_path, name):  # noqa: F811
    copy = shutil.copytree(run[0], tmp_path / "checkpoints" / "step-00000003")
    (copy / "deeper").mkdir()
    for folder in (tmp_path, copy / "deeper"):
        (folder / "secret").write_bytes(b"secret")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name.format(tmp_path)] = {"bytes": 6, "xxh3_128": xxhash.xxh3_128(b"secret").hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused("is not a file of this folder", checkpoint.verify, copy)


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def dataset(data, tmp_path):  # noqa: F811
    """(a dataset folder to be broken, its config)"""
    copy = shutil.copytree(data[0], tmp_path / "mds")
    options = [f"--data.path={copy}", f"--run.dir={tmp_path / 'run'}"]
    return copy, load_config([str(data[0].parent / "good.yaml"), *options])


def test_a_column_of_pickles(dataset, trace, monkeypatch):
    folder, config = dataset
    samples = load_dataset_card(folder)["splits"]["train"]["samples"]
    streaming = import_streaming()
    shutil.rmtree(folder / "train")
    with streaming.MDSWriter(columns={"tokens": "pkl"}, out=str(folder / "train"), hashes=["xxh64"]) as writer:
        for _ in range(samples):
            writer.write({"tokens": Malicious(trace)})
    proven(lambda: streaming.LocalDataset(local=str(folder / "train"))[0], trace)
    refused("index.json: .*pkl", TrainStream, config)
    refused("index.json: .*pkl", tool, monkeypatch, "inspect_mds", folder)
    index = json.loads((folder / "train" / "index.json").read_text())  # nor where the index says otherwise
    index["shards"][0] |= {"column_encodings": ["ndarray:uint16:65"], "column_sizes": [130]}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    stream = TrainStream(config)
    refused("sample 0 cannot be read", stream.read, stream.sequences(0) * 0)


@pytest.mark.parametrize("form", ["raw_data", "zip_data"])
@pytest.mark.parametrize("name", ["../../secret", "{}/secret", "..", ""])
def test_an_index_lists_files_of_its_own_folder(dataset, monkeypatch, tmp_path, form, name):
    folder, config = dataset
    secret = tmp_path / "secret"
    content = (folder / "train" / "shard.00000.mds").read_bytes()
    secret.write_bytes(content)  # even where it would be a shard
    index = json.loads((folder / "train" / "index.json").read_text())
    shard = index["shards"][0]
    if form == "zip_data":
        shard |= {"compression": "zstd", "zip_data": dict(shard["raw_data"])}
    shard[form]["basename"] = name.format(tmp_path)
    (folder / "train" / "index.json").write_text(json.dumps(index))
    refused("index.json: ", TrainStream, config)
    refused("index.json: ", tool, monkeypatch, "inspect_mds", folder, "--samples", 0, "--verify")
    assert secret.read_bytes() == content


@pytest.mark.parametrize("odd", [
    {"name": "{trace}.pkl"}, {"name": "../ranks"}, {"name": "__import__('os').mkdir('{trace}')"},
    {"name": "!!python/name:os.mkdir"}, {"ranks": ["{pickle}"]}, {"ranks": "{pickle}"}, {"alphabet": "{pickle}"},
    {"fingerprint": "{pickle}"}], ids=str)
def test_a_dataset_with_an_odd_tokenizer(dataset, trace, monkeypatch, odd):
    folder, _ = dataset
    content = pickle.dumps(Malicious(trace))
    Path(f"{trace}.pkl").write_bytes(content)
    card = load_dataset_card(folder)
    odd = json.dumps(odd).replace("{trace}", str(trace)).replace("{pickle}", base64.b64encode(content).decode())
    card["tokenizer"] |= json.loads(odd)
    (folder / "dataset.json").write_text(json.dumps(card))
    refused("the stored tokenizer", tokenizer.from_json, load_dataset_card(folder)["tokenizer"])
    refused("the stored tokenizer", tool, monkeypatch, "inspect_mds", folder)


@pytest.mark.parametrize("protocol", [0, 4])
def test_ranks_that_are_a_pickle(tmp_path, trace, monkeypatch, protocol):
    (tmp_path / "ranks").write_bytes(pickle.dumps(Malicious(trace), protocol))
    (tmp_path / "text").write_text("some text " * 99)
    proven(lambda: pickle.loads((tmp_path / "ranks").read_bytes()), trace)
    refused("a tiktoken ranks file has", tool, monkeypatch, "convert_text_to_mds", "--input", tmp_path / "text",
            "--out", tmp_path / "mds", "--tokenizer", tmp_path / "ranks", "--block-size", 8)


# ---- configs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["run: !!python/object/apply:os.mkdir ['{}']", "!!python/object/apply:os.mkdir ['{}']",
                                  "? !!python/object/apply:os.mkdir ['{}']\n: 1",
                                  "run: !!python/object/new:os.mkdir ['{}']",
                                  "run: {{dir: !!python/object/apply:eval [\"__import__('os').mkdir('{}')\"]}}"])
def test_a_config_that_runs_code(tmp_path, trace, text):
    (tmp_path / "c.yaml").write_text(text.format(trace))
    proven(lambda: yaml.load(text.format(trace), yaml.UnsafeLoader), trace)
    refused("c.yaml: not valid YAML: could not determine a constructor", load_config, [str(tmp_path / "c.yaml")])


URL = "s3://AKIAUSER:hush-hush@bucket/data"


@pytest.mark.parametrize("text, options", [
    (f"data: {{path: '{URL}'}}", []), ("", ["--data.path", URL]), ("", [f"--data.path={URL}"]),
    (f"data: {{train: [{{path: '{URL}'}}]}}", []), (f"data: {{path: '{URL}'", []), (f"data: {{path: ['{URL}']}}", []),
    (f"base: '{URL}'", []), (f"base: ['{URL}']", []), ("", ["--data.pth", URL]), ("", [URL]), ("", [f"--{URL}=1"]),
    (f"'{URL}': 1\n'{URL}': 1", []), ("", ["--train.max_steps", URL]),
    ("", ["--data.path", "s3://AKIAUSER:hush/hush@bucket/x"])])
def test_passwords_in_urls_are_refused_and_not_shown(tmp_path, text, options):
    (tmp_path / "c.yaml").write_text(f"train: {{max_steps: 1}}\n{text}")
    with pytest.raises(UserError) as caught:
        load_config([str(tmp_path / "c.yaml"), *options])
    assert "hush" not in str(caught.value) and "AKIAUSER" not in str(caught.value)
    if options[:1] == ["--data.path"]:
        assert str(caught.value) == "--data.path: a URL with a password would be copied into logs and checkpoints; " \
            "credentials come from the environment"


def test_urls_with_a_port_or_an_at_sign_behind_the_host_are_fine(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_steps: 1}")
    for url in ("s3://bucket/user@host/x", "http://localhost:9000/bucket", "http://localhost:9000", "data/a@b:c"):
        assert load_config([str(tmp_path / "c.yaml"), f"--data.path={url}"]).data.path == url


# ---- the code itself, and what it writes ----------------------------------------------------------------------------

def test_nothing_in_the_code_loads_code():
    bad = re.compile(r"trust_remote_code|(?<![\w.])(eval|exec)\(|pickle\.(load|_?Unpickler)|allow_pickle"
                     r"|torch\.load\((?!.*weights_only=True)|allow_unsafe_types|yaml\.(unsafe_|full_)|shell=True"
                     r"|os\.system|__import__")
    allowed = {"class _MetadataUnpickler(pickle.Unpickler):",
               "class PlainUnpickler(pickle._Unpickler):  # the one in C fills the memory where a damaged file asks it to"}
    found = [f"{file}: {line}" for folder in ("nanogpt", "tools", "launch") for file in (ROOT / folder).rglob("*")
             if file.suffix in (".py", ".sh") for line in file.read_text().splitlines()
             if bad.search(line) and line not in allowed]
    assert not found


def test_secrets_of_the_environment_stay_out_of_the_run_folder(data, tmp_path):  # noqa: F811
    names = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    hidden = {name: secrets.token_hex(20) for name in names}
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(CONFIG | {"data": {"path": str(data[0])}, "run": {"dir": str(tmp_path / "run")}}))
    done = subprocess.run([sys.executable, "launch/train.sh", str(config), "--log.wandb=offline", "--run.device=cpu"],
                          cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    written = [str(p.relative_to(tmp_path / "run")) for p in files]
    for pattern in ("config.yaml", "log.txt", "metrics.jsonl", r"checkpoints/step-\d+/state.json", r"wandb/.*\.wandb"):
        assert any(re.fullmatch(pattern, name) for name in written), written
    for secret in hidden.values():
        assert secret not in done.stdout + done.stderr
        assert not [p for p, content in files.items() if secret.encode() in content or secret in str(p)]

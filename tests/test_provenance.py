"""tools/inspect_mds.py --run: what it prints of a step is what the step was trained on.

References: the source files, joined and counted here by hand; and the loss that the run logged, which only
the very same sequences give.
"""

import ast
import bisect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from test_shards import call_tool, hashes, one_line, run_tool
from test_train import train_run

from nanogpt import shards
from nanogpt.config import Config
from nanogpt.convert import convert
from nanogpt.documents import text_files
from nanogpt.generate import load_run
from nanogpt.model import GPT
from nanogpt.stream import TrainStream
from nanogpt.tokenizer import from_name

ROOT = Path(__file__).parents[1]
SMALL = ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--log.interval=1",
         "--train.global_batch_size=24", "--train.micro_batch_size=6", "--train.precision=float32",
         "--train.compile=false", "--eval.sequences=8", "--optim.learning_rate=0.01", "--run.device=cpu"]


class Corpus:
    """Files of words that occur nowhere else, and their dataset: samples of 32 tokens in several shards."""

    def __init__(self, folder: Path, letter: str, sizes: list[int], stride: int, val_fraction: float, block_size=32,
                 **options):
        self.path = folder / letter
        words = iter(range(10**4))
        files = [folder / f"{letter}-texts" / f"{i:02}\t.txt" for i in range(len(sizes))]
        files[0].parent.mkdir()
        for i, (file, size) in enumerate(zip(files, sizes)):
            file.write_text("\x1b".join(f"{letter}{next(words):04}" for _ in range(size)) + "." * (i % 4))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SHARD_BYTES", 1500)
            convert(text_files([str(files[0].parent)]), self.path, from_name("byte"), block_size, stride=stride,
                    val_fraction=val_fraction, **options)
        n_val = round(len(files) * val_fraction)
        val = np.random.default_rng(2357).choice(len(files), n_val, replace=False)
        self.names = [str(file) for i, file in enumerate(files) if i not in val]
        self.stride, self.tokens, self.ends = stride, [], []
        for name in self.names:
            self.tokens += [*Path(name).read_bytes(), 256]
            self.ends.append(len(self.tokens))  # the place after the document's end-of-text
        assert len(list((self.path / "train").glob("shard.*"))) > 3

    def document(self, place: int) -> int:
        return bisect.bisect_right(self.ends, place)


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks):
    """A run of 3 steps on a mixture, then of 3 on one of its datasets in another order."""
    folder = tmp_path_factory.mktemp("provenance")
    a = Corpus(folder, "a", [40, 2, 1, 30, 60, 3, 45] * 4, 32, 0.2)
    b = Corpus(folder, "b", [90, 1, 110], 12, 0)
    (folder / "c.yaml").write_text(f"data: {{train: [{{path: {a.path}, proportion: 2}}, {{path: {b.path}}}]}}")

    def train(*options):
        ranks(1, train_run, [str(folder / "c.yaml"), *SMALL, f"--run.dir={folder / 'run'}", *options])

    train("--train.max_steps=3")
    train("--train.max_steps=6", "--data.train=none", f"--data.path={a.path}", "--data.shuffle_seed=5",
          "--run.allow_data_change=true")
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(folder=folder / "run", metrics=metrics, corpora={str(c.path): c for c in (a, b)})


@pytest.fixture
def shown(capsys, monkeypatch):
    """The tool's output for a step: (text, [(number, dataset, shard, sample, part, first, last, documents, text)])."""
    def call(*arguments):
        status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", "--run", *arguments)
        assert status == 0, stderr
        line = re.compile(r"sequence (\d+): (.*)/train/(shard\.\d+\.mds\S*), sample (\d+), part (\d+) of (\d+), "
                          r"tokens (\d+) to (\d+)(.*)\n  (.*)")
        return stdout + stderr, [tuple(int(x) if x.isdigit() else x for x in found) for found in line.findall(stdout)]
    return call


def decoded(tokens):
    return "".join("<|endoftext|>" if t == 256 else chr(t) for t in tokens)


def loss_of(model: GPT, sequences) -> float:
    """The mean loss in nats over the printed text of sequences."""
    rows = []
    for *_, text in sequences:
        pieces = ast.literal_eval(text).split("<|endoftext|>")
        rows.append([token for i, piece in enumerate(pieces) for token in [256] * (i > 0) + [*piece.encode()]])
    tokens = torch.tensor(rows)
    with torch.no_grad():
        logits = model.lm_head(model.hidden(tokens[:, :-1]))[..., :257]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


# ---- what is shown --------------------------------------------------------------------------------------------------

def test_step_1_is_what_the_logged_loss_is_of(run, shown):
    before = hashes(run.folder), [hashes(c.path) for c in run.corpora.values()]
    text, sequences = shown(run.folder, "--step", 1, "--limit", 24)
    assert [s[0] for s in sequences] == list(range(24))
    config = Config.model_validate(yaml.safe_load((run.folder / "config.yaml").read_text()))
    model = GPT(config.model)
    model.init_weights(config.run.seed)
    assert loss_of(model, sequences) == pytest.approx(run.metrics[0]["loss"], rel=1e-5)
    assert f"loss {run.metrics[0]['loss']:.6g}, grad_norm {run.metrics[0]['grad_norm']:.6g}" in text
    assert (hashes(run.folder), [hashes(c.path) for c in run.corpora.values()]) == before


def test_a_step_after_the_data_was_changed(run, shown):
    """Step 4 is the first of the second era: its loss is that of the weights which step 3 left."""
    model, _, state = load_run(run.folder / "checkpoints" / "step-00000003")
    assert state["step"] == 3
    text, sequences = shown(run.folder, "--step", 4, "--limit", 100)
    assert len(sequences) == 24 and {s[1] for s in sequences} == {list(run.corpora)[0]}
    assert loss_of(model, sequences) == pytest.approx(run.metrics[3]["loss"], rel=1e-5)
    # The older checkpoint knows nothing of the change, and goes on in its own order.
    text, others = shown(run.folder / "checkpoints" / "step-00000003", "--step", 4, "--limit", 100)
    assert {s[1] for s in others} == set(run.corpora) and "note: step 4 is not done" not in text
    assert loss_of(model, others) != pytest.approx(run.metrics[3]["loss"], rel=1e-5)


def test_text_and_documents_by_hand(run, shown):
    before = run.folder / "checkpoints" / "step-00000003"
    steps = [(run.folder, 2), (run.folder, 6), *((before, step) for step in range(3, 12))]
    sequences = [s for folder, step in steps for s in shown(folder, "--step", step, "--limit", 24)[1]]
    assert len(sequences) == 11 * 24
    for _, dataset, shard, sample, part, parts, first, last, documents, printed in sequences:
        corpus = run.corpora[dataset]
        assert parts == 2 and first == sample * corpus.stride + part * 16 and last == first + 16
        assert ast.literal_eval(printed) == decoded(corpus.tokens[first:last + 1])
        one, other = corpus.document(first), corpus.document(last)
        names = ", ".join(map(repr, corpus.names[one:other + 1]))
        assert documents == f", document{f's {one} to {other}' if other > one else f' {one}'} ({names})"
        index = json.loads((corpus.path / "train" / "index.json").read_text())["shards"]
        number = next(i for i in range(len(index)) if sample < sum(s["samples"] for s in index[:i + 1]))
        assert shard == index[number]["raw_data"]["basename"]
    assert any("documents" in s[8] for s in sequences)
    assert any(run.corpora[s[1]].tokens[s[7]] == 256 for s in sequences)  # ends with an end: not yet the next document


def test_limit_and_width(run, shown):
    text, sequences = shown(run.folder, "--step", 2, "--limit", 5, "--no-documents")
    whole = shown(run.folder, "--step", 2, "--limit", 24, "--no-documents")[1]
    assert sequences == [whole[i] for i in (0, 4, 9, 14, 19)] and "19 more sequences are left out" in text
    assert len({s[1] for s in sequences}) == 2  # of both datasets, which lie one after the other
    assert all(s[8] == "" for s in sequences)


def test_long_text_is_shortened(capsys, monkeypatch, tmp_path):
    c = Corpus(tmp_path, "c", [900], 512, 0, block_size=512, compression="zstd")
    folder = config_alone(tmp_path, c.path, 512)
    before = hashes(tmp_path)
    for options, length in ([], 240), (["--full"], 513):
        arguments = "inspect_mds.py", "--run", folder, "--step", 1, *options
        status, stdout, stderr = call_tool(capsys, monkeypatch, *arguments)
        assert status == 0 and "has no checkpoint yet" in stderr and "the run is at 0" in stderr
        assert "no loss of this step is logged" in stdout and ".mds.zstd, sample" in stdout
        printed = re.search(r"^  ('.*')$", stdout, re.M)[1]
        assert sum(len(ast.literal_eval(piece)) for piece in re.split(r" … \d+ characters … ", printed)) == length
    assert hashes(tmp_path) == before  # compressed shards are unpacked elsewhere


def config_alone(tmp_path, dataset, block_size) -> Path:
    """A run folder as it is before its first checkpoint."""
    config = Config(data={"path": str(dataset)}, model={"block_size": block_size},
                    train={"max_steps": 5, "global_batch_size": 4, "micro_batch_size": 4})
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    return tmp_path / "young"


def test_names_are_given_only_where_they_are_certain(run, shown, tmp_path):
    c = Corpus(tmp_path, "c", [150, 160, 170], 32, 0)
    folder = config_alone(tmp_path, c.path, 16)
    assert "(" in shown(folder, "--step", 1)[1][0][8]
    Path(c.names[1]).write_text("another text")
    sequences = shown(folder, "--step", 1)[1]
    for s in sequences:
        one, other = c.document(s[6]), c.document(s[7])
        assert s[8] == f", document{f's {one} to {other}' if other > one else f' {one}'}"


def test_data_changed_and_nothing_saved_since(run, shown, tmp_path):
    """A run that was resumed with another order, and logs a spike before its first checkpoint."""
    copy = shutil.copytree(run.folder, tmp_path / "run")
    values = yaml.safe_load((copy / "config.yaml").read_text())
    values["data"]["shuffle_seed"] = 6
    (copy / "config.yaml").write_text(yaml.safe_dump(values))
    text, sequences = shown(copy, "--step", 8, "--limit", 24)
    assert "started again after step 6, with other data" in text and "step 8 is not done yet" in text
    expected = TrainStream(Config.model_validate(values), 6).sequences(7).tolist()
    assert [[s[3], s[4]] for s in sequences] == expected
    text, sequences = shown(copy, "--step", 5, "--limit", 24)  # the checkpoint knows what this one was
    assert "started again" not in text and sequences == shown(run.folder, "--step", 5, "--limit", 24)[1]


def test_a_moved_dataset(run, shown, capsys, monkeypatch, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    state_path = copy / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(state_path.read_text())
    a = state["config"]["data"]["path"]
    state["config"]["data"]["path"] = "data/gone"
    state_path.write_text(json.dumps(state))
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", "--run", copy, "--step", 5)
    assert one_line(status, stderr) and stderr.startswith("error: data/gone: there is no dataset") and stdout == ""
    assert "--data PATH" in stderr and "call this from the folder" in stderr
    moved = shutil.copytree(a, tmp_path / "moved")
    sequences = shown(copy, "--step", 5, "--data", moved)[1]
    assert [s[2:] for s in sequences] == [s[2:] for s in shown(run.folder, "--step", 5)[1]]
    assert {s[1] for s in sequences} == {str(moved)}


# ---- refusals -------------------------------------------------------------------------------------------------------

def test_a_changed_dataset_is_refused(run, capsys, monkeypatch, tmp_path):
    other = Corpus(tmp_path, "a", [40, 2, 1, 30, 61, 3, 45] * 4, 32, 0.2)
    call = "inspect_mds.py", "--run", run.folder, "--step", 5
    status, stdout, stderr = call_tool(capsys, monkeypatch, *call, "--data", other.path)
    assert one_line(status, stderr) and f"{other.path}: is not what step 5 of {run.folder} was trained on: " in stderr
    assert "train index.json sha256 is " in stderr and stdout == ""
    shard = next((other.path / "train").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    status, stdout, stderr = call_tool(capsys, monkeypatch, *call, "--data", other.path)
    assert one_line(status, stderr) and "the data of step 5 cannot be opened as it was: " in stderr
    assert shard.name in stderr


def test_another_order_of_the_libraries_is_refused(run, capsys, monkeypatch, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    path = copy / "checkpoints" / "step-00000006" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"next_samples": "0"}))
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", "--run", copy, "--step", 5)
    assert one_line(status, stderr) and "the order of its samples comes out another" in stderr and "numpy" in stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "give either DIR"), (["--run", "RUN"], "give either DIR"), (["--step", "1"], "give either DIR"),
    (["DIR", "--run", "RUN", "--step", "1"], "give either DIR"), (["DIR", "--full"], "give either DIR"),
    (["--run", "RUN", "--step", "1", "--verify"], "give either DIR"),
    (["--run", "RUN", "--step", "0"], "--step: 0 is out of range; steps count from 1"),
    (["--run", "RUN", "--step", "-3"], "--step: -3 is out of range"),
    (["--run", "RUN", "--step", "x"], "invalid int value: 'x'"),
    (["--run", "RUN", "--step", "1", "--limit", "0"], "--limit: 0 is out of range"),
    (["--run", "nowhere", "--step", "1"], "nowhere: no such folder"),
    (["--run", "EMPTY", "--step", "1"], "holds neither a checkpoint nor a config.yaml"),
    (["--run", "RUN", "--step", "1", "--data", "EMPTY"], "--data: is for a single dataset, and step 1 is of 2"),
    (["--run", "RUN", "--step", "5", "--data", "EMPTY"], "there is no dataset, and step 5 needs the one that"),
])
def test_bad_input(run, capsys, monkeypatch, tmp_path, arguments, message):
    places = {"RUN": run.folder, "DIR": next(iter(run.corpora)), "EMPTY": tmp_path}
    arguments = [places.get(a, a) for a in arguments]
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", *arguments)
    assert one_line(status, stderr) and message in stderr and stdout == "", stderr


def test_damaged_records_of_a_run(run, capsys, monkeypatch, tmp_path):
    def refused(message, step):
        status, _, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", "--run", copy, "--step", step)
        assert one_line(status, stderr) and message in stderr, stderr

    copy = shutil.copytree(run.folder, tmp_path / "run")
    (copy / "config.yaml").write_text("run: [")
    refused("config.yaml: not valid YAML", 7)
    (copy / "config.yaml").write_text("run: {}\ntrain: {steps: 3}")
    refused("config.yaml: is damaged", 7)
    shutil.rmtree(copy / "checkpoints")
    refused("config.yaml: train.steps: Extra inputs are not permitted", 7)
    copy = shutil.copytree(run.folder, tmp_path / "run2")
    path = copy / "checkpoints" / "step-00000006" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_history": [{}]}))
    refused("state.json: ", 2)
    path.write_text(path.read_text()[:-9])
    refused("state.json: cannot be read", 2)


def test_a_process_of_its_own(run):
    """As a user calls it: in the shell of a job, and without torch where there is nothing to be done with it."""
    done = run_tool("inspect_mds.py", "--run", run.folder / "checkpoints" / "step-00000006", "--step", 7)
    assert done.returncode == 0 and done.stdout.count("\nsequence ") == 16 and "\x1b" not in done.stdout
    assert done.stderr == "note: step 7 is not done yet, as far as is saved or logged: the run is at 6\n"
    code = "import sys, runpy; sys.argv = ['x', '--run', 'nowhere', '--step', '1']\n" \
           "try: runpy.run_path('tools/inspect_mds.py', run_name='__main__')\n" \
           "finally: assert not {'torch', 'streaming', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert one_line(done.returncode, done.stderr)

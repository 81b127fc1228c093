"""Loss against a plain loop, the tasks against a plain loop and against lm-evaluation-harness itself."""

import base64
import contextlib
import io
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from nanogpt import evaluate, tokenizer
from nanogpt.config import Config, Model
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.ranks import init_process_group
from nanogpt.shards import import_streaming
from nanogpt.stream import Split

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
STORY = ("Tom and Ann went to the lake. Tom took the boat and Ann took the bread. They ate the bread in the boat. "
         "Ann said that the lake was cold, and Tom said that the bread was cold. ")
HELLASWAG = [
    dict(ind=4, activity_label="Rowing", ctx_a="Tom and Ann went to the lake.", ctx_b="tom took the", label=3,
         endings=["bread and Ann", "boat  and Ann [step] took the bread.", "boat", "lake"]),
    dict(ind=7, activity_label="Eating [substeps] bread", ctx_a="Ann said that the [title] Boat was cold.", ctx_b="[step]",
         label="2", endings=["Tom said", "and Tom said that the bread", "so was the bread", "Ünsinn, said Tom"]),
    dict(ind=8, activity_label="Rowing", ctx_a="They ate the bread", ctx_b="IN THE", label="1",
         endings=["boat.", "lake.", "cold.", "Ann."]),
]
CONTEXTS = ["Rowing: Tom and Ann went to the lake. Tom took the",  # as the published prompts would be, by hand
            "Eating bread: Ann said that the. Boat was cold. ",
            "Rowing: They ate the bread In the"]
ENDINGS = [["bread and Ann", "boat and Ann took the bread.", "boat", "lake"],
           HELLASWAG[1]["endings"], HELLASWAG[2]["endings"]]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE of a few merges, as the tokenizers library has it, and as ours, from a ranks file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([STORY] * 4, vocab_size=330, show_progress=False)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = tmp_path_factory.mktemp("bpe") / "ranks"
    ranks.write_text("\n".join(f"{base64.b64encode(bytes(letters[c] for c in token)).decode()} {i}"
                               for token, i in theirs.get_vocab().items()))
    theirs.add_special_tokens(["<|endoftext|>"])
    return theirs._tokenizer, tokenizer.from_name(str(ranks))


def random_model(vocab_size, block_size) -> GPT:
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=vocab_size))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(bpe):
    return random_model(bpe[1].vocab_size, 48), bpe[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory, gpt2):
    """The tasks' files: endings of the LAMBADA ones that the model would write, and others."""
    model, tok = gpt2
    words, folder = STORY.split(), tmp_path_factory.mktemp("tasks")
    texts = ["Ann", "Tom and Ann went to  Ann", *(" ".join(words[:n]) for n in range(4, 30))]
    for first in range(30):
        context = " ".join(words[first:first + 3])
        word = tok.decode(model(torch.from_numpy(tok.encode(context).astype(np.int64))[None])[0].argmax(-1))
        texts += [context + word] if word[0] == " " and word[1:].isalpha() else []
    return dict(hellaswag=jsonl(folder / "hellaswag.jsonl", HELLASWAG),
                lambada_openai=jsonl(folder / "lambada.jsonl", [dict(text=text) for text in texts]))


@torch.no_grad()
def by_hand(model, tok, context, ending):
    """(log-likelihood, greedy?) of one ending, one token at a time."""
    n = len(tok.encode(ending))
    ids = torch.tensor([*([*tok.encode(context)] or [tok.eot]), *tok.encode(ending)], dtype=torch.int64)
    ids = ids[-(model.config.block_size + 1):]
    p = model.logits(model.hidden(ids[None, :-1]))[0].double().log_softmax(-1)
    steps = range(len(ids) - 1 - n, len(ids) - 1)
    return sum(p[t, ids[t + 1]].item() for t in steps), all(p[t].argmax() == ids[t + 1] for t in steps)


# ---- tasks ----------------------------------------------------------------------------------------------------------

def test_hellaswag_is_that_of_a_plain_loop(gpt2, files):
    documents = evaluate.read_documents("hellaswag", files["hellaswag"])
    assert [d.context for d in documents] == CONTEXTS and [d.endings for d in documents] == ENDINGS
    right = [3, 2, 1]
    assert [d.right for d in documents] == right
    # The blank that ends the second context belongs to its endings.
    scores = [[by_hand(*gpt2, context.rstrip(), context[len(context.rstrip()):] + " " + ending)[0]
               for ending in endings] for context, endings in zip(CONTEXTS, ENDINGS)]
    found = evaluate.score_endings(*gpt2, documents, batch_size=5)
    assert [[p for p, _ in of] for of in found] == [pytest.approx(of, rel=1e-5) for of in scores]
    acc = [max(range(4), key=lambda i: s[i]) == r for s, r in zip(scores, right)]
    norm = [max(range(4), key=lambda i: s[i] / len(e[i])) == r for s, r, e in zip(scores, right, ENDINGS)]
    assert sum(norm) == 1 and sum(acc) == 2  # so that the two cannot be mistaken for each other
    for metric, of in zip(evaluate.run_task("hellaswag", *gpt2, documents), (acc, norm)):
        assert metric == (metric.name, np.mean(of), pytest.approx(np.std(of, ddof=1) / math.sqrt(3)), 3)


def test_lambada_is_that_of_a_plain_loop(gpt2, files):
    documents = evaluate.read_documents("lambada_openai", files["lambada_openai"])
    texts = [json.loads(line)["text"] for line in Path(files["lambada_openai"]).read_text().splitlines()]
    # "to  Ann": of two blanks, the first ends the context, and so goes to the last word as well. "Ann" has no context.
    cut = [["", " Ann"], ["Tom and Ann went to", "  Ann"], *([t[:t.rindex(" ")], t[t.rindex(" "):]] for t in texts[2:])]
    log_p, greedy = np.array([by_hand(*gpt2, context, word) for context, word in cut]).T
    n = len(texts)
    assert 0 < greedy.sum() < n
    perplexity, acc = evaluate.run_task("lambada_openai", *gpt2, documents, batch_size=5)
    value = pytest.approx(math.exp(-log_p.mean()), rel=1e-5)
    assert perplexity == ("perplexity", value, pytest.approx(perplexity.value * np.std(log_p, ddof=1) / math.sqrt(n)), n)
    assert acc == ("acc", greedy.mean(), pytest.approx(np.std(greedy, ddof=1) / math.sqrt(n)), n)
    one = evaluate.read_documents("lambada_openai", files["lambada_openai"], limit=1)
    assert one == documents[:1] and one[0].where.endswith("line 1")
    assert evaluate.run_task("lambada_openai", *gpt2, one)[1] == ("acc", greedy[0], None, 1)


def test_never_logits_of_a_whole_batch(gpt2, files, monkeypatch):
    documents = evaluate.read_documents("hellaswag", files["hellaswag"])
    whole = evaluate.score_endings(*gpt2, documents)
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 7 * gpt2[1].vocab_size)
    sizes = []
    monkeypatch.setattr(GPT, "logits", lambda self, x, original=GPT.logits: sizes.append(len(x)) or original(self, x))
    for a, b in zip(whole, evaluate.score_endings(*gpt2, documents)):
        assert [p for p, _ in b] == pytest.approx([p for p, _ in a], rel=1e-6)
    assert max(sizes) == 7


@pytest.fixture
def gpt2_folder(bpe, gpt2, transformers, tmp_path):
    """The model and its tokenizer as transformers saves them."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe[0], eos_token="<|endoftext|>").save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=bpe[1].vocab_size, n_positions=48, n_embd=32, n_layer=2, n_head=2, activation_function="gelu",
        bos_token_id=bpe[1].eot, eos_token_id=bpe[1].eot))
    weights = gpt2[0].state_dict()
    for name, weight in theirs.named_parameters():
        matrix = any(k in name for k in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weight.data.copy_(weights[name].T if matrix else weights[name][:len(weight)])
    theirs.save_pretrained(tmp_path)
    return tmp_path


def harness(folder, files, tmp_path) -> dict:
    """{(task, metric): value} by lm-evaluation-harness: its tasks, but the documents of our files."""
    import datasets
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM
    datasets.disable_progress_bars()
    tasks = Path(lm_eval.tasks.__file__).parent
    local = tmp_path / "tasks"
    local.mkdir()
    for task, folder_of, split in (("hellaswag", "hellaswag", "validation"), ("lambada_openai", "lambada", "test")):
        (local / f"{task}.yaml").write_text(yaml.safe_dump(dict(
            include=str(tasks / folder_of / f"{task}.yaml"), task=f"local_{task}", dataset_path="json", dataset_name=None,
            dataset_kwargs=dict(data_files={split: files[task]}, cache_dir=str(tmp_path)), training_split=None)))
    results = lm_eval.simple_evaluate(
        HFLM(str(folder), device="cpu", batch_size=3), tasks=[f"local_{task}" for task in files], bootstrap_iters=1000,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(local), include_defaults=False))["results"]
    return {(task, metric): value for task in files for metric, value in results[f"local_{task}"].items()}


def test_the_harness_gives_the_same_numbers(gpt2, gpt2_folder, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of its bootstrap
    model, tok = gpt2
    theirs = harness(gpt2_folder, files, tmp_path)
    for task in files:
        ours = evaluate.run_task(task, *gpt2, evaluate.read_documents(task, files[task]), batch_size=4)
        for metric in ours:
            assert metric.value == pytest.approx(theirs[task, f"{metric.name},none"], rel=1e-6)
            drawn = metric.name == "perplexity"  # theirs comes from a thousand random samples of the documents
            stderr = pytest.approx(theirs[task, f"{metric.name}_stderr,none"], rel=0.15 if drawn else 1e-9)
            assert metric.stderr == stderr and metric.stderr > 0


def test_the_hub_gives_what_a_file_gives(files, monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what, **of: asked.append((*what, of)) or HELLASWAG)
    documents = evaluate.read_documents("hellaswag")
    assert asked == [("Rowan/hellaswag", None, dict(split="validation"))]
    assert documents[1].where == "Rowan/hellaswag: row 2"
    assert evaluate.fingerprint(documents) == evaluate.fingerprint(evaluate.read_documents("hellaswag", files["hellaswag"]))

    def fails(*what, **of):
        raise ConnectionError("Couldn't\nreach it")
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"EleutherAI/lambada_openai: .*reach it.*--task lambada_openai=FILE.jsonl$"):
        evaluate.read_documents("lambada_openai")


@pytest.mark.parametrize("line", [
    b"{", b"[]", b"3", b"\xff", b"[" * 100000, b'{"text": 3}', b'{"label": 0}',
    *(json.dumps(HELLASWAG[0] | change).encode() for change in (
        dict(label=4), dict(label=-1), dict(label=""), dict(label=1.0), dict(label=True), dict(label=[1]),
        dict(endings="abcd"), dict(endings=[1, 2, 3, 4]), dict(endings={}), dict(ctx_b=None),
        dict(activity_label=None, ctx_a=[])))])
def test_a_damaged_line_is_named(files, tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_bytes(Path(files["hellaswag"]).read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"x.jsonl: line 4: is no document of hellaswag \(.*label$") as told:
        evaluate.read_documents("hellaswag", str(file))
    assert len(str(told.value)) < 500 and "\n" not in str(told.value)
    assert len(evaluate.read_documents("hellaswag", str(file), limit=3)) == 3


def test_what_cannot_be_scored_is_told(gpt2, tmp_path):
    for name, message in (("", "Is a directory"), ("none.jsonl", "No such file"), ("empty.jsonl", "is empty")):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(UserError, match=message):
            evaluate.read_documents("lambada_openai", str(tmp_path / name))
    model, tok = gpt2
    with pytest.raises(UserError, match="line 1: its ending of 60 tokens does not fit into the 48"):
        evaluate.score_endings(model, tok, [evaluate.Document("line 1", "a", ["." * 59], 0)])
    letters = tokenizer.from_name("char", ["abc "])
    with pytest.raises(UserError, match="line 1: character 2, 'x'"):
        evaluate.score_endings(model, letters, [evaluate.Document("line 1", "abx", ["c"], 0)])


# ---- loss -----------------------------------------------------------------------------------------------------------

def open_split(path, block_size):
    return Split(Config(model=dict(block_size=block_size)), "val", str(path))


def test_loss_is_that_of_a_plain_loop(text_dataset):
    tok, model = tokenizer.from_name("byte"), random_model(257, 32)
    samples = import_streaming().LocalDataset(local=str(text_dataset / "val"))
    nats, n_bytes = [], []
    for sample in samples:
        for part in (0, 32):  # samples hold 64 tokens and one more
            ids = torch.from_numpy(sample["tokens"][part:part + 33].astype(np.int64))
            p = model.logits(model.hidden(ids[None, :-1])).double().log_softmax(-1)[0]
            nats.append(-sum(p[t, ids[t + 1]].item() for t in range(32)))
            n_bytes.append((ids[1:] != tok.eot).sum().item())
    for n in (len(nats), 7):
        sequences = 7 if n == 7 else None
        loss, perplexity, bits = evaluate.split_loss(model, tok, open_split(text_dataset, 32), sequences, batch_size=6)
        mean = np.sum(nats[:n]) / (32 * n)
        stderr = pytest.approx(np.std(np.array(nats[:n]) / 32, ddof=1) / math.sqrt(n), rel=1e-5)
        assert loss == ("loss", pytest.approx(mean, rel=1e-6), stderr, n)
        assert perplexity == ("perplexity", pytest.approx(math.exp(mean), rel=1e-5),
                              pytest.approx(math.exp(mean) * loss.stderr, rel=1e-5), n)
        assert bits.value == pytest.approx(np.sum(nats[:n]) / np.sum(n_bytes[:n]) / math.log(2), rel=1e-6)


def test_only_real_targets_count():
    """Ids that are no targets are stored as their complement. Errors against the formula written out."""
    tok, model = tokenizer.from_name("byte"), random_model(257, 8)
    ids = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(0))
    no_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, n in enumerate((0, 3, 8, 9, 5)):  # of the fourth, none counts
        no_target[row, :n] = True
    split = SimpleNamespace(path="pairs", name="val", samples=5, parts=1, card=dict(tokenizer=tok.to_json()),
                            read=lambda sequences: torch.where(no_target, ~ids, ids)[sequences[:, 0]])
    p = model.logits(model.hidden(ids[:, :-1])).double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    a, b = -(p * ~no_target[:, 1:]).sum(1).detach().numpy(), (~no_target[:, 1:]).sum(1).numpy()
    r, (var_a, cov), var_b = a.sum() / b.sum(), np.cov(a, b)[0], np.var(b, ddof=1)
    for batch_size in (1, 3):
        loss, _, bits = evaluate.split_loss(model, tok, split, batch_size=batch_size)
        stderr = math.sqrt((var_a - 2 * r * cov + r * r * var_b) / 5) / b.mean()
        assert loss == ("loss", pytest.approx(r, rel=1e-6), pytest.approx(stderr, rel=1e-5), 5)
        assert bits.value == pytest.approx(r / math.log(2), rel=1e-6)  # a byte a token
    with pytest.raises(UserError, match="pairs: its tokenizer .byte. is not the model's .char."):
        evaluate.split_loss(model, tokenizer.from_name("char", ["abc"]), split)


def on_ranks(dataset, file):
    """All the numbers that a rank comes to know, and the scores behind them."""
    init_process_group(Config(run=dict(device="cpu")))
    tok, model = tokenizer.from_name("byte"), random_model(257, 64)
    documents = evaluate.read_documents("lambada_openai", file)
    return (evaluate.split_loss(model, tok, open_split(dataset, 64), 37, batch_size=4),
            evaluate.run_task("lambada_openai", model, tok, documents, batch_size=3),
            evaluate.score_endings(model, tok, documents, batch_size=3))


def test_any_number_of_ranks_gives_the_same_bits(ranks, text_dataset, files):
    alone, = ranks(1, on_ranks, text_dataset, files["lambada_openai"])
    for world_size in (2, 3):
        assert ranks(world_size, on_ranks, text_dataset, files["lambada_openai"]) == [alone] * world_size
    assert len(alone[2]) > 20 and alone[0][0].n == 37


# ---- the command ----------------------------------------------------------------------------------------------------

def tool(*argv):
    """What tools/evaluate.py prints on this rank."""
    sys.argv = [str(TOOL), *map(str, argv)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(TOOL))["main"]()
    return printed.getvalue()


def test_a_run_of_two_ranks(ranks, text_dataset, files, tmp_path):
    from test_train import SMALL, train_run
    config = tmp_path / "small.yaml"
    config.write_text(f"data: {{path: {text_dataset}}}")
    argv = [str(config), *SMALL, f"--run.dir={tmp_path / 'run'}", "--train.max_steps=5", "--train.micro_batch_size=4"]
    record = ranks(2, train_run, argv)[0][-1]
    argv = ["--run", tmp_path / "run", "--sequences", 13, "--task", "loss",
            "--task", f"lambada_openai={files['lambada_openai']}"]
    printed, nothing = ranks(2, tool, *argv, "--out", tmp_path / "two.json")
    assert nothing == "" and printed.splitlines()[1].split()[:3] == ["loss", f"{text_dataset}/val", "loss"]
    two = json.loads((tmp_path / "two.json").read_text())
    found = {(r["task"], r["metric"]): r["value"] for r in two["results"]}
    assert found["loss", "loss"] == pytest.approx(record["val_loss"], rel=1e-6)
    assert found["loss", "bits_per_byte"] == pytest.approx(record["val_bits_per_byte"], rel=1e-6)
    assert ("lambada_openai", "perplexity") in found and two["model"]["step"] == 5
    ranks(1, tool, *argv, "--out", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["settings"].pop("ranks") == 1 and two["settings"].pop("ranks") == 2
    assert one == two


def test_a_folder_of_transformers(ranks, gpt2, gpt2_folder, files, tmp_path):
    argv = ["--hf", gpt2_folder, *(word for task in files for word in ("--task", f"{task}={files[task]}"))]
    ranks(1, tool, *argv, "--out", tmp_path / "x.json")
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    ours = [dict(task=task, metric=m.name, value=pytest.approx(m.value, rel=1e-5),
                 stderr=pytest.approx(m.stderr, rel=1e-5), n=m.n)
            for task in files for m in evaluate.run_task(task, *gpt2, evaluate.read_documents(task, files[task]))]
    assert results == ours


@pytest.mark.parametrize("argv, message", [
    (["--run", "x", "--task", "hellaswg"], "--task: hellaswg is none; take loss, hellaswag or lambada_openai"),
    (["--run", "x", "--limit", "0"], "--limit: 0 is not a number from 1 on"),
    (["--task", "loss"], "one of the arguments --run --hf is required"),
    (["--run", "x", "--out", "/no/such/x.json"], "--out: /no/such/x.json is a folder, or in none that can be written")])
def test_a_wrong_command_is_told_in_one_line(argv, message):
    done = subprocess.run([sys.executable, str(TOOL), *argv], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1

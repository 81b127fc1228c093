"""Documents in a packed sequence are as if each were alone. Reference: each goes through the model by itself, unmasked."""

import json
import math
import random
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from conftest import convert
from test_train import MODERN, SMALL, plain_optimizer, plain_step, train_run

from nanogpt import evaluate, generate
from nanogpt.config import Config, Model, load_config
from nanogpt.errors import UserError
from nanogpt.model import GPT, BlockMask, separate_documents
from nanogpt.sampling import Sampling
from nanogpt.shards import import_streaming
from nanogpt.stream import Split, TrainStream, inputs_and_targets
from nanogpt.tokenizer import CharTokenizer

END, T, STEPS = 49, 150, 10
TOK = SimpleNamespace(name="fifty", eot=END, bos=None)
SHAPES = dict(learned=dict(), rope=dict(position="rope", n_kv_head=2, qk_norm=True))
# torch refuses a backward of flex_attention on a CPU, though it computes one: what it refuses is narrowed to nothing.
ON_ANY_DEVICE = mock.patch.object(flex, "_validate_device", lambda query, key, value: None)


def alone(x: torch.Tensor, y: torch.Tensor, end: int):
    """The documents of x (B, T) with their targets, one at a time, each with the end-of-text before it."""
    for row, targets in zip(x.tolist(), y.tolist()):
        starts = sorted({0, *(i for i, token in enumerate(row) if token == end)}) + [len(row)]
        for a, b in zip(starts, starts[1:]):
            yield torch.tensor([row[a:b]]), torch.tensor([targets[a:b]])


def batch(seed=0):
    """x, y (5, T) of random ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, END, (5, T + 1), generator=generator)
    tokens[0, [7, 9, 10, 11, 80, T - 1]] = END   # begins in the middle; of 1, 0 and 0 tokens; one that ends with the row
    tokens[1, [0, 128, 129]] = END               # begins with a document; one that begins with a block of flex_attention
    tokens[2, :] = END                           # nothing but empty ones; the fourth row is one long piece
    tokens[4, torch.randint(0, T, (9,), generator=generator)] = END
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    model.zero_grad()
    return found


def close(ours: dict, theirs: dict, tolerance: float) -> bool:
    return all((ours[name] - g).norm() <= tolerance * g.norm() for name, g in theirs.items())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_packed_sequence_is_its_documents_one_by_one(shape):
    config = Model(n_layer=2, n_head=4, n_embd=64, block_size=T, vocab_size=50, mask_documents=True, **shape)
    model = GPT(config)
    model.init_weights(1)
    model.double()
    x, y = batch()
    expected = sum(model(*document).double() for document in alone(x, y, END))
    expected.backward()
    theirs = gradients(model)
    for blocks in (False, True):
        positions, mask = separate_documents(config, TOK, blocks)(x)
        assert isinstance(mask, BlockMask if blocks else torch.Tensor)
        with ON_ANY_DEVICE:
            loss = model(x, y, positions, mask)
            loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert close(gradients(model), theirs, 1e-6)  # the softmax of the loss is float32
    model(x, y, *separate_documents(config.model_copy(update=dict(mask_documents=False)), TOK)(x)).backward()
    as_ever = gradients(model)
    model(x, y).backward()
    assert all(torch.equal(g, as_ever[name]) for name, g in gradients(model).items()) and not close(as_ever, theirs, 0.01)


def test_positions_and_masks_by_hand():
    config = Model(n_layer=1, n_head=1, n_embd=16, vocab_size=50, mask_documents=True)
    x = torch.tensor([[5, 6, END, 7, END, END, 8, 9]])
    positions, mask = separate_documents(config, TOK)(x)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1, 2]]
    assert ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()] == [
        "x.......", "xx......", "..x.....", "..xx....", "....x...", ".....x..", ".....xx.", ".....xxx"]
    # A tokenizer with a beginning-of-text puts it before each document: then that is what begins one.
    positions, _ = separate_documents(config, SimpleNamespace(name="llama", eot=5, bos=END))(x)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1, 2]]
    for change in (dict(dropout=0.1), dict(n_embd=8), dict(n_embd=256)):  # what flex_attention does not have
        _, mask = separate_documents(config.model_copy(update=change), TOK, blocks=True)(x)
        assert isinstance(mask, torch.Tensor)
    with pytest.raises(UserError, match=r"^model.mask_documents: the char tokenizer has no end-of-text.*\n?$"):
        separate_documents(config, CharTokenizer("abc", with_eot=False))


def test_pairs_and_their_padding():
    config = Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50, mask_documents=True)
    model = GPT(config)
    model.init_weights(1)
    pad, pairs = ~END, [([1, 2], [3, 4]), ([5], [6]), ([], [7, 8]), ([9], [3])]  # prompt, completion
    rows = [[*(~i for i in prompt), *completion, END] for prompt, completion in pairs]
    tokens = torch.tensor([rows[0] + rows[1] + rows[2] + [pad] * 6, [pad] + rows[2] + rows[3] + [pad] * 10])
    x, y = inputs_and_targets(tokens)
    expected = sum(model(*inputs_and_targets(torch.tensor([row]))) for row in (
        rows[0], [pad, *rows[1]], [pad, *rows[2]], [pad, *rows[2]], [pad, *rows[3]]))
    assert model(x, y, *separate_documents(config, TOK)(x)).item() == pytest.approx(expected.item(), rel=1e-6)


# ---- sharded, compiled, checkpointed --------------------------------------------------------------------------------

BLOCKS = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, block_size=T, vocab_size=50, position="rope", mask_documents=True)


def compiled_steps(checkpointing: str, blocks: bool):
    """On a rank, compiled: ([loss, gradients] of two batches, how many graphs there were, evaluation included)."""
    import torch.distributed as dist

    from nanogpt.model import Block
    from nanogpt.sharding import build
    dist.init_process_group("gloo")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = Config(model=BLOCKS, train=dict(precision="float32", compile=True), sharding=dict(activation_checkpointing=checkpointing))
    compile, found = Block.compile, []
    with ON_ANY_DEVICE, mock.patch.object(Block, "compile", lambda block: compile(block, backend="aot_eager")):
        model, separate = build(config, torch.device("cpu")), separate_documents(config.model, TOK, blocks)
        for seed in range(2):
            x, y = batch(seed)
            loss = model(x, y, *separate(x))
            loss.backward()
            found.append((loss.item(), gradients(model)))
            with torch.no_grad():
                assert model.eval()(x, y, *separate(x)).item() == pytest.approx(loss.item(), rel=1e-6)
            model.train()
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("world_size, checkpointing, blocks", [
    (1, "none", True), (2, "selective", True), (1, "full", False)])
def test_masks_are_sharded_recomputed_and_compiled_once(ranks, world_size, checkpointing, blocks):
    """What runs on CUDA, but for its kernels."""
    model = GPT(Model(**BLOCKS))
    model.init_weights(1337)
    (found, graphs), *_ = ranks(world_size, compiled_steps, checkpointing, blocks)
    assert graphs == 2  # of training and of evaluation: blocks are alike, and so are steps
    for seed, (loss, ours) in enumerate(found):
        x, y = batch(seed)
        expected = model(x, y, *separate_documents(model.config, TOK)(x))
        (world_size * expected).backward()  # every rank has the same batch
        assert loss == pytest.approx(expected.item(), rel=1e-5) and close(ours, gradients(model), 1e-4)


# ---- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A folder with many short documents in mds/, and a config of it."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "text").mkdir()
    choose = random.Random(0)
    for i in range(500):
        (folder / "text" / f"{i:03}.txt").write_text("".join(choose.choices("abc", k=choose.choice([1, 2, 5, 15, 50]))))
    convert(folder / "text", folder / "mds")
    (folder / "small.yaml").write_text(f"data: {{path: {folder / 'mds'}}}\nmodel: {{mask_documents: true}}\n"
                                       "train: {micro_batch_size: 2}")
    return folder


def make_argv(documents, name, *options):
    return [str(documents / "small.yaml"), *SMALL, f"--train.max_steps={STEPS}", f"--run.dir={documents / name}", *options]


def mean_loss(model, rows):
    """Of tokens (n, 33), in nats: each document by itself."""
    x, y = rows[:, :-1], rows[:, 1:]
    logits = ((model.lm_head(model.hidden(document))[0, :, :257], targets[0]) for document, targets in alone(x, y, 256))
    return sum(F.cross_entropy(*each, reduction="sum") for each in logits) / y.numel()


def plain_loop(argv, folder):
    """(losses, norms) of a loop without FSDP, ranks, masks or our reader of shards."""
    config = load_config([*argv, "--train.micro_batch_size=8"])
    samples, stream = import_streaming().LocalDataset(local=str(folder / "mds" / "train")), TrainStream(config)
    model = GPT(config.model.model_copy(update=dict(vocab_size=257)))
    model.init_weights(config.run.seed)
    optimizer, losses, norms = plain_optimizer(model.parameters()), [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 5 if step < 4 else 0.001 + 0.0045 * (1 + math.cos(math.pi * (step - 4) / 21))
        rows = [samples[s]["tokens"][part * 32:part * 32 + 33] for s, part in stream.sequences(step).tolist()]
        loss = mean_loss(model, torch.from_numpy(np.stack(rows).astype(np.int64)))
        for found, value in zip((losses, norms), plain_step(optimizer, loss)):
            found.append(value)
    return losses, norms


@pytest.fixture(scope="module")
def masked_run(documents, ranks):
    """Metrics of two ranks."""
    return ranks(2, train_run, make_argv(documents, "run"))[0]


def test_two_ranks_train_as_if_on_one_document_at_a_time(documents, ranks, masked_run):
    modern = make_argv(documents, "modern", *MODERN, "--sharding.activation_checkpointing=selective")
    for argv, metrics in ((make_argv(documents, "run"), masked_run), (modern, ranks(2, train_run, modern)[0])):
        losses, norms = plain_loop(argv, documents)
        assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=2e-5)
        assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)


def test_validation_is_of_one_document_at_a_time_too(documents, masked_run):
    samples = import_streaming().LocalDataset(local=str(documents / "mds" / "val"))
    rows = np.stack([samples[i // 2]["tokens"][i % 2 * 32:i % 2 * 32 + 33] for i in range(13)]).astype(np.int64)
    model, tok, _ = generate.load_run(documents / "run")
    split = Split(Config(model=dict(block_size=32)), "val", str(documents / "mds"))
    torch.manual_seed(0)
    for trained in (True, False):
        if not trained:  # where attention and positions matter more than after ten steps
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            expected = pytest.approx(mean_loss(model, torch.from_numpy(rows)).item(), rel=1e-6)
        assert evaluate.split_loss(model, tok, split, 13, batch_size=5)[0].value == expected
        if trained:
            assert masked_run[-1]["val_loss"] == expected
    model.config.mask_documents = False
    assert evaluate.split_loss(model, tok, split, 13)[0].value != pytest.approx(expected.expected, rel=1e-3)


def test_sampling_from_such_a_run(documents, masked_run):
    """As ever: the tokens that the model, shown all that stands before, finds likeliest."""
    text = generate.load(documents / "run", "cpu")
    ids = [256]
    with torch.no_grad():
        for _ in range(12):
            ids.append(text.model.logits(text.model.hidden(torch.tensor([ids])))[0, -1].argmax().item())
    found = generate.new_ids(text.model, [[256]], 12, Sampling(temperature=0))
    assert [256, *(new.item() for new in found)] == ids
    assert isinstance(text.generate("the ", 10, seed=1), str)


def test_it_is_no_part_of_the_shape(documents, ranks, masked_run):
    """Finetuning with and without; where it is not stated it comes with the weights. And a run may go on without."""
    before = masked_run[-1]["val_loss"]
    found = {}
    for name, options in (("as it was", []), ("off", ["--model.mask_documents=false"])):
        config = documents / "tune.yaml"
        config.write_text(f"data: {{path: {documents / 'mds'}}}\nrun: {{init_from: {documents / 'run'}}}")
        argv = [str(config), *SMALL, "--train.micro_batch_size=4", "--train.max_steps=5", "--optim.learning_rate=1e-9",
                "--optim.min_learning_rate=0", f"--run.dir={documents / name}", *options]
        found[name] = ranks(1, train_run, argv)[0][0]["val_loss"]
    assert found["as it was"] == pytest.approx(before, rel=1e-6) and found["off"] != pytest.approx(before, rel=1e-5)
    argv = make_argv(documents, "off", "--model.mask_documents=true", f"--run.init_from={documents / 'run'}")
    assert ranks(1, train_run, argv)[0][-1]["step"] == STEPS
    state = json.loads((documents / "off" / "checkpoints" / f"step-{STEPS:08}" / "state.json").read_text())
    assert state["config"]["model"]["mask_documents"] is True

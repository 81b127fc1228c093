"""Finetuning: weights of others in, part of them frozen, the best kept, and the end when it gets no better."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from test_train import SMALL, plain_optimizer, plain_step, small_run, train_run  # noqa: F401

SHAPE = [option for option in SMALL if option.startswith("--model.n_")]
OURS = [option for option in SMALL if option not in SHAPE and ".block_size" not in option]  # these come with the weights
OURS += ["--optim.warmup_steps=0", "--optim.schedule=constant"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(a random GPT-2 of transformers, its folder): 64 positions, twice what the run takes, and OpenAI's GELU."""
    import transformers.utils.import_utils as available
    available._torchvision_available = False
    import transformers
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=256, eos_token_id=256))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def finetune(ranks, small_run):  # noqa: F811
    def run(name, world_size, *options, steps=3):
        argv = [str(small_run.config), *OURS, f"--run.dir={small_run.folder / name}", f"--train.max_steps={steps}", *options]
        return ranks(world_size, train_run, argv)[0]

    run.folder, run.config, run.ranks = small_run.folder, small_run.config, ranks
    return run


def sequences(text_dataset, split, pairs):
    """Tokens (n, 33) of (sample, part) pairs, read without our reader."""
    from nanogpt.shards import import_streaming
    samples = import_streaming().LocalDataset(local=str(text_dataset / split))
    rows = [samples[s]["tokens"][part * 32:part * 32 + 33] for s, part in pairs]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def plain_finetuning(model, text_dataset, config_file, trained, steps):
    """Losses of transformers' own model in a plain loop, of which only the `trained` parameters change."""
    from nanogpt.config import load_config
    from nanogpt.stream import TrainStream
    stream = TrainStream(load_config([str(config_file), *OURS, "--model.block_size=32", f"--train.max_steps={steps}", "--train.micro_batch_size=8"]))
    for name, p in model.named_parameters():
        p.requires_grad_(trained(name))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = plain_optimizer(params)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        tokens = sequences(text_dataset, "train", stream.sequences(step).tolist())
        loss = loss_of(model, tokens)
        losses.append(plain_step(optimizer, loss)[0])
    return losses


def loss_of(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("world_size, freeze, strategy", [(2, 0, "full"), (1, 1, "full"), (2, 2, "full"), (2, 2, "replicate")])
def test_a_gpt2_of_others_is_finetuned_as_a_plain_loop_does_it(
        gpt2, finetune, small_run, text_dataset, world_size, freeze, strategy):  # noqa: F811
    theirs, folder = copy.deepcopy(gpt2[0]).eval(), gpt2[1]  # deepcopy: the fixture is shared
    name = f"hf-{world_size}-{freeze}-{strategy}"
    metrics = finetune(name, world_size, f"--run.init_from={folder}", "--model.block_size=32", "--train.micro_batch_size=4",
                       f"--train.freeze_blocks={freeze}", f"--sharding.strategy={strategy}")
    before = loss_of(theirs, sequences(text_dataset, "val", [(i // 2, i % 2) for i in range(13)])).item()
    assert metrics[0]["step"] == 0 and metrics[0]["val_loss"] == pytest.approx(before, rel=1e-5)
    frozen = ["transformer.wte.", "transformer.wpe.", *(f"transformer.h.{i}." for i in range(freeze))] if freeze else []
    losses = plain_finetuning(theirs, text_dataset, small_run.config, lambda n: not n.startswith(tuple(frozen)), 3)
    assert [m["loss"] for m in metrics[1:]] == pytest.approx(losses, rel=1e-4)
    after = loss_of(theirs, sequences(text_dataset, "val", [(i // 2, i % 2) for i in range(13)])).item()
    assert metrics[-1]["val_loss"] == pytest.approx(after, rel=1e-4)

    from nanogpt.generate import load_run
    tuned, original = load_run(finetune.folder / name)[0].state_dict(), gpt2[0].state_dict()
    for key in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight",
                "transformer.h.1.mlp.c_proj.bias", "transformer.h.2.ln_1.weight"):
        was = original[key].t() if "c_attn" in key else original[key]
        rows = min(len(was), len(tuned[key]))
        assert torch.equal(tuned[key][:rows], was[:rows]) == key.startswith(tuple(frozen)), key


def test_a_finetuning_goes_on_when_what_it_came_from_is_gone(gpt2, finetune, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(gpt2[1], folder)
    options = [f"--run.init_from={folder}", "--model.block_size=32", "--train.micro_batch_size=4"]
    whole = finetune("whole", 1, *options, steps=4)
    finetune("gone", 2, *options, steps=2)
    shutil.rmtree(folder)
    resumed = finetune("gone", 1, *options, steps=4)
    assert [m["step"] for m in resumed] == [0, 1, 2, 3, 4]
    assert [m["loss"] for m in resumed[1:]] == pytest.approx([m["loss"] for m in whole[1:]], rel=1e-4)


def test_a_shape_that_contradicts_the_weights_is_refused(gpt2, finetune):
    for option, said in (("--model.n_layer=2", "model.n_layer: is 2, and that of .* is 3; leave it out"),
                         ("--model.mlp=gelu", "model.mlp: is gelu, and that of .* is gelu_tanh"),
                         ("--model.block_size=128", "model.block_size: 128, and the learned positions of .* end at 64"),
                         ("--train.freeze_blocks=4", "train.freeze_blocks: 4, and the model has 3 blocks")):
        options = [f"--run.init_from={gpt2[1]}", "--train.micro_batch_size=4", option]
        with pytest.raises(RuntimeError, match=f"UserError: {said}"):
            finetune("refused", 1, *options, *([] if "block_size" in option else ["--model.block_size=32"]))
    assert not (finetune.folder / "refused").exists()


def test_frozen_blocks_stay_so(gpt2, finetune):
    options = [f"--run.init_from={gpt2[1]}", "--model.block_size=32", "--train.micro_batch_size=4"]
    finetune("frozen", 1, *options, "--train.freeze_blocks=1", steps=1)
    with pytest.raises(RuntimeError, match="UserError: train.freeze_blocks: is 2 and was 1 in .*init_from"):
        finetune("frozen", 1, *options, "--train.freeze_blocks=2", steps=2)


def test_own_weights_with_another_context(small_run, finetune):  # noqa: F811
    """A shorter one of learned positions; a longer one of rotary positions, with another base."""
    small_run("learned", 2, "--train.micro_batch_size=4", "--optim.warmup_steps=0", steps=2)
    metrics = finetune("cropped", 2, f"--run.init_from={small_run.folder / 'learned'}", "--model.block_size=16",
                       "--train.micro_batch_size=4", steps=1)
    from nanogpt.generate import load_run
    ours, theirs = (load_run(small_run.folder / name)[0] for name in ("cropped", "learned"))
    theirs.crop_block_size(16)
    assert ours.config == theirs.config and metrics[0]["val_loss"] > 0

    small_run("rotary", 1, "--train.micro_batch_size=8", "--optim.warmup_steps=0", "--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu",
              "--model.n_kv_head=1", "--model.bias=false", "--model.tied=false", steps=2)
    finetune("longer", 2, f"--run.init_from={small_run.folder / 'rotary'}", "--model.block_size=64", "--model.rope_base=5e5",
             "--train.micro_batch_size=4", steps=1)
    config = load_run(small_run.folder / "longer")[0].config
    assert (config.block_size, config.rope_base, config.mlp, config.tied) == (64, 5e5, "swiglu", False)


def test_the_best_is_kept_and_the_run_ends_when_it_gets_no_better(finetune, small_run):  # noqa: F811
    """A learning rate at which it soon gets worse."""
    options = [*SHAPE, "--model.block_size=32", "--train.micro_batch_size=8", "--eval.interval=1", "--eval.patience=3", "--checkpoint.keep_best=true",
               "--checkpoint.keep_last=1", "--optim.learning_rate=0.3"]
    metrics = finetune("best", 1, *options, steps=40)
    losses = {m["step"]: m["val_loss"] for m in metrics}
    best = min(losses, key=losses.get)
    assert len(metrics) == best + 3 < 40
    checkpoints = finetune.folder / "best" / "checkpoints"
    assert (checkpoints / "best").resolve().name == f"step-{best:08d}"
    assert {p.name for p in checkpoints.iterdir()} == {"best", f"step-{best:08d}", f"step-{best + 3:08d}"}
    assert finetune("best", 1, *options, steps=40) == metrics  # it is still at its end
    longer = finetune("best", 1, *options, "--eval.patience=4", steps=40)
    assert longer[:len(metrics)] == metrics and len(longer) > len(metrics)

    # Other sequences cannot be compared with what was the best of these: the run goes on. What a kill kept from
    # being pointed at is pointed at again.
    (checkpoints / "best").unlink()
    other = finetune("best", 1, *options, "--eval.patience=4", "--eval.sequences=12", steps=len(longer) + 1)
    assert len(other) == len(longer) + 1 and (checkpoints / "best").resolve().name == f"step-{len(other):08d}"
    checkpoint = checkpoints / f"step-{best:08d}"
    assert not checkpoint.exists()  # it is the best no more
    losses[len(other)] = other[-1]["val_loss"]
    best = len(other)

    # Evaluated alone, it comes to the same, and nothing is written.
    record = finetune.ranks(2, evaluate_only, [str(finetune.config), *OURS, f"--run.dir={finetune.folder / 'nothing'}",
                                               f"--run.init_from={checkpoints / 'best'}", "--eval.only=true",
                                               "--eval.sequences=12", "--train.micro_batch_size=4"])[0]
    assert record["val_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert not (finetune.folder / "nothing").exists()


def evaluate_only(argv):
    from nanogpt.config import load_config
    from nanogpt.train import start
    return start(load_config(argv, 2, 2))


def test_keeping_the_best_needs_a_val_split(finetune, text_dataset, tmp_path):
    data = tmp_path / "mds"
    shutil.copytree(text_dataset, data)
    card = json.loads((data / "dataset.json").read_text())
    del card["splits"]["val"]
    (data / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(RuntimeError, match="UserError: eval.patience, checkpoint.keep_best: the data has no val split"):
        finetune("no-val", 1, *SHAPE, "--model.block_size=32", f"--data.path={data}", "--train.micro_batch_size=8", "--eval.patience=2",
                 "--eval.interval=1")


def test_weights_without_an_optimizer_cannot_be_resumed(small_run):  # noqa: F811
    """As tools/convert_nanogpt.py writes them."""
    from nanogpt import checkpoint
    from nanogpt.generate import load_run
    small_run("with", 1, "--train.micro_batch_size=8", "--optim.warmup_steps=0", steps=1)
    model, _, state = load_run(small_run.folder / "with")
    folder = small_run.folder / "without"
    checkpoint.save_alone(folder / "checkpoints" / "step-00000001", checkpoint.tensors(model), state)
    with pytest.raises(RuntimeError, match="UserError: .*step-00000001: holds weights alone, so it cannot be resumed; start"):
        small_run("without", 1, "--train.micro_batch_size=8", "--optim.warmup_steps=0", steps=2)

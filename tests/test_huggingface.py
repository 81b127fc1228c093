"""Hugging Face's models and ours, both ways. Reference: transformers' own models, randomly initialised."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt import checkpoint, huggingface
from nanogpt.config import Config, Model
from nanogpt.errors import UserError
from nanogpt.evaluate import encode_pair
from nanogpt.hf_tokenizer import tokenizer_files
from nanogpt.huggingface import KINDS, Source, export, fill, is_hf, read_config
from nanogpt.model import GPT
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, from_json, from_name, from_tokenizer_json
from test_tokenizer import TEXTS, write_ranks

TOOL = Path(__file__).parents[1] / "tools" / "export_hf.py"
LLAMA = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=40)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "gpt2": dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4),
    "gpt2-untied-gelu": dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, n_inner=50,
                             activation_function="gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "llama": LLAMA,
    "llama-grouped-biased-tied": LLAMA | dict(num_key_value_heads=2, head_dim=20, attention_bias=True, mlp_bias=True,
                                              tie_word_embeddings=True, vocab_size=65, rms_norm_eps=1e-3),
    "llama-3.1": LLAMA | dict(num_key_value_heads=1, rope_scaling=LLAMA3, rope_theta=500000.0),
    "llama-linear": LLAMA | dict(rope_scaling=dict(type="linear", factor=2.5), hidden_size=50, head_dim=10),
    "qwen3": LLAMA | dict(num_key_value_heads=2, head_dim=16),
    "qwen3-tied-biased": LLAMA | dict(num_key_value_heads=4, head_dim=24, tie_word_embeddings=True, attention_bias=True),
}


def make(transformers, case: str):
    """A model of theirs with large random weights, biases and norms too, so that nothing can be forgotten."""
    kind = {"gpt2": "GPT2", "llama": "Llama", "qwen3": "Qwen3"}[case.split("-")[0]]
    config = getattr(transformers, f"{kind}Config")(**CASES[case])
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=generator)
    return model


def ours_from(folder) -> GPT:
    source = Source(folder)
    model = GPT(source.config).eval()
    fill(model, source)
    return model


def exported(model: GPT, out, tokenizer=CharTokenizer("abc"), **options):
    return export(model.config, dict(model.named_parameters()).__getitem__, tokenizer, out, "A card.\n", **options)


def distance(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory):
    """CASE -> its folder, made once."""
    root = tmp_path_factory.mktemp("hf")

    def folder(case):
        if not (root / case).exists():
            make(transformers, case).save_pretrained(root / case)
        return root / case
    return folder


# ---- the same numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_weights_and_text_are_theirs(transformers, tmp_path, case):
    theirs = make(transformers, case)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if case == "llama" else "5GB")
    ours = ours_from(tmp_path / "in")
    idx = torch.randint(0, ours.config.vocab_size, (3, ours.config.block_size), generator=torch.Generator().manual_seed(1))
    logits = theirs(idx).logits
    assert distance(ours.logits(ours.hidden(idx)), logits) <= 1e-5

    exported(ours, tmp_path / "out", max_shard_size="60KB" if case == "gpt2" else "5GB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (case == "gpt2")
    back, told = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(back.eval()(idx).logits, logits)
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(p, weights.pop(name)) for name, p in back.named_parameters()) and not weights
    assert Source(tmp_path / "out").config.filled() == ours.config.filled()

    text = idx[:, :5]
    for _ in range(10):
        text = torch.cat([text, ours(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, back.generate(idx[:, :5], attention_mask=torch.ones_like(idx[:, :5]), max_new_tokens=10,
                                           do_sample=False))


@pytest.mark.parametrize("settings", [
    dict(bias=False), dict(bias=False, attention_bias=True, tied=False, mlp="gelu_tanh", dropout=0.1),
    dict(position="rope", norm="rmsnorm", mlp="swiglu", bias=False, qk_norm=True, n_kv_head=1, norm_eps=1e-6)])
@torch.no_grad()
def test_our_own_shapes_are_exported(transformers, tmp_path, settings):
    ours = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=70, **settings)).eval()
    for p in ours.parameters():
        p.normal_(0, 0.2)
    assert "char" in exported(ours, tmp_path / "out")
    idx = torch.randint(0, 70, (2, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert distance(theirs(idx).logits, ours.logits(ours.hidden(idx))) <= 1e-5
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 3
    exported(ours, tmp_path / "half", precision="bfloat16")
    for name, p in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(p, theirs.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(transformers, kind):
    theirs = transformers.AutoConfig.for_model(kind)
    checked = 0
    for key, value in KINDS[kind]().model_dump().items():
        if hasattr(theirs, key):
            checked += 1
            default = getattr(theirs, key)
            if key == "layer_types":  # there it is filled in
                assert set(default) == {"full_attention"}
            elif value is not None or default is None:
                assert value == default, key
    assert checked >= 11


def test_rope_parameters_of_transformers_5_are_read(folders, tmp_path):
    config = json.loads((folders("llama-3.1") / "config.json").read_text())
    before = read_config(folders("llama-3.1") / "config.json")
    config["rope_parameters"] = config.pop("rope_scaling") | dict(rope_theta=config.pop("rope_theta"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json") == before


# ---- sharded --------------------------------------------------------------------------------------------------------

def finetune_nothing(source, run, strategy):
    """Weights of Hugging Face -> a model sharded over the ranks -> a checkpoint of ours."""
    from nanogpt.ranks import init_process_group
    from nanogpt.sharding import build
    found = Source(source)
    config = Config(model=found.config, train=dict(max_steps=1, compile=False, precision="float32", micro_batch_size=1),
                    data=dict(path="data/none"), run=dict(device="cpu"), sharding=dict(strategy=strategy))
    device = init_process_group(config)
    model = build(config, device)
    fill(model, found)
    saver = checkpoint.Saver(Path(run) / "checkpoints", 2, 0, False)
    identity = {"train.global_batch_size": 4, "model.block_size": found.config.block_size}
    saver.save(model, None, dict(
        step=7, tokens=7 * 4 * found.config.block_size, config=config.model_dump(), next_samples="", tokenizer=ByteTokenizer(
        ).to_json(), world_size=2, skipped_steps=[], recent_losses=[], versions={},
        data_history=[dict(from_step=0, tokens=0, identity=identity, parts=8, data=dict(path="data/none"))]))
    return saver.wait()


@pytest.mark.parametrize("case, strategy", [("gpt2", "full"), ("llama", "grad"), ("qwen3-tied-biased", "replicate")])
def test_round_trip_through_two_ranks_is_bit_exact(transformers, ranks, tmp_path, case, strategy, monkeypatch):
    monkeypatch.setitem(CASES, case, CASES[case] | dict(vocab_size=261))  # room for the 257 bytes
    theirs = make(transformers, case)
    theirs.save_pretrained(tmp_path / "in")
    assert ranks(2, finetune_nothing, tmp_path / "in", tmp_path / "run", strategy) == [True, True]
    metrics = [dict(step=5, loss=4.0, val_loss=3.25), dict(step=6, loss=4.0), dict(step=9, loss=4.0, val_loss=1.0)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + '\n{"step":')
    command = [str(TOOL), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    if case == "gpt2":  # as a user would type it, and without transformers
        code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); " \
               "assert 'transformers' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
        assert "GPT2LMHeadModel" in done.stdout and done.stderr == ""
    else:
        monkeypatch.syspath_prepend(str(TOOL.parent))
        monkeypatch.setattr(sys, "argv", command)
        import export_hf
        export_hf.main()
    back = load_file(tmp_path / "out" / "model.safetensors")
    was = load_file(tmp_path / "in" / "model.safetensors")
    assert back.keys() == was.keys() and all(torch.equal(back[name], was[name]) for name in was)
    config, old = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "in"))
    assert all(old[key] == value for key, value in config.items() if key in old and "_id" not in key and "dtype" not in key
               and key not in ("n_inner", "resid_pdrop", "embd_pdrop", "attn_pdrop"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3.2500 nats a token, at step 5" in card and "`data/none`" in card and "tokenizer: byte, 257 ids" in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Grüße\r\n")["input_ids"] == list("Grüße\r\n".encode()) and tokenizer.eos_token_id == 256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "run"]  # nothing left lying


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, change, said", [
    ("gpt2", dict(model_type="mistral"), "model_type is 'mistral'; gpt2, llama, qwen3 can be read"),
    ("gpt2", dict(model_type=None), "model_type is None"),
    ("gpt2", dict(activation_function="relu"), "activation_function: input should be 'gelu'"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx: .*our model does not compute it"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights: input should be True"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", dict(quantization_config=dict(bits=4)), "quantization_config"),
    ("gpt2", dict(n_head=5), "n_embd: 48 is not a multiple of n_head 5"),
    ("gpt2", dict(n_layer=10**6), "says 1000000 blocks"),
    ("gpt2", dict(n_layer=4), r"has no tensor transformer\.h\.3\."),
    ("gpt2", dict(n_layer=2), r"has a tensor 'transformer\.h\.2\..* which would be lost"),
    ("gpt2", dict(n_positions=31), r"wpe.weight is \(32, 48\), and by its config.json \(31, 48\)"),
    ("gpt2", dict(tie_word_embeddings=False), "has no tensor lm_head.weight"),
    ("llama", dict(tie_word_embeddings=True), "has a tensor 'lm_head.weight'"),
    ("llama", dict(hidden_act="gelu"), "hidden_act"),
    ("llama", dict(num_key_value_heads=3), "n_kv_head: 3 does not divide"),
    ("llama", dict(head_dim=11), "cannot be rotated"),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling.rope_type: .*'yarn'"),
    ("llama", dict(rope_scaling=dict(type="dynamic", rope_type="linear", factor=4.0)), "rope_scaling.type"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "llama3 has no low_freq_factor"),
    ("llama", dict(rope_scaling=dict(LLAMA3, high_freq_factor=1.0)), "not below"),
    ("llama", dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "rope_parameters.full_attention"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 20),
     "its sizes are no model's"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types.1"),
])
def test_what_our_model_cannot_do_is_refused_by_name(folders, tmp_path, case, change, said):
    shutil.copytree(folders(case), tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        Source(tmp_path / "in")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


WEIRD = [None, True, False, -1, 0, 1, 3, 1e-5, 1e400, -1e400, float("nan"), 2**64, "", "1", "x" * 999, [], [0], {}, {"a": 1}]


@pytest.mark.parametrize("case", ["gpt2", "llama-3.1", "qwen3"])
def test_no_value_in_config_json_is_a_crash(folders, tmp_path, case):
    config, stored = json.loads((folders(case) / "config.json").read_text()), 0
    shutil.copytree(folders(case), tmp_path / "in")
    keys = {*config, *KINDS[case.split("-")[0]].model_fields}
    changes = [config | {key: value} for key in keys for value in WEIRD]
    changes += [config | dict(rope_scaling=LLAMA3 | {key: value}) for key in LLAMA3 for value in WEIRD if "llama" in case]
    for change in changes:
        (tmp_path / "in" / "config.json").write_text(json.dumps(change))
        try:
            stored += len(Source(tmp_path / "in").stored)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    assert stored
    for text in ("", "[]", "{", "null", "\xff", '{"model_type": {"a": 1}}', "[" * 10**5):
        (tmp_path / "in" / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError):
            Source(tmp_path / "in")


def rewritten(folder, out, change) -> Path:
    """A copy whose tensors have gone through change(tensors)."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_files_of_the_hub_without_prefix_and_with_buffers(folders, tmp_path):
    def older(tensors):
        return {name.removeprefix("transformer."): t for name, t in tensors.items()} | {
            "h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    new, old = ours_from(folders("gpt2")), ours_from(rewritten(folders("gpt2"), tmp_path / "old", older))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters()))
    buffered = rewritten(folders("llama"), tmp_path / "inv", lambda t: t | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    assert Source(buffered).stored
    half = ours_from(rewritten(folders("gpt2"), tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()}))
    for a, b in zip(new.parameters(), half.parameters()):
        assert torch.equal(a.half().float(), b)


@pytest.mark.parametrize("change, said", [
    (lambda t: t | {"score.weight": torch.ones(2, 48)}, "has a tensor 'score.weight' which"),
    (lambda t: t | {"wte.weight": t["transformer.wte.weight"] + 1}, "stands here and elsewhere"),
    (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "has a tensor 'lm_head.weight' which"),
    (lambda t: t | {"transformer.ln_f.bias": torch.zeros(48, dtype=torch.int8)}, "of type I8"),
    (lambda t: t | {"transformer.ln_f.bias": torch.zeros(47)}, r"ln_f.bias is \(47,\), and by its config.json \(48,\)"),
])
def test_other_tensors_are_refused_by_name(folders, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        Source(rewritten(folders("gpt2"), tmp_path / "in", change))


def test_other_files_are_refused_by_name(folders, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(folders("gpt2"), folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", b"x" * 100, whole[:-1], whole[:1000], b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors: cannot be read"):
            Source(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle like pytorch_model.bin is never read: .*save_pretrained"):
        Source(folder)
    for file in ("../secret.safetensors", "/etc/passwd", "..", 7, "model-00001-of-00002.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"wte.weight": file})))
        with pytest.raises(UserError, match="files of this folder|cannot be read"):
            Source(folder)
    (folder / "part.safetensors").write_bytes(whole)
    names = list(load_file(folder / "part.safetensors"))
    for listed in (names[1:], [*names, "more"]):
        index = dict(weight_map=dict.fromkeys(listed, "part.safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="index"):
            Source(folder)
    with pytest.raises(UserError, match="no folder of a model"):
        Source(tmp_path / "nowhere")
    assert [is_hf(p) for p in (folder, "hf:gpt2", tmp_path, "x" * 5000)] == [True, True, False, False]


def test_the_context_may_be_shorter_and_not_longer(folders):
    source = Source(folders("gpt2"))
    model = GPT(source.config.model_copy(update=dict(block_size=8)))
    fill(model, source)
    assert torch.equal(model.transformer.wpe.weight, ours_from(folders("gpt2")).transformer.wpe.weight[:8])
    with pytest.raises(UserError, match=r"wpe.weight is \(32, 48\) there, and \(64, 48\) in this model"):
        fill(GPT(source.config.model_copy(update=dict(block_size=64))), source)


@pytest.mark.parametrize("settings, said", [
    (dict(mlp="relu2"), r"mlp relu2 \(GPT2LMHeadModel has gelu or gelu_tanh\)"),
    (dict(logit_softcap=30, norm="rmsnorm"), "norm rmsnorm .*logit_softcap 30"),
    (dict(n_kv_head=1), "n_kv_head 1"), (dict(head_dim=6), "n_embd 32"), (dict(qk_norm=True), "qk_norm True"),
    (dict(position="rope"), "norm layernorm .*mlp gelu"),
    (dict(position="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True), r"bias True \(Qwen3ForCausalLM has False\)"),
])
def test_shapes_that_nobody_has_are_not_exported(tmp_path, settings, said):
    model = GPT(Model(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=70, **settings))
    with pytest.raises(UserError, match=said):
        exported(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_where_the_export_may_not_go(tmp_path):
    model = GPT(Model(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=70))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for out, options, said in (("full", {}, "is there already"), ("full/file", {}, "is there already"),
                               ("full/file/out", {}, "cannot be written"), ("new", dict(max_shard_size="big"), "as in 5GB")):
        with pytest.raises(UserError, match=said):
            exported(model, tmp_path / out, **options)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "file"]
    (tmp_path / "empty").mkdir()
    exported(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


# ---- tokenizers -----------------------------------------------------------------------------------------------------

@pytest.fixture
def ranks_tokenizer(tmp_path):
    return from_name(write_ranks(tmp_path / "small.tiktoken"))


def written(files: dict, folder: Path) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_exported_tokenizers_give_the_same_ids(transformers, tmp_path, ranks_tokenizer):
    import tiktoken
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS
    from nanogpt.tokenizer import BPETokenizer
    gpt4, gpt4o = (next(text for text in ENCODING_CONSTRUCTORS[name].__code__.co_consts if "p{L}" in str(text))
                   for name in ("cl100k_base", "o200k_base"))  # how they cut text; the second one in parts
    published = [BPETokenizer("x", tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks_tokenizer._ranks,
                                                     special_tokens={"<|endoftext|>": 300, "<|fim|>": 307}))
                 for pattern in (gpt4, "|".join(gpt4o))]
    for i, ours in enumerate([ByteTokenizer(), ranks_tokenizer, *published]):
        folder = written(tokenizer_files(ours, 64), tmp_path / str(i))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            if "endoftext" not in text:
                assert theirs(text)["input_ids"] == ours.encode(text).tolist(), text
        assert theirs.eos_token_id == theirs.bos_token_id == ours.eot and theirs.model_max_length == 64
        again = from_name(str(folder / "tokenizer.json"))
        assert again.vocab_size == ours.vocab_size and again.eot == ours.eot and again.pieces == ours.pieces
        assert (again.fingerprint == ours.fingerprint) == (i > 0)  # the bytes name another rule
        assert from_json(json.loads(json.dumps(again.to_json()))).fingerprint == again.fingerprint
        for text in TEXTS:
            assert again.decode(again.encode(text)) == text
            assert again.encode(text).tolist() == ours.encode(text).tolist()
        assert again.decode([again.eot]) == "<|endoftext|>"
        with pytest.raises(UserError, match="surrogate"):
            again.encode("a\ud800")
    with pytest.raises(ValueError, match="kind char"):
        tokenizer_files(CharTokenizer("abc"), 64)


def test_the_slow_tokenizer_and_its_two_files(transformers, tmp_path, ranks_tokenizer, folders):
    files = tokenizer_files(ranks_tokenizer, 64)
    slow = transformers.GPT2Tokenizer.from_pretrained(written(files, tmp_path / "all"))
    text = "the cat in\r\nthe hat 🙂 é"
    assert slow(text)["input_ids"] == ranks_tokenizer.encode(text).tolist()
    shutil.copytree(folders("gpt2"), tmp_path / "in")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "in" / name).write_text(files[name], encoding="utf-8")
    source = Source(tmp_path / "in")
    source.config.vocab_size = 300
    assert source.tokenizer().fingerprint == ranks_tokenizer.fingerprint and source.tokenizer().name == "in"
    source.config.vocab_size = 268
    with pytest.raises(UserError, match="has 269 ids, and the model only 268"):
        source.tokenizer()
    for name, text in (("vocab.json", '{"a": 5}'), ("vocab.json", '{"a": "b"}'), ("merges.txt", "x y z\n"),
                       ("vocab.json", "{}")):
        (tmp_path / "in" / name).write_text(text)
        with pytest.raises(UserError, match="vocab.json"):
            source.tokenizer()
    (tmp_path / "in" / "merges.txt").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json, and sentencepiece"):
        source.tokenizer()


def test_a_tokenizer_like_llama_3s(transformers, tmp_path, ranks_tokenizer):
    """Special tokens beyond the vocabulary, one put before each text, and one that is only text."""
    obj = json.loads(tokenizer_files(ranks_tokenizer, 64)["tokenizer.json"])
    del obj["model"]["vocab"]["<|endoftext|>"]
    token = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    obj["added_tokens"] = [dict(token, id=268 + i, content=content, special=content != "<tool>") for i, content in
                           enumerate(["<|begin_of_text|>", "<|end_of_text|>", "<tool>"])]
    obj["post_processor"] = dict(type="TemplateProcessing", pair=[], single=[
        {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        special_tokens={"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [268], "tokens": ["<|begin_of_text|>"]}})
    obj["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    ours = from_tokenizer_json(json.dumps(obj), "llama", "here")
    assert (ours.eot, ours.vocab_size, ours.decode([268])) == (269, 271, "<|begin_of_text|>")
    assert ours.token_bytes()[268:].tolist() == [0, 0, 6]
    plain = ranks_tokenizer.encode("<|end_of_text|> the cat")
    assert ours.encode("<|end_of_text|> the cat").tolist() == plain.tolist()
    assert ours.encode("<tool>").tolist() == [270]
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer_files(ours, 64), tmp_path / "out"))
    assert ours.bos == 268 and ranks_tokenizer.bos is None
    assert theirs("the cat, and the hat")["input_ids"] == [ours.bos, *ours.encode("the cat, and the hat")]
    assert encode_pair(ours, "the cat", " and") == ([ours.bos, *ours.encode("the cat")], ours.encode(" and").tolist())
    assert encode_pair(ours, "", " and")[0] == [ours.bos]
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    obj["normalizer"] = dict(type="NFC")  # as Qwen's
    assert from_tokenizer_json(json.dumps(obj), "qwen", "here").fingerprint != ours.fingerprint
    model = obj["model"]
    for change, said in ((dict(normalizer=dict(type="Lowercase")), "it changes the text"),
                         (dict(model=dict(model, vocab=model["vocab"] | {"▁the": 268})), "not a byte-level one"),
                         (dict(model=dict(model, vocab=model["vocab"] | {"x" * 9: 10**9})), "large gaps"),
                         (dict(model=dict(type="WordPiece")), ""), (dict(version="9"), "")):
        with pytest.raises(UserError, match=rf"here: cannot be used \(.*{said}"):
            from_tokenizer_json(json.dumps(obj | change), "x", "here")
    stored = ours.to_json()
    for wrong in (dict(tokenizer_json=7), dict(tokenizer_json="{}"), dict(eot=3), dict(fingerprint="")):
        with pytest.raises(UserError):
            from_json(stored | wrong)


# ---- the hub --------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub talks to: one model, one that is gated, and no others."""
    folder, asked = None, []

    def do_GET(self):
        self.asked.append(self.path)
        api, _, name = self.path.partition("/api/models/")
        if name.split("/")[0] == "silent":
            return threading.Event().wait(3)
        if name in ("tiny", "tiny/revision/v1", "tiny/revision/main", "gated", "gated/revision/main"):
            files = [dict(rfilename=p.name) for p in self.folder.iterdir()]
            return self.answer(json.dumps(dict(id=name, sha="5" * 40, siblings=files)).encode())
        if name.startswith("tiny"):
            return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        if self.path.startswith("/gated/resolve/"):
            return self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        if self.path.startswith("/tiny/resolve/"):
            return self.answer((self.folder / self.path.split("/")[-1]).read_bytes())
        self.answer(b"", 401, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, body, status=200, headers=()):
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": f'"{hash(self.path)}"', "X-Repo-Commit": "5" * 40} | dict(headers)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folders):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.folder, Hub.asked = folders("gpt2"), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def talking_to(url, cache):
    """huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported."""
    from huggingface_hub import constants, file_download
    with pytest.MonkeyPatch.context() as patch:
        for module in (constants, file_download):
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield


def tried(name, url, cache):
    with talking_to(url, cache):
        try:
            return "transformer.wte.weight" in Source(name).stored
        except UserError as error:
            return str(error)


def test_a_model_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "CONNECT_S", 0.5)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    for name in ("hf:tiny", "hf:tiny@v1"):
        assert tried(name, hub, tmp_path) is True
    assert not any("pytorch_model.bin" in path for path in Hub.asked)
    for name, said in (("tiny@v2", "there is no such branch"), ("gated", "its owner lets only some in"),
                       ("nothing", "there is no such model on the hub, or it is private: then set HF_TOKEN"),
                       ("silent", "cannot be downloaded (ReadTimeout"), ("a/b/c", "is not the name of a model")):
        assert tried(f"hf:{name}", hub, tmp_path).startswith(f"hf:{name}: {said}")
    assert tried("hf:tiny", "http://127.0.0.1:9", tmp_path) is True  # downloaded before
    assert "set HF_HOME" in tried("hf:tiny", "http://127.0.0.1:9", tmp_path / "another")


def tried_on_a_rank(name, url, cache):
    from nanogpt.ranks import init_process_group
    init_process_group(Config(run=dict(device="cpu")))
    return tried(name, url, cache)


def test_one_rank_of_a_machine_downloads_and_all_hear_of_failure(hub, tmp_path, ranks):
    assert ranks(2, tried_on_a_rank, "hf:tiny", hub, tmp_path) == [True, True]
    assert sum(path.endswith("model.safetensors") for path in Hub.asked) == 2  # its HEAD and its GET
    said = ranks(2, tried_on_a_rank, "hf:nothing", hub, tmp_path)
    assert said[0] == said[1] and "no such model" in said[0]

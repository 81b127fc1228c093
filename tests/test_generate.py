"""Sampling against the model without a cache, transformers' generate and its logits processors."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanogpt
from nanogpt import huggingface
from nanogpt.config import Model
from nanogpt.errors import UserError
from nanogpt.generate import Cache, Context, Continuation, QuickLinear, Text, generate, new_ids
from nanogpt.model import GPT, CausalSelfAttention
from nanogpt.sampling import Sampling
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer

LLAMA = dict(position="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False, n_kv_head=2)
KINDS = {"gpt2": {}, "llama": LLAMA, "qwen3": dict(LLAMA, qk_norm=True, head_dim=16)}


def small(kind="gpt2", **changes) -> GPT:
    torch.manual_seed(4)
    model = GPT(Model(**dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50, **KINDS[kind]) | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def alone(model: GPT, text: list[int]):
    """The logits after the last token of a text, by the model alone: (vocab_size,)."""
    with torch.no_grad():
        return model(torch.tensor([text[-model.config.block_size:]]))[0, 0]


def bytes_text() -> Text:
    return Text(small(vocab_size=300), ByteTokenizer(), {})


def folder(model: GPT, out) -> str:
    """The model as a Hugging Face folder, with bytes for tokens."""
    assert not huggingface.export(model.config, dict(model.named_parameters()).__getitem__, ByteTokenizer(), out, card="")
    return str(out)


# ---- the cache ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [[1], [5], [3, 7, 1, 7], [16], [20, 2], [5, 16, 30]])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_without_a_cache(kind, lengths):
    """At every position, for each row of a padded batch as if it were alone, and beyond block_size."""
    model = small(kind)
    texts = [torch.randint(0, 50, (n,)).tolist() for n in lengths]
    context = Context(model, texts, 24)
    for _ in range(24):
        logits = context.logits()
        expected = torch.stack([alone(model, text) for text in texts])
        assert expected.std() > 0.1
        assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
        new = torch.randint(0, 50, (len(texts),))
        context.add(new)
        texts = [text + [i] for text, i in zip(texts, new.tolist())]


@pytest.mark.parametrize("fused", [True, False])
def test_several_tokens_after_cached_ones(monkeypatch, fused):
    monkeypatch.setattr(CausalSelfAttention, "fused", fused)
    model, ids = small("llama"), torch.randint(0, 50, (2, 12))
    cache = [Cache(model, 2, 12) for _ in range(2)]
    with torch.no_grad():
        for first, last in ((0, 5), (5, 9), (9, 12)):
            logits = model(ids[:, first:last], positions=torch.arange(first, last), cache=cache)
            assert torch.allclose(logits, model(ids[:, :last]), atol=1e-5)


def test_one_token_at_a_time_goes_through_the_model():
    """Until the window is full. A batch without padding needs no mask."""
    model, seen = small(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args[0].shape, kwargs["mask"])), with_kwargs=True)
    list(new_ids(model, [[1, 2, 3]] * 2, 15, Sampling(0)))
    assert seen == [(2, 3, None)] + [(2, 1, None)] * 13 + [(2, 16, None)]


def test_memory_of_the_cache_is_taken_once():
    model = small("llama")
    context = Context(model, [[1, 2, 3]], 6)
    context.logits()
    before = context.cache[1].k
    for i in range(6):
        context.add(torch.tensor([i]))
        context.logits()
    assert context.cache[1].k is before and before.shape == (1, 2, 9, 8) and context.cache[1].length == 9


@pytest.mark.parametrize("bias", [True, False])
def test_a_few_tokens_through_a_large_matrix(bias):
    """They take another way through MKL, forth and back."""
    layer = QuickLinear(384, 512, bias=bias)
    for shape in ((384,), (1, 1, 384), (3, 1, 384), (2, 2, 384), (5, 1, 384)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        expected = x @ layer.weight.t() + (layer.bias if bias else 0)
        assert y.shape == (*shape[:-1], 512) and y.is_contiguous() and torch.allclose(y, expected, atol=1e-5)
        both = (torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (y, expected))
        assert all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in zip(*both))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_text_is_that_of_transformers(transformers, tmp_path, kind):
    """By way of a Hugging Face folder, which `load` reads as transformers does."""
    model = small(kind, vocab_size=257, block_size=64)
    text = nanogpt.load(folder(model, tmp_path / "hf"), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompts, seen = ["A first line", "Another", "Z"], set()
    for penalty in (1.0, 1.3):
        expected = []
        for prompt in prompts:
            idx = torch.tensor([list(prompt.encode())])
            whole = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=40, do_sample=False,
                                    pad_token_id=256, eos_token_id=None, repetition_penalty=penalty)
            assert torch.equal(generate(text.model, idx, 40, 0, repetition_penalty=penalty), whole)
            expected.append(text.tokenizer.decode(whole[0, idx.size(1):]))
            seen.update(whole[0].tolist())
        options = dict(max_new_tokens=40, temperature=0, repetition_penalty=penalty, ignore_eot=True)
        assert text.generate(prompts, **options) == expected
        assert [text.generate(prompt, **options) for prompt in prompts] == expected
    assert len(seen) > 16


def test_greedy_sampling_takes_the_likeliest_and_never_the_padding():
    model = small()
    with torch.no_grad():  # make the padding the likeliest by far
        model.lm_head.weight[50:] = 10 * model.lm_head.weight[7]
    idx = torch.randint(0, 50, (2, 5))
    text = generate(model, idx, 30, temperature=0)  # past block_size, so that the context slides
    assert text.shape == (2, 35) and (text[:, :5] == idx).all() and text.max() < 50
    for t in range(5, 35):
        assert text[:, t].tolist() == [alone(model, row).argmax().item() for row in text[:, :t].tolist()]


# ---- which id -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, dict(top_k=5), dict(top_k=500), dict(top_p=0.7), dict(top_p=0.01), dict(top_p=1.0), dict(min_p=0.1), dict(min_p=0),
    dict(min_p=1), dict(repetition_penalty=1.7), dict(repetition_penalty=0.5), dict(top_k=8, top_p=0.8),
    dict(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    dict(temperature=1.9, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2)], ids=str)
def test_filters_are_those_of_transformers(transformers, options):
    torch.manual_seed(0)
    logits, text = 3 * torch.randn(16, 50), torch.randint(0, 50, (16, 9))
    text[:, 4] = text[:, 2]
    settings = transformers.GenerationConfig(**dict(do_sample=True, top_k=0) | options)
    config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config)
    processors = model._get_logits_processor(settings)  # in the order in which its `generate` applies them
    expected = processors(text, logits.clone())
    ours = Sampling(**options).filtered(logits.clone(), text)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert torch.allclose(ours, expected, rtol=1e-6)
    assert torch.equal(Sampling(**options | dict(temperature=0)).draw(logits, text), expected.argmax(-1))


def test_draws_have_the_probabilities_of_the_filtered_logits():
    logits, text = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1), torch.zeros(20000, 1, dtype=torch.int64)
    sampling = Sampling(temperature=0.7, top_k=3, repetition_penalty=1.5)
    drawn = sampling.draw(logits, text, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    expected = torch.tensor([2.0 / 1.5, 1.0, 0.0, float("-inf")]).div(0.7).softmax(-1)
    assert torch.allclose(drawn, expected, atol=0.015) and drawn[3] == 0


def test_top_k_and_seed():
    model = small()
    idx = torch.zeros(200, 1, dtype=torch.int64)
    first = [generate(model, idx, 1, 1.5, 3, torch.Generator().manual_seed(s))[:, 1] for s in (1, 1, 2)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert set(first[0].tolist()) == set(alone(model, [0]).topk(3).indices.tolist())
    text = bytes_text()
    with_seed = [text.generate("a", 20, seed=s, temperature=2.0, ignore_eot=True) for s in (1, 1, 2, None, None)]
    assert with_seed[0] == with_seed[1] and len(set(with_seed)) == 4


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    """A model of others may have more rows than its tokenizer has ids."""
    text = bytes_text()
    with torch.no_grad():
        text.model.lm_head.weight[257:300] = 10 * text.model.lm_head.weight[65]
    for options in (dict(temperature=0), dict(temperature=5.0, top_k=None, seed=0)):
        rows = list(text.stream(["A"] * 20, 30, ignore_eot=True, **options))[-1]
        assert all(row.tokens == 30 for row in rows)


@pytest.mark.parametrize("options, said", [
    (dict(temperature=-0.5), "temperature: -0.5 is not a number from 0 on; 0 takes the likeliest token"),
    (dict(temperature=float("nan")), "temperature: nan is not"), (dict(temperature=float("inf")), "temperature: inf is not"),
    (dict(temperature="hot"), "temperature: 'hot' is not"), (dict(top_k=0), "top_k: 0 is below 1; leave it out"),
    (dict(top_k=2.5), "top_k: 2.5 is not a whole number"), (dict(top_p=0), "top_p: 0 is not a number from 1e-06 to 1;"),
    (dict(top_p=1.1), "top_p: 1.1 is not"), (dict(min_p=-0.1), "min_p: -0.1 is not a number from 0 to 1"),
    (dict(repetition_penalty=0), "repetition_penalty: 0 is not a number from 0.01 to 100"),
    (dict(stop=[""]), r"stop: \[''\] is neither"), (dict(stop=[5]), r"stop: \[5\] is neither"),
    (dict(stop=5), "stop: 5 is neither"), (dict(repetition_penalty=True), "repetition_penalty: True is not"),
    (dict(seed=-1), "seed: -1 is below 0"), (dict(seed=1 << 64), "seed: 18446744073709551616 is above"),
    (dict(max_new_tokens=0), "max_new_tokens: 0 is below 1"), (dict(prompt=[]), r"prompt: \[\] is neither"),
    (dict(prompt=["a", 5]), r"prompt: \['a', 5\] is neither"), (dict(prompt=5), "prompt: 5 is neither"),
    (dict(prompt="\udc80"), "half of a surrogate pair")])
def test_options_that_make_no_sense(options, said):
    with pytest.raises(UserError, match=said):
        bytes_text().generate(**options)


def test_models_that_are_not_there(tmp_path):
    for arguments, said in (((), "no complete checkpoint there"), (("cpu", "int4"), "precision: 'int4' is"),
                            (("gpu",), "device: 'gpu' is not one"), (("cuda:99",), "device: cuda:99 is asked for")):
        with pytest.raises(UserError, match=said):
            nanogpt.load(tmp_path, *arguments)
    with pytest.raises(ImportError):
        from nanogpt import lode  # noqa: F401


# ---- text -----------------------------------------------------------------------------------------------------------

def continuations(tok, ids, stop=(), end=None):
    """What is shown after each id, and at the end."""
    row = Continuation(tok, list(stop), end)
    shown = []
    for i in ids:
        row.add(i)
        shown.append(row.text)
    row.finish()
    return shown + [row.text]


def test_streamed_text_is_the_decoded_text():
    tok, choose = ByteTokenizer(), random.Random(0)
    for _ in range(300):  # valid and invalid UTF-8, and end-of-text by name
        ids = [choose.choice([65, 0xC3, 0xA4, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 256]) for _ in range(12)]
        shown = continuations(tok, ids)
        assert shown[-1] == tok.decode(ids)
        assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:]))
    assert continuations(tok, "aä€".encode()) == ["a", "a", "aä", "aä", "aä", "aä€", "aä€"]


def test_stop_strings():
    tok = ByteTokenizer()
    assert continuations(tok, b"one\n\ntwo", ["\n\n"])[-1] == "one"          # over two tokens
    assert continuations(tok, b"one\ntwo", ["\n\n"])[3:5] == ["one", "one\nt"]  # held back while it may be one
    assert continuations(tok, b"one\n", ["\n\n"])[-1] == "one\n"             # and given at the end
    assert continuations(tok, b"aab", ["ab"])[-1] == "a"
    assert continuations(tok, b"abcabd", ["abd", "c"])[-1] == "ab"
    assert continuations(tok, "ä€x".encode(), ["€"])[-1] == "ä"
    assert continuations(tok, [65, 66, 256, 67], end=256)[-1] == "AB"
    assert continuations(tok, [65, 256, 67])[-1] == "A<|endoftext|>C"
    words = CharTokenizer("ab")  # whatever its pieces are
    words.pieces = [b"so it ends here", b"!"]
    assert continuations(words, [0, 1], ["ends", "here"])[-1] == "so it "
    choose = random.Random(1)
    for _ in range(300):
        text, stop = ("".join(choose.choice("ab") for _ in range(n)) for n in (20, choose.randint(1, 4)))
        assert continuations(tok, text.encode(), [stop])[-1] == text.split(stop)[0]


def test_the_batch_goes_on_until_all_are_done():
    text = bytes_text()
    prompts = ["A", "some more of it", "z"]
    whole = [text.generate(p, 30, temperature=0, ignore_eot=True) for p in prompts]
    options = dict(max_new_tokens=30, temperature=0, ignore_eot=True)
    assert text.generate(prompts, **options) == whole
    stop = whole[0][3]
    assert text.generate(prompts, **options, stop=stop) == [w.split(stop)[0] for w in whole]
    steps = [(rows[0].tokens, rows[0].done) for rows in text.stream(["A"], **options, stop=stop)]
    assert steps[0] == (1, False) and steps[-1][1] and len(steps) <= 4  # and no token later


def test_end_of_text():
    text = bytes_text()
    with torch.no_grad():
        text.model.transformer.ln_f.weight.zero_()
        text.model.transformer.ln_f.bias.copy_(text.model.lm_head.weight[256])  # always the likeliest
    assert text.generate("A", 3, temperature=0) == ""
    assert text.generate(["A", ""], 2, temperature=0, ignore_eot=True) == ["<|endoftext|>" * 2] * 2


@pytest.mark.parametrize("alphabet, first", [("\n ab", 0), ("ab", 0), (" \nab", 1)])
def test_alphabets_of_nanogpt_have_no_end_of_text(alphabet, first):
    tok = CharTokenizer(alphabet, with_eot=False)
    text = Text(small(vocab_size=len(alphabet)), tok, {})
    assert text.generate("", 10, temperature=0) == tok.decode(
        generate(text.model, torch.tensor([[first]]), 10, temperature=0)[0, 1:])


def test_the_tool(tmp_path, monkeypatch, capsys):
    """Streams one text, prints several at the end; the same texts as the library, from a folder of any kind."""
    text = nanogpt.load(folder(small(vocab_size=257), tmp_path / "hf"))
    (tmp_path / "prompt.txt").write_text("from a file")
    tool = Path(__file__).parents[1] / "tools" / "sample.py"
    common = ["--hf", str(tmp_path / "hf"), "--max-new-tokens", "9", "--temperature", "0.9", "--top-p", "0.9", "--min-p",
              "0.01", "--ignore-eot", "--repetition-penalty", "1.1", "--stop", "zz", "--seed", "5", "--device", "cpu"]
    options = dict(max_new_tokens=9, temperature=0.9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, ignore_eot=True, seed=5)
    done = subprocess.run([sys.executable, tool, *common, "--prompt", "-"], input=b"piped in", capture_output=True)
    assert done.stdout.decode() == f"piped in{text.generate('piped in', **options)}\n{'-' * 20}\n"
    assert done.stderr.decode().startswith("9 tokens: the first after ") and done.stderr.endswith(b" tokens/s\n")

    monkeypatch.syspath_prepend(tool.parent)
    import sample

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *common, *arguments])
        sample.main()
        return capsys.readouterr().out

    prompts = ["from a file"] * 2 + ["b"] * 2
    assert printed("--prompt", f"FILE:{tmp_path}/prompt.txt", "--prompt", "b", "--num-samples", "2") == "".join(
        f"{p}{new}\n{'-' * 20}\n" for p, new in zip(prompts, text.generate(prompts, **options)))
    assert printed() == text.generate("", **options) + f"\n{'-' * 20}\n"
    for arguments, said in ((["--prompt", "FILE:nowhere"], "--prompt: nowhere cannot be read"),
                            (["--stop", ""], "--stop: give"), (["--top-p", "2"], "--top-p: 2 is not"),
                            (["--min-p", "nan"], "--min-p: nan is not")):
        with pytest.raises(UserError, match=said):
            printed(*arguments)

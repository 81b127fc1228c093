"""From weights to text: a model on one device, without torchrun, and new tokens from it, each at the cost of one.

    from nanogpt import load
    load("runs/gpt2_124m").generate("Once upon a time", temperature=0.8, stop="\\n\\n")
"""

import codecs
import sys
import warnings
from pathlib import Path
from collections.abc import Iterator

import torch

from nanogpt import checkpoint, tokenizer
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.sampling import Sampling, whole


# ---- weights --------------------------------------------------------------------------------------------------------

def load(path: str | Path, device: str = "auto", precision: str = "float32") -> "Text":
    """A model to sample from. path: a run folder, one of its checkpoints, a Hugging Face folder, or hf:NAME[@REVISION].

    device: auto (CUDA where there is one), cpu, cuda or cuda:N; precision: float32 or bfloat16, of weights and cache.
    Raises UserError where there is no such model, where it is damaged, or where there is no such device.
    """
    from nanogpt import huggingface
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"precision: {precision!r:.40} is neither float32 nor bfloat16")
    device, dtype = find_device(device), getattr(torch, precision)
    if huggingface.is_hf(path):
        source = huggingface.Source(path)
        tok, state = source.tokenizer(), {}
        with torch.device("meta"):
            model = GPT(source.config).to(dtype)
        model.to_empty(device=device)
        model.tie_weights()
        huggingface.fill(model, source)
    else:
        model, tok, state = load_run(path, device, dtype)
    return Text(model.eval(), tok, state)


def load_run(path: str | Path, device: torch.device = torch.device("cpu"), dtype: torch.dtype = torch.float32):
    """(model in evaluation mode, its tokenizer, state.json) of a run folder or a checkpoint, weights alone.

    Raises UserError where there is no complete checkpoint, or where it is damaged.
    """
    path = checkpoint.find(path)
    checkpoint.verify(path)
    state = checkpoint.read_state(path)
    try:
        tok = tokenizer.from_json(state["tokenizer"])
        config = checkpoint.model_of(path, state)
        if config.vocab_size < tok.vocab_size:
            raise ValueError("its model does not know all ids of its tokenizer")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}/state.json: damaged ({' '.join(str(error).split())[:200]})") from None
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    checkpoint.fitting_reader(path, checkpoint.tensors(model))  # before there is memory for it
    model.to_empty(device=device)
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP remarks that it loads in a single process
        checkpoint.load(path, model)
    return model.eval(), tok, state


def find_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU. Raises UserError."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError):
        raise UserError(f"device: {name!r:.40} is not one; take auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} is asked for, and PyTorch finds {torch.cuda.device_count() or 'none'} here")
    return device


# ---- ids ------------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of one block for all tokens so far, (B, n_kv_head, tokens, head), in memory that is taken once."""

    def __init__(self, model: GPT, rows: int, capacity: int):
        weight, (_, K, D) = model.lm_head.weight, model.config.heads
        self.k, self.v = (torch.empty(rows, K, capacity, D, dtype=weight.dtype, device=weight.device) for _ in "kv")
        self.length = 0

    def append(self, k, v):
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class QuickLinear(torch.nn.Linear):
    """For up to four tokens in float32 on a CPU, where F.linear leaves most of the machine unused.

    MKL takes one thread for a single row, and reads the matrix several times for a few. Matrix times columns it does in
    several threads and reads once, but not for a single column, so there are two of the same. Measured for one token on
    two cores: 1536 x 384 in 78 µs, not 241; 50304 x 768 in 4.0 ms, not 11.4. It is slower for long rows and small matrices.
    """

    def forward(self, x):
        tokens, weight = x.numel() // x.size(-1), self.weight
        if tokens > 4 or weight.size(1) > 1536 or weight.numel() < 1 << 17:
            return super().forward(x)
        rows = x.reshape(tokens, -1)
        columns = (rows if tokens > 1 else torch.cat([rows, rows])).t()            # (in, tokens); laid out as rows: MKL's best
        y = weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], weight, columns)
        return y[:, :tokens].t().contiguous().view(*x.shape[:-1], -1)              # (…, out)


def quicken(model: GPT):
    """Makes Linears of a model on a CPU quick for single tokens, too. It computes what it did."""
    if model.lm_head.weight.is_cpu and model.lm_head.weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = QuickLinear


class Context:
    """What the model knows of a batch of texts: up to block_size tokens, all rows ending in the same column.

    Shorter texts are padded on the left. While all fit, each new token goes through the model alone, beside the cached
    keys and values. Then the window slides as nanoGPT's does: it goes through the model whole for each token, because its
    positions count from its own beginning, and with them change all keys and values.
    """

    def __init__(self, model: GPT, prompts: list[list[int]], room: int):
        """room: how many tokens will be added at most."""
        quicken(model)
        self.model, device, longest = model, model.lm_head.weight.device, max(map(len, prompts))
        # The padding repeats a token that stands in the text, so that the repetition penalty needs no mask.
        self.ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts], device=device)          # (B, tokens)
        self.padding = torch.tensor([longest - len(p) for p in prompts], device=device)[:, None]            # (B, 1)
        self.padded = longest - min(map(len, prompts))  # columns in which some row has padding
        capacity = min(longest + room, model.config.block_size)
        self.columns = torch.arange(capacity, device=device)
        self.cache = [Cache(model, len(prompts), capacity) for _ in range(model.config.n_layer)]

    def logits(self):
        """(B, vocab_size), after the last token of each row."""
        end = self.ids.size(1)
        start = max(0, end - self.model.config.block_size)  # where the window begins
        if start:
            self.cache = None
        first = self.cache[0].length if self.cache else start  # what is left of it is cached
        positions, mask = self.columns[first - start:end - start], None
        if start < self.padded:
            padding = self.padding - start                                                          # (B, 1)
            seen = self.columns[:end - start] >= padding                                            # (B, S)
            mask = (self.columns[:end - start] <= positions[:, None]) & seen[:, None, None]         # (B, 1, T, S)
            mask |= self.columns[:end - start] == positions[:, None]  # padding sees itself: to see nothing is not a number
            positions = (positions - padding.clamp(min=0)).clamp(min=0)                             # (B, T)
        return self.model(self.ids[:, first:], positions=positions, mask=mask, cache=self.cache)[:, 0]

    def add(self, new):
        """new (B,): the next id of each row."""
        self.ids = torch.cat([self.ids, new[:, None]], 1)


@torch.inference_mode()
def new_ids(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
            generator: torch.Generator | None = None, vocab_size: int | None = None) -> Iterator[torch.Tensor]:
    """Yields (B,) ids, the next of each prompt, max_new_tokens times. Prompts are of any length, but not empty.

    Ids from vocab_size on are never drawn (default: all that the model knows).
    """
    context = Context(model, prompts, max_new_tokens)
    for _ in range(max_new_tokens):
        new = sampling.draw(context.logits()[:, :vocab_size], context.ids, generator)
        context.add(new)
        yield new


def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None, **filters) -> torch.Tensor:
    """idx (B, T) -> (B, T + max_new_tokens), as nanoGPT's. filters: those of sampling.Sampling.

    A text longer than block_size is continued from its last block_size tokens. Raises UserError.
    """
    sampling = Sampling(temperature, top_k, **filters)
    return torch.cat([idx, *(new[:, None] for new in new_ids(model, idx.tolist(), max_new_tokens, sampling, generator))], 1)


# ---- text -----------------------------------------------------------------------------------------------------------

class Continuation:
    """The text of one row as its ids come, up to end-of-text or a stop string, which are not part of it.

    text     so far: whole characters, and nothing that may turn out to be the beginning of a stop string
    tokens   how many ids were added
    done     nothing is added any more
    """

    def __init__(self, tok: tokenizer.Tokenizer, stop: list[str] | tuple[str, ...], end: int | None):
        self.tok, self.stop, self.end = tok, stop, end
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # bytes that end amid a character wait for the rest
        self.text, self.held, self.tokens, self.done = "", "", 0, False

    def add(self, i: int):
        if self.done:
            return
        self.tokens += 1
        if i == self.end:
            self.finish()
        else:  # as tok.decode shows it: special tokens by name
            self._read(self.tok.pieces[i] or self.tok.decode([i]).encode())

    def finish(self):
        """No id will follow: what was held back is part of the text."""
        if not self.done:
            self._read(b"", final=True)
            self.text, self.held, self.done = self.text + self.held, "", True

    def _read(self, data: bytes, final=False):
        self.held += self.decoder.decode(data, final)
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            self.text, self.held, self.done = self.text + self.held[:min(found)], "", True
            return
        wait = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        ready = len(self.held) - wait
        self.text, self.held = self.text + self.held[:ready], self.held[ready:]


class Text:
    """A model with its tokenizer: text in, text out.

    model       GPT, in evaluation mode
    tokenizer   that of its data
    state       state.json of its checkpoint; {} for a model of others
    """

    def __init__(self, model: GPT, tok: tokenizer.Tokenizer, state: dict):
        self.model, self.tokenizer, self.state = model, tok, state
        self.device = model.lm_head.weight.device

    def generate(self, prompt: str | list[str] = "", max_new_tokens: int = 200, **options):
        """What follows prompt, without it; of a list, what follows each, all at once. options: those of `stream`."""
        for rows in self.stream([prompt] if isinstance(prompt, str) else prompt, max_new_tokens, **options):
            pass
        texts = [row.text for row in rows]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompts: list[str], max_new_tokens: int = 200, *, stop: str | list[str] | tuple[str, ...] = (),
               ignore_eot: bool = False, seed: int | None = None, temperature: float = 0.8, top_k: int | None = 200, **filters) -> Iterator[list]:
        """Yields, after each step, a list with the Continuation of each prompt: the same objects, grown by a token.

        It ends when all are done: by end-of-text (unless ignore_eot), a stop string, or max_new_tokens. An empty prompt is
        a new document. seed: None draws another text each time; filters: top_p, min_p, repetition_penalty (sampling.py).
        Raises UserError where an option makes no sense, or a prompt has characters that the tokenizer lacks.
        """
        tok, sampling = self.tokenizer, Sampling(temperature, top_k, **filters)
        stop = [stop] if isinstance(stop, str) else stop
        if not (isinstance(stop, (list, tuple)) and all(isinstance(s, str) and s for s in stop)):
            raise UserError(f"stop: {stop!r:.60} is neither a text nor a list of texts, of at least one character")
        if not (isinstance(prompts, (list, tuple)) and prompts and all(isinstance(p, str) for p in prompts)):
            raise UserError(f"prompt: {prompts!r:.60} is neither a text nor a list of texts")
        whole("max_new_tokens", max_new_tokens, 1, sys.maxsize, "take as many as you want to read")
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(whole("seed", seed, 0, sys.maxsize, "take 0 to 2**63 - 1"))
        rows = [Continuation(tok, stop, None if ignore_eot else tok.eot) for _ in prompts]
        before = [] if tok.bos is None else [tok.bos]
        ids = [before + tok.encode(p).tolist() or [self._beginning()] for p in prompts]
        left = max_new_tokens
        for new in new_ids(self.model, ids, max_new_tokens, sampling, generator, tok.vocab_size):
            left -= 1
            for row, i in zip(rows, new.tolist()):
                row.add(i)
                if not left:
                    row.finish()
            yield rows
            if all(row.done for row in rows):
                return

    def _beginning(self) -> int:
        """The id that a new document follows: end-of-text, or of nanoGPT's alphabets, which lack it, a line break."""
        if self.tokenizer.eot is not None:
            return self.tokenizer.eot
        try:
            return int(self.tokenizer.encode("\n")[0])
        except UserError:  # an alphabet without one
            return 0

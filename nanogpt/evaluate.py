"""How good a model is: its loss on a dataset, HellaSwag, LAMBADA, each with its standard error.

HellaSwag (Zellers et al., 2019): which of four endings does a text have? LAMBADA (Paperno et al., 2016), in OpenAI's
version: what is the last word of a text? Both zero-shot, with the prompts and the scoring of EleutherAI's
lm-evaluation-harness. The model sees no end-of-text before a text, but where it would see nothing at all.

Work is cut into batches first, and these are dealt to the ranks; what comes back is added up in one order. So the
numbers do not depend on how many ranks there are.
"""

import hashlib
import json
import math
import re
from typing import NamedTuple
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from nanogpt.errors import PeerLost, UserError
from nanogpt.loss import CHUNK_LOGITS, IGNORE
from nanogpt.model import GPT, separate_documents
from nanogpt.stream import Split, inputs_and_targets
from nanogpt.tokenizer import Tokenizer


class Metric(NamedTuple):
    """One number. stderr is None where n, the sequences or documents it is of, is 1."""
    name: str
    value: float
    stderr: float | None
    n: int


# ---- loss -----------------------------------------------------------------------------------------------------------

def split_loss(model: GPT, tok: Tokenizer, split: Split, sequences: int | None = None, batch_size: int = 16) -> list[Metric]:
    """Loss in nats a token, perplexity, and bits a byte, over the first `sequences` of a split, or all of them.

    Standard errors are over sequences. Raises UserError where the split is not of this tokenizer, or is damaged.
    """
    if (theirs := split.card["tokenizer"])["fingerprint"] != tok.fingerprint:
        raise UserError(f"{split.path}: its tokenizer ({theirs['name']}) is not the model's ({tok.name}): the same ids are "
                        "other text there; convert the text again with the model's")
    n = min(sequences or split.samples * split.parts, split.samples * split.parts)
    token_bytes = torch.from_numpy(tok.token_bytes())
    separate = separate_documents(model.config, tok)

    def score(first):
        numbers = np.arange(first, min(first + batch_size, n))
        x, y = inputs_and_targets(split.read(np.stack([numbers // split.parts, numbers % split.parts], 1)))
        counts = y != IGNORE
        nats = torch.zeros(y.shape, dtype=torch.float64)
        nats[counts] = -log_probs(model, x, y, separate)[0]
        return torch.stack([nats.sum(1), counts.sum(1), (token_bytes[y.clamp(min=0)] * counts).sum(1)], 1).numpy()

    nats, tokens, n_bytes = np.concatenate(deal(range(0, n, batch_size), score, f"{split.path}/{split.name}")).T
    if not n_bytes.any():
        raise UserError(f"{split.path}: its {split.name} split has no text among the targets of the first {n} sequences")
    loss, loss_error = ratio(nats, tokens)
    bits, bits_error = ratio(nats / math.log(2), n_bytes)
    return [Metric("loss", loss, loss_error, n), exponential("perplexity", loss, loss_error, n),
            Metric("bits_per_byte", bits, bits_error, n)]


# ---- tasks ----------------------------------------------------------------------------------------------------------

class Document(NamedTuple):
    """A text, and one or several endings, each after a blank; the right one is endings[right]. where: for messages."""
    where: str
    context: str
    endings: list[str]
    right: int


def read_hellaswag(row: dict, where: str) -> Document:
    def clean(text):  # [title], [step] and the like are WikiHow's markup
        return re.sub(r"\[.*?]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
    endings, right = [clean(ending) for ending in row["endings"]], int(str(row["label"]))
    if type(row["endings"]) is not list or not 0 <= right < len(endings):
        raise ValueError("label is not that of one of the endings")
    return Document(where, clean(context), endings, right)


def read_lambada(row: dict, where: str) -> Document:
    *words, last = row["text"].split(" ")
    return Document(where, " ".join(words), [last], 0)


def hellaswag_metrics(documents: list[Document], scores: list[list[tuple[float, bool]]]) -> list[Metric]:
    """acc: the right ending is the likeliest; acc_norm: it is so by log-likelihood a character."""
    n, ones = len(documents), np.ones(len(documents))
    right, right_norm = np.zeros(n), np.zeros(n)
    for i, (document, of_endings) in enumerate(zip(documents, scores)):
        log_p = np.array([log_p for log_p, _ in of_endings])
        characters = np.array([len(ending) or 1e-9 for ending in document.endings])  # an empty one never wins
        right[i] = log_p.argmax() == document.right
        right_norm[i] = (log_p / characters).argmax() == document.right
    return [Metric("acc", *ratio(right, ones), n), Metric("acc_norm", *ratio(right_norm, ones), n)]


def lambada_metrics(documents: list[Document], scores: list[list[tuple[float, bool]]]) -> list[Metric]:
    """perplexity of the last word, all its tokens together; acc: each of them is the likeliest."""
    n, ones = len(documents), np.ones(len(documents))
    (log_p, greedy), = np.array(scores, dtype=float).transpose(1, 2, 0)
    return [exponential("perplexity", *ratio(-log_p, ones), n), Metric("acc", *ratio(greedy, ones), n)]


class Task(NamedTuple):
    read: Callable     # a row, as published, and where it stands -> Document
    metrics: Callable  # documents, scores of their endings -> metrics
    hub: tuple         # what `datasets` calls it: path, name, split
    fields: str        # of a row


TASKS = {
    "hellaswag": Task(read_hellaswag, hellaswag_metrics, ("Rowan/hellaswag", None, "validation"),
                      "activity_label, ctx_a, ctx_b, endings and label"),
    "lambada_openai": Task(read_lambada, lambada_metrics, ("EleutherAI/lambada_openai", "default", "test"), "text"),
}


def read_documents(task: str, file: str | None = None, limit: int | None = None) -> list[Document]:
    """The first `limit` documents of a task, or all of them: of a JSONL file, or without one, from the Hugging Face hub.

    Raises UserError: the file is not there or damaged (and in which line), the hub does not answer.
    """
    of, documents = TASKS[task], []
    for where, line in _lines(file) if file else _hub_rows(task):
        if limit and len(documents) == limit:
            break
        try:
            documents.append(of.read(json.loads(line) if file else line, where))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise UserError(f"{where}: is no document of {task} ({said}); each line of the published file is a "
                            f"JSON object with {of.fields}") from None
    if not documents:
        raise UserError(f"{file}: is empty; each line of the published file is a JSON object with {of.fields}")
    return documents


def _lines(file: str):
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}: line {number}", line
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the task's published JSONL file") from None


def _hub_rows(task: str):
    path, name, split = TASKS[task].hub
    try:
        from datasets import load_dataset
        from huggingface_hub.utils.logging import set_verbosity_error
        set_verbosity_error()  # not of each attempt
        rows = load_dataset(path, name, split=split)
    except Exception as error:  # its own, the hub's, urllib's, the disk's
        raise UserError(f"{path}: cannot be loaded from the Hugging Face hub ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:150]}); where there is no network, fetch the published JSONL file "
                        f"elsewhere and give --task {task}=FILE.jsonl") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def fingerprint(documents: list[Document]) -> str:
    """sha256 of what is asked and what is right, wherever it was read from."""
    return hashlib.sha256(json.dumps([document[1:] for document in documents]).encode()).hexdigest()


def run_task(task: str, model: GPT, tok: Tokenizer, documents: list[Document], batch_size: int = 16) -> list[Metric]:
    """The task's metrics, with standard errors over documents. Raises UserError where an ending is too long."""
    return TASKS[task].metrics(documents, score_endings(model, tok, documents, batch_size, task))


def score_endings(model: GPT, tok: Tokenizer, documents: list[Document], batch_size: int = 16,
                  title: str = "") -> list[list[tuple[float, bool]]]:
    """For each ending of each document: (Σ log p of its tokens in nats, is each of them the likeliest one?).

    A text that does not fit into the model's context loses its beginning. Raises UserError where an ending alone does
    not fit, or where the tokenizer lacks its characters.
    """
    T, requests = model.config.block_size, []  # (ids, how many of them, at the end, are the ending's)
    for document in documents:
        for ending in document.endings:
            try:
                context, ids = encode_pair(tok, document.context, " " + ending)
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None
            if not 0 < len(ids) <= T:
                raise UserError(f"{document.where}: its ending of {len(ids)} tokens does not fit into the {T} of the "
                                "model's context; this task needs a model with a longer one")
            requests.append(((context + ids)[-(T + 1):], len(ids)))
    # The longest first, so that there is little padding, and a lack of memory shows at once.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))

    def score(batch):
        width = len(requests[batch[0]][0]) - 1
        x, y = torch.zeros(len(batch), width, dtype=torch.int64), torch.full((len(batch), width), IGNORE)
        for row, (ids, n) in enumerate(requests[i] for i in batch):
            x[row, :len(ids) - 1] = torch.tensor(ids[:-1])
            y[row, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(ids[-n:])
        lengths = (y != IGNORE).sum(1).tolist()
        log_p, greedy = log_probs(model, x, y)
        return [(p.sum().item(), g.all().item()) for p, g in zip(log_p.split(lengths), greedy.split(lengths))]

    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    scored = dict(zip(order, (pair for pairs in deal(batches, score, title) for pair in pairs)))
    in_order = iter(range(len(requests)))
    return [[scored[next(in_order)] for _ in document.endings] for document in documents]


def encode_pair(tok: Tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the ending). Blanks at the end of the context go to the ending.

    The two are encoded together and cut where the ids of the context alone end: apart, "the" and " end" could become
    other tokens than the model has seen. Before the context stands what the tokenizer wants there (bos), and in the place
    of an empty one, at least end-of-text. UserError: there is none.
    """
    before = tok.encode(context.rstrip()).tolist()
    after = tok.encode(context + ending).tolist()[len(before):]
    before = ([] if tok.bos is None else [tok.bos]) + before
    if not before and tok.eot is None:
        raise UserError(f"is empty but for its ending, and the {tok.name} tokenizer has no end-of-text to begin with")
    return before or [tok.eot], after


# ---- both -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def log_probs(model: GPT, x: torch.Tensor, y: torch.Tensor, separate=None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, T) ids, y (B, T) ids or IGNORE -> of the n targets in y, row by row: (log p (n,) float64, in nats; is it the
    likeliest id? (n,) bool), on the CPU. There are never logits of more than CHUNK_LOGITS / vocab_size positions.
    separate: of the documents in x, as separate_documents makes it."""
    device = model.transformer.wte.weight.device
    x, y = x.to(device), y.to(device)
    hidden = model.hidden(x, *separate(x) if separate else ())[y != IGNORE]              # (n, n_embd)
    y = y[y != IGNORE]                                                                   # (n,)
    log_p, greedy = torch.empty(len(y), dtype=torch.float64, device=device), torch.empty_like(y, dtype=torch.bool)
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for i in range(0, len(y), chunk):
        logits, target = model.logits(hidden[i:i + chunk]), y[i:i + chunk]              # (chunk, vocab_size), (chunk,)
        log_p[i:i + chunk] = -F.cross_entropy(logits, target, reduction="none")
        greedy[i:i + chunk] = logits.argmax(-1) == target
    return log_p.cpu(), greedy.cpu()


def deal(batches, score: Callable, title: str) -> list:
    """[score(batch) for batch in batches], shared out among the ranks, and with a progress bar where there is a terminal.

    What one rank raises as a UserError, all do. PeerLost: a rank is gone.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, problem = [], None
    try:
        for batch in tqdm(batches[rank::world_size], title, unit="batch", disable=None if rank == 0 else True):
            mine.append(score(batch))
    except UserError as error:
        problem = error
    except torch.OutOfMemoryError:
        problem = UserError(f"{title}: the GPU's memory does not hold a batch; take a smaller --batch-size")
    every = [(mine, problem)]
    if world_size > 1:
        every = [None] * world_size
        try:
            dist.all_gather_object(every, (mine, problem))
        except RuntimeError as error:
            raise PeerLost(f"lost another rank ({' '.join(str(error).split())[:100]})") from error
    for _, problem in every:
        if problem:
            raise problem
    return [every[i % world_size][0][i // world_size] for i in range(len(batches))]


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float | None]:
    """(r = Σa / Σb, its standard error over the n pairs, None if n = 1).

    The error is that of the mean of a - r·b, over the mean of b (Cochran, Sampling Techniques, 1977, section 6.4).
    With b = 1 this is a mean and its usual error, s / √n, s with n - 1.
    """
    n, r = len(a), float(a.sum() / b.sum())
    return r, math.sqrt(((a - r * b) ** 2).sum() / (n - 1) / n) / float(b.mean()) if n > 1 else None


def exponential(name: str, mean: float, error: float | None, n: int) -> Metric:
    """exp(mean). Its standard error is exp(mean) times that of the mean: the delta method."""
    value = math.inf if mean > 700 else math.exp(mean)
    return Metric(name, value, error and value * error, n)

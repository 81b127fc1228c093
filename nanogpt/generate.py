"""From a checkpoint to text: a run's weights on one device, without torchrun, and sampling from them."""

import warnings
from pathlib import Path

import torch

from nanogpt import checkpoint, tokenizer
from nanogpt.config import Model
from nanogpt.errors import UserError
from nanogpt.model import GPT


def load_run(path: str | Path, device: torch.device = torch.device("cpu")):
    """(model in evaluation mode, its tokenizer, state.json) of a run folder or a checkpoint, weights alone.

    Raises UserError where there is no complete checkpoint, or where it is damaged.
    """
    path = checkpoint.find(path)
    checkpoint.verify(path)
    state = checkpoint.read_state(path)
    try:
        tok = tokenizer.from_json(state["tokenizer"])
        config = Model.model_validate(state["config"]["model"])
        n_stored = len(checkpoint.SafeReader(path).read_metadata().state_dict_metadata)
        if config.vocab_size < tok.vocab_size or any(config.contradictions()) or config.n_layer > n_stored:
            raise ValueError("its model is none of ours")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}/state.json: damaged ({' '.join(str(error).split())[:200]})") from None
    with torch.device("meta"):
        model = GPT(config)
    checkpoint.fitting_reader(path, checkpoint.tensors(model))  # before there is memory for it
    model.to_empty(device=device)
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP remarks that it loads in a single process
        checkpoint.load(path, model)
    return model.eval(), tok, state


@torch.no_grad()
def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None) -> torch.Tensor:
    """idx (B, T) -> (B, T + max_new_tokens): each next id drawn from softmax(logits / temperature).

    temperature 0 takes the likeliest id; top_k draws from the k likeliest alone. Ids in the padding of the vocabulary
    are never drawn. A text longer than block_size is continued from its last block_size tokens.
    Raises UserError where temperature is negative or not finite, or top_k < 1.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature: {temperature:g} is not a number from 0 on; 0 takes the likeliest token, 1 samples "
                        "as trained")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: {top_k} is below 1; leave it out to draw from all tokens")
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1, :model.config.vocab_size].float()  # (B, vocab_size)
        if top_k is not None and top_k < logits.size(-1):
            least = logits.topk(top_k).values[:, -1:]                                               # (B, 1)
            logits = logits.masked_fill(logits < least, float("-inf"))
        if temperature < 1e-6:  # 0, or so small that logits / temperature would overflow
            new = logits.argmax(-1, keepdim=True)                                                   # (B, 1)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        idx = torch.cat([idx, new], 1)
    return idx

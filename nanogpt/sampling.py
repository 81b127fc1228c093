"""Which token comes next: greedy, or drawn after temperature, top-k, top-p, min-p and a repetition penalty.

The filters, and the order in which they apply, are those of transformers' logits processors.
"""

import math
import sys

from nanogpt.errors import UserError


class Sampling:
    """How each next id is chosen. None leaves a filter out. Raises UserError where a value makes no sense.

    repetition_penalty   r > 1: the logits of ids that stand in the text already are divided by r where positive, else
                         multiplied (CTRL, Keskar et al., 2019)
    temperature          logits / temperature; 0 takes the likeliest id, and draws nothing
    top_k                the k likeliest ids alone
    top_p                the fewest ids whose probabilities add up to p (nucleus sampling, Holtzman et al., 2020)
    min_p                ids at least p times as probable as the likeliest (Nguyen et al., 2024)
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
        self.temperature = number("temperature", temperature, 0, sys.float_info.max,
                                  "0 takes the likeliest token, 1 samples as trained")
        self.top_k = None if top_k is None else whole("top_k", top_k, 1, sys.maxsize, "leave it out to draw from all tokens")
        self.top_p, self.min_p, self.repetition_penalty = (
            None if value is None else number(name, value, low, high, "leave it out to do without")
            for name, value, low, high in (("top_p", top_p, 1e-6, 1), ("min_p", min_p, 0, 1),
                                           ("repetition_penalty", repetition_penalty, 0.01, 100)))
        self.greedy = self.temperature < 1e-6  # or so small that logits / temperature would overflow

    def draw(self, logits, text, generator=None):
        """logits (B, vocab_size) after text (B, n) -> ids (B,)."""
        logits = self.filtered(logits, text)
        if self.greedy:
            return logits.argmax(-1)
        return logits.softmax(-1).multinomial(1, generator=generator).squeeze(1)

    def filtered(self, logits, text):
        """logits (B, vocab_size) after text (B, n) -> those to draw from, -inf for what is left out."""
        out = float("-inf")
        if self.repetition_penalty:
            score = logits.gather(1, text)                                                          # (B, n)
            score = (score / self.repetition_penalty).where(score > 0, score * self.repetition_penalty)
            logits = logits.scatter(1, text, score)
        if self.greedy:
            return logits                                      # what follows leaves the likeliest where it is
        logits = logits / self.temperature
        if self.top_k and self.top_k < logits.size(1):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], out)
        if self.top_p:
            ascending, order = logits.sort()
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[:, -1] = False                            # whatever rounding says, one remains
            logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), out)
        if self.min_p:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.min_p), out)
        return logits


def number(name: str, value, low: float, high: float, hint: str) -> float:
    """value, where it is a number from low to high. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = f"from {low:g} on" if high == sys.float_info.max else f"from {low:g} to {high:g}"
        shown = f"{value:g}" if isinstance(value, float) else repr(value)[:40]
        raise UserError(f"{name}: {shown} is not a number {bounds}; {hint}")
    return value


def whole(name: str, value, low: int, high: int, hint: str) -> int:
    """value, where it is a whole number from low to high. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name}: {value!r:.40} is not a whole number; {hint}")
    if not low <= value <= high:
        raise UserError(f"{name}: {value} is {'below' if value < low else 'above'} {low if value < low else high}; {hint}")
    return value

"""The GPT, top to bottom on one page. It knows nothing of devices, ranks or training.

The architecture is GPT-2's (Radford et al., 2019), with the weight names of nanoGPT: pre-norm blocks, learned
positions, GELU, and one matrix for the token embedding and the head.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.config import Model as ModelConfig
from nanogpt.loss import cross_entropy_sum


def padded(vocab_size: int, multiple: int = 64) -> int:
    """Rows of the embedding: the vocabulary rounded up, so that matmuls tile well. Ids in the padding are never sampled."""
    return -(-vocab_size // multiple) * multiple


def plain_attention(q, k, v, dropout=0.0):
    """Causal attention written out: what F.scaled_dot_product_attention is held against. q, k, v: (B, n_head, T, head)."""
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    future = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))   # (B * n_head, T, T): scale and mask in one
    return (F.dropout(scores.softmax(-1), dropout) @ v).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    fused = True  # False: plain_attention always

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        # In bfloat16 on a CPU the fused kernel is the slower one up to 512 tokens: 5 times at 64, twice at 256.
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512
        if self.fused and not slow:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y = plain_attention(q, k, v, dropout)
        y = y.transpose(1, 2).reshape(B, T, C)                                     # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        """config.vocab_size must be set. Weights are uninitialised: init_weights fills them."""
        super().__init__()
        self.config = config
        rows = padded(config.vocab_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """One matrix for embedding and head (Press & Wolf, 2017). Again after `to_empty`, which parts them."""
        self.lm_head.weight = self.transformer.wte.weight

    def hidden(self, idx):
        """idx (B, T) ids -> (B, T, n_embd): what the head reads."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit in block_size {self.config.block_size}"
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) ids, targets (B, T) ids or -100 -> the sum over targets of -log p in nats, a float32 scalar.

        Without targets: the logits after the last token, (B, 1, rows), all that sampling needs.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:])
        return cross_entropy_sum(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    # ---- weights ----------------------------------------------------------------------------------------------------

    def init_weight(self, name: str, weight: torch.Tensor, generator: torch.Generator):
        """Fills one parameter in place as GPT-2 does: N(0, 0.02), residual projections N(0, 0.02 / √(2·n_layer))."""
        if name.endswith("bias"):
            weight.zero_()
        elif ".ln_" in name:
            weight.fill_(1.0)
        else:
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            weight.normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Fills all parameters. sharding.init_weights does the same, parameter by parameter, on a sharded model."""
        for i, (name, weight) in enumerate(self.named_parameters()):
            self.init_weight(name, weight, torch.Generator(weight.device).manual_seed(seed + i))

    def crop_block_size(self, block_size: int):
        """Cuts the context to block_size tokens, in place (weights trained with a longer one)."""
        assert block_size <= self.config.block_size
        self.config = self.config.model_copy(update=dict(block_size=block_size))
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight.data[:block_size], freeze=False)

    # ---- counts -----------------------------------------------------------------------------------------------------

    def num_params(self, positions: bool = True) -> int:
        """Parameters, the shared embedding once; without learned positions on demand, as nanoGPT counts."""
        return sum(p.numel() for p in self.parameters()) - (0 if positions else self.transformer.wpe.weight.numel())

    def flops_per_token(self) -> int:
        """Of forward and backward: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B), N without positions."""
        c = self.config
        return 6 * self.num_params(positions=False) + 12 * c.n_layer * c.n_embd * c.block_size

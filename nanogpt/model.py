"""The GPT, top to bottom on one page. It knows nothing of devices, ranks or training.

By default it is GPT-2 (Radford et al., 2019), with the weight names of nanoGPT: pre-norm blocks, learned positions,
GELU, and one matrix for the token embedding and the head. By config it is a Llama (Touvron et al., 2023) or a Qwen3:
rotary positions, RMSNorm, SwiGLU, keys and values shared by several heads, an untied head, no biases.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nanogpt.config import Model as ModelConfig
from nanogpt.cpu import RMSNorm, attends_by_hand, by_hand, causal_attention, drop, relu2
from nanogpt.errors import UserError
from nanogpt.loss import cross_entropy_sum, finished


def padded(vocab_size: int, multiple: int = 64) -> int:
    """Rows of the embedding: the vocabulary rounded up, so that matmuls tile well. The padding is never sampled."""
    return -(-vocab_size // multiple) * multiple


def rope_angles(c: ModelConfig, positions):
    """positions (T,) or (B, T) -> (cos, ±sin) of the angles by which the elements of a head are turned: (…, 1, T, head).

    Pair i turns by base^(-2i/head) a token (RoFormer, Su et al., 2021), or more slowly in a stretched context.
    """
    D = c.heads[2]
    speed = c.rope_base ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)  # radians a token
    if c.rope_scaling:
        s = c.rope_scaling
        slow = 1.0 if s.kind == "linear" else (  # llama3: pairs that turn often keep their speed, with a gradual change
            (s.high_freq_factor - s.original_block_size * speed / (2 * math.pi))
            / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        speed = speed * (1 - slow + slow / s.factor)
    angles = positions[..., None, :, None] * speed
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, rope):
    """x (B, heads, T, head): element i and element i + head/2 are a pair, as in Llama."""
    (cos, sin), y = rope, x.float()
    return torch.addcmul(y * cos, y.roll(y.size(-1) // 2, -1), sin).type_as(x)


def plain_attention(q, k, v, dropout=0.0, mask=None):
    """Attention written out: what F.scaled_dot_product_attention is held against. q: (B, n_head, T, head).

    k, v: (B, n_kv_head, S, head), S ≥ T. mask (B, 1, T, S): what each query sees; None: itself, and all before it.
    """
    (B, H, T, D), S = q.shape, k.size(2)
    k, v = (x if x.size(1) == H else x.repeat_interleave(H // x.size(1), 1) for x in (k, v))
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    if mask is None:
        hidden = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1 + S - T)
    else:
        hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf")).expand(B, H, T, S).flatten(0, 1)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))   # (B * n_head, T, S): scale and mask in one
    return (drop(scores.softmax(-1), dropout) @ v).view(B, H, T, D)


def separate_documents(c: ModelConfig, tok, blocks=False):
    """A function of ids (B, T) that gives the positions (B, T) and the mask by which each document is as if alone.

    As an input, end-of-text (beginning-of-text, where the tokenizer has it) begins the next document, at position 0, as it
    does in sampling. blocks: flex_attention's BlockMask, which skips what is hidden, but must be compiled, and has no
    dropout and no narrow or very wide heads; else a bool mask. Without c.mask_documents: (None, None). Raises UserError.
    """
    start = tok.eot if tok.bos is None else tok.bos
    if not c.mask_documents:
        return lambda idx: (None, None)
    if start is None:
        raise UserError(f"model.mask_documents: the {tok.name} tokenizer has no end-of-text between documents; turn it off")
    def separate(idx):
        (B, T), at = idx.shape, torch.arange(idx.size(1), device=idx.device)
        first = torch.where(idx == start, at, 0).cummax(1).values                  # (B, T): where each one's document begins
        if blocks and not c.dropout and 16 <= c.heads[2] <= 128:
            return at - first, create_block_mask(lambda b, h, q, k: (first[b, q] <= k) & (k <= q), B, None, T, T, idx.device)
        return at - first, (first[:, None, :, None] <= at) & (at <= at[:, None])
    return separate


def make_norm(c: ModelConfig) -> nn.Module:
    if c.norm == "rmsnorm":
        return RMSNorm(c.n_embd, eps=c.norm_eps)
    return nn.LayerNorm(c.n_embd, eps=c.norm_eps, bias=c.bias)


class CausalSelfAttention(nn.Module):
    fused = True  # False: plain_attention always

    def __init__(self, config: ModelConfig):
        super().__init__()
        (H, K, D), C = config.heads, config.n_embd  # K < H: grouped queries (Ainslie et al., 2023)
        bias = config.bias if config.attention_bias is None else config.attention_bias
        self.widths, self.head_dim = (H * D, K * D, K * D), D
        self.dropout = config.dropout
        self.c_attn = nn.Linear(C, (H + 2 * K) * D, bias=bias)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(H * D, C, bias=bias)
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None  # Henry et al., 2020
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None

    def by_head(self, x, rope=None):
        """x (B, T, n_embd) -> q (B, n_head, T, head), k and v (B, n_kv_head, T, head)."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.c_attn(x).split(self.widths, -1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def forward(self, x, rope=None, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.by_head(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)                                              # those of all tokens so far
        dropout = self.dropout if self.training else 0.0
        S, shared = k.size(2), q.size(1) // k.size(1)
        # In bfloat16 on a CPU the fused kernel is slow up to 512 tokens: 5 times at 64, twice at 256. And it has no dropout there.
        slow = q.device.type == "cpu" and (dropout > 0 or q.dtype == torch.bfloat16 and T <= 512)
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=shared > 1)
        elif (self.fused and mask is None and 1 < T == S and by_hand(q)
              and attends_by_hand(T, q.dtype == torch.bfloat16, dropout)):
            y = causal_attention(q, *(x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v)), dropout)
        elif self.fused and not slow:
            if shared > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):  # no kernel but the slow one has it
                k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
            if mask is None and 1 < T < S:                                         # torch would align the corner at the top
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1, enable_gqa=shared > 1)
        else:
            y = plain_attention(q, k, v, dropout, mask)
        y = y.transpose(1, 2).reshape(B, T, -1)                                    # heads side by side again
        return drop(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.kind == "swiglu":                                                  # Shazeer, 2020
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        elif self.kind == "relu2":
            x = relu2(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return drop(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        """config.vocab_size must be set. Weights are uninitialised: init_weights fills them."""
        super().__init__()
        self.config = config
        rows = padded(config.vocab_size)
        self.transformer: Any = nn.ModuleDict(dict(wte=nn.Embedding(rows, config.n_embd)))
        if config.position == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """One matrix for embedding and head (Press & Wolf, 2017). Again after `to_empty`, which parts them."""
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def hidden(self, idx, positions=None, mask=None, cache=None):
        """idx (B, T) ids -> (B, T, n_embd): what the head reads.

        positions (T,) or (B, T), from 0 on; mask (B, 1, T, S), bool or BlockMask: what each id sees (None: all before it);
        cache[i].append(k, v), each (B, n_kv_head, T, head): keeps those of block i, and returns those of all S tokens.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit in block_size {self.config.block_size}"
        x, rope = self.transformer.wte(idx), None
        if self.config.position == "rope":
            rope = rope_angles(self.config, torch.arange(T, device=idx.device) if positions is None else positions)
        else:
            x = x + (self.transformer.wpe.weight[:T] if positions is None else self.transformer.wpe(positions))
        x = drop(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, rope, mask, cache and cache[i])
        return self.transformer.ln_f(x)

    def logits(self, x):
        """x (…, n_embd) -> (…, vocab_size), float32."""
        c = self.config
        return finished(self.lm_head(x), c.vocab_size, c.logit_softcap)[..., :c.vocab_size]

    def forward(self, idx, targets=None, positions=None, mask=None, cache=None):
        """idx (B, T) ids, targets (B, T) ids or -100 -> the sum over targets of -log p in nats, a float32 scalar.

        Without targets: the logits after the last token, (B, 1, vocab_size), all that sampling needs.
        """
        x = self.hidden(idx, positions, mask, cache)
        if targets is None:
            return self.logits(x[:, -1:])
        c = self.config
        return cross_entropy_sum(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), c.vocab_size, c.logit_softcap)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def init_weight(self, name: str, weight: torch.Tensor, generator: torch.Generator):
        """Fills one parameter in place as GPT-2 does: N(0, 0.02), residual projections N(0, 0.02 / √(2·n_layer)).

        With zero_init those begin at 0 (Goyal et al., 2017; Zhang et al., 2019), and so does an untied head (Yang et al., 2022).
        """
        if name.endswith("bias"):
            weight.zero_()
        elif ".ln_" in name or "_norm." in name:
            weight.fill_(1.0)
        elif self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
            weight.zero_()
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
        if self.config.position == "learned":
            self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight.data[:block_size], freeze=False)

    # ---- counts -----------------------------------------------------------------------------------------------------

    def num_params(self, lookups: bool = True) -> int:
        """Parameters, a shared embedding once; on demand without those that are only looked up, as nanoGPT counts."""
        looked_up = [self.transformer.wpe] if self.config.position == "learned" else []
        looked_up += [] if self.config.tied else [self.transformer.wte]
        return sum(p.numel() for p in self.parameters()) - (0 if lookups else sum(e.weight.numel() for e in looked_up))

    def flops_per_token(self) -> int:
        """Of forward and backward: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B), N without lookups."""
        (H, _, D), c = self.config.heads, self.config
        return 6 * self.num_params(lookups=False) + 12 * c.n_layer * H * D * c.block_size

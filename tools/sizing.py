"""What a GPT is made of: parameters, FLOPs and bytes, component by component.

    python tools/sizing.py configs/gpt2_124m.yaml
    python tools/sizing.py configs/gpt2_124m.yaml --gpu A100 --gpus 8 --mfu 0.3 --out sizing.png
    python tools/sizing.py configs/gpt_modern.yaml --model.n_layer 24 --sharding.activation_checkpointing full --json

Any setting of the config may follow as --section.key VALUE. Neither a GPU nor the dataset is needed. FLOPs are those of
matmuls, 2 for each multiply and add, as torch.utils.flop_counter counts them: attention to all tokens, also those that a
causal kernel skips; lookups, norms and activation functions are none. Bytes are those of the whole model, on however many
GPUs; what one of them will hold, and what a run costs on many, tools/plan.py tells.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for plan beside this

from nanogpt.config import load_config  # noqa: E402
from nanogpt.errors import Parser, UserError, run, written_whole  # noqa: E402
from nanogpt.words import duration, short  # noqa: E402
from plan import peak_of, positive, set_vocabulary, with_settings  # noqa: E402

WORDS = {"wte": "token embedding", "wpe": "positions", "ln_1": "norm", "attn.c_attn": "queries, keys, values",
         "attn.q_norm": "norm of queries", "attn.k_norm": "norm of keys", "attn.scores": "queries x keys",
         "attn.values": "scores x values", "attn.c_proj": "projection", "ln_2": "norm", "mlp.c_fc": "up",
         "mlp.c_proj": "down", "ln_f": "norm", "lm_head": "head"}  # by name in the model, in the order of the data


def main():
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2],
                    usage="%(prog)s CONFIG [options] [--section.key VALUE …]")
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML of configs/, or your own")
    add("--gpus", type=positive(int), default=1, metavar="N", help="GPUs among which the time is shared")
    add("--gpu", default="H100", metavar="NAME", help="which GPU; a part of its name, as A100, H200, L40S")
    add("--mfu", type=positive(float), default=0.4, metavar="SHARE", help="share of its bfloat16 peak that is reached")
    add("--vocab-size", type=positive(int), metavar="N", help="ids (default: the config's, the dataset's, or GPT-2's)")
    add("--out", metavar="FILE", help="draw the shares of the components: .png, .svg or .pdf")
    add("--json", action="store_true", help="all figures as one JSON object")
    args, settings = with_settings(parser)
    peak = peak_of(args.gpu, args.mfu)
    if args.out and not args.out.endswith((".png", ".svg", ".pdf")):
        raise UserError(f"--out: {args.out} ends neither in .png nor in .svg or .pdf")
    # How the model is spread is not the question here, and one process may be too few for it.
    config = load_config([args.config, *settings, "--sharding.strategy=full", "--sharding.shard_size=null"])
    notes = set_vocabulary(config, args.vocab_size)
    found = sizing(config)
    found["time"] = time_of(found, peak, args.gpus, args.mfu)
    if args.out:
        draw(found, Path(args.out))
    if args.json:
        print(json.dumps(found | dict(notes=notes), indent=1))
    else:
        print("\n".join([*(f"note: {note}" for note in notes), table(found, args)]))


def sizing(config) -> dict:
    """All counts of config.model (vocab_size set) and of a step of its training. FLOPs are a token's unless they say otherwise.

    components: {name: dict(count, parameters, trained, forward, backward, weights, gradients, optimizer)}, of all `count`
    blocks that have it together; the last three in bytes. activations: [(tensor, bytes a token and block)] that wait for
    backward, on a GPU, in the config's mode of recomputing.
    """
    import torch

    from nanogpt import memory
    from nanogpt.meter import recomputed_flops
    from nanogpt.model import GPT
    with torch.device("meta"):
        model = GPT(config.model)
    m, t, (H, _, D) = config.model, config.train, config.model.heads
    matmul = 2 * H * D * m.block_size  # of a token's queries with all keys, and of its scores with all values
    layers, trained_layers, names = m.n_layer, m.n_layer - t.freeze_blocks, {}
    for name, shape, there, trained in sum(memory.parameters(config), []):
        of = names.setdefault(component(name), dict.fromkeys(KEYS, 0))
        n, states = shape.numel(), memory.moments(config, name, shape)
        step = 4 * (states == 2)  # AdamW's count of steps, of each tensor
        of |= dict(count=there, parameters=of["parameters"] + n * there, trained=of["trained"] + n * trained,
                   weights=of["weights"] + 4 * n * there, gradients=of["gradients"] + 4 * n * trained,
                   optimizer=of["optimizer"] + (4 * n * states + step) * trained)
        if len(shape) == 2 and ".wte." not in name and ".wpe." not in name:
            of |= dict(forward=2 * n * there, backward=4 * n * trained)  # gradients of its input and of itself
    for name in ("attn.scores", "attn.values"):
        names[name] = dict.fromkeys(KEYS, 0) | dict(
            count=layers, forward=matmul * layers, backward=2 * matmul * trained_layers)
    if m.tied:  # the embedding once more, as a head
        head = 2 * model.lm_head.weight.numel()
        names["lm_head"] = dict.fromkeys(KEYS, 0) | dict(count=1, forward=head, backward=head * (1 if t.freeze_blocks else 2))
    components = {name: names[name] for name in WORDS if name in names}
    forward, backward = (sum(of[way] for of in components.values()) for way in ("forward", "backward"))
    mode = config.sharding.activation_checkpointing
    tokens, params = t.sequences(config.max_steps) * m.block_size or None, model.num_params()
    return dict(config=config.run.name, components=components, parameters=params, layers=layers, tied=m.tied,
                forward=forward, backward=backward, recomputed=recomputed_flops(model, mode), six_n=6 * params,
                palm=model.flops_per_token(), optimizer_flops_a_step=muon_flops(config, model) * trained_layers,
                tokens_per_step=config.tokens_per_step, tokens=tokens, mode=mode, element=memory.element(config),
                micro_tokens=t.micro_batch_size * m.block_size, activation_bytes=memory.activations(config),
                activations=[(name, n) for name, n, modes in memory.kept(config, True) if mode[0] in modes and n])


KEYS = ("count", "parameters", "trained", "forward", "backward", "weights", "gradients", "optimizer")


def component(name: str) -> str:
    """transformer.h.0.attn.c_attn.weight -> attn.c_attn"""
    return name.removeprefix("transformer.").removeprefix("h.0.").rpartition(".")[0]


def muon_flops(config, model) -> int:
    """FLOPs of making the matrices of a block orthogonal: five times x xᵀ, its square, and that with x (optim.orthogonal)."""
    from nanogpt.optim import heights
    block, flops = model.transformer.h[0], 0
    for p in block.parameters():
        for rows in heights(block, p) if config.optim.name == "muon" and p.dim() == 2 else ():
            few, many = sorted((rows, p.size(1)))
            flops += 5 * 2 * few * few * (2 * many + few)
    return flops


def time_of(f: dict, peak: float, gpus: int, mfu: float) -> dict:
    """Seconds of a step and of the run, by the exact count and by 6 N D, if gpus reach the share mfu of their peak."""
    rate, a_token = gpus * peak * mfu, f["forward"] + f["backward"]
    step = (a_token * f["tokens_per_step"]) / rate
    return dict(step_s=step, run_s=f["tokens"] and f["tokens"] * a_token / rate,
                run_by_6nd_s=f["tokens"] and f["tokens"] * f["six_n"] / rate)


# ---- words ----------------------------------------------------------------------------------------------------------

def table(f: dict, args) -> str:
    parts, a_token, params = f["components"], f["forward"] + f["backward"], f["parameters"]
    rows = [("", "parameters", "share", "forward", "backward", "share", "a step", "weights", "gradients", "optimizer"),
            ("", "", "", "FLOP a token", "", "", "TFLOP", "MiB", "", "")]
    def row(name, *of):
        p, fwd, bwd, *size = (sum(part[key] for part in of) for key in
                              ("parameters", "forward", "backward", "weights", "gradients", "optimizer"))
        return (name, f"{p:,}" if p else "-", f"{p / params:.2%}" if p else "", f"{fwd:,}" if fwd else "-",
                f"{bwd:,}" if fwd else "-", f"{(fwd + bwd) / a_token:.2%}" if fwd else "",
                f"{(fwd + bwd) * f['tokens_per_step'] / 1e12:,.3f}" if fwd else "-",
                *(f"{n / 2**20:,.2f}" if n else "-" for n in size))
    def named(name):
        tied = ", the embedding again" if name == "lm_head" and f["tied"] else ""
        return f"{name}  {WORDS[name]}{tied}"
    blocks = {name: of for name, of in parts.items() if name not in ("wte", "wpe", "ln_f", "lm_head")}
    rows += [row(named(name), parts[name]) for name in ("wte", "wpe") if name in parts]
    rows += [row(f"{f['layers']} blocks", *blocks.values()), *(row(f"  {named(name)}", of) for name, of in blocks.items()),
             *(row(named(name), parts[name]) for name in ("ln_f", "lm_head") if name in parts), row("all", *parts.values())]
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    lines = [f"{f['config']}: {params / 1e6:,.2f}M parameters", ""]
    lines += ["  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
              for line in rows]
    if f["optimizer_flops_a_step"]:
        lines += [f"and Muon, once a step: {f['optimizer_flops_a_step'] / 1e12:,.3f} TFLOP, "
                  f"{f['optimizer_flops_a_step'] / (a_token * f['tokens_per_step']):.2%} of it"]
    if f["recomputed"]:
        lines += [f"and recomputed in backward ({f['mode']}): {f['recomputed']:,} FLOP a token"]

    lines += ["", f"{'A token, forward and backward':<46}{'FLOP':>16}{'against exact':>15}"]
    lines += [f"{name:<46}{n:>16,}{n / a_token - 1:>+15.2%}" for name, n in (
        ("exact, of matmuls", a_token), ("6 N, of all parameters", f["six_n"]),
        ("6 N + 12 L H Q T without lookups, as for MFU", f["palm"]))]

    lines += ["", f"Kept for backward on a GPU, recomputing {f['mode']}: bytes a token of a block, and MiB of a micro-batch "
              "in all"]
    for name, n in [*f["activations"], (f"{f['layers']} blocks", sum(n for _, n in f["activations"]))]:
        lines += [f"  {name:<44}{n:>16,.0f}{n * f['layers'] * f['micro_tokens'] / 2**20:>15,.2f}"]
    lines += [f"  {'with embedding, last norm and ids':<44}{'':>16}{f['activation_bytes'] / 2**20:>15,.2f}"]
    kept = sum(of["weights"] + of["optimizer"] for of in parts.values())
    lines += ["", f"A checkpoint: {kept / 2**20:,.1f} MiB, weights and optimizer; exported in bfloat16: "
              f"{2 * params / 2**20:,.1f} MiB"]
    when, rest = f["time"], f"at {args.mfu:.0%} of {args.gpus} x {args.gpu}'s peak (assumed, not measured)"
    lines += [f"A step of {f['tokens_per_step']:,} tokens: {a_token * f['tokens_per_step'] / 1e12:,.3f} TFLOP, "
              f"{when['step_s']:.3g} s {rest}"]
    if f["tokens"]:
        lines += [f"The run's {short(f['tokens'])} tokens: {a_token * f['tokens']:.3g} FLOP, {duration(when['run_s'])}; by "
                  f"6 N D {f['six_n'] * f['tokens']:.3g} FLOP, {duration(when['run_by_6nd_s'])}"]
    return "\n".join(lines)


def draw(f: dict, out: Path):
    """One bar each for parameters, FLOPs and bytes, of the components' shares."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    parts, kinds = f["components"], {"parameters": ("parameters",), "FLOPs": ("forward", "backward"),
                                     "bytes that last": ("weights", "gradients", "optimizer")}
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    shown = [name for name, of in parts.items() if of["parameters"] > f["parameters"] / 100 or of["forward"]]
    lefts, colors = [0.0] * len(kinds), plt.cm.tab20.colors
    for name, color in zip([*shown, "positions, norms"], colors):
        these = [parts[name]] if name in parts else [of for other, of in parts.items() if other not in shown]
        shares = [100 * sum(of[key] for of in these for key in keys) / sum(of[key] for of in parts.values() for key in keys)
                  for keys in kinds.values()]
        bars = axes.barh(list(kinds), shares, left=lefts, color=color, edgecolor="white", label=f"{name}: {WORDS[name]}"
                         if name in WORDS else name)
        axes.bar_label(bars, [f"{share:.0f}" if share > 3 else "" for share in shares], label_type="center", fontsize=8)
        lefts = [left + share for left, share in zip(lefts, shares)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
    axes.set_title(f"{f['config']}: {f['parameters'] / 1e6:,.2f}M parameters, "
                   f"{(f['forward'] + f['backward']) / 1e9:,.3f} GFLOP a token")
    axes.spines[["right", "top"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with written_whole(out) as file:
        figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run(main)

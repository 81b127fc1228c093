"""What a run will take, before a cent is spent: memory, time, cost, and how it scales.

    python tools/plan.py configs/gpt2_1558m.yaml --gpus 8 --gpu-memory 80
    python tools/plan.py configs/gpt2_124m.yaml --gpus 64 --gpu-memory 40 --gpu A100 --price 1.80 --mfu 0.45
    python tools/plan.py configs/gpt2_350m.yaml --gpus 8 --gpu-memory 80 --sharding.strategy full --train.micro_batch_size 24

Any setting of the config may follow as --section.key VALUE. Neither a GPU nor the dataset is needed. Memory is that of
nanogpt/memory.py, held against what a CPU's allocator hands out in the tests. Speed is no measurement: it is the --mfu
that you state, and a model of communication which is printed with all that it assumes.

That model against published figures: Llama 3.1 8B, fully sharded, 2 x 8192 tokens a GPU, compiled, on H100s by torchtitan
(December 2024) ran at 6,667 tokens/s a GPU on 8, and at 6,514 on 128, 97.7 %; eager at 5,762 and 5,605, 97.3 %. The model
says 99.6 %: it knows neither jitter nor GPUs that wait for the slowest. What one node reaches, it is told by --mfu.
"""

import json
import math
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for scaling_laws beside this

from nanogpt.config import load_config  # noqa: E402
from nanogpt.errors import Parser, UserError, run  # noqa: E402
from nanogpt.words import duration, short  # noqa: E402

# GB/s a GPU in one direction, from the vendors' data sheets: NVLink within a node; between nodes InfiniBand, one port each.
# Others have neither: PCIe 4 and 100 Gb/s.
NETWORK = {"A100": (300, 25), "A800": (200, 25), "H800": (200, 50), "H100 PCIe": (64, 25), "H100": (450, 50),
           "H200": (450, 50), "GB200": (900, 50), "B200": (900, 50)}
OTHERS = (32, 12.5)
REACHED = 0.8    # share of a link's bandwidth
HIDDEN = 0.8     # share of communication that goes on behind computing
HOP_S = 10e-6    # seconds from node to node, in each collective


def main():
    parser = Parser(description=__doc__,
                    usage="%(prog)s CONFIG --gpus N --gpu-memory GIB [options] [--section.key VALUE …]")
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML of configs/, or your own")
    add("--gpus", type=positive(int), required=True, metavar="N", help="GPUs in all")
    add("--gpu-memory", type=positive(float), required=True, metavar="GIB", help="memory of each in GiB")
    add("--gpus-per-node", type=positive(int), default=8, metavar="N", help="GPUs of a machine")
    add("--gpu", default="H100", metavar="NAME", help="which GPU; a part of its name, as A100, H200, L40S")
    add("--mfu", type=positive(float), default=0.4, metavar="SHARE",
        help="share of the GPU's bfloat16 peak that a node reaches, recomputation counted as work")
    add("--price", type=positive(float), metavar="USD", help="of a GPU for an hour")
    add("--vocab-size", type=positive(int), metavar="N",
        help="ids of the tokenizer (default: the config's, the "
        "dataset's, or GPT-2's)")
    add("--json", action="store_true", help="all figures as one JSON object")
    args, settings = with_settings(parser)
    args.peak = peak_of(args.gpu, args.mfu)
    found = plan(*read(args, settings), args)
    print(json.dumps(found, indent=1) if args.json else table(found, args))


def with_settings(parser):
    """(arguments, [--section.key, VALUE, …]) of a command that takes both. Raises UserError: a word is neither."""
    args, settings = parser.parse_known_args()
    for i, word in enumerate(settings):
        value = i and settings[i - 1].startswith("--") and "=" not in settings[i - 1]
        if not value and not (word.startswith("--") and "." in word):
            raise UserError(f"{word}: no option of this tool, nor a setting, as --section.key VALUE (see its --help)")
    return args, settings


def peak_of(gpu: str, mfu: float) -> float:
    """Bfloat16 FLOP/s of --gpu. Raises UserError where it is not known, or --mfu no share."""
    from nanogpt.meter import PEAK_TFLOPS
    if mfu > 1:
        raise UserError(f"--mfu: {mfu:g} is no share; take 0.4 for 40 %")
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    if not peak:
        raise UserError(f"--gpu: {gpu} is not known; take one of {', '.join(PEAK_TFLOPS)}")
    return peak


def positive(kind):
    """An argument above 0."""
    def number(text: str):
        value = kind(text)
        if not 0 < value < 1e9:
            raise ValueError
        return value
    number.__name__ = f"positive {kind.__name__}"
    return number


def read(args, settings: list[str]):
    """(config with its vocab_size, notes for the user). A micro-batch that does not divide the batch is no error here."""
    argv, notes = [args.config, *settings], []
    node = min(args.gpus, args.gpus_per_node)
    if args.gpus % node:
        raise UserError(f"--gpus: {args.gpus} is not a multiple of --gpus-per-node {node}")
    try:
        config = load_config(argv, args.gpus, node)
    except UserError as error:
        config = load_config([*argv, "--train.micro_batch_size=1"], args.gpus, node)  # says itself what else is wrong
        notes.append(f"planned with micro_batch_size 1, because {error}")
    return config, notes + set_vocabulary(config, args.vocab_size)


def set_vocabulary(config, given: int | None = None) -> list[str]:
    """Sets model.vocab_size: given, the config's, the dataset's, or GPT-2's. Returns what else the shape was taken from."""
    m, notes = config.model, []
    if config.run.init_from:
        notes.append(f"run.init_from: the shape of {config.run.init_from} is not looked up; it is as the config has it")
    if given:
        m.vocab_size = given
    if not m.vocab_size:
        there = of_dataset(config)
        m.vocab_size = there or 50257
        notes.append(f"vocabulary of {m.vocab_size:,}, " + ("the dataset's" if there else "GPT-2's: the dataset is not "
                                                            "here, and neither model.vocab_size nor --vocab-size is given"))
    return notes


def of_dataset(config) -> int | None:
    """Size of the vocabulary, where the dataset is on this machine."""
    from nanogpt.shards import load_dataset_card
    folder = config.data.sources[0].path
    try:
        return load_dataset_card(folder)["tokenizer"]["vocab_size"] if (Path(folder) / "dataset.json").exists() else None
    except (UserError, OSError):
        return None


def plan(config, notes: list[str], args) -> dict:
    """All figures: bytes, tokens, seconds, USD."""
    import torch

    from nanogpt import memory
    from nanogpt.meter import recomputed_flops
    from nanogpt.model import GPT
    with torch.device("meta"):
        model = GPT(config.model)
    m, t, gpus, node = config.model, config.train, args.gpus, min(args.gpus, args.gpus_per_node)
    params, flops, room = model.num_params(), model.flops_per_token(), int(args.gpu_memory * 2**30)
    tokens, modes = t.sequences(config.max_steps) * m.block_size or None, {}
    for mode in memory.MODES:
        c = memory.changed(config, activation_checkpointing=mode)
        fits, divides = (memory.largest_micro_batch(c, gpus, node, int(0.9 * room), divides=d) for d in (False, True))
        by_hardware = flops + recomputed_flops(model, mode)
        modes[mode] = dict(bytes=memory.predict(c, gpus, node), largest_micro_batch=fits, largest_that_divides=divides,
                           hardware_flops_per_token=by_hardware, tokens_per_s=gpus * args.mfu * args.peak / by_hardware)
    mode = config.sharding.activation_checkpointing
    scaling = scale(config, args, modes[mode]["hardware_flops_per_token"])
    for found in modes.values():
        found["tokens_per_s"] *= efficiency(config, args, found["hardware_flops_per_token"])
        hours = tokens and tokens / found["tokens_per_s"] / 3600
        found |= dict(hours=hours, usd=hours and args.price and hours * gpus * args.price)
    return dict(config=config.run.name, notes=notes, parameters=params, flops_per_token=flops,
                strategy=config.sharding.strategy, micro_batch_size=t.micro_batch_size,
                accumulation=config.accumulation(gpus), tokens=tokens, chosen=mode,
                tokens_per_step=config.tokens_per_step, modes=modes, host_bytes_a_gpu=memory.host(config, gpus, node),
                chinchilla=chinchilla(params, tokens), scaling=scaling)


def chinchilla(params: int, tokens: int | None) -> dict:
    """What Hoffmann et al. (2022) say: 20 tokens a parameter; and their law, in nats a token of their text and tokenizer."""
    from scaling_laws import PUBLISHED
    law = PUBLISHED["hoffmann"]
    found = dict(tokens=20 * params, loss=law.loss(params, 20 * params))
    if tokens:
        best = law.best(6 * params * tokens)  # of all models for the same compute
        found |= dict(tokens_a_parameter=tokens / params, loss_of_this_run=law.loss(params, tokens), best_parameters=best[0],
                      loss_of_best=law.loss(*best))
    return found


# ---- many GPUs ------------------------------------------------------------------------------------------------------

def network(gpu: str) -> tuple[float, float]:
    """(GB/s of NVLink, of InfiniBand) of a GPU in one direction."""
    return next((speed for name, speed in NETWORK.items() if name in gpu), OTHERS)


def communication(config, gpus: int, node: int, gpu: str) -> float:
    """Seconds of communication in an optimizer step, if nothing of it were hidden, on gpus of nodes of `node`.

    What a GPU receives: of weights that are gathered (bfloat16: 2 bytes a parameter) all but its own, twice a micro-batch,
    for forward and backward; of gradients (float32) the same in a reduce-scatter. An all-reduce is two of these.
    """
    from nanogpt import memory
    blocks, root = memory.parameters(config)
    block, others = (sum(math.prod(shape) * there for _, shape, there, _ in part) for part in (blocks, root))
    (near, far), e, s = network(gpu), memory.element(config), config.sharding
    shards = memory.shards_of(config, gpus, node)
    times, groups = max(1, config.accumulation(gpus)), config.model.n_layer + 1

    def seconds(size: float, ranks: int, collectives: int, apart: int = 1) -> float:
        """Of `size` bytes that each of `ranks`, neighbours or `apart`, ends with: each node takes in what it lacks."""
        nodes = max(1, min(ranks, ranks * apart // node))  # over which a group reaches
        within = size * (1 - 1 / ranks) / near if apart < node else 0
        between = size * (1 - 1 / nodes) / (far * (ranks / nodes)) if nodes > 1 else 0
        return max(within, between) / (REACHED * 1e9) + collectives * (nodes - 1) * HOP_S

    if s.strategy in ("full", "hybrid"):
        gathers = seconds(e * (2 * block + others) * times, shards, (2 * groups - 1) * times)
        reduces = seconds(4 * (block + others) * times, shards, groups * times)
        replicas = gpus // shards
        return gathers + reduces + (replicas > 1) * seconds(
            2 * 4 * (block + others) / shards * times, replicas, 2 * groups * times, apart=shards)
    if s.strategy == "grad":  # weights stay until the end of backward; gradients are summed once a step
        return seconds(e * (block + others) * times, gpus, groups * times) + seconds(4 * (block + others), gpus, groups)
    return seconds(2 * 4 * (block + others), gpus, 2 * groups)


def computing(config, args, flops: float) -> float:
    """Seconds of a step without communication: those in which a node reaches --mfu, less what it does not hide."""
    per_gpu = max(1, config.accumulation(args.gpus)) * config.train.micro_batch_size * config.model.block_size
    step, node = per_gpu * flops / (args.mfu * args.peak), min(args.gpus, args.gpus_per_node)
    return max(0.1 * step, step - (1 - HIDDEN) * communication(alike(config, args.gpus, node), node, node, args.gpu))


def alike(config, gpus: int, others: int):
    """The config with a global batch in which each of `others` GPUs has the work that each of `gpus` had."""
    each = max(1, config.accumulation(gpus)) * config.train.micro_batch_size
    copy = config.model_copy()
    copy.train = config.train.model_copy(update=dict(global_batch_size=each * others, batch_schedule=None))
    return copy


def step_seconds(config, args, flops: float, gpus: int) -> tuple[float, float]:
    """(seconds of a step, of all communication in it) on so many GPUs, each with the same work."""
    node = min(gpus, args.gpus_per_node)
    compute, talk = computing(config, args, flops), communication(alike(config, args.gpus, gpus), gpus, node, args.gpu)
    hidden = min(HIDDEN * talk, compute)
    return compute + talk - hidden, talk


def efficiency(config, args, flops: float) -> float:
    """Speed of a GPU among --gpus, over that of one in a single node."""
    node = min(args.gpus, args.gpus_per_node)
    return step_seconds(config, args, flops, node)[0] / step_seconds(config, args, flops, args.gpus)[0]


def scale(config, args, flops: float) -> list[dict]:
    """Of 8 to 1,024 GPUs with the same work each: step time, its communication, tokens/s, efficiency."""
    per_gpu = max(1, config.accumulation(args.gpus)) * config.train.micro_batch_size * config.model.block_size
    rows, first = [], None
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        if gpus % min(gpus, args.gpus_per_node):
            continue
        step, talk = step_seconds(config, args, flops, gpus)
        first = first or step
        rows.append(dict(gpus=gpus, sequences=per_gpu * gpus // config.model.block_size, step_s=step, communication_s=talk,
                         tokens_per_s_a_gpu=per_gpu / step, efficiency=first / step))
    return rows


# ---- words ----------------------------------------------------------------------------------------------------------

def table(f: dict, args) -> str:
    from nanogpt.memory import gib
    modes, tokens = f["modes"], f"{short(f['tokens'])} tokens" if f["tokens"] else "no end is set"
    lines = [f"note: {note}" for note in f["notes"]]
    lines += [f"{f['config']}: {f['parameters'] / 1e6:,.2f}M parameters, {tokens}, {f['tokens_per_step']:,} a step; "
              f"{args.gpus} x {args.gpu} of {args.gpu_memory:g} GiB, strategy {f['strategy']}",
              f"micro-batch {f['micro_batch_size']}, {f['accumulation']} accumulated; "
              f"{f['flops_per_token'] / 1e9:.3f} GFLOP a token (6 N + attention)", ""]
    rows = [("GiB of a GPU, recomputing", *modes)]
    rows += [(f"  {name}", *(gib(of["bytes"][name]) for of in modes.values()))
             for name in modes["none"]["bytes"] if any(of["bytes"][name] for of in modes.values())]
    rows += [("  peak", *(gib(sum(of["bytes"].values())) for of in modes.values())),
             ("largest micro-batch", *(str(of["largest_micro_batch"] or "none fits") for of in modes.values())),
             ("  that divides the batch", *(str(of["largest_that_divides"] or "none fits") for of in modes.values())),
             ("GFLOP a token by hardware", *(f"{of['hardware_flops_per_token'] / 1e9:.3f}" for of in modes.values())),
             (f"tokens/s at {args.mfu:.0%}", *(short(of["tokens_per_s"]) for of in modes.values()))]
    if f["tokens"]:
        rows += [("time", *(duration(3600 * of["hours"]) for of in modes.values()))]
    if f["tokens"] and args.price:
        rows += [(f"USD at {args.price:g} a GPU-hour", *(f"{of['usd']:,.0f}" for of in modes.values()))]
    lines += [f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows]
    lines += [f"(the config has {f['chosen']}; a micro-batch fits when the peak is within 90 % of the memory: CUDA, NCCL "
              "and gaps take some)",
              f"host memory a GPU: {gib(f['host_bytes_a_gpu'])} GiB, for an asynchronous save and what is offloaded", ""]
    c = f["chinchilla"]
    lines += [f"Chinchilla (Hoffmann et al., 2022): 20 tokens a parameter are {short(c['tokens'])} tokens; "
              f"loss {c['loss']:.3f} by their fit, of their text and tokenizer"]
    if f["tokens"]:
        lines += [f"  this run: {c['tokens_a_parameter']:.1f} tokens a parameter, {c['loss_of_this_run']:.3f}; the best "
                  f"model for its compute: {short(c['best_parameters'])} parameters, {c['loss_of_best']:.3f}"]
    if f["scaling"]:
        each, (near, far) = f["scaling"][0]["sequences"] // f["scaling"][0]["gpus"], network(args.gpu)
        lines += ["", f"Many GPUs, each with the same {each} sequences a step; seconds of a step, and of its communication:",
                  f"{'GPUs':>6}{'sequences':>11}{'step':>9}{'comm.':>9}{'tokens/s/GPU':>14}{'efficiency':>12}"]
        lines += [f"{r['gpus']:>6}{r['sequences']:>11,}{r['step_s']:>9.3f}{r['communication_s']:>9.3f}"
                  f"{r['tokens_per_s_a_gpu']:>14,.0f}{r['efficiency']:>12.1%}" for r in f["scaling"]]
        lines += [f"assumed, not measured: {args.mfu:.0%} of {args.peak / 1e12:.0f} TFLOP/s in a node of "
                  f"{args.gpus_per_node}; {near:g} GB/s a GPU there and {far:g} between",
                  f"nodes, {REACHED:.0%} of it reached; {HIDDEN:.0%} of communication hidden behind computing; "
                  f"{HOP_S * 1e6:.0f} µs a node in each collective; no",
                  "jitter, no slow link (--help holds it against published figures)"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)

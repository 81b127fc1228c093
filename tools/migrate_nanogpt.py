"""nanoGPT's settings, a command line or a config file -> one of our YAML configs.

    python tools/migrate_nanogpt.py ../nanoGPT/config/train_gpt2.py > configs/mine.yaml
    python tools/migrate_nanogpt.py --out configs/mine.yaml python train.py config/train_shakespeare_char.py --device=cpu
    python tools/migrate_nanogpt.py --out configs/mine.yaml torchrun --nproc_per_node=8 train.py config/train_gpt2.py

A config of nanoGPT's is a program. Here it is read, and nothing of it is run: assignments of numbers, texts, True and False,
of sums and products of these and of names that have a value (5 * 8, batch_size * 2), and str(). Whatever else it holds is
named, with its line, and nothing is written. What nobody set has the value of nanoGPT's own train.py. What has no equivalent
is told once, with the reason, on stderr; so are the commands that make the data, and start the run.
"""

import ast
import difflib
import operator
import os
import re
import shlex
import sys
import tempfile
from argparse import REMAINDER
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run, written_whole

# What nanoGPT's train.py has where nobody says otherwise. (bfloat16: or float16, on a GPU without it.)
DEFAULTS = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from="scratch", wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext",
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
    warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend="nccl", device="cuda", dtype="bfloat16", compile=True)
POSITIVE = {"eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps", "batch_size", "block_size", "n_layer",
            "n_head", "n_embd", "max_iters", "lr_decay_iters", "learning_rate"}


def main():
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2],
                    usage="%(prog)s [--out FILE] CONFIG.py … | [python | torchrun …] train.py [CONFIG.py] [--key=value …]")
    parser.add_argument("--out", metavar="FILE", help="the YAML to write (default: standard output)")
    parser.add_argument("command", nargs=REMAINDER, metavar="COMMAND", help="as it was typed for nanoGPT, in its folder or "
                        "with paths from here; or its config files alone")
    args = parser.parse_args()
    if not args.command:
        raise UserError("what to read is missing: a config of nanoGPT's, or its command, as train.py CONFIG.py --key=value")
    out = Path(args.out) if args.out else None
    if out and out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out: {out} does not end in .yaml")
    if out and out.exists():
        raise UserError(f"{out}: is there already; take another --out")
    ranks, theirs, given, notes = read_command(args.command)
    name = out.stem if out else "migrated"
    ours, more = translate(theirs, given, ranks, name)
    text = yaml_text(ours, args.command)
    check(text, ranks, name)
    if out:
        with written_whole(out) as file:
            file.write_text(text, encoding="utf-8")
    else:
        print(text, end="", flush=True)
    for note in notes + more:
        print(f"note: {note}", file=sys.stderr)
    for line in commands(theirs, args.command, ranks, out or Path("CONFIG.yaml")):
        print(line, file=sys.stderr)


# ---- reading, without running ---------------------------------------------------------------------------------------

def read_command(words: list[str]) -> tuple[int, dict, dict, list[str]]:
    """(ranks, values of all settings, {those that were given: where}, notes) of nanoGPT's command or config files.

    Raises UserError with a line for each thing that could not be read.
    """
    start = script_at(words)
    ranks, values, given, notes, problems = ranks_of(words[:max(0, start)]), dict(DEFAULTS), {}, [], []
    for word in words[start + 1:]:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            read_file(Path(word), values, given, notes, problems)
        elif not equals:
            problems.append(f"{word}: nanoGPT takes --key=value, in one word")
        elif key not in DEFAULTS:
            problems.append(f"--{key}: no setting of nanoGPT's train.py{meant(key)}")
        else:
            try:
                value = ast.literal_eval(text)
            except Exception:  # as there, it is the text then
                value = text
            assign(key, value, f"--{key}", values, given, problems)
    if problems:
        raise UserError("\n".join(problems))
    return ranks, values, given, notes


def script_at(words: list[str]) -> int:
    """Where train.py stands in a command; -1: config files alone."""
    return next((i for i, word in enumerate(words) if Path(word).name == "train.py"), -1)


def ranks_of(words: list[str]) -> int:
    """Processes of a torchrun: nnodes x nproc_per_node."""
    counts = dict(nnodes=1, nproc_per_node=1)
    for word, after in zip(words, [*words[1:], ""]):
        key, equals, value = word.lstrip("-").replace("-", "_").partition("=")
        if key in counts and word.startswith("-"):
            value = value if equals else after
            if not re.fullmatch(r"[1-9]\d{0,5}", value):
                raise UserError(f"{word}: {value!r:.40} is not a number of processes; write how many there are")
            counts[key] = int(value)
    return counts["nnodes"] * counts["nproc_per_node"]


def read_file(path: Path, values: dict, given: dict, notes: list[str], problems: list[str]):
    """Takes over what a config file assigns."""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(1 << 20))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); paths are taken from the folder you are in") from None
    except Exception as error:  # SyntaxError, ValueError, RecursionError, MemoryError
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise UserError(f"{path}: {line}not Python ({type(error).__name__}: {getattr(error, 'msg', error)})") from None
    names = dict(values)  # and its own helpers
    for statement in tree.body:
        where = f"{path}: line {statement.lineno}"
        try:
            match statement:
                case ast.Expr(value=ast.Constant()) | ast.Import(names=[ast.alias(name="time", asname=None)]):
                    continue  # a docstring; for str(time.time()) in a name
                case ast.Assign(targets=[ast.Name(id=key)], value=node):
                    names[key] = value_of(node, names)
                case _:
                    raise Unreadable(statement)
        except Unreadable as error:
            problems.append(f"{where}: {shown(error.args[0])} would have to be run, and nothing is; write the value it has")
            continue
        except (ArithmeticError, ValueError, RecursionError) as error:
            problems.append(f"{where}: {shown(statement)} cannot be worked out ({error})")
            continue
        if key in DEFAULTS:
            assign(key, names[key], f"{where}: {key}", values, given, problems)
            names[key] = values[key]
        else:
            notes.append(f"{where}: {key} is no setting of nanoGPT's, only a name in its file{meant(key)}")


class Unreadable(Exception):
    """A piece of a program that is no value."""


SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def value_of(node: ast.expr, names: dict):
    """The number, text or truth that an expression of literals, known names, arithmetic and str() is. Raises Unreadable."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(value_of(operand, names))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value_of(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SUMS:
            left, right = value_of(left, names), value_of(right, names)
            if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add):
                return (left + right)[:10000]
            value = SUMS[type(op)](number(left), number(right, 64 if isinstance(op, ast.Pow) else 1e18))
            return number(value)
        case ast.Call(func=ast.Name(id="str"), args=[inner], keywords=[]) if isinstance(inner, ast.Call):
            if ast.unparse(inner) == "time.time()":  # a name for each start; here one is kept over all restarts
                return ""
        case ast.Call(func=ast.Name(id="str"), args=[inner], keywords=[]):
            return str(value_of(inner, names))
    raise Unreadable(node)


def number(value, limit: float = 1e18):
    """The value, if it is a number that arithmetic cannot make the memory full with. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= limit:
        raise ValueError(f"{value!r:.40} is not a number up to {limit:g}")
    return value


def assign(key: str, value, where: str, values: dict, given: dict, problems: list[str]):
    """Takes over a value of the kind that nanoGPT's own is of."""
    kind = type(DEFAULTS[key])
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
        problems.append(f"{where}: {value!r:.60} is not {words[kind]}, as nanoGPT's own {DEFAULTS[key]!r} is")
    elif kind in (int, float) and not (0 < value < 1e18 if key in POSITIVE else 0 <= value < 1e18):
        problems.append(f"{where}: {value!r:.60} is not {'above 0' if key in POSITIVE else '0 or more'}")
    elif kind is str and (len(value) > 1000 or not value.isprintable()):
        problems.append(f"{where}: {value!r:.60} is too long for a name, or holds control characters")
    else:
        values[key], given[key] = value, where


def meant(key: str) -> str:
    near = difflib.get_close_matches(key, DEFAULTS, 1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def shown(node) -> str:
    try:
        text = " ".join(ast.unparse(node).split())
    except RecursionError:
        text = "an expression of great depth"
    return text if len(text) <= 80 else f"{text[:80]}…"


# ---- into our words -------------------------------------------------------------------------------------------------

def translate(t: dict, given: dict, ranks: int, name: str) -> tuple[dict, list[str]]:
    """(our settings {section: {key: value}}, notes of what is otherwise, or has no equivalent) of nanoGPT's values t."""
    notes = []
    if t["gradient_accumulation_steps"] % ranks:
        raise UserError(f"gradient_accumulation_steps: nanoGPT divides it by its {ranks} processes, and "
                        f"{t['gradient_accumulation_steps']} cannot be; it would not start either")
    ours = dict(
        run=dict(), data=dict(path=f"data/{t['dataset'].strip('/')}"), model=shape_of(t, given),
        optim={} if t["eval_only"] else optim_of(t, notes),
        train=dict(max_steps=t["max_iters"], global_batch_size=t["batch_size"] * t["gradient_accumulation_steps"],
                   micro_batch_size=t["batch_size"]),
        eval=dict(interval=t["eval_interval"], sequences=t["eval_iters"] * t["batch_size"]),
        checkpoint=dict(interval=t["eval_interval"]), log=dict(interval=t["log_interval"]))
    if ranks > 1:
        ours["sharding"] = dict(strategy="replicate")  # as DDP
    if t["eval_only"]:  # nothing is trained, and nothing saved
        ours = {key: ours[key] for key in ("run", "data", "model", "train", "eval", "log")}
        ours["train"] = dict(micro_batch_size=t["batch_size"])
        ours["eval"] = dict(only=True, sequences=ours["eval"]["sequences"])
    if "compile" in given:  # else where it gains something
        ours["train"]["compile"] = t["compile"]

    # Where it is, and what it is called.
    if "wandb_run_name" in given and (called := re.sub(r"[^\w.-]+", "-", t["wandb_run_name"]).strip("-.")):
        ours["run"]["name"] = name = called
        if called != t["wandb_run_name"]:
            notes.append(f"wandb_run_name: {called} here: it names the run folder too, and a restart must find it again")
    if "out_dir" in given:
        ours["run"]["dir"] = t["out_dir"]
    if t["wandb_log"]:
        ours["log"] |= dict(wandb="online", wandb_project=t["wandb_project"])
    elif "wandb_project" in given:
        ours["log"]["wandb_project"] = t["wandb_project"]

    # Where it starts from.
    if t["init_from"] == "resume":
        ours["run"]["init_from"] = f"runs/{name}_nanogpt"
        notes.append("init_from='resume': the same command resumes here by itself, but its own checkpoints: of nanoGPT's take "
                     f"the weights, by python tools/convert_nanogpt.py --checkpoint {shlex.quote(t['out_dir'] + '/ckpt.pt')} "
                     f"--out runs/{name}_nanogpt; moments of AdamW and the step do not come with them, so steps count from 0")
    elif t["init_from"].startswith("gpt2"):
        ours["run"]["init_from"] = f"hf:{t['init_from']}"
    elif t["init_from"] != "scratch":
        raise UserError(f"init_from: {t['init_from']!r:.60} is nothing that nanoGPT knows; it is scratch, resume, or gpt2, "
                        "gpt2-medium, gpt2-large, gpt2-xl")

    # What it runs on.
    device = t["device"].partition(":")
    if device[0] not in ("cuda", "cpu", "mps"):
        raise UserError(f"device: {t['device']!r:.60} is not cuda, cpu or mps")
    if device[0] == "mps":
        notes.append("device='mps': FSDP has no Apple GPUs; it is the CPU here")
    if device[2] not in ("", "0"):
        notes.append(f"device={t['device']!r}: which GPUs there are, CUDA_VISIBLE_DEVICES={device[2]} tells, before the "
                     "command")
    if device[0] != "cuda" or "device" in given:
        ours["run"]["device"] = "cuda" if device[0] == "cuda" else "cpu"
    ours["train"]["precision"] = "float32" if device[0] == "cpu" or t["dtype"] == "float32" else "auto"
    if device[0] == "cpu" and t["dtype"] != "float32":
        notes.append("dtype: on a CPU nanoGPT computes in float32 whatever it says, and so does this; "
                     "train.precision auto takes bfloat16 where that is quicker")
    elif t["dtype"] == "float16":
        notes.append("dtype='float16': it is bfloat16 here, as precise as needed and without a loss to scale")
    elif t["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"dtype: {t['dtype']!r:.60} is not float32, bfloat16 or float16")
    if "backend" in given:
        notes.append(f"backend={t['backend']!r}: not set here: NCCL among GPUs, gloo among CPUs")

    # What is kept.
    if not t["always_save_checkpoint"] and not t["eval_only"]:
        ours["checkpoint"]["keep_best"] = True
        notes.append("always_save_checkpoint=False: the one with the lowest validation loss is kept, as checkpoints/best; the "
                     "newest two are too, because a run resumes from them")
    notes.append(f"eval_iters: {t['eval_iters']} random batches of {t['batch_size']} are the same "
                 f"{t['eval_iters'] * t['batch_size']:,} sequences each time here")
    return {section: kept for section, values in ours.items() if (kept := of_note(section, values, given))}, notes


def of_note(section: str, values: dict, given: dict) -> dict:
    """Without what was not given and is our default."""
    from nanogpt.config import Config
    theirs = {"max_steps": "max_iters", "warmup_steps": "warmup_iters", "decay_steps": "lr_decay_iters"}
    ours = getattr(Config(), section).model_dump()
    return {key: value for key, value in values.items() if theirs.get(key, key) in given or value != ours[key]}


def shape_of(t: dict, given: dict) -> dict:
    """The model. With weights from elsewhere it comes with them, but for dropout and a shorter context."""
    if t["init_from"] == "scratch":
        return {key: t[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")}
    shorter = t["block_size"] < 1024 if t["init_from"] != "resume" else "block_size" in given
    return dict(dropout=t["dropout"]) | (dict(block_size=t["block_size"]) if shorter else {})


def optim_of(t: dict, notes: list[str]) -> dict:
    """AdamW, and the learning rate of each step as nanoGPT's get_lr has it."""
    rest = {key: t[key] for key in ("weight_decay", "beta1", "beta2", "grad_clip")}
    peak, warmup, steps, decay = t["learning_rate"], t["warmup_iters"], t["max_iters"], t["lr_decay_iters"]
    if not t["decay_lr"]:
        return rest | dict(learning_rate=peak, schedule="constant")  # without its warmup too
    if warmup >= steps:  # an end within warmup: the same line, to where it gets
        notes.append(f"warmup_iters: {warmup} is not below max_iters {steps}, so learning_rate {peak:g} is never reached; here "
                     "the line ends where nanoGPT's does")
        return rest | dict(learning_rate=peak * steps / (warmup + 1), schedule="constant", warmup_steps=steps - 1)
    if decay <= warmup:
        raise UserError(f"lr_decay_iters: {decay} is not above warmup_iters {warmup}: nanoGPT falls from its peak to min_lr in "
                        "one step; set either")
    if t["min_lr"] > peak:
        raise UserError(f"min_lr: {t['min_lr']:g} is above learning_rate {peak:g}: nanoGPT's schedule would rise; set either")
    return rest | dict(learning_rate=peak, min_learning_rate=t["min_lr"], warmup_steps=warmup, decay_steps=decay)


# ---- words ----------------------------------------------------------------------------------------------------------

def yaml_text(ours: dict, command: list[str]) -> str:
    """One section a line, as the files of configs/."""
    import yaml
    lines = [f"# From nanoGPT's {' '.join(map(shlex.quote, command))[:1000]}"]
    lines += [yaml.safe_dump({section: values}, default_flow_style=None, sort_keys=False, width=10**6,
                             allow_unicode=True).strip() for section, values in ours.items()]
    return "\n".join(lines) + "\n"


def check(text: str, ranks: int, name: str):
    """Raises UserError where the result is no config of ours."""
    from nanogpt.config import load_config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load_config([str(file)], ranks, ranks)
        except UserError as error:
            raise UserError("\n".join("what nanoGPT was given makes no config here: " + line.removeprefix(f"{file}: ")
                                      for line in str(error).splitlines())) from None


def commands(t: dict, command: list[str], ranks: int, out: Path) -> list[str]:
    """What to type next."""
    folder = shlex.quote(f"data/{t['dataset'].strip('/')}")
    launcher = command[:script_at(command)] if ranks > 1 else ["bash"]
    start = " ".join(map(shlex.quote, [*launcher, "launch/train.sh"]))
    more = "; or from its source: python tools/convert_owt_to_mds.py --out " + folder if t["dataset"] == "openwebtext" else ""
    block = t["block_size"]
    return [f"data:  python tools/convert_nanogpt.py --data NANOGPT/{folder} --block-size {block} --out {folder}{more}",
            f"start: {start} {shlex.quote(os.fspath(out))}"]


if __name__ == "__main__":
    run(main)

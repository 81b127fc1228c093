"""How large a model, and how many tokens, for a budget: Chinchilla's laws, fitted to small runs of your own.

    python tools/scaling_laws.py --run configs/shakespeare_char_cpu.yaml --sizes 2x32 2x64 4x96 4x128 --budgets 1e12 3e12 1e13
    python tools/scaling_laws.py --read runs/scaling --budget 1e15
    python tools/scaling_laws.py --read runs/a runs/b others.csv --gpu-hours 500 --gpu H100 --mfu 0.4
    python tools/scaling_laws.py --law hoffmann --budget 5.76e23

--run trains each size (blocks x width) once for each budget, one run after another, by launch/train.sh with the settings of
CONFIG and those that follow as --section.key VALUE; then it reads them. Killed, the same command goes on where it was. Each
run has a learning rate that ends with it: warmup of at most a tenth of its steps, and the decay of the config over its own
length, because a loss taken in the middle of a decay is that of no budget. The peak is the same for all sizes.

--read takes run folders, folders of such, and CSV files with the columns N, D and loss. A budget is C = 6 N D FLOP, N all
parameters and D the tokens trained on, as in Hoffmann et al. (2022). Two of their three ways are fitted:

  approach 3   L(N, D) = E + A / N^alpha + B / D^beta, to all runs: Huber's loss (delta 0.001) of log L, by L-BFGS from a grid
               of starts. They averaged that loss, and stopped early by it: Besiroglu et al. (2024) found other constants in
               the same data. Here it is a sum, in units of delta.
  approach 2   to runs of the same budget a parabola of the loss in log N, whose lowest point is the best size; and a power
               law through these.

What the runs leave open is told by fitting anew to what chance makes of them: 80 % of such fits lie in the brackets.
"""

import contextlib
import csv
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of a few dozen numbers: threads would only wait for one another
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, Path(__file__).resolve().parents[1::-1])  # for nanogpt, and for plan beside this

from nanogpt.errors import Parser, Stopped, UserError, run, written_whole  # noqa: E402
from nanogpt.words import short  # noqa: E402
from plan import peak_of, positive, set_vocabulary, with_settings  # noqa: E402

DELTA = 1e-3          # of Huber's loss: beyond, a run counts less
FEWEST_STEPS = 20     # of a run of the grid
SAME = 1.2            # budgets that differ by less are one


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n, d):
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def best(self, flops):
        """(parameters, tokens) of the lowest loss with 6 N D = flops (Hoffmann et al., equation 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n


PUBLISHED = {"hoffmann": Law(1.69, 406.4, 410.7, 0.34, 0.28),             # Hoffmann et al., 2022
             "besiroglu": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)}   # Besiroglu et al., 2024, from the same runs


class Point(NamedTuple):
    """A finished run."""
    n: float
    d: float
    loss: float
    name: str

    @property
    def flops(self):
        return 6 * self.n * self.d


def main():
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2],
                    usage="%(prog)s (--run CONFIG --sizes LxW … --budgets FLOP … | --read PATH … | --law NAME) [options]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="CONFIG", help="train a grid of runs, then read it")
    what.add_argument("--read", nargs="+", metavar="PATH", help="run folders, folders of these, CSV files")
    what.add_argument("--law", choices=sorted(PUBLISHED), help="no runs: the law as it was published")
    add = parser.add_argument
    add("--sizes", nargs="+", metavar="LxW", help="with --run: blocks x width, as 4x128; heads are as wide as the config's")
    add("--budgets", nargs="+", type=positive_flops, metavar="FLOP", help="with --run: 6 N D of a run of each size")
    add("--folder", default="runs/scaling", metavar="DIR", help="with --run: where the runs go")
    add("--budget", nargs="+", type=positive_flops, default=[], metavar="FLOP", help="what size and tokens for these?")
    add("--gpu-hours", type=positive(float), metavar="HOURS", help="a budget in hours of one --gpu, at --mfu")
    add("--gpu", default="H100", metavar="NAME", help="which GPU; a part of its name, as A100, H200, L40S")
    add("--mfu", type=positive(float), default=0.4, metavar="SHARE", help="share of its bfloat16 peak that is reached")
    add("--resamplings", type=int, default=200, metavar="N", help="fits for the uncertainty; 0: none")
    add("--out", metavar="FILE", help="the picture, .png, .svg or .pdf (default: scaling_laws.png beside what is read)")
    add("--json", action="store_true", help="all figures as one JSON object")
    args, settings = with_settings(parser)
    if settings and not args.run:
        raise UserError(f"{settings[0]}: settings are for --run")
    if not (bool(args.run) == bool(args.sizes) == bool(args.budgets)):
        raise UserError("--sizes, --budgets: both belong to --run, as in --run CONFIG --sizes 2x64 4x128 --budgets 1e13 1e14")
    if args.out and (args.law or not args.out.endswith((".png", ".svg", ".pdf"))):
        raise UserError(f"--out: {args.out} " + ("shows runs, and --law has none" if args.law else
                                                 "ends neither in .png nor in .svg or .pdf"))
    if not 0 <= args.resamplings <= 10000:
        raise UserError(f"--resamplings: {args.resamplings} is not between 0 and 10000")
    budgets = list(args.budget)
    if args.gpu_hours:
        budgets.append(args.gpu_hours * 3600 * peak_of(args.gpu, args.mfu) * args.mfu)
    if args.law:
        law = PUBLISHED[args.law]
        found = dict(law=law, budgets=[dict(flops=c, answers=[answer("as published", *law.best(c), law.loss(*law.best(c)))])
                                       for c in budgets])
        said = published(args.law, law, found, args)
        print(json.dumps(found | dict(law=law._asdict()), indent=1) if args.json else "\n".join(said))
        return
    if args.run:
        train_grid([args.run, *settings], args.sizes, args.budgets, Path(args.folder))
    paths = [Path(p) for p in args.read or [args.folder]]
    found = study(read(paths), budgets, args.resamplings)
    out = Path(args.out or (paths[0] if paths[0].is_dir() else paths[0].parent) / "scaling_laws.png")
    draw(found, out)
    print(json.dumps(plain(found), indent=1) if args.json else "\n".join([*text(found, args), str(out)]))


def positive_flops(word: str) -> float:
    value = float(word)
    if not 1 <= value <= 1e40:
        raise ValueError
    return value


positive_flops.__name__ = "number of FLOP"


# ---- a grid of runs -------------------------------------------------------------------------------------------------

class Cell(NamedTuple):
    """A run of the grid: its folder, the options that make it, its parameters, tokens and steps."""
    path: Path
    options: list[str]
    n: int
    d: int
    steps: int


def train_grid(argv: list[str], sizes: list[str], budgets: list[float], folder: Path):
    """Trains what is missing of a grid, one run after another. Raises UserError, or Stopped: the same command goes on."""
    cells = grid(argv, sizes, budgets, folder)
    for i, cell in enumerate(cells, 1):
        there = isinstance(of_run(cell.path), Point)
        print(f"[{i}/{len(cells)}] {cell.path}: {short(cell.n)} parameters, {short(cell.d)} tokens, {cell.steps} steps"
              + (": there already" if there else ""), flush=True)
        if not there:
            launch([*argv, *cell.options], cell.path)


def grid(argv: list[str], sizes: list[str], budgets: list[float], folder: Path) -> list[Cell]:
    """The runs of each size and budget. Raises UserError with a line for each problem."""
    from nanogpt.config import load_config
    base = load_config([*argv, "--train.max_steps=1000000000", "--train.max_tokens=null"])
    (H, K, D), block, problems, cells = base.model.heads, base.model.block_size, [], []
    notes, budgets = set_vocabulary(base), sorted(set(budgets))
    if base.run.init_from or base.eval.only:
        raise UserError("run.init_from, eval.only: the runs of a grid train, and from nothing; take it out")
    if base.model.mlp_dim:
        raise UserError("model.mlp_dim: leave it out, so that it follows the width")
    problems += [f"--budgets: {a:g} and {b:g} are too close to tell apart; make each 1.3 times the one before, or more"
                 for a, b in pairwise(budgets) if b < 1.3 * a]
    for size in dict.fromkeys(sizes):
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,5}", size):
            problems.append(f"--sizes: {size} is not blocks x width, as 4x128")
            continue
        layers, width = map(int, size.split("x"))
        shape = dict(n_layer=layers, n_embd=width, n_head=width // D)
        if width % D:
            problems.append(f"--sizes: {size} has no whole number of heads {D} wide, as the config's are; take a multiple of {D}, "
                            "or another model.n_head")
            continue
        if K < H:
            shape["n_kv_head"] = max(1, width // D * K // H)
        n = parameters(base.model.model_copy(update=shape))
        for flops in budgets:
            steps = base.train.steps(max(1, round(flops / 6 / n / block)))
            path = folder / re.sub(r"e\+0*", "e", f"{size}-{flops:.4g}")
            if steps < FEWEST_STEPS:
                problems.append(f"--budgets: {flops:g} FLOP are {steps} steps of {size} ({short(n)} parameters, "
                                f"{base.tokens_per_step:,} tokens a step), and {FEWEST_STEPS} are the least; take a larger "
                                "budget, smaller batches, or leave this size out")
                continue
            options = [*(f"--model.{key}={value}" for key, value in shape.items()), f"--train.max_steps={steps}",
                       "--train.max_tokens=null", f"--optim.warmup_steps={min(base.optim.warmup_steps, steps // 10)}",
                       "--optim.decay_steps=null", "--eval.interval=0", "--eval.patience=0", "--checkpoint.keep_last=1",
                       "--checkpoint.keep_best=false", f"--run.name={path.name}", f"--run.dir={path}"]
            if was := otherwise(path, load_config([*argv, *options])):
                problems.append(f"{path}: was started with {was}; take another --folder")
            cells.append(Cell(path, options, n, base.train.sequences(steps) * block, steps))
    if problems:
        raise UserError("\n".join(problems))
    for note in [*notes, *repetition(base, max(cell.d for cell in cells))]:
        print(f"note: {note}", flush=True)
    return cells


def parameters(model) -> int:
    """Of a model's config."""
    import torch

    from nanogpt.model import GPT
    with torch.device("meta"):
        return GPT(model).num_params()


def otherwise(path: Path, config) -> str | None:
    """A setting with which the run in a folder was started, and which is another in this config; None: all are the same."""
    import yaml
    try:
        was = yaml.safe_load((path / "config.yaml").read_text())
        now = config.model_dump()
        keys = [("data", "path"), ("data", "train"), ("run", "seed"), ("train", "global_batch_size"), ("train", "max_steps"),
                ("train", "precision"), ("eval", "sequences"), *(("optim", key) for key in now["optim"]),
                *(("model", key) for key in now["model"] if key != "vocab_size")]
        return next((f"{a}.{b} {was[a][b]}, and it is {now[a][b]} now" for a, b in keys
                     if now[a][b] not in (was[a][b], "auto")), None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}/config.yaml: cannot be read ({type(error).__name__}); take another --folder") from None


def repetition(config, most: int) -> list[str]:
    """What to say where runs see their data again and again."""
    from nanogpt.shards import load_dataset_card
    with contextlib.suppress(UserError, OSError):
        cards = [(load_dataset_card(s.path), s.split) for s in config.data.sources if "://" not in s.path]
        tokens = sum(card["splits"][split]["tokens"] for card, split in cards)
        if tokens and most > 4 * tokens:
            return [f"the longest run goes {most / tokens:.1f} times through its data; beyond 4 or so the same tokens are "
                    "worth less than new ones (Muennighoff et al., 2023), and these laws are of new ones"]
    return []


def launch(argv: list[str], path: Path):
    """One run, by launch/train.sh, which ends with us. Raises UserError, or Stopped."""
    def end_with_us():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it saves, and ends

    process = subprocess.Popen(["bash", str(ROOT / "launch" / "train.sh"), *argv], preexec_fn=end_with_us,
                               env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"})
    before = {number: signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM)) for number in ENDS}
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told it too
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status in (Stopped.STATUS, -signal.SIGTERM):
        raise Stopped
    if status:
        raise UserError(f"{path}: the run ended with status {status}, as told above; once that is mended, the same command goes "
                        "on")


ENDS = (signal.SIGTERM, signal.SIGUSR1)


# ---- reading runs ---------------------------------------------------------------------------------------------------

def read(paths: list[Path]) -> list[Point]:
    """The finished runs of folders and CSV files; what is left out is told. Raises UserError."""
    points, runs = [], []
    for path in paths:
        if path.suffix == ".csv" and not path.is_dir():
            points += of_csv(path)
        elif (path / "config.yaml").exists():
            runs.append(path)
        elif path.is_dir() and (inside := sorted(p.parent for p in path.glob("*/config.yaml"))):
            runs += inside
        else:
            raise UserError(f"{path}: is neither a run folder, nor one that holds some, nor a .csv of N, D and loss")
    found = {path: of_run(path) for path in dict.fromkeys(runs)}
    for path, point in found.items():
        if not isinstance(point, Point):
            print(f"warning: {path}: left out: {point}", file=sys.stderr, flush=True)
    kept = {path: point for path, point in found.items() if isinstance(point, Point)}
    kinds = {path: held_out(path) for path in kept}
    if len(set(kinds.values())) > 1:
        a, b = (next(path for path, kind in kinds.items() if kind == one) for one in list(dict.fromkeys(kinds.values()))[:2])
        raise UserError(f"{a} and {b}: their losses are of other data, {kinds[a]} and {kinds[b]}, and cannot be compared; read "
                        "them apart")
    return points + list(kept.values())


def of_run(path: Path) -> Point | str:
    """What a run folder says: its parameters, tokens and last validation loss; or why it does not count."""
    import yaml

    from nanogpt.config import Config
    try:
        config = Config.model_validate(yaml.safe_load((path / "config.yaml").read_text()))
        last = None
        for line in reversed((path / "metrics.jsonl").read_text(errors="replace").splitlines()):
            with contextlib.suppress(ValueError):  # cut short by a crash
                last = json.loads(line)
                break
        if last is None:
            return "it has no step yet"
        if config.run.init_from:
            return f"it began with the weights of {config.run.init_from}"
        if last["step"] < config.max_steps:
            return f"it is not finished, step {last['step']} of {config.max_steps}; the command that started it goes on"
        if "val_loss" not in last:
            return "it has no validation loss; its data needs a val split"
        loss, tokens = float(last["val_loss"]), int(last["tokens"])
        if not (0 < loss < math.inf and tokens > 0):
            return f"its validation loss is {loss}"
        return Point(parameters(config.model), tokens, loss, path.name)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name} yet"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return f"it cannot be read ({type(error).__name__})"


def held_out(path: Path) -> str:
    """What a run's validation loss is of."""
    import yaml
    config = yaml.safe_load((path / "config.yaml").read_text())
    data, model = config["data"], config["model"]
    return f"{data['path'] or data['train']} with {model['vocab_size']} ids in blocks of {model['block_size']}"


def of_csv(path: Path) -> list[Point]:
    """The rows of a file with columns N, D and loss, and perhaps name. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = {name.strip().lower(): name for name in rows.fieldnames or () if name}
            if missing := {"n", "d", "loss"} - names.keys():
                raise UserError(f"{path}: has no column {', '.join(sorted(missing))}; its first line names them: N,D,loss")
            points = []
            for row in rows:
                try:
                    n, d, loss = (float(row[names[key]]) for key in ("n", "d", "loss"))
                    if not all(0 < x < 1e30 for x in (n, d, loss)):
                        raise ValueError
                except (ValueError, TypeError):
                    raise UserError(f"{path}: line {rows.line_num}: N, D and loss are not all numbers above 0") from None
                points.append(Point(n, d, loss, row.get(names.get("name")) or f"line {rows.line_num}"))
            return points
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


# ---- fitting --------------------------------------------------------------------------------------------------------

def study(points: list[Point], budgets: list[float], resamplings: int) -> dict:
    """Both fits, their uncertainty, and the answers for each budget. Raises UserError where there are too few runs for either."""
    if not points:
        raise UserError("there is no finished run to read")
    curves, problem, law, laws = iso_curves(points), cannot_fit(points), None, []
    if problem and not curves:
        raise UserError(f"{problem}; and approach 2 needs three sizes or more of one budget")
    if not problem:
        law, theta = fit(points)
        if problem := says_nothing(law, points):
            law = None
        else:
            laws = resampled_laws(points, theta, resamplings)
    power, powers = power_law(curves), []
    if power:
        powers = resampled_powers(curves, resamplings)
    answers = []
    for flops in budgets:
        rows = []
        if law:
            rows.append(answer("approach 3", *law.best(flops), law.loss(*law.best(flops)), [one.best(flops)[0] for one in laws],
                               flops, [one.loss(*one.best(flops)) for one in laws]))
        if power:
            n = power[0] * flops**power[1]
            rows.append(answer("approach 2", n, flops / 6 / n, None, [k * flops**a for k, a in powers], flops))
        answers.append(dict(flops=flops, beyond=flops / max(p.flops for p in points), answers=rows))
    return dict(points=points, law=law, laws=laws, problem=problem, curves=curves, power=power, powers=powers,
                budgets=answers, resamplings=resamplings)


def answer(how: str, n: float, d: float, loss: float | None, sizes=(), flops=None, losses=()) -> dict:
    """One answer: parameters, tokens and loss, each with what lies around it."""
    return dict(how=how, n=n, d=d, loss=loss, n_range=around(sizes), d_range=around([flops / 6 / n for n in sizes]),
                loss_range=around(losses))


def around(values) -> tuple[float, float] | None:
    """What holds the middle 80 % of values."""
    values = sorted(values)
    return (values[len(values) // 10], values[-1 - len(values) // 10]) if len(values) >= 20 else None


def cannot_fit(points: list[Point]) -> str | None:
    """Why five constants do not follow from these runs."""
    sizes, tokens = ({round(math.log(getattr(p, key)), 2) for p in points} for key in ("n", "d"))
    if len(points) < 6:
        return f"approach 3 has five constants, and needs 6 runs or more, better 15; there are {len(points)}"
    if len(sizes) < 3 or len(tokens) < 3:
        return ("approach 3 needs three sizes and three numbers of tokens or more, to tell E from the rest; there are "
                f"{len(sizes)} and {len(tokens)}")
    import numpy as np
    if abs(np.corrcoef(np.log([p.n for p in points]), np.log([p.d for p in points]))[0, 1]) > 0.995:
        return ("approach 3 needs sizes and tokens that vary on their own; here one follows from the other, as with a single "
                "budget")
    return None


def says_nothing(law: Law, points: list[Point]) -> str | None:
    """Why a law, though fitted, tells no best size: one of its terms is the same for all runs, or falls like a step."""
    ns, ds = ([getattr(p, key) for p in points] for key in ("n", "d"))
    for what, factor, exponent, of in (("size", law.A, law.alpha, ns), ("tokens", law.B, law.beta, ds)):
        fall = factor * (min(of)**-exponent - max(of)**-exponent)
        if fall < 1e-3 * min(p.loss for p in points) or exponent > 3.9:
            return (f"approach 3 finds no power law of {what} in the losses of these runs; larger sizes, longer runs, or a learning "
                    "rate that suits all sizes may show one")
    return None


def fit(points: list[Point], starts=None):
    """(Law, what it was fitted as: a start for others) by Huber's loss of log L, the least of L-BFGS from each start.

    starts: vectors (a, b, e, alpha, beta) of logarithms A, B of the terms at the runs' mean, and of E. By default a grid: for
    each pair of exponents E, A and B follow by least squares, not negative; from the best of these L-BFGS goes on.
    """
    import numpy as np
    from scipy.optimize import minimize, nnls
    x, y, z = (np.log([getattr(p, key) for p in points]) for key in ("n", "d", "loss"))
    at_x, at_y = x.mean(), y.mean()  # where A and B are measured from: else they and the exponents move as one
    x, y = x - at_x, y - at_y

    def objective(theta):
        terms = np.stack([theta[0] - theta[3] * x, theta[1] - theta[4] * y, np.full_like(x, theta[2])])
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        r = (top + np.log(total) - z) / DELTA
        size = np.abs(r)
        slope = np.clip(r, -1, 1) / DELTA * parts / total  # (3, runs): of the loss by each term
        value = np.where(size <= 1, r * r / 2, size - 0.5).sum()
        return value, np.array([*slope.sum(1), -(slope[0] * x).sum(), -(slope[1] * y).sum()])

    if starts is None:
        starts = []
        for alpha in GRID:
            for beta in GRID:
                columns = np.stack([np.exp(-alpha * x), np.exp(-beta * y), np.ones_like(x)], 1) / np.exp(z)[:, None]
                found, _ = nnls(columns, np.ones_like(x))
                starts.append([*np.log(found.clip(1e-3 * np.exp(z.min()))), alpha, beta])
        starts = sorted(starts, key=lambda start: objective(np.array(start))[0])[:STARTS]
    bounds = [(-30, 30)] * 3 + [(1e-3, 4)] * 2
    fits = [minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds,
                     options=dict(maxiter=1000, maxfun=2000, ftol=1e-12, gtol=1e-8)) for start in starts]
    best = min(fits, key=lambda f: f.fun).x
    a, b, e, alpha, beta = map(float, best)
    return Law(math.exp(e), math.exp(a + alpha * at_x), math.exp(b + beta * at_y), alpha, beta), best


GRID, STARTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3), 8  # exponents to start from


def resampled_laws(points: list[Point], theta, times: int) -> list[Law]:
    """Laws of runs drawn from these with replacement, the same number, where they allow one."""
    import numpy as np
    draw, laws = np.random.default_rng(0), []
    for _ in range(times):
        some = [points[i] for i in draw.integers(len(points), size=len(points))]
        if not cannot_fit(some) and not says_nothing(law := fit(some, [theta])[0], some):
            laws.append(law)
    return laws


def iso_curves(points: list[Point]) -> list[dict]:
    """Of each budget with three sizes or more: its runs, a parabola of the loss in log N, and its lowest point.

    [dict(flops, runs, coefficients, best: dict(n, d, loss) or None, why, residuals)]
    """
    import numpy as np
    groups = []
    for p in sorted(points, key=lambda p: p.flops):
        if not groups or p.flops > SAME * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(p)
    curves = []
    for runs in groups:
        if len({p.n for p in runs}) < 3:
            continue
        runs = sorted(runs)
        x, losses = np.log([p.n for p in runs]), np.array([p.loss for p in runs])
        flops = float(np.exp(np.mean(np.log([p.flops for p in runs]))))
        coefficients = parabola(x, losses)
        best, why = lowest(coefficients, x, flops)
        curves.append(dict(flops=flops, runs=runs, coefficients=coefficients, best=best, why=why,
                           residuals=losses - value_at(coefficients, x)))
    return curves


def parabola(x, y):
    """(curvature, slope, height) about the mean of x, and that mean, of the parabola with the least squares."""
    import numpy as np
    return (*np.polyfit(x - x.mean(), y, 2), x.mean())


def value_at(coefficients, x):
    a, b, c, centre = coefficients
    return a * (x - centre)**2 + b * (x - centre) + c


def lowest(coefficients, x, flops: float) -> tuple[dict | None, str | None]:
    """(lowest point, None) of a parabola, or (None, why it says nothing)."""
    a, b, _, centre = coefficients
    at = centre - b / (2 * a) if a > 0 else math.nan
    if not x.min() <= at <= x.max():
        smaller = (value_at(coefficients, x.min()) < value_at(coefficients, x.max()))
        return None, f"no lowest point within its sizes; add {'smaller' if smaller else 'larger'} ones"
    n = math.exp(at)
    return dict(n=n, d=flops / 6 / n, loss=float(value_at(coefficients, at))), None


def power_law(curves: list[dict]) -> tuple[float, float] | None:
    """(k, a) of N = k C^a through the lowest points; None: fewer than two."""
    import numpy as np
    found = [(math.log(c["flops"]), math.log(c["best"]["n"])) for c in curves if c["best"]]
    if len(found) < 2:
        return None
    a, k = np.polyfit(*zip(*found), 1)
    return math.exp(k), float(a)


def resampled_powers(curves: list[dict], times: int) -> list[tuple[float, float]]:
    """Power laws of parabolas to which residuals, drawn from those of all, were added anew.

    A parabola takes three of the runs' freedoms, by which residuals are too small; of three runs it leaves none.
    """
    import numpy as np
    usable = [c for c in curves if c["best"]]
    free, runs = sum(len(c["runs"]) - 3 for c in usable), sum(len(c["runs"]) for c in usable)
    if not free:
        return []
    residuals, draw, found = np.concatenate([c["residuals"] for c in usable]), np.random.default_rng(0), []
    residuals *= math.sqrt(runs / free)
    for _ in range(times):
        again = []
        for c in usable:
            x = np.log([p.n for p in c["runs"]])
            y = value_at(c["coefficients"], x) + draw.choice(residuals, len(x))
            again.append(dict(flops=c["flops"], best=lowest(parabola(x, y), x, c["flops"])[0]))
        if power := power_law(again):
            found.append(power)
    return found


# ---- words ----------------------------------------------------------------------------------------------------------

def text(f: dict, args) -> list[str]:
    """The tables."""
    points, law, laws = f["points"], f["law"], f["laws"]
    ns, ds, cs = ([getattr(p, key) for p in points] for key in ("n", "d", "flops"))
    lines = [f"{len(points)} runs of {len(set(ns))} sizes: {short(min(ns))} to {short(max(ns))} parameters, {short(min(ds))} "
             f"to {short(max(ds))} tokens, {min(cs):.2g} to {max(cs):.2g} FLOP, losses of {max(p.loss for p in points):.3f} to "
             f"{min(p.loss for p in points):.3f}", "", "approach 3: L(N, D) = E + A / N^alpha + B / D^beta"]
    if law:
        for name, value in law._asdict().items():
            lines.append(f"  {name:<12}{value:>12.4g}  {bracket(around([getattr(one, name) for one in laws]), '.4g')}".rstrip())
        share = around([one.beta / (one.alpha + one.beta) for one in laws])
        off = sorted(((p.loss / law.loss(p.n, p.d) - 1, p.name) for p in points), key=lambda one: abs(one[0]))
        lines += [f"  best size grows as C^{law.beta / (law.alpha + law.beta):.3f} {bracket(share, '.3f')}".rstrip()
                  + f", tokens as C^{law.alpha / (law.alpha + law.beta):.3f}",
                  f"  off by {abs(off[len(off) // 2][0]):.2%} of the loss in the middle, {off[-1][0]:+.2%} at most, of "
                  f"{off[-1][1]}"]
        if law.E < 0.01 * min(p.loss for p in points):
            lines += ["  these runs do not tell E from the rest; larger sizes and longer runs would"]
        if len(laws) < 0.9 * f["resamplings"]:
            lines += [f"  {f['resamplings'] - len(laws)} of {f['resamplings']} resamplings gave no law: the brackets are too narrow"]
        if len(points) < 15:
            lines += [f"  {len(points)} runs are few for five constants"]
    else:
        lines += [f"  none: {f['problem']}"]
    lines += ["", "approach 2: of each budget the lowest point of a parabola in log N"]
    if f["curves"]:
        lines += [f"  {'FLOP':>10}{'runs':>6}{'parameters':>12}{'tokens':>10}{'a parameter':>13}{'loss':>9}"]
    for c in f["curves"]:
        best = c["best"]
        lines += [f"  {c['flops']:>10.3g}{len(c['runs']):>6}" + (
            f"{short(best['n']):>12}{short(best['d']):>10}{best['d'] / best['n']:>13.1f}{best['loss']:>9.4f}" if best else
            f"  {c['why']}")]
    if f["power"]:
        lines += [f"  best size grows as C^{f['power'][1]:.3f} {bracket(around([a for _, a in f['powers']]), '.3f')}".rstrip()
                  + f", tokens as C^{1 - f['power'][1]:.3f}"]
    else:
        lines += ["  no power law: it needs two budgets, each with three sizes or more around its lowest loss"]
    return lines + budget_lines(f["budgets"], args)


def published(name: str, law: Law, f: dict, args) -> list[str]:
    who = dict(hoffmann="Hoffmann et al. (2022), of their text and tokenizer, as rounded in print: unrounded, they say, 5.76e23 "
               "FLOP are best spent on 40B", besiroglu="Besiroglu et al. (2024), who fitted Hoffmann's runs again")[name]
    return [f"{who}:", "  L(N, D) = " + f"{law.E} + {law.A} / N^{law.alpha} + {law.B} / D^{law.beta}",
            *budget_lines(f["budgets"], args)]


def budget_lines(budgets: list[dict], args) -> list[str]:
    lines = []
    for one in budgets:
        mine = args.gpu_hours and one is budgets[-1]
        hours = f", {args.gpu_hours or 0:g} hours of one {args.gpu} at {args.mfu:.0%} of its peak (assumed, not measured)"
        lines += ["", f"{one['flops']:.3g} FLOP{hours if mine else ''}:"]
        for a in one["answers"]:
            loss = f", loss {a['loss']:.4f} {bracket(a['loss_range'], '.4f')}".rstrip() if a["loss"] else ""
            size = f"{short(a['n'])} parameters {bracket(a['n_range'], short)}".rstrip()
            tokens = f"{short(a['d'])} tokens {bracket(a['d_range'], short)}".rstrip()
            lines += [f"  {a['how']}: {size}, {tokens}, {a['d'] / a['n']:.1f} tokens a parameter{loss}"]
        if not one["answers"]:
            lines += ["  no answer: neither fit could be made"]
        if one.get("beyond", 0) > 10:
            lines += [f"  {one['beyond']:,.0f} times the largest run's budget: the further away, the less these brackets hold"]
    return lines


def bracket(two, how) -> str:
    return "" if two is None else "[" + ", ".join(how(x) if callable(how) else format(x, how) for x in two) + "]"


def plain(f: dict) -> dict:
    """What --json prints: the brackets in the place of all fits."""
    law = f["law"] and f["law"]._asdict()
    return dict(points=[p._asdict() for p in f["points"]], law=law, why_no_law=f["problem"], law_range=law and {
        name: around([getattr(one, name) for one in f["laws"]]) for name in law}, curves=[
            dict(flops=c["flops"], runs=[p.name for p in c["runs"]], best=c["best"], why=c["why"]) for c in f["curves"]],
        power=f["power"], power_range=around([a for _, a in f["powers"]]), budgets=f["budgets"])


def draw(f: dict, out: Path):
    """Three pictures in one file: the budgets' curves, the best size and tokens against FLOPs, and each run against the fit."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    points, law, curves = f["points"], f["law"], f["curves"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    in_a_curve = {p for c in curves for p in c["runs"]}
    colors = plt.cm.viridis(np.linspace(0, 0.9, max(1, len(curves))))
    for c, color in zip(curves, colors):
        x = np.linspace(math.log(c["runs"][0].n), math.log(c["runs"][-1].n), 100)
        left.plot([p.n for p in c["runs"]], [p.loss for p in c["runs"]], "o", color=color, markersize=4,
                  label=f"{c['flops']:.2g} FLOP")
        left.plot(np.exp(x), value_at(c["coefficients"], x), color=color, linewidth=1.2)
        if law:
            left.plot(np.exp(x), law.loss(np.exp(x), c["flops"] / 6 / np.exp(x)), color=color, linewidth=1, linestyle=":")
        if c["best"]:
            left.plot(c["best"]["n"], c["best"]["loss"], "*", color="crimson", markersize=11, zorder=3)
    if rest := [p for p in points if p not in in_a_curve]:
        left.plot([p.n for p in rest], [p.loss for p in rest], "x", color="grey", markersize=4, label="other runs")
    left.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats a token)",
             title="approach 2: parabolas (dotted: approach 3)" if curves else "runs")
    left.legend(frameon=False, fontsize=8)

    budgets = [p.flops for p in points] + [b["flops"] for b in f["budgets"]]
    cs = np.geomspace(min(budgets) / 2, max(budgets) * 2, 60)
    lines = [("approach 3", law and law.best, [one.best for one in f["laws"]], "tab:blue"),
             ("approach 2", f["power"] and by_power(*f["power"]), [by_power(*one) for one in f["powers"]], "crimson")]
    for (how, best, others, color), width in zip(lines, (3, 1.2)):
        if best:
            for i, (what, style) in enumerate((("parameters", "-"), ("tokens", "--"))):
                middle.plot(cs, best(cs)[i], style, color=color, linewidth=width, alpha=0.7, label=f"{what}, {how}")
                if len(others) >= 20:
                    low, high = np.quantile([other(cs)[i] for other in others], [0.1, 0.9], axis=0)
                    middle.fill_between(cs, low, high, color=color, alpha=0.12, linewidth=0)
    found = [c for c in curves if c["best"]]
    for key, marker in (("n", "*"), ("d", "P")):
        middle.plot([c["flops"] for c in found], [c["best"][key] for c in found], marker, color="crimson", markersize=7,
                    linestyle="")
    for b in f["budgets"]:
        middle.axvline(b["flops"], color="grey", linewidth=0.8, linestyle=":")
    middle.set(xscale="log", yscale="log", xlabel="FLOP (6 N D)", title="best parameters and tokens (bands: 80 %)")
    if middle.get_legend_handles_labels()[0]:
        middle.legend(frameon=False, fontsize=8)

    if law:
        fitted = [law.loss(p.n, p.d) for p in points]
        ends = [min(fitted + [p.loss for p in points]), max(fitted + [p.loss for p in points])]
        right.plot(ends, ends, color="grey", linewidth=0.8)
        dots = right.scatter(fitted, [p.loss for p in points], c=np.log10([p.n for p in points]), cmap="plasma", s=18, zorder=3)
        figure.colorbar(dots, ax=right, label="log10 of parameters")
        right.set(xlabel=f"{law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}",
                  ylabel="validation loss", title="approach 3: each run against the fit")
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "approach 3: no fit", ha="center", transform=right.transAxes)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["right", "top"]].set_visible(False)
    with written_whole(out) as file:
        figure.savefig(file, dpi=150)
    plt.close(figure)


def by_power(k: float, a: float):
    """C -> (N, D) by N = k C^a."""
    return lambda flops: (k * flops**a, flops ** (1 - a) / 6 / k)


if __name__ == "__main__":
    run(main)

"""A run, or several, as one HTML page to look at, keep and send: it needs no network and holds all that it shows.

    python tools/report.py runs/quickstart                                  writes runs/quickstart/report.html
    python tools/report.py runs/a runs/b runs/c --out compared.html         curves in one chart, what differs in the configs
    python tools/report.py runs/gpt2_124m --samples 0                       without loading a checkpoint
    python tools/report.py runs/gpt2_124m --samples 3 --prompt "Once upon a time"

Curves in which one can hover and zoom (a drag; a double click shows all again), against steps, tokens, time or FLOPs;
settings, data, hardware, goodput, restarts, spikes, checkpoints; text that each kept checkpoint wrote, always from the
same prompt and seed: RUN/samples.jsonl remembers it, so that a report now and then shows how a run learned to write;
and evaluation results that lie in the run folder, as tools/evaluate.py --run RUN --out RUN/evaluation.json leaves them.
"""

import base64
import fcntl
import hashlib
import html
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.curves import (AXES, COLORS, along, column, differences, flops_per_token, marked, names,
                            read_config, read_metrics, settings, shown, smoothed, thinned)
from nanogpt.errors import Parser, UserError, one_line, run, written_whole
from nanogpt.words import duration, short

CELLS = 300_000  # numbers in a page, all curves of all runs together: 2 MB or so, and quick to draw
SEED, TEMPERATURE, LENGTH = 1337, 0.8, 240  # of samples
CHARTS = {  # what is always looked at: title, the way its values are written, whether its axis begins at zero
    "loss": ("loss (nats per token)", "loss", False), "learning_rate": ("learning rate", "small", True),
    "grad_norm": ("gradient norm", "norm", True), "tokens_per_s": ("tokens/s", "count", True),
    "mfu": ("MFU, share of the device's peak", "share", True), "data_wait_fraction": ("waiting for data", "share", True),
    "goodput": ("goodput", "share", True), "memory_gib": ("largest memory (GiB)", "plain", True)}
SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "mfu", "data_wait_fraction")
OTHERS = 40  # curves of other keys, at most
NOT_DRAWN = {"step", "tokens", "time", "step_time_s", "hfu", "train_loss", "val_loss", "train_bits_per_byte",
             "val_bits_per_byte"}
MOST = 200  # rows of a table, at most


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, done or under way")
    parser.add_argument("--out", metavar="FILE.html", help="(nothing: report.html in the first RUN)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts from each checkpoint that "
                        "is kept; 0: none, and those of earlier reports are still shown")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what samples go on from; nothing: a new document")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of the sampling")
    args = parser.parse_args()
    out = Path(args.out or Path(args.runs[0]) / "report.html")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out: {out} does not end in .html")
    if not 0 <= args.samples <= 100:
        raise UserError(f"--samples: {args.samples} is not from 0 to 100")
    runs = [Run(Path(name), called) for name, called in zip(args.runs, names([Path(name) for name in args.runs]))]
    for one in runs:
        if args.samples:
            sample(one, args.samples, args.prompt, args.device)
    text = page(runs)
    with written_whole(out) as file:
        file.write_text(text, encoding="utf-8", newline="\n")
    print(out)


# ---- what there is to know of a run ---------------------------------------------------------------------------------

class Run:
    """All that its folder tells. What is missing or damaged is left out, and named in `problems`."""

    def __init__(self, folder: Path, called: str):
        self.folder, self.called, self.problems = folder, called, []
        self.records = read_metrics(folder)
        for record in self.records:  # log.health full: a value of each block
            for key, values in list(record.items()):
                if key.startswith("health/") and isinstance(values, list) and (there := [v for v in column(
                        [{key: v} for v in values], key) if v == v]):
                    record[f"{key}, the largest block's"] = max(there)
                    record[f"{key}, the median block's"] = statistics.median(there)
        self.config = self.attempt(lambda: read_config(folder)) or {}
        self.flops = self.attempt(lambda: flops_per_token(self.config), quiet=True)
        self.log = self.attempt(lambda: (folder / "log.txt").read_text("utf-8", "replace").splitlines(), quiet=True) or []
        self.starts = starts(self.log)
        self.checkpoints = checkpoints(folder)
        self.state = self.checkpoints[-1]["state"] if self.checkpoints else {}
        self.val = [(r["step"], v) for r, v in zip(self.records, column(self.records, "val_loss")) if v == v]
        self.best = min(self.val, key=lambda at: at[1], default=None)
        self.trained_s = along("time", self.records)[-1]
        self.last_step = self.attempt(lambda: planned(self.config), quiet=True) or dig(self.config, "train", "max_steps")

    def attempt(self, function, quiet=False):
        """What it returns; None where a file is missing, damaged, or not ours."""
        try:
            return function()
        except Exception as error:  # a report of what is there is worth more than none
            if not quiet:
                self.problems.append(str(error) if isinstance(error, UserError) else one_line(error))
            return None

    def status(self) -> str:
        done = self.last_step and self.records[-1]["step"] >= self.last_step
        return f"{'under way' if self.trains_now() else 'done' if done else 'stopped'}: {self.steps()} steps"

    def steps(self) -> str:
        step, last = self.records[-1]["step"], self.last_step
        return f"{step:,}" + (f" of {last:,}" if last and last > step else "")

    def trains_now(self) -> bool:
        """Whether a process holds the folder's lock (watch.py)."""
        try:
            with open(self.folder / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


def planned(config: dict) -> int | None:
    from nanogpt.config import Config
    return Config.model_validate(config).max_steps or None


def starts(log: list[str]) -> list[dict]:
    """Each start of a run, as log.txt tells it: {first, last, ranks, device, …}, steps as counted there."""
    found = []
    for line in log:
        word, value = at.groups() if (at := re.fullmatch(r"([a-z]+) {2,}(.*)", line)) else ("", "")
        if word == "model":  # the first line of each
            found.append(dict(first=0, last=None, ranks=None, device="", memory="", end=""))
        elif not found:
            continue
        elif word in ("device", "memory"):
            found[-1][word] = value
        elif word == "batch" and (at := re.search(r"= (\d+) ranks", value)):
            found[-1]["ranks"] = int(at[1])
        elif word == "resuming" and (at := re.search(r": step (\d+) on \d+ -> \d+ ranks", value)):
            found[-1]["first"] = int(at[1])
        elif at := re.match(r"step +(\d+)/\d+ ", line):
            found[-1]["last"] = int(at[1])
        elif line.startswith(("stopped by ", "ended at step ", "nothing to do")):
            found[-1]["end"] = line
    return found


def checkpoints(folder: Path) -> list[dict]:
    """Those that are there, by step: {step, name, bytes, state, identity}; without importing torch, and unverified."""
    found = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        try:
            manifest = (path / "manifest.json").read_bytes()
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            found.append(dict(step=int(state["step"]), name=path.name, path=path, state=state,
                              bytes=sum(int(file["bytes"]) for file in json.loads(manifest)["files"].values()),
                              identity=hashlib.sha256(manifest).hexdigest()[:16]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # deleted just now, damaged, put aside
    return sorted(found, key=lambda one: one["step"])


def dig(value, *keys):
    """value[key][key]…, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- samples --------------------------------------------------------------------------------------------------------

def sample(one: Run, number: int, prompt: str, device: str):
    """Texts of each kept checkpoint, added to RUN/samples.jsonl; what it has already is not drawn again."""
    from nanogpt import generate
    known = {(s["checkpoint"], s["prompt"], s["number"]) for s in read_samples(one)}
    for kept in one.checkpoints:
        if all((kept["identity"], prompt, i) in known for i in range(number)):
            continue
        print(f"{one.folder}: a sample from {kept['name']}", file=sys.stderr)
        try:
            text = generate.load(kept["path"], device)
            texts = text.generate([prompt] * number, LENGTH, seed=SEED, temperature=TEMPERATURE)
        except (UserError, OSError) as error:  # damaged; gone, because a newer one has come; an alphabet without the prompt
            one.problems.append(f"no sample: {error}")
            continue
        lines = [dict(step=kept["step"], checkpoint=kept["identity"], prompt=prompt, number=i, text=text, seed=SEED,
                      temperature=TEMPERATURE) for i, text in enumerate(texts)]
        try:
            with open(one.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written ({error.strerror}); take --samples 0") from None


def read_samples(one: Run) -> list[dict]:
    """By step, each prompt and number once. Damaged lines, and steps that the run has not reached, are left out."""
    found = {}
    try:
        lines = (one.folder / "samples.jsonl").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            s = json.loads(line)
            if 0 <= s["step"] <= one.records[-1]["step"]:
                key = (int(s["step"]), str(s["prompt"]), int(s["number"]))
                found[key] = dict(step=key[0], prompt=key[1], number=key[2], checkpoint=str(s["checkpoint"]),
                                  text=str(s["text"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [found[key] for key in sorted(found)]


# ---- the page -------------------------------------------------------------------------------------------------------

class Html(str):
    """Text that is markup already; all other text is escaped where it comes into the page."""


def e(text) -> Html:
    """Escaped. Characters that a page cannot show are shown by name: a text cannot hide what it holds."""
    if isinstance(text, Html):
        return text
    visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                     lambda c: f"\\x{ord(c[0]):02x}" if ord(c[0]) < 256 else f"\\u{ord(c[0]):04x}", str(text))
    return Html(html.escape(visible))


def tag(name: str, *inside, **attributes) -> Html:
    """<name attribute="…">inside</name>; class_ for class."""
    said = "".join(f' {key.rstrip("_")}="{e(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{said}>{''.join(map(e, inside))}</{name}>")


def table(head: list, rows: list[list]) -> Html:
    """Columns that scroll where the screen is narrow; no heading row if head is empty."""
    cells = [[tag("td", cell, class_="wrap" if len(str(cell)) > 36 else "") for cell in row] for row in rows[:MOST]]
    body = [tag("tr", *row) for row in cells]
    if len(rows) > MOST:
        body.append(tag("tr", tag("td", f"… and {len(rows) - MOST:,} more")))
    first = [tag("tr", *(tag("th", cell) for cell in head))] if head else []
    return tag("div", tag("table", *first, *body), class_="scroll")


def section(title: str, *inside) -> Html:
    return tag("section", tag("h3", title), *inside)


def muted(*inside) -> Html:
    return tag("p", *inside, class_="muted")


def page(runs: list[Run]) -> str:
    title = ", ".join(one.called for one in runs) if len(runs) < 4 else f"{len(runs)} runs"
    style = "\n" + beside("report.css") + "".join(f".c{i} {{ background: {color}; }}\n" for i, color in enumerate(COLORS))
    script = "\n" + beside("report.js")
    # What is not this style and this script is neither run nor fetched, whatever a text in the page may hold.
    policy = (f"default-src 'none'; script-src {sha256(script)}; style-src {sha256(style)}; base-uri 'none'; "
              "form-action 'none'")
    several = [overview(runs)] if len(runs) > 1 else []
    details = [tag("details", tag("summary", swatch(i), one.called), *of_run(one), class_="run")
               for i, one in enumerate(runs)]
    body = [
        tag("header", tag("h1", title), tag("p", "" if several else f"{runs[0].folder}, {runs[0].status()}; ",
                                            f"written {time.strftime('%F %H:%M %Z')}", class_="muted")),
        tag("main", *(several or [tiles(runs[0])]), curves(runs),
            *([tag("h2", "Each run"), *details] if several else of_run(runs[0]))),
        tag("footer", "tools/report.py; the page is complete, and asks no network for anything"),
        Html(f'<script type="application/json" id="data">{as_json(data(runs))}</script>'),
        Html(f"<script>{script}</script>")]
    head = [Html('<meta charset="utf-8">'), Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="referrer" content="no-referrer">'), tag("title", title), Html(f"<style>{style}</style>")]
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>", ""]
    return "\n".join(lines)


def beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def sha256(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def as_json(value) -> str:
    """JSON that cannot end the <script> in which it stands."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---- curves ---------------------------------------------------------------------------------------------------------

def data(runs: list[Run]) -> dict:
    """What report.js draws: of each run columns of equal length, thinned together until all are within CELLS."""
    logged = [key for key in CHARTS if any(v == v for one in runs for v in column(one.records, key))]
    others = sorted({key for one in runs for r in one.records for key, value in r.items()
                     if type(value) in (int, float) and key not in CHARTS and key not in NOT_DRAWN})[:OTHERS]
    keys = logged + others
    rows = CELLS // len(runs) // (len(keys) + len(SMOOTHED) + 4)
    charts = [dict(key=key, title=CHARTS[key][0], format=CHARTS[key][1], zero=CHARTS[key][2]) for key in logged]
    charts += [dict(key=key, title=key, format="plain", zero=False, more=True) for key in others]
    return dict(runs=[columns(one, keys, rows) for one in runs], charts=charts, colors=COLORS, axes=AXES)


def columns(one: Run, keys: list[str], rows: int) -> dict:
    raw = {key: column(one.records, key) for key in (*keys, "val_loss")}
    sure = [raw[key] for key in ("loss", "val_loss", "grad_norm", "tokens_per_s") if key in raw]
    gaps = [float(v != v) for v in raw["loss"]] if "loss" in raw else []
    keep = thinned([*sure, gaps] if any(gaps) else sure, rows // (2 * (len(sure) + 2)))
    raw |= {f"{key}~": smoothed(raw[key]) for key in SMOOTHED if key in raw}
    places = {axis: along(axis, one.records) for axis in ("steps", "tokens", "time")}
    if not one.trained_s:
        del places["time"]

    def marks(key):
        """Steps, and where they lie along the other axes: at the record that tells of them."""
        at = [(step, i) for i, r in enumerate(one.records) for step in marked([r], key)][:MOST]
        return {"steps": [step for step, _ in at]} | {axis: [round(values[i], 3) for _, i in at]
                                                      for axis, values in places.items() if axis != "steps"}

    return dict(name=one.called, flops=one.flops,
                x={axis: [round(values[i], 3) for i in keep] for axis, values in places.items()},
                columns={key: [finite(values[i]) for i in keep] for key, values in raw.items()},
                spikes=marks("loss_spikes"), skipped=marks("skipped_steps"))


def finite(value: float) -> float | None:
    """Six digits; null where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def curves(runs: list[Run]) -> Html:
    """The places that report.js fills."""
    pressed = Html(' aria-pressed="true"')
    legend = [Html(f'<button data-run="{i}"{pressed}>{swatch(i)}{e(one.called)}</button>') for i, one in enumerate(runs)]
    key = legend if len(runs) > 1 else [tag("span", swatch(0), "train, smoothed; faint: each logged value", class_="muted"),
                                        *([tag("span", swatch(1), "validation", class_="muted")] if runs[0].val else [])]
    controls = Html('<div class="group"><span class="muted">against</span><span class="group" id="axis"></span></div>'
                    '<div class="group"><button id="logx" aria-pressed="false">log x</button>'
                    f'<button id="logy" aria-pressed="false">log y</button><button id="raw"{pressed}>logged values</button>'
                    '<button id="whole" hidden>show all again</button></div>')
    more = [tag("details", tag("summary", "more curves"), tag("div", id="more"))]
    return Html(tag("section", tag("h2", "Curves"), tag("div", controls, class_="controls"),
                    tag("div", *key, class_="group", id="legend"), tag("div", id="charts"), *more,
                    muted("Hover for values, drag to zoom, double-click to see all again. Triangles mark spikes of the "
                          "loss, crosses steps that were left out."),
                    Html("<noscript>The curves need JavaScript.</noscript>")))


def swatch(number: int) -> Html:
    return tag("span", class_=f"swatch c{number % len(COLORS)} dash{number // len(COLORS) % 3}")


# ---- words ----------------------------------------------------------------------------------------------------------

def facts(one: Run) -> dict[str, str]:
    """The few numbers that one looks at first."""
    last = one.records[-1]
    speed = [v for v in column(one.records, "tokens_per_s") if v == v]
    goodput = [v for v in column(one.records, "goodput") if v == v]
    loss = smoothed(column(one.records, "loss"))[-1]
    bits = next((r.get("val_bits_per_byte") for r in reversed(one.records) if one.best and r["step"] == one.best[0]), None)
    found = {"best validation loss": one.best and f"{one.best[1]:.4f}", "at step": one.best and f"{one.best[0]:,}",
             "bits a byte there": f"{bits:.4f}" if isinstance(bits, float) else None,
             "training loss, smoothed": f"{loss:.4f}" if math.isfinite(loss) else "not finite",
             "steps": one.steps(),
             "tokens": short(last["tokens"]), "FLOPs": one.flops and f"{last['tokens'] * one.flops:.3g}".replace("e+", "e"),
             "trained for": duration(one.trained_s) if one.trained_s else None,
             "tokens/s, median": short(statistics.median(speed)) if speed else None,
             "goodput": f"{goodput[-1]:.0%}" if goodput else None,
             "restarts": str(len(one.starts) - 1) if one.starts else None}
    return {name: value for name, value in found.items() if value}


def tiles(one: Run) -> Html:
    each = [tag("div", tag("b", value), tag("span", name), class_="tile") for name, value in facts(one).items()]
    return tag("div", *each, class_="tiles")


def overview(runs: list[Run]) -> Html:
    """One row a run; and the settings in which they differ."""
    known = [facts(one) for one in runs]
    heads = [name for name in dict.fromkeys(name for each in known for name in each) if name != "FLOPs"]
    first = table(["run", *heads, "status"], [[Html(swatch(i) + e(one.called)), *(each.get(name, "-") for name in heads),
                  one.status().partition(":")[0]] for i, (one, each) in enumerate(zip(runs, known))])
    missing = [one.called for one in runs if not one.config]
    first = tag("div", first, class_="several")
    if missing:
        return Html(first + tag("p", f"Settings are not compared: no config.yaml in {', '.join(missing)}", class_="warn"))
    different = differences([one.config for one in runs])
    rows = [[Html(swatch(i) + e(one.called)), *(shown(values[i]) for values in different.values())]
            for i, one in enumerate(runs)]
    second = tag("div", table(["run", *different], rows), class_="several") if different else muted("Nothing.")
    return Html(first + tag("h2", "What differs in their settings") + second)


def of_run(one: Run) -> list[Html]:
    """Everything of a run but its curves."""
    problems = [tag("p", problem, class_="warn") for problem in one.problems]
    parts = [settings_of(one), data_card(one), hardware(one), time_of(one), checkpoints_of(one), evaluations(one),
             oddities(one)]
    return [*problems, samples(one), tag("div", *parts, class_="columns"), whole_config(one)]


def samples(one: Run) -> Html:
    found = read_samples(one)
    if not found:
        return section("Samples", muted("None: ", "this report was written with --samples 0." if one.checkpoints else
                                        "no checkpoint is kept."))
    texts = [tag("div", muted(f"step {s['step']:,}"), tag("pre", tag("span", s["prompt"], class_="prompt"), s["text"]))
             for s in found[-MOST:]]
    return section("Samples", muted(f"What checkpoints wrote, always with seed {SEED} and temperature {TEMPERATURE:g}: "
                                    f"{LENGTH} tokens, or up to the end of a document."),
                   tag("div", *texts, class_="samples"))


def settings_of(one: Run) -> Html:
    if not one.config:
        return section("Settings", muted("There is no config.yaml."))
    default = settings({})
    other = [[tag("code", key), shown(value), shown(default.get(key))] for key, value in settings(one.config).items()
             if value != default.get(key)]
    return section("Settings that are not the defaults", table(["", "here", "default"], other))


def whole_config(one: Run) -> Html:
    text = one.attempt(lambda: (one.folder / "config.yaml").read_text("utf-8", "replace"), quiet=True)
    return tag("details", tag("summary", "config.yaml, whole"), tag("pre", text)) if text else Html()


def data_card(one: Run) -> Html:
    """dataset.json of each dataset; where it cannot be read from here, what a checkpoint knows."""
    from nanogpt.shards import load_dataset_card
    sources = dig(one.config, "data", "train")
    paths = [dig(s, "path") for s in sources] if isinstance(sources, list) else [dig(one.config, "data", "path")]
    parts = []
    for path in filter(lambda path: isinstance(path, str), paths):
        try:
            card = load_dataset_card(path)
        except UserError as error:
            name, rows = dig(one.state, "tokenizer", "name"), dig(one.state, "tokenizer", "vocab_size")
            parts.append(muted(error))
            parts.append(table([], [["tokenizer", f"{name}, {rows:,} ids"]]) if name and isinstance(rows, int) else "")
            continue
        source, tokenizer = card["source"], card["tokenizer"]
        rows = [["folder", tag("code", path)], ["tokenizer", f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids"],
                ["samples", f"of {card['block_size']:,} tokens, {card['dtype']}"],
                *([name, f"{split['tokens']:,} tokens, {split['samples']:,} samples, {split['documents']:,} documents, "
                   f"{short(split['bytes'])} bytes"] for name, split in card["splits"].items()),
                ["source", shown(source.get("paths") or source.get("kind"))]]
        made = table([], [[key, shown(value)] for key, value in source.items()])
        parts += [table([], rows), tag("details", tag("summary", "how it was made"), made)]
    return section("Data", *(parts or [muted("No dataset is named.")]))


def hardware(one: Run) -> Html:
    memory = [v for v in column(one.records, "memory_gib") if v == v]
    versions = dig(one.state, "versions")
    start = one.starts[-1] if one.starts else {}
    ranks = start.get("ranks") or dig(one.state, "world_size")
    rows = [["device", start.get("device")], ["ranks", ranks and f"{ranks}"], ["memory, predicted", start.get("memory")],
            ["memory, largest", memory and f"{max(memory):.2f} GiB"],
            *([name, version] for name, version in (versions if isinstance(versions, dict) else {}).items())]
    return section("Hardware and software", table([], [row for row in rows if row[1]]))


def time_of(one: Run) -> Html:
    """Goodput, and each start with how it ended."""
    began = dig(one.state, "clock", "began")
    until = max((v for v in column(one.records, "time") if v == v), default=None)
    goodput, wait = ([v for v in column(one.records, key) if v == v] for key in ("goodput", "data_wait_fraction"))
    rows = [["first start", began and clock(began)], ["last logged step", until and clock(until)],
            ["from the first to the last", began and until and until > began and duration(until - began)],
            ["in its steps", one.trained_s and duration(one.trained_s)], ["goodput", goodput and f"{goodput[-1]:.1%}"],
            ["waiting for data, median", wait and f"{statistics.median(wait):.1%}"]]
    first = {r["step"]: r for r in reversed(one.records)}
    each = []
    for i, start in enumerate(one.starts):
        after = one.starts[i + 1] if i + 1 < len(one.starts) else None
        last, end = start["last"], start["end"]
        at = next((first[s] for s in sorted(first) if s > start["first"]), {}) if i == len(one.starts) - 1 or (
            after and after["first"] > start["first"]) else {}
        if not end and after:
            again = (last or start["first"]) - after["first"]
            end = "killed, or an error" + (f"; {again:,} steps done again" if again > 0 else "")
        done = one.last_step and last == one.last_step
        end = end or ("under way" if one.trains_now() else "done" if done else "killed, or an error")
        when = at.get("time")
        each.append([f"{i + 1}", clock(when) if isinstance(when, (int, float)) else "-", f"{start['first']:,}",
                     "-" if last is None else f"{last:,}", start["ranks"] or "-", end])
    list_of = [tag("h3", "Starts"), table(["", "its first step, as kept", "after step", "to step", "ranks", "end"], each)]
    return section("Time and goodput", table([], [row for row in rows if row[1]]), *(list_of if each else []))


def clock(seconds: float) -> str:
    try:
        return time.strftime("%F %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"


def checkpoints_of(one: Run) -> Html:
    val = dict(one.val)
    best = dig(one.state, "held_out", "best_step")
    rows = [[kept["name"], f"{kept['bytes'] / 2**20:,.1f} MiB", f"{val[kept['step']]:.4f}" if kept["step"] in val else "-",
             "best" if kept["step"] == best else ""] for kept in one.checkpoints]
    return section("Checkpoints", table(["", "size", "validation loss", ""], rows) if rows else muted("None is kept."))


def evaluations(one: Run) -> Html:
    """What tools/evaluate.py --out has left in the run folder."""
    rows = []
    for path in sorted(one.folder.glob("*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            for r in said["results"]:
                error = f" ± {r['stderr']:.4f}" if isinstance(r.get("stderr"), float) else ""
                what = f"{r['task']} {r.get('data', '')} {r.get('split', '')}".strip()
                step = dig(said, "model", "step") or "-"
                rows.append([what, r["metric"], f"{r['value']:.4f}{error}", f"{r['n']:,}", step])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    command = f"python tools/evaluate.py --run {one.folder} --out {one.folder}/evaluation.json"
    hint = muted("None yet: ", tag("code", command))
    return section("Evaluation", table(["task", "metric", "value", "of", "step"], rows) if rows else hint)


def oddities(one: Run) -> Html:
    """Spikes, steps that were left out, warnings."""
    by_step = {r["step"]: r for r in one.records}
    rows = []
    for key, what in (("loss_spikes", "spike of the loss"), ("skipped_steps", "left out: not finite")):
        for step in marked(one.records, key):
            loss = dig(by_step.get(step, {}), "loss")
            rows.append([f"{step:,}", what, f"{loss:.4f}" if isinstance(loss, float) and loss == loss else "-"])
    warned = list(dict.fromkeys(line for line in one.log if line.startswith("warning: ")))
    parts = [table(["step", "", "loss"], rows) if rows else muted("No spike of the loss, and no step was left out.")]
    parts += [tag("p", line, class_="warn") for line in warned[-30:]]
    return section("Out of the ordinary", *parts)


if __name__ == "__main__":
    run(main)

"""What tools/plot.py and tools/report.py draw: metrics.jsonl and config.yaml of runs, smoothed, thinned, compared."""

import json
import math
import sys
from itertools import accumulate, pairwise
from pathlib import Path

from nanogpt.errors import UserError

# Colours that people with any colour vision tell apart, on white and on black (Okabe and Ito, 2008), without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
AXES = {"steps": "step", "tokens": "tokens", "time": "time spent training", "flops": "training FLOPs"}


# ---- reading --------------------------------------------------------------------------------------------------------

def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, by step. Damaged lines are left out, and told. Raises UserError.

    A loss that was not finite is NaN: a gap in the curve.
    """
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); training writes it") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["loss"] is None:
                record["loss"] = math.nan
            needed = [record[key] for key in ("step", "tokens", "loss")]
            if any(isinstance(value, (str, bool)) or math.isinf(float(value)) for value in needed):
                raise ValueError
            record["step"], record["tokens"] = int(record["step"]), int(record["tokens"])
            records.append(record)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            print(f"warning: {path}: line {number} is damaged and left out", file=sys.stderr)
    if not records:
        raise UserError(f"{path}: holds no step yet")
    return sorted(records, key=lambda r: r["step"])


def read_config(folder: Path) -> dict:
    """{section: {key: value}} of a run's config.yaml; {} where there is none. Raises UserError where it is damaged."""
    from nanogpt.config import read_yaml
    path = folder / "config.yaml"
    values = read_yaml(path)[0] if path.exists() else {}
    return {name: section for name, section in values.items() if isinstance(section, dict)}


def names(folders: list[Path]) -> list[str]:
    """What to call each run: its folder's name, with those above it as far as they are needed to tell runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-n:]) for p in parts]
        if len(set(found)) == len(set(parts)):
            break
    return found


def column(records: list[dict], key: str) -> list[float]:
    """One value of each record; NaN where there is none, or no finite number."""
    values = []
    for record in records:
        value = record.get(key)
        try:
            values.append(float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan)
        except OverflowError:  # an int that no float holds
            values.append(math.nan)
    return values


def along(axis: str, records: list[dict], flops_per_token: float = math.nan) -> list[float]:
    """Where each record lies: steps, tokens, seconds of training, or FLOPs.

    The seconds are those of the steps, each once, without evaluations, saves, and time in which nothing ran.
    """
    if axis == "steps":
        return [r["step"] for r in records]
    if axis == "time":
        seconds = [0.0 if s != s else s for s in column(records, "step_time_s")]
        steps = [b - a for a, b in pairwise([0, *(r["step"] for r in records)])]
        return list(accumulate(s * n for s, n in zip(seconds, steps)))
    return [r["tokens"] * (flops_per_token if axis == "flops" else 1) for r in records]


def flops_per_token(config: dict) -> float:
    """Of forward and backward, model.py's count, from the config of a run. Raises UserError where it has no whole model."""
    import torch

    from nanogpt.config import Model
    from nanogpt.model import GPT
    try:
        model = Model(**config["model"])
        if model.vocab_size is None or any(model.contradictions()):
            raise ValueError
        with torch.device("meta"):
            return float(GPT(model).flops_per_token())
    except (KeyError, TypeError, ValueError):
        raise UserError("its config.yaml has no whole model section, so its FLOPs are not known; take another --x") from None


# ---- lines ----------------------------------------------------------------------------------------------------------

def smoothed(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours: a 25th of the run, and less at the start, where the loss falls fast."""
    sums = [0.0, *accumulate(v if v == v else 0.0 for v in values)]  # a NaN would stay for ever
    counts = [0, *accumulate(v == v for v in values)]
    means = []
    for i in range(len(values)):
        reach = min(max(3, len(values) // 50), i // 4)
        first, last = i - reach, min(i + reach + 1, len(values))
        n = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / n if n else math.nan)
    return means


def thinned(columns: list[list[float]], bins: int) -> list[int]:
    """Which rows to draw of long columns: the first `bins`, then of each of `bins` equal parts those with the smallest and
    the largest value of each column, so that no spike is lost; and the last.

    A column's NaNs are left out; all rows are kept where they are few enough.
    """
    n = len(columns[0])
    if n <= 2 * bins * (len(columns) + 1):
        return list(range(n))
    keep = {n - 1, *range(bins)}
    for i in range(bins):
        rows = range(bins + (n - bins) * i // bins, bins + (n - bins) * (i + 1) // bins)
        for values in columns:
            found = [row for row in rows if values[row] == values[row]]
            if found:
                keep |= {min(found, key=values.__getitem__), max(found, key=values.__getitem__)}
    return sorted(keep)


def marked(records: list[dict], key: str) -> list[int]:
    """The steps that `loss_spikes` or `skipped_steps` of the records name."""
    lists = [steps for r in records if isinstance(steps := r.get(key), list)]
    return sorted({step for steps in lists for step in steps if type(step) is int})


# ---- settings -------------------------------------------------------------------------------------------------------

def settings(config: dict) -> dict:
    """{section.key: value}, with the defaults of what a config does not state."""
    from nanogpt.config import Config
    known = Config().model_dump()
    return {f"{section}.{key}": value for section in {**known, **config}
            for key, value in {**known.get(section, {}), **config.get(section, {})}.items()}


def differences(configs: list[dict]) -> dict[str, list]:
    """{section.key: its value in each config} where these are not the same. A run's name and folder do not count."""
    flat = [settings(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one if key not in ("run.name", "run.dir"))
    rows = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def shown(value) -> str:
    """A setting as a config would state it."""
    if value is None:
        return "-"
    if type(value) is float:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)

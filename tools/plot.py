"""The loss curves of runs, as one picture.

    python tools/plot.py runs/quickstart                      writes runs/quickstart/loss.png
    python tools/plot.py runs/a runs/b --out compared.png
"""

import json
import os
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run  # noqa: E402
from nanogpt.words import short  # noqa: E402


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are drawn into one picture")
    parser.add_argument("--out", metavar="FILE", help=".png, .svg or .pdf (default: loss.png in the first RUN)")
    args = parser.parse_args()
    out = Path(args.out or Path(args.runs[0]) / "loss.png")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out: {out} ends neither in .png nor in .svg or .pdf")
    curves = {name: read_metrics(Path(name)) for name in args.runs}
    draw(curves, out)
    print(out)


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl. Damaged lines are left out, and told."""
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
            if record["loss"] is None:  # not finite: a gap in the curve
                record["loss"] = float("nan")
            for key in ("step", "tokens", "loss"):
                float(record[key])
            records.append(record)
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path}: line {number} is damaged and left out", file=sys.stderr)
    if not records:
        raise UserError(f"{path}: holds no step yet")
    return sorted(records, key=lambda r: r["step"])


def smoothed(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours: a 25th of the run, and less at the start, where the loss falls fast."""
    sums = [0.0, *accumulate(v if v == v else 0.0 for v in values)]  # a NaN would stay for ever
    counts = [0, *accumulate(v == v for v in values)]
    means = []
    for i in range(len(values)):
        reach = min(max(3, len(values) // 50), i // 4)
        first, last = i - reach, min(i + reach + 1, len(values))
        n = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / n if n else float("nan"))
    return means


def draw(curves: dict[str, list[dict]], out: Path):
    """Training loss, raw and smoothed, and validation loss against steps, one colour a run."""
    import matplotlib
    matplotlib.use("Agg")  # no window, so no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for color, (name, records) in zip(plt.cm.tab10.colors * len(curves), curves.items()):
        steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
        label = Path(name).resolve().name
        smooth = smoothed(losses)
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth, color=color, linewidth=1.6, label=f"{label}: train {smooth[-1]:.4f}")
        validated = [r for r in records if r.get("val_loss") is not None]
        if validated:
            last = validated[-1]
            bits = f" ({last['val_bits_per_byte']:.4f} bits/byte)" if "val_bits_per_byte" in last else ""
            axes.plot([r["step"] for r in validated], [r["val_loss"] for r in validated], color=color, linestyle="--",
                      marker="o", markersize=4, markeredgecolor="white", markeredgewidth=0.6, linewidth=1,
                      label=f"{label}: val {last['val_loss']:.4f}{bits} at step {last['step']:,}")

    # The first steps fall from ln(vocabulary) within moments, and would press everything else onto the floor.
    late = [r["loss"] for records in curves.values() for r in records[len(records) // 25:] if r["loss"] == r["loss"]]
    every = [r["loss"] for records in curves.values() for r in records if r["loss"] == r["loss"]]
    every += [r["val_loss"] for records in curves.values() for r in records if r.get("val_loss") is not None]
    if late and max(every) > min(every):
        margin = 0.05 * (max(late) - min(every))
        axes.set_ylim(min(every) - margin, max(late) + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    names = [Path(name).resolve().name for name in curves]
    axes.set_title(", ".join(names) if len(names) < 4 else f"{len(names)} runs")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False)

    sizes = {r["tokens"] / r["step"] for records in curves.values() for r in records if r["step"]}
    if len(sizes) == 1:  # all runs take steps of the same size: tokens along the top
        size = sizes.pop()
        top = axes.secondary_xaxis("top", functions=(lambda step: step * size, lambda tokens: tokens / size))
        top.set_xlabel("tokens")
        top.xaxis.set_major_formatter(lambda x, _: short(x))

    aside = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        figure.savefig(aside, dpi=150)
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); take another --out") from None
    plt.close(figure)


if __name__ == "__main__":
    run(main)

"""The curves of runs, as one picture: loss (train and val), learning rate, gradient norm, throughput; several compared.

    python tools/plot.py runs/quickstart                                     writes runs/quickstart/loss.png
    python tools/plot.py runs/a runs/b --out compared.png compared.svg       and a table of what differs in their configs
    python tools/plot.py runs/a runs/b --x time                              against steps, tokens, time or flops
    python tools/plot.py runs/gpt2_124m --log-x                              the beginning of a long run

Lines are smoothed, each logged value stands faintly beneath; circles are the validation loss. Time is that of training
alone. tools/report.py makes a page of the same curves in which one can zoom.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.curves import (AXES, COLORS, along, column, differences, flops_per_token, marked, names,
                            read_config, read_metrics, shown, smoothed, thinned)
from nanogpt.errors import Parser, UserError, run, written_whole
from nanogpt.words import short

PANELS = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens/s"}
BINS = 1000  # of a long run: more is not to be seen, and makes an SVG slow


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are drawn into one picture")
    parser.add_argument("--x", choices=list(AXES), default="steps", help="what lies along the picture")
    parser.add_argument("--log-x", action="store_true", help="in powers of ten")
    parser.add_argument("--out", nargs="+", metavar="FILE", help=".png, .svg or .pdf, one or several "
                        "(nothing: loss.png in the first RUN)")
    parser.add_argument("--dpi", type=int, default=200, help="of a .png: 200 is good for print")
    args = parser.parse_args()
    outs = [Path(out) for out in args.out or [Path(args.runs[0]) / "loss.png"]]
    for out in outs:
        if out.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--out: {out} ends neither in .png nor in .svg or .pdf")
    if not 30 <= args.dpi <= 1200:
        raise UserError(f"--dpi: {args.dpi} is not from 30 to 1200")
    curves = {name: read_metrics(Path(name)) for name in args.runs}
    draw(curves, *outs, axis=args.x, log_x=args.log_x, dpi=args.dpi)
    if len(curves) > 1:
        show(summary(curves))
    for out in outs:
        print(out)


def summary(curves: dict[str, list[dict]]) -> list[list[str]]:
    """A table with its heading: of each run how far it came and how well, then the settings in which runs differ."""
    configs = []
    for name in curves:
        try:
            configs.append(read_config(Path(name)))
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            configs.append({})
    different = differences(configs) if all(configs) else {}
    table = [["run", "steps", "tokens", "train loss", "val loss", *(unique(key, different) for key in different)]]
    for i, (called, records) in enumerate(zip(names([Path(name) for name in curves]), curves.values())):
        val = [f"{v:.4f}" for v in column(records, "val_loss") if v == v] or ["-"]
        last = records[-1]
        wanted = configs[i].get("train", {}).get("max_steps")
        steps = f"{last['step']:,}" + (f" of {wanted:,}" if type(wanted) is int and wanted > last["step"] else "")
        table.append([called, steps, short(last["tokens"]), f"{smoothed(column(records, 'loss'))[-1]:.4f}", val[-1],
                      *(shown(values[i]) for values in different.values())])
    return table


def unique(key: str, keys) -> str:
    """A setting without its section, where no other has the same name."""
    name = key.partition(".")[2]
    return name if name != "name" and sum(other.partition(".")[2] == name for other in keys) == 1 else key


def show(table: list[list[str]]):
    widths = [max(map(len, cells)) for cells in zip(*table)]
    for row in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())


# ---- the picture ----------------------------------------------------------------------------------------------------

def draw(curves: dict[str, list[dict]], *outs: Path, axis: str = "steps", log_x: bool = False, dpi: int = 200):
    """curves: run folder -> its records. Loss above, PANELS below it, and for several runs the table of `summary`."""
    import matplotlib
    matplotlib.use("Agg")  # no window, so no display is needed
    import matplotlib.pyplot as plt
    plt.rcParams["text.parse_math"] = False  # a dollar in a run's name is a dollar

    lines = [Line(name, called, records, axis, i) for i, ((name, records), called) in
             enumerate(zip(curves.items(), names([Path(name) for name in curves])))]
    table = summary(curves) if len(curves) > 1 else []
    labels = end_labels(lines)
    per_step = {r["tokens"] / r["step"] for line in lines for r in line.records if r["step"]}
    both = axis == "steps" and len(per_step) == 1 and min(per_step) > 0  # all steps are of one size: tokens along the top
    top = 0.95 if both else 0.5
    longest_label = max(len(words.split("\n")[-1]) for _, _, words, _ in labels)
    height, left, right = top + 6.45 + 0.21 * len(table), 0.85, 11 - 0.35 - 0.072 * longest_label
    figure = plt.figure(figsize=(11, height))

    def place(x, y, width, tall):  # in inches, from the upper left
        return figure.add_axes((x / 11, 1 - (y + tall) / height, width / 11, tall / height))

    axes = place(left, top, right - left, 3.9)
    each = (11 - 0.2 - left) / 3
    panels = {key: place(left + i * each, top + 4.7, each - 0.55, 1.15) for i, key in enumerate(PANELS)}
    longest = max((line.x[-1] for line in lines), default=0)
    size, unit = time_unit(longest) if axis == "time" else (1, "")

    for line in lines:
        line.x = [x / size for x in line.x]
        alone = len(lines) == 1
        line.into(axes, "loss", alpha=0.3 if len(lines) < 5 else 0.13)
        line.validation(axes, COLORS[1] if alone else line.color, joined=len(lines) < 5)
        for key, panel in panels.items():
            line.into(panel, key, alpha=0.25 if len(lines) < 5 else 0.1, width=1.2)
    log_x = log_x and longest > 0
    if log_x:
        axes.set_xlim(min((x for line in lines for x in line.x if x > 0), default=1), longest / size * 1.02 or 10)
    else:
        axes.set_xlim(0, longest / size * 1.002 or 1)
    axes.set_ylim(*loss_range(lines, log_x))
    axes.set_ylabel("loss (nats per token)")
    draw_labels(axes, [(x, *rest) for x, *rest in labels], size)
    figure.suptitle(title([line.called for line in lines]), fontsize=13, y=1 - 0.25 / height)
    for key, panel in panels.items():
        panel.set_title(PANELS[key], fontsize=10)
        panel.tick_params(labelsize=8)
        values = [v for line in lines for v in column(line.records, key) if v == v]
        if not values:
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", color="#888888")
            panel.set_yticks([])
        elif key == "grad_norm" and min(values) > 0 and max(values) > 20 * sorted(values)[len(values) // 2]:
            panel.set_yscale("log")
        elif key != "learning_rate":
            panel.set_ylim(bottom=0, top=1.1 * sorted(values)[int(0.995 * (len(values) - 1))] or None)
        if key == "learning_rate":
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        elif panel.get_yscale() == "linear":
            panel.yaxis.set_major_formatter(lambda y, _: short(y) if y >= 1000 else f"{y:g}")
    for panel in (axes, *panels.values()):
        if log_x:
            panel.set_xscale("log")
        else:
            panel.xaxis.set_major_locator(plt.MaxNLocator(9 if panel is axes else 4, integer=axis == "steps"))
        if panel.get_yscale() == "log":
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            panel.yaxis.set_minor_formatter(lambda y, _: "")
        panel.set_xlim(axes.get_xlim())
        whole = 1e6 if panel is axes else 1e4
        panel.xaxis.set_major_formatter(lambda x, _, whole=whole: f"{x:.3g}" if unit or axis == "flops" else
                                        f"{x:,.0f}" if x < whole else short(x))
        panel.xaxis.set_minor_formatter(lambda x, _: "")
        panel.set_xlabel(AXES[axis] + (f" ({unit})" if unit else ""), fontsize=10 if panel is axes else 8)
        panel.grid(alpha=0.25)
        panel.spines[["right", "top"]].set_visible(False)

    if both:
        size, = per_step
        tokens = axes.secondary_xaxis("top", functions=(lambda step: step * size, lambda tokens: tokens / size))
        tokens.set_xlabel("tokens")
        tokens.xaxis.set_major_formatter(lambda x, _: short(x))
        tokens.xaxis.set_minor_formatter(lambda x, _: "")
    if table:
        write_table(place(0.2, top + 6.35, 10.6, 0.21 * len(table)), table, lines)
    for out in outs:
        with written_whole(out) as file:
            figure.savefig(file, dpi=dpi)
    plt.close(figure)


class Line:
    """What is drawn of a run: its rows, thinned, and their places along x."""

    def __init__(self, folder: str, called: str, records: list[dict], axis: str, number: int):
        try:
            flops = flops_per_token(read_config(Path(folder))) if axis == "flops" else 0
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        if axis == "time" and not any(s == s for s in column(records, "step_time_s")):
            raise UserError(f"{folder}: its metrics.jsonl has no step_time_s; take another --x")
        self.called, self.records = called, records
        self.color, self.style = COLORS[number % len(COLORS)], ("-", (0, (4, 1.5)), (0, (1, 1)))[number // len(COLORS) % 3]
        self.raw = {key: column(records, key) for key in ("loss", "val_loss", *PANELS)}
        self.smooth = {key: values if key == "learning_rate" else smoothed(values) for key, values in self.raw.items()}
        self.x = along(axis, records, flops)
        self.rows = thinned([self.raw[key] for key in ("loss", "grad_norm", "tokens_per_s")], BINS)

    def into(self, axes, key: str, alpha: float, width: float = 1.8):
        """Smoothed; and if that differs, each value faintly beneath. A value that is not finite is a gap."""
        x = [self.x[i] for i in self.rows]
        if key != "learning_rate":
            axes.plot(x, [self.raw[key][i] for i in self.rows], color=self.color, alpha=alpha, linewidth=0.7)
        axes.plot(x, [self.smooth[key][i] for i in self.rows], color=self.color, linewidth=width, linestyle=self.style)
        if key == "loss":  # marks along the lower edge
            for what, marker in (("loss_spikes", "^"), ("skipped_steps", "x")):
                steps = set(marked(self.records, what))
                at = [self.x[i] for i, r in enumerate(self.records) if r["step"] in steps or steps & set(r.get(what) or ())]
                axes.plot(at, [0.012] * len(at), marker, color=self.color, markersize=4, clip_on=False,
                          transform=axes.get_xaxis_transform())

    def validation(self, axes, color: str, joined: bool):
        """A circle for each value, where they are few; joined by a line."""
        rows = [i for i, v in enumerate(self.raw["val_loss"]) if v == v]
        axes.plot([self.x[i] for i in rows], [self.raw["val_loss"][i] for i in rows], color=color,
                  linewidth=1 if joined else 0, marker="o" if len(rows) < 60 or not joined else None,
                  markersize=4.5 if joined else 3, markeredgecolor="white", markeredgewidth=0.6)


def loss_range(lines: list[Line], log_x: bool) -> tuple[float, float]:
    """Of the y axis. The first steps fall from ln(vocabulary) within moments, and would press everything else onto the
    floor; so would a spike: only the smoothed line counts in full, of single values all but the highest 200th."""
    low, high = [], []
    for line in lines:
        first = 0 if log_x else len(line.records) // 25
        raw = sorted(v for v in line.raw["loss"][first:] if v == v)
        val = [v for v in line.raw["val_loss"] if v == v]
        smooth = [v for v in line.smooth["loss"][first:] if v == v]
        low += raw[:1] + val
        high += ([raw[int(0.995 * (len(raw) - 1))]] if raw else []) + smooth + val[len(val) // 25:]
    if not high:
        return 0, 1
    bottom, top = min(low), max(high)
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def end_labels(lines: list[Line]) -> list[tuple]:
    """(x, y, words, color) for the end of each curve: its name and last loss. One run has names for train and val."""
    labels = []
    for line in lines:
        train, val = (max((i for i, v in enumerate(values) if v == v), default=None)
                      for values in (line.smooth["loss"], line.raw["val_loss"]))
        if len(lines) == 1:
            if val is not None:
                bits = line.records[val].get("val_bits_per_byte")
                y, more = line.raw["val_loss"][val], f"\n{bits:.4f} bits/byte" if isinstance(bits, float) else ""
                labels.append((line.x[val], y, f"val {y:.4f}{more}", COLORS[1]))
            if train is not None:
                y = line.smooth["loss"][train]
                labels.append((line.x[train], y, f"train {y:.4f}", line.color))
        elif train is not None:
            words = f"{line.called:.24}  {line.smooth['loss'][train]:.3f}"
            words += f", val {line.raw['val_loss'][val]:.3f}" if val is not None else ""
            labels.append((line.x[train], line.smooth["loss"][train], words, line.color))
    return labels or [(0, 0, "no finite loss", COLORS[-1])]


def draw_labels(axes, labels: list[tuple], size: float):
    """To the right of the curves, at their height as far as there is room, joined to their ends by a thin line."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[1])
    gaps = [0.045 * max(1.3 * label[2].count("\n") + 1, 1) for label in labels]
    places = spread([(y - low) / (high - low) for _, y, _, _ in labels], max(gaps))
    for at, (x, y, words, color) in zip(places, labels):
        axes.annotate(words, (x / size, y), (1.015, at), textcoords="axes fraction", color=color, va="center", fontsize=9,
                      annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=color, linewidth=0.5, alpha=0.6, relpos=(0, 0.5)))


def spread(places: list[float], gap: float) -> list[float]:
    """Rising places from 0 to 1, moved until neighbours are `gap` apart, if there is room."""
    places = [min(max(place, 0.0), 1.0) for place in places]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(places))):
        places[i] = limit = min(places[i], limit)
        limit -= gap
    return places


def write_table(axes, table: list[list[str]], lines: list[Line]):
    """Runs that differ in more settings than fit: the rest is on the console, and in tools/report.py."""
    axes.axis("off")
    columns = 12
    cells = [[f"{cell:.24}" for cell in row[:columns]] for row in table]
    if len(table[0]) > columns:
        cells[0].append(f"+ {len(table[0]) - columns} more")
        cells[1:] = [[*row, "…"] for row in cells[1:]]
    widths = [max(map(len, (*column, column[0] + "  "))) + 2 for column in zip(*cells)]
    widths[0] += 3  # what is bold is wider
    drawn = axes.table(cells, bbox=(0, 0, 1, 1), cellLoc="left", edges="horizontal",
                       colWidths=[w / sum(widths) for w in widths])
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(min(9, 9 * 150 / sum(widths)))
    for (row, col), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if row == 0:
            cell.set_text_props(weight="bold")
        elif col == 0:
            cell.set_text_props(color=lines[row - 1].color, weight="bold")


def title(called: list[str]) -> str:
    return ", ".join(called) if len(called) < 4 else f"{len(called)} runs"


def time_unit(seconds: float) -> tuple[float, str]:
    """The largest unit of which there are at least two."""
    return next(((size, unit) for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds >= 2 * size),
                (1, "seconds"))


if __name__ == "__main__":
    run(main)

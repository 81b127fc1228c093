// The curves of a report: hover for values, drag to zoom, double-click to see all again. No library, no network.
"use strict";
const {runs, charts: specs, colors, axes} = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, name, text) => Object.assign(document.createElement(tag), {className: name || "", textContent: text ?? ""});
const DASHES = [[], [7, 3], [2, 2]];
const state = {axis: "steps", logX: false, logY: false, raw: true, view: null, hidden: new Set()};
const charts = [];

runs.forEach((run, i) => {
  run.color = colors[i % colors.length];
  run.dash = DASHES[Math.floor(i / colors.length) % 3];
  if (run.flops) run.x.flops = run.x.tokens.map((n) => n * run.flops);
});

// ---- numbers as people read them ------------------------------------------------------------------------------------

function short(v, digits = 3) {
  const a = Math.abs(v);
  if (a >= 1e15) return v.toExponential(Math.max(0, digits - 1)).replace("e+", "e");
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (a >= size) return Number((v / size).toPrecision(digits)) + letter;
  return String(Number(v.toPrecision(digits)));
}
const FORMATS = {
  loss: (v) => v.toFixed(4),
  small: (v) => v.toExponential(3),
  norm: (v) => v.toPrecision(4),
  count: (v) => Math.round(v).toLocaleString("en"),
  share: (v) => (100 * v).toFixed(1) + " %",
  plain: (v) => String(Number(v.toPrecision(5))),
};
function seconds(s) {
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return s < 60 ? s.toFixed(1) + " s" : (s >= 86400 ? Math.floor(s / 86400) + "d " : "") +
    (s >= 3600 ? Math.floor(s % 86400 / 3600) + ":" + two(s % 3600 / 60) : Math.floor(s / 60)) + ":" + two(s % 60);
}
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
const shownX = (v) => state.axis === "time" ? seconds(v) : state.axis === "steps" ? v.toLocaleString("en") : short(v, 4);

function ticks(low, high, log, most) {  // round numbers from low to high, not many more than `most`
  const found = [];
  if (log && high / low >= 10) {
    const decades = Math.log10(high / low), within = decades > 3 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(decades / most));
    for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k += every)
      for (const m of within) if (m * 10 ** k >= low * 0.999 && m * 10 ** k <= high * 1.001) found.push(m * 10 ** k);
    return found;
  }
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}

function faint(color, page, share) {  // opaque, so that lines which cross do not add up
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.length === 4 ? hex[(i + 1) / 2].repeat(2) : hex.slice(i, i + 2), 16));
  const [a, b] = [rgb(color), rgb(page.trim())];
  return `rgb(${a.map((v, i) => Math.round(share * v + (1 - share) * b[i])).join(",")})`;
}

// ---- where things are -----------------------------------------------------------------------------------------------

const visible = () => runs.filter((run) => !state.hidden.has(run) && run.x[state.axis]);

function bound(xs, x) {  // the first index with xs[i] >= x
  let low = 0, high = xs.length;
  while (low < high) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid + 1; else high = mid; }
  return low;
}

function wholeX() {
  let low = Infinity, high = -Infinity;
  for (const run of visible()) {
    const xs = run.x[state.axis];
    low = Math.min(low, state.logX ? xs[bound(xs, Number.MIN_VALUE)] ?? Infinity : 0);
    high = Math.max(high, xs[xs.length - 1]);
  }
  return high > low && low < Infinity ? [low, high] : [state.logX ? 1 : 0, (state.logX ? 10 : 1)];
}

class Chart {
  constructor(parent, spec) {
    this.spec = spec;
    const figure = make("figure", spec.key === "loss" ? "chart wide" : "chart"), caption = make("figcaption", "", spec.title);
    this.plot = make("div", "plot");
    [this.base, this.top] = [make("canvas"), make("canvas")];
    this.tip = make("div", "tip");
    this.tip.hidden = true;
    this.base.setAttribute("role", "img");
    this.base.setAttribute("aria-label", spec.title + ", a curve");
    this.plot.append(this.base, this.top, this.tip);
    figure.append(caption, this.plot);
    parent.append(figure);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.top.addEventListener("pointerdown", (event) => this.down(event));
    this.top.addEventListener("pointermove", (event) => this.move(event));
    this.top.addEventListener("pointerup", (event) => this.up(event));
    this.top.addEventListener("pointercancel", () => { this.from = null; hover(null); });
    this.top.addEventListener("pointerleave", () => hover(null));
    this.top.addEventListener("dblclick", () => zoom(null));
  }

  columns(run) {  // what is drawn of a run: the logged values, their mean, and those of validation
    const {key} = this.spec, mean = run.columns[key + "~"];
    return {raw: run.columns[key], mean, val: key === "loss" ? run.columns.val_loss : null};
  }

  range(x0, x1) {  // of y; until one zooms, of single values all but the highest 200th: a spike would press the rest onto the floor
    const all = [], sure = [];
    const late = this.spec.key === "loss" && !state.view && !state.logX && !state.logY ? x0 + (x1 - x0) / 25 : x0;
    for (const run of visible()) {
      const xs = run.x[state.axis], {raw, mean, val} = this.columns(run);
      for (let i = bound(xs, Math.min(late, xs[xs.length - 1])); i < xs.length && xs[i] <= x1; i++) {
        if (raw[i] !== null && (!mean || state.raw)) all.push(raw[i]);
        if (mean && mean[i] !== null) sure.push(mean[i]);
        if (val && val[i] !== null) sure.push(val[i]);
      }
    }
    const positive = state.logY ? (v) => v > 0 : () => true;
    const sorted = Float64Array.from(all.filter(positive)).sort();
    const ends = sorted.length ? [sorted[0], sorted[Math.floor((state.view ? 1 : 0.995) * (sorted.length - 1))]] : [];
    let low = Infinity, high = -Infinity;
    for (const list of [ends, sure.filter(positive)]) for (const v of list) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) return null;
    if (state.logY) return low < high ? [low / (high / low) ** 0.05, high * (high / low) ** 0.05] : [low / 2, high * 2];
    if (this.spec.zero && low > 0 && !state.view) low = 0;
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    return [this.spec.zero && low === 0 ? 0 : low - margin, high + margin];
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight, dpr = window.devicePixelRatio || 1;
    if (!width || !height) return;
    for (const canvas of [this.base, this.top]) [canvas.width, canvas.height] = [Math.round(width * dpr), Math.round(height * dpr)];
    const c = this.base.getContext("2d"), style = getComputedStyle(document.body);
    const muted = style.getPropertyValue("--muted"), grid = style.getPropertyValue("--grid");
    c.scale(dpr, dpr);
    c.font = "11px system-ui, sans-serif";
    const [x0, x1] = state.view || wholeX(), y = this.range(x0, x1);
    const named = runs.length > 1 && this.spec.key === "loss" && width > 800 ? 150 : 0;  // room for names at the ends
    const box = this.box = {left: 58, right: width - 14 - named, top: 6, bottom: height - 34};
    const [fx, fy] = [state.logX ? Math.log : Number, state.logY ? Math.log : Number];
    const [y0, y1] = y || [1, 2];
    this.X = (x) => box.left + (fx(x) - fx(x0)) / (fx(x1) - fx(x0)) * (box.right - box.left);
    this.Y = (v) => box.bottom - (fy(v) - fy(y0)) / (fy(y1) - fy(y0)) * (box.bottom - box.top);
    this.at = (px) => { const t = (px - box.left) / (box.right - box.left); return state.logX ? x0 * (x1 / x0) ** t : x0 + t * (x1 - x0); };

    const [size, unit] = state.axis === "time" ? UNITS.find(([n]) => x1 >= 2 * n) || [1, "s"] : [1, ""];
    c.fillStyle = muted;
    c.strokeStyle = grid;
    c.lineWidth = 1;
    c.textAlign = "center";
    c.textBaseline = "top";
    const line = (a, b, d, e) => { c.beginPath(); c.moveTo(a, b); c.lineTo(d, e); c.stroke(); };
    for (const x of ticks(x0 / size, x1 / size, state.logX, Math.max(2, (box.right - box.left) / 80))) {
      if (state.axis === "steps" && x % 1) continue;
      const px = Math.round(this.X(x * size)) + 0.5;
      line(px, box.top, px, box.bottom);
      c.fillText(Math.abs(x) < 1e4 ? String(Number(x.toPrecision(4))) : short(x, 4), px, box.bottom + 5);
    }
    c.textAlign = "right";
    c.fillText(axes[state.axis] + (unit && ` (${unit})`), box.right, box.bottom + 20);
    c.textBaseline = "middle";
    if (!y) {
      c.textAlign = "center";
      c.fillText("nothing logged here", (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    } else for (const v of ticks(y0, y1, state.logY, Math.max(2, (box.bottom - box.top) / 42))) {
      const py = Math.round(this.Y(v)) + 0.5;
      line(box.left, py, box.right, py);
      c.fillText(this.spec.format === "share" ? Number((100 * v).toPrecision(4)) + " %" :
        Math.abs(v) >= 1e4 ? short(v) : Math.abs(v) < 1e-3 && v ? Number(v.toPrecision(3)).toExponential() : Number(v.toPrecision(4)), box.left - 6, py);
    }
    c.strokeStyle = muted;
    line(box.left + 0.5, box.top, box.left + 0.5, box.bottom);
    line(box.left, box.bottom + 0.5, box.right, box.bottom + 0.5);

    c.save();
    c.beginPath();
    c.rect(box.left, box.top, box.right - box.left + 5, box.bottom - box.top + 1);
    c.clip();
    c.lineJoin = "round";
    const shown = visible(), page = style.getPropertyValue("--page"), within = (run) => {
      const xs = run.x[state.axis];
      return [Math.max(0, bound(xs, x0) - 1), Math.min(xs.length, bound(xs, x1) + 1)];
    };
    if (y) for (const layer of ["raw", "mean", "val", "marks"]) for (const run of shown) {
      const xs = run.x[state.axis], {raw, mean, val} = this.columns(run);
      if (layer === "raw" && mean && state.raw) this.line(c, xs, raw, ...within(run), faint(run.color, page, shown.length < 5 ? 0.35 : 0.18), 1, []);
      if (layer === "mean") this.line(c, xs, mean || raw, ...within(run), run.color, 2, run.dash);
      if (layer === "val" && val) this.dots(c, xs, val, ...within(run), runs.length === 1 ? colors[1] : run.color, page);
      if (layer === "marks" && this.spec.key === "loss") for (const [steps, mark] of [[run.spikes, "▲"], [run.skipped, "✕"]])
        for (const x of steps[state.axis] || []) {
          c.fillStyle = run.color;
          c.textAlign = "center";
          c.fillText(mark, this.X(x), box.bottom - 6);
        }
    }
    c.restore();
    if (y && named) this.names(c, shown, x1);
    this.over();
  }

  line(c, xs, ys, first, last, color, width, dash) {  // a value that was not finite is a gap
    c.beginPath();
    c.strokeStyle = color;
    c.lineWidth = width;
    c.setLineDash(dash);
    const dense = last - first > 3 * (this.box.right - this.box.left);  // then of each column of pixels what matters
    let pen = false, at = null, low, high, end;
    const flush = () => {
      if (at !== null) for (const v of [low, high, end]) c.lineTo(at, v);
      at = null;
    };
    for (let i = first; i < last; i++) {
      if (ys[i] === null || (state.logY && ys[i] <= 0) || (state.logX && xs[i] <= 0)) { flush(); pen = false; continue; }
      const px = this.X(xs[i]), py = this.Y(ys[i]);
      if (!pen) { c.moveTo(px, py); pen = true; }
      else if (!dense) c.lineTo(px, py);
      else if (at === Math.round(px)) [low, high, end] = [Math.min(low, py), Math.max(high, py), py];
      else { flush(); at = Math.round(px); low = high = end = py; }
    }
    flush();
    c.stroke();
    c.setLineDash([]);
  }

  names(c, shown, x1) {  // to the right, at the height of each curve's end as far as there is room
    const {top, bottom, right} = this.box, gap = 14, ends = [];
    for (const run of shown) {
      const {raw, mean} = this.columns(run), ys = mean || raw;
      let i = Math.min(bound(run.x[state.axis], x1), ys.length - 1);
      while (i > 0 && ys[i] === null) i--;
      if (ys[i] !== null) ends.push({run, x: Math.min(this.X(run.x[state.axis][i]), right), y: Math.min(Math.max(this.Y(ys[i]), top), bottom)});
    }
    ends.sort((a, b) => a.y - b.y);
    ends.forEach((end, k) => { end.at = k ? Math.max(end.y, ends[k - 1].at + gap) : end.y; });
    for (let k = ends.length - 1, limit = bottom; k >= 0; k--) { ends[k].at = Math.min(ends[k].at, limit); limit = ends[k].at - gap; }
    c.textAlign = "left";
    c.lineWidth = 0.6;
    for (const {run, x, y, at} of ends) {
      c.strokeStyle = c.fillStyle = run.color;
      c.beginPath();
      c.moveTo(x, y);
      c.lineTo(right + 8, at);
      c.stroke();
      c.fillText(run.name.length > 22 ? run.name.slice(0, 21) + "…" : run.name, right + 12, at);
    }
  }

  dots(c, xs, ys, first, last, color, page) {  // joined over the rows between them
    const all = [];
    for (let i = 0; i < ys.length; i++) if (ys[i] !== null && (!state.logX || xs[i] > 0)) all.push(i);
    const there = all.filter((i, k) => all[Math.min(k + 1, all.length - 1)] >= first && all[Math.max(k - 1, 0)] < last);
    const many = there.length > 80 || runs.length > 4;
    if (runs.length < 5) this.line(c, there.map((i) => xs[i]), there.map((i) => ys[i]), 0, there.length, color, many ? 1.5 : 1, []);
    if (there.length <= 80) for (const i of there) {
      c.beginPath();
      c.arc(this.X(xs[i]), this.Y(ys[i]), many ? 2.5 : 3.5, 0, 7);
      c.fillStyle = color;
      c.strokeStyle = page;
      c.lineWidth = 1;
      c.fill();
      c.stroke();
    }
  }

  // ---- under the pointer --------------------------------------------------------------------------------------------

  nearest(run, x) {  // the row nearest to x that has something to tell here
    const xs = run.x[state.axis], {raw, val} = this.columns(run), told = (i) => raw[i] !== null || (val && val[i] !== null);
    let b = bound(xs, x), a = b - 1;
    while (a >= 0 && !told(a)) a--;
    while (b < xs.length && !told(b)) b++;
    if (a < 0 && b >= xs.length) return -1;
    return b >= xs.length || (a >= 0 && Math.abs(this.X(xs[a]) - this.X(x)) <= Math.abs(this.X(xs[b]) - this.X(x))) ? a : b;
  }

  over(x = null, own = false) {  // a line at x; and, in the chart below the pointer, the values there
    const c = this.top.getContext("2d"), dpr = window.devicePixelRatio || 1, box = this.box;
    c.setTransform(dpr, 0, 0, dpr, 0, 0);
    c.clearRect(0, 0, this.top.width, this.top.height);
    this.tip.hidden = true;
    if (x === null || !box) return;
    const style = getComputedStyle(document.body);
    if (own && this.from != null && Math.abs(this.to - this.from) > 6) {
      c.fillStyle = style.getPropertyValue("--select");
      c.fillRect(Math.min(this.from, this.to), box.top, Math.abs(this.to - this.from), box.bottom - box.top);
    }
    const px = this.X(x);
    if (px < box.left - 1 || px > box.right + 1) return;
    c.strokeStyle = style.getPropertyValue("--muted");
    c.beginPath();
    c.moveTo(px, box.top);
    c.lineTo(px, box.bottom);
    c.stroke();
    if (!own) return;
    const rows = [];
    for (const run of visible()) {
      const i = this.nearest(run, x), at = i < 0 ? 0 : run.x[state.axis][i];
      if (i < 0 || Math.abs(this.X(at) - px) > 24) continue;
      const {raw, mean, val} = this.columns(run);
      let j = val ? i : -1;  // the last evaluation until then
      while (j >= 0 && val[j] === null) j--;
      rows.push({run, i, j, raw: raw[i], mean: mean?.[i], val: val?.[j], order: mean?.[i] ?? raw[i] ?? val?.[j]});
      for (const [k, value, color] of [[i, raw[i], run.color], [j, val?.[j], runs.length === 1 ? colors[1] : run.color]]) {
        if (value == null || this.Y(value) < box.top || this.Y(value) > box.bottom || this.X(run.x[state.axis][k]) < box.left) continue;
        c.beginPath();
        c.arc(this.X(run.x[state.axis][k]), this.Y(value), 4, 0, 7);
        c.fillStyle = color;
        c.fill();
      }
    }
    if (rows.length) this.tell(rows.sort((a, b) => b.order - a.order), px);
  }

  tell(rows, px) {
    const say = FORMATS[this.spec.format], loss = this.spec.key === "loss", table = make("table"), head = make("tr");
    const has = (name) => rows.some((row) => row[name] != null);
    const names = ["raw", "mean", "val"].filter((name) => has(name));
    const one = new Set(rows.map(({run, i}) => run.x[state.axis][i])).size === 1;
    const x = rows[0].run.x[state.axis][rows[0].i], step = rows[0].run.x.steps[rows[0].i];
    const title = axes[state.axis] + " " + shownX(x) + (state.axis === "steps" ? "" : ", step " + step.toLocaleString("en"));
    head.append(make("th", "", one ? title : ""));
    for (const name of names) head.append(make("th", "", {raw: loss ? "train" : "", mean: "mean", val: "val"}[name]));
    table.append(head);
    for (const row of rows) {
      const tr = make("tr"), name = make("td"), swatch = make("span", `swatch dash${DASHES.indexOf(row.run.dash)}`);
      swatch.style.background = row.run.color;
      name.append(swatch, runs.length > 1 ? row.run.name : loss ? "" : this.spec.title);
      if (!one) name.append(make("small", "", " " + shownX(row.run.x[state.axis][row.i])));
      tr.append(name, ...names.map((key) => make("td", key, row[key] == null ? "" : say(row[key]))));
      if (row.val != null && row.j !== row.i) tr.lastChild.append(make("small", "", " at " + shownX(row.run.x[state.axis][row.j])));
      table.append(tr);
    }
    const marks = rows.flatMap(({run, i}) => [[run.spikes, "a spike"], [run.skipped, "left out, not finite"]].flatMap(([steps, what]) =>
      (steps[state.axis] || []).map((x, k) => [Math.abs(this.X(x) - px), `${what} at step ${steps.steps[k].toLocaleString("en")}`])))
      .filter(([far]) => far < 6).sort((a, b) => a[0] - b[0]).slice(0, 3);
    this.tip.replaceChildren(table, ...(loss ? marks : []).map(([, words]) => make("div", "", words)));
    this.tip.hidden = false;
    const narrow = window.innerWidth < 640, right = px > (this.box.left + this.box.right) / 2;
    this.tip.style.top = narrow ? "100%" : this.box.top + 4 + "px";
    this.tip.style.left = narrow ? "0" : right ? "auto" : px + 14 + "px";
    this.tip.style.right = narrow || !right ? "auto" : this.plot.clientWidth - px + 14 + "px";
  }

  inside(event) {
    const px = event.clientX - this.top.getBoundingClientRect().left;
    return Math.min(Math.max(px, this.box.left), this.box.right);
  }
  down(event) {
    if (event.button || !this.box) return;
    this.from = this.to = this.inside(event);
    this.top.setPointerCapture(event.pointerId);
    hover(this.at(this.from), this);
  }
  move(event) {
    if (!this.box) return;
    this.to = this.inside(event);
    hover(this.at(this.to), this);
  }
  up(event) {
    if (!this.box) return;
    const from = this.from, to = this.inside(event);
    this.from = null;
    if (from != null && Math.abs(to - from) > 6) zoom([this.at(Math.min(from, to)), this.at(Math.max(from, to))]);
    else this.move(event);
  }
}

// ---- all charts together --------------------------------------------------------------------------------------------

let waiting = null;
function hover(x, chart) {  // once a frame
  if (!waiting) requestAnimationFrame(() => { const [at, own] = waiting; waiting = null; for (const one of charts) one.over(at, one === own); });
  waiting = [x, chart];
}
function zoom(view) {
  state.view = view;
  drawAll();
}
function drawAll() {
  $("whole").hidden = !state.view;
  for (const chart of charts) chart.draw();
}
function press(button, on) { button.setAttribute("aria-pressed", String(on)); }

for (const axis of Object.keys(axes)) {
  if (!runs.some((run) => run.x[axis])) continue;
  const button = make("button", "", axis === "flops" ? "FLOPs" : axis);
  button.addEventListener("click", () => {
    state.axis = axis;
    state.view = null;
    for (const other of $("axis").children) press(other, other === button);
    drawAll();
  });
  press(button, axis === state.axis);
  $("axis").append(button);
}
for (const [id, key] of [["logx", "logX"], ["logy", "logY"], ["raw", "raw"]])
  $(id).addEventListener("click", () => { state[key] = !state[key]; state.view = null; press($(id), state[key]); drawAll(); });
$("whole").addEventListener("click", () => zoom(null));
for (const button of document.querySelectorAll("#legend button")) {
  const run = runs[Number(button.dataset.run)];
  button.addEventListener("click", () => {
    if (!state.hidden.delete(run)) state.hidden.add(run);
    press(button, !state.hidden.has(run));
    drawAll();
  });
}
for (const spec of specs) charts.push(new Chart($(spec.more ? "more" : "charts"), spec));
$("more").parentElement.hidden = !specs.some((spec) => spec.more);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

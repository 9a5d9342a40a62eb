// Throughput and latency over the last five minutes, as lines of our own. What wasn't heard is shown as not heard.

import { $, clock, el, fill, ms, number, perSecond, svg, table } from "./dom.js";

const SPAN_MS = 300000;
const KEPT_MS = 900000;
const HEIGHT = 190;
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 8, 10, 22];
const PROMISED_MS = 100;
const TABLE_EVERY_MS = 30000;
// Places of a point, as gateway/console/picture.py makes it.
const [AT, RATE, P50, P99, P999, DEGRADED] = [0, 1, 2, 3, 4, 5];
let points = [];
let gapMs = 12000;
let nowMs = 0;

export function begin(history, tickS) {
  points = history.slice();
  gapMs = Math.max(12000, tickS * 4000);
}

export function add(point) {
  points.push(point);
  while (points.length && points[0][AT] < point[AT] - KEPT_MS) points.shift();
}

/** A round number no less than `value`, to end an axis with. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return [1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= value);
}

function path(shown, place, x, y) {
  let text = "";
  let before = null;
  for (const point of shown) {
    if (point[place] === null) { before = null; continue; }
    const joined = before !== null && point[AT] - before <= gapMs;
    text += `${joined ? "L" : "M"}${x(point[AT]).toFixed(1)} ${y(point[place]).toFixed(1)}`;
    if (!joined) text += "h0.01";
    before = point[AT];
  }
  return text;
}

/** Where nothing was heard for longer than a few ticks: [from, to] in ms. */
function silences(shown, fromMs) {
  const found = [];
  let before = shown.length && shown[0][AT] - fromMs > gapMs ? fromMs : null;
  for (const point of shown) {
    if (before !== null && point[AT] - before > gapMs) found.push([before, point[AT]]);
    before = point[AT];
  }
  if (before !== null && nowMs - before > gapMs) found.push([before, nowMs]);
  return found;
}

function chart(holder, lines, least, summary, promise, unit) {
  const width = Math.floor(holder.clientWidth);
  if (width < 50) return;
  const fromMs = nowMs - SPAN_MS;
  const shown = points.filter((p) => p[AT] >= fromMs);
  const top = roundUp(Math.max(least, ...shown.flatMap((p) => lines.map(([place]) => p[place] ?? 0))) * 1.05);
  const x = (atMs) => LEFT + ((atMs - fromMs) / SPAN_MS) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
  const grid = [0, 0.5, 1].map((part) => [
    svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(top * part), y2: y(top * part) }),
    svg("text", { class: "soft", x: LEFT - 7, y: y(top * part) + 4, "text-anchor": "end" }, number(top * part)),
  ]).flat();
  const times = (width < 420 ? [0, 0.5, 1] : [0, 0.2, 0.4, 0.6, 0.8, 1]).map((part) =>
    svg("text", { class: "soft", x: x(fromMs + part * SPAN_MS), y: HEIGHT - 5, "text-anchor": part === 0 ? "start" : part === 1 ? "end" : "middle" },
      part === 1 ? "now" : `${Math.round(5 - 5 * part)} min ago`));
  const unheard = silences(shown, fromMs).map(([a, b]) => [
    svg("rect", { class: "lost", x: x(a), y: TOP, width: Math.max(0, x(b) - x(a)), height: HEIGHT - TOP - BOTTOM }),
    x(b) - x(a) > 90 ? svg("text", { class: "soft", x: (x(a) + x(b)) / 2, y: TOP + 18, "text-anchor": "middle" }, "no figures") : null,
  ]).flat();
  const [first] = lines;
  const under = [];
  if (first[2]) {
    let run = [];
    const close = () => { if (run.length > 1) under.push(svg("path", { class: "under", d: `M${x(run[0][AT])} ${y(0)}${run.map((p) => `L${x(p[AT]).toFixed(1)} ${y(p[first[0]] ?? 0).toFixed(1)}`).join("")}L${x(run[run.length - 1][AT])} ${y(0)}z` })); run = []; };
    for (const p of shown) { if (run.length && p[AT] - run[run.length - 1][AT] > gapMs) close(); run.push(p); }
    close();
  }
  const drawn = lines.map(([place, name]) => svg("path", { class: `lineof ${name}`, d: path(shown, place, x, y) }));
  const limit = promise === null || promise > top ? [] : [svg("line", { class: "promise", x1: LEFT, x2: width - RIGHT, y1: y(promise), y2: y(promise) })];
  fill(holder,
    svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": summary }, unheard, grid, times, under, limit, drawn),
    el("div", { class: "legend" }, lines.map(([, name, , text]) => el("span", {}, svg("svg", { "aria-hidden": "true", viewBox: "0 0 22 8" }, svg("line", { class: `lineof ${name}`, x1: 0, x2: 22, y1: 4, y2: 4 })), text)),
      promise === null ? null : el("span", {}, svg("svg", { "aria-hidden": "true", viewBox: "0 0 22 8" }, svg("line", { class: "promise", x1: 0, x2: 22, y1: 4, y2: 4 })), `promised: p99 under ${promise} ${unit}`)));
}

function spaced() {
  const found = [];
  for (let i = points.length - 1; i >= 0 && found.length < 10; i -= 1) {
    if (!found.length || found[found.length - 1][AT] - points[i][AT] >= TABLE_EVERY_MS) found.push(points[i]);
  }
  return found;
}

export function drawCharts(frame, atMs) {
  nowMs = atMs;
  if (frame !== null) {
    const [p50, p99, p999] = frame.latency.ms;
    fill($("throughput-now"), number(frame.rate), el("small", {}, "a second"));
    fill($("latency-now"), p99 === null ? "–" : `${number(p99)} ms`, el("small", {}, p99 === null ? "nothing was asked" : "p99"));
    chart($("throughput"), [[RATE, "rate", true, "decisions"], [DEGRADED, "bad", false, "made without something"]], 1,
      `Decisions a second over five minutes, now ${perSecond(frame.rate)}`, null, "");
    chart($("latency"), [[P50, "p50", false, `p50 ${ms(p50)}`], [P99, "p99", false, `p99 ${ms(p99)}`], [P999, "p999", false, `p99.9 ${ms(p999)}`]], PROMISED_MS,
      `Time to the answer over five minutes, now p50 ${ms(p50)}, p99 ${ms(p99)}, p99.9 ${ms(p999)}`, PROMISED_MS, "ms");
  }
  const rows = spaced();
  fill($("throughput-table"), table(["time", "#decisions/s", "#without something/s"], rows.map((p) => [clock(p[AT]), number(p[RATE]), number(p[DEGRADED])])));
  fill($("latency-table"), table(["time", "#p50", "#p99", "#p99.9"], rows.map((p) => [clock(p[AT]), ms(p[P50]), ms(p[P99]), ms(p[P999])])));
}

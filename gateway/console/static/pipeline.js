// The way of a payment, drawn: five parts and what goes from each to the next. On a narrow screen from top to bottom.

import { $, age, fill, ms, number, perSecond, share, svg, table } from "./dom.js";

const SIGNS = { well: "✓ well", watch: "▲ watch", degraded: "◆ degraded", down: "✕ down", off: "○ off", unknown: "○ unknown" };
const NARROW = 760;
let last = null;
let lost = false;

/** Each part with its title, what it does, two facts; each arrow with what goes over it and what it costs. */
function said(f) {
  const p99 = f.latency.ms[1];
  const full = f.degraded_share === null ? null : f.rate * (1 - f.degraded_share);
  const doors = Object.entries(f.doors).filter(([, rate]) => rate > 0).map(([door, rate]) => `${door === "http" ? "HTTP" : "topic"} ${perSecond(rate)}`);
  const oldest = f.tables.filter((t) => t.fresh_s !== null);
  const waits = f.kafka.waiting + f.kafka.spooled;
  const nodes = [
    { id: "kafka", title: "Kafka", does: "payments come in", facts: [doors.join(", ") || "no payments now", f.kafka.wanted ? (f.kafka.connected ? "connected" : "can't be reached") : "topic not consumed"] },
    { id: "features", title: "Features", does: "the card's history", facts: [f.redis.ready ? "Redis answers" : "Redis is silent", f.redis.unobserved ? `${number(f.redis.unobserved)} to catch up` : `${share(1 - (f.degraded_share ?? 0))} with all`] },
    { id: "model", title: "Model", does: "risk, rules, lists", facts: [f.in_use.model === null ? "none, rules decide" : `version ${f.in_use.model.version}`, `p99 ${ms(f.steps_ms.model)}`] },
    { id: "store", title: "Store", does: "receipts and tables", facts: [f.jobs.trouble === null ? oldest.map((t) => `${t.name} ${age(t.fresh_s)}`).slice(0, 1).join("") || "no batch yet" : "jobs don't answer", f.jobs.trouble === null ? oldest.slice(1).map((t) => `${t.name} ${age(t.fresh_s)}`).join(", ") : f.jobs.age_s === null ? "never heard of" : `heard ${age(f.jobs.age_s)} ago`] },
    { id: "serve", title: "Serve", does: "the answer, in time", facts: [`p99 ${ms(p99)}`, `${number(f.in_flight)} in flight`] },
  ];
  const arrows = [
    { top: perSecond(f.rate), below: f.kafka.wanted ? (f.kafka.lag === null ? "lag unknown" : `lag ${number(f.kafka.lag)}`) : "HTTP alone", level: f.parts.kafka === "off" ? "well" : f.parts.kafka },
    { top: full === null ? perSecond(f.rate) : `${perSecond(full)} full`, below: `p99 ${ms(f.steps_ms.features)}`, level: f.parts.features },
    { top: perSecond(f.rate), below: waits ? `${number(waits)} wait` : "none waits", level: f.kafka.connected || !f.kafka.wanted ? "well" : "degraded" },
    { top: perSecond(f.rate), below: `p99 ${ms(p99)}`, level: f.parts.serve },
  ];
  return { nodes: nodes.map((n) => ({ ...n, level: lost ? "unknown" : f.parts[n.id] })), arrows, moves: f.rate > 0 && !lost };
}

const label = (x, y, text, className, anchor = "start") => svg("text", { x, y, class: className, "text-anchor": anchor }, text);

function node(n, x, y, width, height) {
  const tall = height > 80;
  return svg("g", { "data-level": n.level, "data-part": n.id },
    svg("rect", { class: "node", x, y, width, height, rx: 9 }),
    label(x + 12, y + 23, n.title, "title"),
    label(x + 12, y + 42, n.does, "soft"),
    label(x + 12, y + 64, n.facts[0], "strong"),
    tall ? label(x + 12, y + 83, n.facts[1], "") : label(x + width - 12, y + 64, n.facts[1], "", "end"),
    tall ? label(x + 12, y + 106, SIGNS[n.level], "sign") : label(x + width - 12, y + 23, SIGNS[n.level], "sign", "end"));
}

function across({ nodes, arrows, moves }, width) {
  const [gap, height] = [Math.max(86, Math.min(124, width * 0.082)), 118];
  const each = (width - 4 * gap) / 5;
  const parts = nodes.map((n, i) => node(n, i * (each + gap), 6, each, height));
  arrows.forEach((a, i) => {
    const [from, to, y] = [(i + 1) * each + i * gap + 6, (i + 1) * (each + gap) - 8, 6 + height / 2];
    parts.push(svg("g", { "data-level": a.level },
      svg("line", { class: "arrow", x1: from, y1: y, x2: to - 6, y2: y }),
      moves ? svg("line", { class: "flow", x1: from, y1: y, x2: to - 6, y2: y }) : null,
      svg("path", { class: "head-of", d: `M${to} ${y}l-9 -5v10z` }),
      label((from + to) / 2, y - 10, a.top, "strong", "middle"), label((from + to) / 2, y + 20, a.below, "soft", "middle")));
  });
  return [parts, height + 12];
}

function down({ nodes, arrows, moves }, width) {
  const [gap, height] = [44, 76];
  const parts = nodes.map((n, i) => node(n, 1, i * (height + gap) + 2, width - 2, height));
  arrows.forEach((a, i) => {
    const [from, to, x] = [(i + 1) * height + i * gap + 6, (i + 1) * (height + gap) - 2, 28];
    parts.push(svg("g", { "data-level": a.level },
      svg("line", { class: "arrow", x1: x, y1: from, x2: x, y2: to - 6 }),
      moves ? svg("line", { class: "flow", x1: x, y1: from, x2: x, y2: to - 6 }) : null,
      svg("path", { class: "head-of", d: `M${x} ${to}l-5 -9h10z` }),
      label(x + 18, (from + to) / 2 + 4, a.top, "strong"), label(x + 150, (from + to) / 2 + 4, a.below, "soft")));
  });
  return [parts, 5 * height + 4 * gap + 4];
}

export function drawPipeline(frame, isLost = false) {
  if (frame !== null) last = frame;
  lost = isLost;
  if (last === null) return;
  const holder = $("pipeline");
  const width = Math.floor(holder.clientWidth);
  if (width < 50) return;
  const picture = said(last);
  const [parts, height] = width < NARROW ? down(picture, width) : across(picture, width);
  const summary = picture.nodes.map((n) => `${n.title}: ${SIGNS[n.level].slice(2)}`).join(", ");
  fill(holder, svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `The way of a payment. ${summary}` }, parts));
  const rows = picture.nodes.map((n, i) => [n.title, SIGNS[n.level].slice(2), n.facts.join("; "), picture.arrows[i] ? `${picture.arrows[i].top}, ${picture.arrows[i].below}` : "the answer"]);
  fill($("pipeline-table"), table(["part", "state", "facts", "to the next"], rows));
}

new ResizeObserver(() => drawPipeline(null, lost)).observe($("pipeline"));

// The panels that are drawn anew with each frame: outcomes, tables, models, drift, alerts, what is in use.

import { $, age, clock, day, el, fill, number, perSecond, pill, say, share, state, table, tall, wide, words } from "./dom.js";

export function drawOutcomes(f) {
  const rate = f.outcomes.reduce((sum, o) => sum + o.rate, 0);
  const total = f.outcomes.reduce((sum, o) => sum + o.total, 0);
  const part = (o) => (rate > 0 ? o.rate / rate : total > 0 ? o.total / total : 0);
  const bar = el("div", { class: "bar", role: "img", "aria-label": f.outcomes.map((o) => `${o.name} ${share(part(o))}`).join(", ") },
    f.outcomes.map((o) => wide(el("span", { class: `of-${o.name}` }), part(o))));
  const rows = f.outcomes.map((o) => [el("span", {}, el("span", { class: `swatch of-${o.name}`, "aria-hidden": "true" }), o.name), share(part(o)), perSecond(o.rate), number(o.total)]);
  const without = Object.entries(f.degraded).map(([kind, r]) => `${words(kind)} ${perSecond(r)}`);
  const refused = Object.entries(f.refused).map(([reason, r]) => `${words(reason)} ${perSecond(r)}`);
  fill($("outcomes"), bar, el("table", {}, table(["outcome", "#share", "#now", "#since start"], rows)),
    el("p", { class: "note" }, without.length ? `Made without something: ${without.join(", ")}.` : "All made with everything they should have."),
    refused.length ? el("p", { class: "note" }, `Refused: ${refused.join(", ")}.`) : "");
}

const TABLE_LEVELS = { fresh: ["well", "fresh"], late: ["watch", "late"], still: ["watch", "stands still"], unknown: ["unknown", "not known"] };

export function drawTables(f) {
  const rows = f.tables.map((t) => {
    const [level, text] = f.jobs.trouble !== null && t.state !== "unknown" ? ["watch", "old"] : TABLE_LEVELS[t.state];
    const meter = el("div", { class: "meter", "data-level": level, "aria-hidden": "true" }, wide(el("span"), t.fresh_s === null ? 0 : t.fresh_s / t.promised_s));
    return [t.name, number(t.rows), el("span", {}, `${age(t.fresh_s)} of ${number(t.promised_s)} s`, meter), state(level, text)];
  });
  const notes = [];
  if (f.jobs.age_s === null && f.jobs.trouble === null) {
    notes.push("The feature jobs have not been asked yet.");
  } else if (f.jobs.trouble !== null) {
    notes.push(f.jobs.age_s === null ? `The feature jobs were not heard of yet: ${f.jobs.trouble}.` : `As the feature jobs said ${age(f.jobs.age_s)} ago; now ${f.jobs.trouble}.`);
  } else {
    const up = Object.entries(f.jobs.queries);
    const running = up.filter(([, on]) => on).length;
    notes.push(`${running} of ${up.length} streams run${f.jobs.lag === null ? "" : `, ${number(f.jobs.lag)} records behind Kafka`}.`);
    const written = f.tables.filter((t) => t.written_s !== null);
    if (written.length) notes.push(`Last written: ${written.map((t) => `${t.name} ${age(t.written_s)} ago`).join(", ")}.`);
    if (f.jobs.quarantined) notes.push(`${number(f.jobs.quarantined)} records in quarantine.`);
  }
  fill($("tables"), el("table", {}, table(["table", "#rows", "age when written", "state"], rows)), el("p", { class: "note" }, notes.join(" ")));
}

const model = (m) => (m === null ? "none" : `${m.name} ${m.version}`);

export function drawRoutes(f) {
  const r = f.routes;
  const has = r.routes.filter((route) => route.model !== null || route.total > 0);
  const rows = has.map((route) => {
    const most = Math.max(1, ...route.bins);
    const histogram = route.scored
      ? el("div", { class: "hist", role: "img", "aria-label": `Scores of the ${route.route} in tenths: ${route.bins.map(number).join(", ")}` },
        route.bins.map((n) => tall(el("span"), Math.sqrt(n / most))))
      : "–";
    return [el("span", {}, route.route, el("br"), el("span", { class: "soft" }, model(route.model))), perSecond(route.rate), number(route.total), histogram];
  });
  const notes = [];
  if (r.routes[1].model === null) notes.push("No challenger: the champion scores all.");
  else if (r.guard_out) notes.push("The guard has taken the challenger out: the champion scores all.");
  else notes.push(`The challenger gets ${share(r.share)} of the cards.`);
  if (r.guard_pairs) {
    const evidence = Math.max(0, ...Object.values(r.guard_evidence));
    notes.push(`Guard: ${number(r.guard_pairs)} pairs compared, evidence against it ${number(evidence)} of 1.`);
  }
  if (r.shadows.length) notes.push(`Shadows: ${r.shadows.join(", ")}.`);
  fill($("routes"), has.length ? el("table", {}, table(["model", "#now", "#scored", "scores 0 to 1000"], rows)) : el("p", { class: "empty" }, "There is no model: rules and amount bands decide alone."),
    el("p", { class: "note" }, notes.join(" ")));
}

export function drawDrift(f) {
  const d = f.drift;
  if (!d.measures.length) {
    const why = d.reference === null ? "Not known: the feature jobs were not heard of." : d.reference ? "Not compared yet: a window needs ten minutes and 20 payments." : "Nothing to compare with: no model with training rows is promoted.";
    fill($("drift"), el("p", { class: "empty" }, why));
    return;
  }
  const rows = d.measures.map((m) => [words(m.name), number3(m.psi), number3(m.ks), m.alarm ? state("watch", "alarm") : state("well", "as trained")]);
  fill($("drift"), el("table", {}, table(["measure", "#PSI", "#KS", "state"], rows)),
    el("p", { class: "note" }, `The furthest of all measures; under 0.1 nothing has changed. ${d.alarms.length ? `${d.alarms.length} alarms.` : "No alarm."}${f.jobs.trouble !== null ? ` As of ${age(f.jobs.age_s)} ago.` : ""}`));
}

const number3 = (n) => (n === null ? "–" : n.toFixed(3));
const KINDS = { guard: "guard", burst: "burst of declines", drift: "drift", decision: "decline" };
let shownAlerts = null;

export function drawAlerts(f, alerts) {
  if (alerts !== undefined) shownAlerts = alerts;
  const items = [];
  for (const alarm of f.alarms?.firing ?? []) {
    items.push(el("li", {}, el("div", { class: "line" }, state("watch", alarm.name), el("time", { datetime: alarm.since }, alarm.since ? `since ${clock(Date.parse(alarm.since))}` : "")),
      el("p", {}, alarm.summary), alarm.runbook ? el("p", { class: "soft" }, `runbook: ${alarm.runbook}`) : ""));
  }
  for (const a of (shownAlerts ?? []).slice(0, 30)) {
    const declined = a.kind === "decision";
    items.push(el("li", { "data-kind": a.kind }, el("div", { class: "line" }, declined ? pill("decline") : state("watch", KINDS[a.kind] ?? a.kind),
      el("time", { datetime: new Date(a.decided_at_ms).toISOString(), title: day(a.decided_at_ms) }, clock(a.decided_at_ms))),
      declined ? el("p", { class: "soft" }, el("span", { class: "mono" }, a.transaction_id), ` at ${a.merchant_id}, score ${a.risk_score}: ${a.reasons.map(words).join(", ") || "no reason"}`) : el("p", {}, a.detail)));
  }
  const trouble = f.alert_topic.trouble;
  const note = trouble !== null ? `Not followed now: ${trouble}${f.alert_topic.heard_s === null ? "" : `, for ${age(f.alert_topic.heard_s)}`}.` : "";
  const from = f.alarms === null ? "" : f.alarms.trouble === null ? "" : ` Alertmanager: ${f.alarms.trouble}.`;
  fill($("alerts"), note || from ? el("p", { class: "note" }, note + from) : "",
    items.length ? el("ul", { class: "alerts" }, items) : el("p", { class: "empty" }, trouble === null ? "None. Declines, bursts, drift and the guard would stand here." : "None were heard."));
}

export function drawInUse(f) {
  const u = f.in_use;
  const short = (digest) => (digest ? digest.slice(0, 12) : "–");
  const facts = [
    ["model", u.model === null ? "none, rules decide" : `${u.model.name} ${u.model.version}`, u.model === null ? "" : short(u.model.digest)],
    ["policy", u.policy.name, short(u.policy.digest)],
    ["lists", u.lists.version < 0 ? "not known" : `version ${number(u.lists.version)}`, `${number(u.lists.entries)} entries`],
    ["features", `${(f.features_count ?? 0) || ""} in one definition`.trim(), u.feature_fingerprint],
    ["gateway", `version ${u.code_version}`, f.workers > 1 ? `${f.workers} workers` : "1 process"],
    ["case service", f.cases.trouble === null ? `${number(f.cases.open)} reviews open` : f.cases.trouble, f.cases.age_s === null ? "never heard of" : `heard ${age(f.cases.age_s)} ago`],
  ];
  fill($("inuse"), facts.map(([name, what, more]) => el("div", {}, el("dt", {}, name), el("dd", {}, what, el("br"), el("span", { class: "soft mono" }, more)))));
}

const LEVEL_WORDS = { well: "Well", watch: "Watch", degraded: "Degraded", down: "Down" };
let announced = null;

export function drawVerdict(verdict) {
  $("verdict").dataset.level = verdict.level;
  say($("sentence"), verdict.text);
  document.title = `${LEVEL_WORDS[verdict.level] ?? "?"} – Fraudgate console`;
  const list = $("troubles");
  list.hidden = verdict.troubles.length < 2;
  fill(list, verdict.troubles.map((t) => el("li", { "data-level": t.level }, el("span", { class: "icon", "aria-hidden": "true" }), el("span", {}, t.text, el("span", { class: "soft" }, ` ${age(Math.floor(t.for_s))}`)))));
  // A screen reader hears what changes, not each second's figures.
  const what = `${verdict.level}:${verdict.troubles.map((t) => t.code).join()}`;
  if (what !== announced) {
    announced = what;
    say($("announce"), verdict.text);
  }
}

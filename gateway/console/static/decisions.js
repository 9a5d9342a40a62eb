// The latest decisions, and the story of one: the receipt came with it, so a click asks nobody and works when all else is down.

import { $, age, clock, day, el, fill, money, ms, number, pill, say, share, words } from "./dom.js";

const KEPT = 40;
let features = [];
let stories = [];
let held = [];
let seen = { seen: 0, kept: 0 };

export function begin(names, told) {
  // A stream that begins anew goes on where the one before ended.
  features = names;
  add(told);
}

/** Whoever reads a row doesn't want it to move: what comes meanwhile waits until pointer and focus have left. */
const looking = () => $("decisions").matches(":hover") || $("decisions").contains(document.activeElement);

export function add(told, sampled = null) {
  if (sampled !== null) seen = sampled;
  const known = new Set([...stories, ...held].map((s) => s.transaction_id));
  held = [...held, ...told.filter((s) => !known.has(s.transaction_id))].slice(-KEPT);
  if (!looking() || !stories.length) take();
  draw();
}

function take() {
  stories = [...held.reverse(), ...stories].slice(0, KEPT);
  held = [];
}

export function draw() {
  const only = $("only-notable").checked;
  const shown = stories.filter((s) => !only || s.decision !== "approve");
  const rows = shown.map((s) => el("tr", {},
    el("td", {}, el("time", { datetime: new Date(s.decided_at_ms).toISOString() }, clock(s.decided_at_ms))),
    el("td", {}, pill(s.decision)),
    el("td", { class: "num wide-only" }, String(s.risk_score)),
    el("td", { class: "num" }, money(s.transaction.amount_minor, s.transaction.currency)),
    el("td", {}, el("button", { type: "button", class: "id mono", "data-id": s.transaction_id, "aria-haspopup": "dialog" }, s.transaction_id)),
    el("td", { class: "wide-only" }, el("span", { class: "soft" }, [...s.reasons.map((r) => words(r.code)), ...s.degraded.map((d) => `without: ${words(d)}`)].join(", ") || "nothing against it"))));
  const heads = ["time", "outcome", "#score", "#amount", "payment", "why"];
  fill($("decisions"), el("thead", {}, el("tr", {}, heads.map((h) => el("th", { scope: "col", class: `${h === "why" || h === "#score" ? "wide-only" : ""} ${h.startsWith("#") ? "num" : ""}`.trim() || null }, h.replace("#", ""))))),
    el("tbody", {}, rows));
  const waiting = held.length ? ` ${held.length} new ones wait until you have looked.` : "";
  say($("decisions-note"), (shown.length ? `A few a second, what isn't approved first; ${number(seen.kept)} of ${number(seen.seen)} since somebody watches.` : stories.length ? "All of the latest were approved." : "None since somebody watches.") + waiting);
}

export function find(id) {
  return stories.find((s) => s.transaction_id === id) ?? null;
}

/** The case service gives features by name; our own stories as values in the order of the definition. */
function featuresOf(story) {
  if (Array.isArray(story.features)) return story.features;
  if (story.values === null || story.values === undefined) return null;
  return story.values.map((value, i) => ({ name: features[i].name, value, age_ms: features[i].entity === null ? 0 : story.tiles_age_ms }));
}

export function openStory(story, texts = {}) {
  const t = story.transaction;
  const said = { ...story.texts, ...texts };
  const facts = (pairs) => el("dl", { class: "facts" }, pairs.filter(([, what]) => what !== null && what !== undefined && what !== "").map(([name, what]) => el("div", {}, el("dt", {}, name), el("dd", {}, what))));
  const hits = (title, ids) => (ids.length ? [el("h3", {}, title), el("ul", {}, ids.map((id) => el("li", {}, el("code", {}, id), said[id] ? ` ${said[id]}` : "")))] : []);
  const known = featuresOf(story);
  const ageOf = (f) => (f.age_ms === 0 ? "of the payment" : f.age_ms === null ? "not known" : `${age(f.age_ms / 1000)} old`);
  const rowsOf = (some) => some.map((f) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, f.name)), el("td", { class: "num" }, f.value === null ? "not known" : number4(f.value)), el("td", {}, ageOf(f))));
  const body = el("tbody", {}, rowsOf(known ?? []));
  const filter = el("input", { type: "text", id: "feature-filter", autocomplete: "off", oninput: (e) => body.replaceChildren(...rowsOf(known.filter((f) => f.name.includes(e.target.value.trim().toLowerCase())))) });
  const command = `fraudgate why ${story.transaction_id}`;
  const copy = el("button", { type: "button", onclick: async () => { await navigator.clipboard?.writeText(command); copy.textContent = "Copied"; } }, "Copy");
  const steps = Object.entries(story.timings_us).map(([step, us]) => [`${step}`, ms(us / 1000)]);
  say($("story-title"), story.transaction_id);
  $("story-body").replaceChildren(
    el("p", {}, pill(story.decision), ` score ${story.risk_score} of 1000, ${story.probability === null ? "no model's probability" : `probability ${share(story.probability)}`}`),
    story.policy_decision && story.policy_decision !== story.decision ? el("p", { class: "note" }, `The policy came to ${story.policy_decision}; explored with probability ${story.propensity ?? ""}.`) : "",
    story.degraded.length ? el("p", { class: "error" }, `Made without something: ${story.degraded.map(words).join(", ")}.`) : "",
    facts([["amount", money(t.amount_minor, t.currency)], ["card", t.card_id], ["customer", t.customer_id], ["merchant", `${t.merchant_id}, ${t.mcc}, ${t.country}`], ["channel", t.channel], ["device", t.device_id], ["address", t.ip], ["paid", day(t.event_time_ms)], ["decided", day(story.decided_at_ms)], ["came by", story.door === "http" ? "HTTP" : "Kafka"]]),
    el("h3", {}, "Reasons"),
    story.reasons.length ? el("ul", {}, story.reasons.map((r) => el("li", {}, el("code", {}, r.code), ` ${r.text}`))) : el("p", { class: "soft" }, "None: nothing speaks against it."),
    ...hits("Rules that fired", story.rule_hits), ...hits("Lists it stands on", story.list_hits), ...hits("Rules in shadow that would have", story.shadow_hits ?? []), ...hits("Rules that couldn't be evaluated", story.rule_errors ?? []),
    el("h3", {}, "Decided by"),
    facts([["model", story.model.name === null ? "none" : `${story.model.name} ${story.model.version}, ${story.model.route}`], ["model digest", short(story.digests.model)], ["policy", short(story.digests.policy)], ["lists", story.digests.lists_version < 0 ? "not known" : `version ${story.digests.lists_version}`], ["features", story.digests.features], ["gateway", story.code_version], ...steps]),
    el("h3", {}, "The whole of it"),
    el("p", { class: "soft" }, "Counterfactuals, what the chain of receipts says, and the payment decided once more:"),
    el("div", { class: "command" }, el("code", {}, command), copy),
    el("h3", {}, known === null ? "Features" : `Features (${known.length})`),
    known === null ? el("p", { class: "soft" }, "The receipt is of another definition of features: fraudgate why reads it.")
      : el("div", {}, el("label", { for: "feature-filter" }, "Show those whose name has"), filter, el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "feature"), el("th", { scope: "col", class: "num" }, "value"), el("th", { scope: "col" }, "age"))), body))));
  const dialog = $("story");
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

const short = (digest) => (digest ? digest.slice(0, 12) : null);
const number4 = (n) => (Number.isInteger(n) ? n.toLocaleString("en-GB") : Math.abs(n) >= 1000 ? Math.round(n).toLocaleString("en-GB") : String(Number(n.toPrecision(4))));

export function listen() {
  $("decisions").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    const id = row?.querySelector("button.id")?.dataset.id;
    const story = id === undefined ? null : find(id);
    if (story !== null) openStory(story);
  });
  for (const left of ["mouseleave", "focusout"]) $("decisions").addEventListener(left, () => setTimeout(() => { if (!looking() && held.length) { take(); draw(); } }, 50));
  $("only-notable").addEventListener("change", draw);
}

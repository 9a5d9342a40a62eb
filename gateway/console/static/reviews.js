// The review queue: what waits for a person, claimed and decided by mouse or keyboard through the case service.

import { access } from "./access.js";
import { $, age, el, fill, money, number, pill, say, state } from "./dom.js";
import { openStory } from "./decisions.js";

const POLL_MS = 4000;
const SHOWN = 25;
let reviews = [];
let current = 0;
let heardMs = null;
let trouble = null;
let deciding = null;
let open = null;

async function ask(path, body) {
  const options = { headers: access.headers(), cache: "no-store", signal: AbortSignal.timeout(8000) };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const reply = await fetch(`reviews/${path}`, options);
  const said = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(said.detail ?? `the case service answers ${reply.status}`);
  return said;
}

async function refresh() {
  try {
    const order = $("review-order").value;
    const [waiting, mine] = await Promise.all([
      ask(`reviews?state=open&order=${order}&limit=${SHOWN}`),
      ask(`reviews?mine=true&order=${order}&limit=${SHOWN}`),
    ]);
    const chosen = reviews[current]?.transaction_id;
    reviews = [...mine.reviews, ...waiting.reviews].slice(0, SHOWN);
    const again = reviews.findIndex((r) => r.transaction_id === chosen);
    current = again >= 0 ? again : Math.min(current, Math.max(0, reviews.length - 1));
    heardMs = Date.now();
    trouble = null;
  } catch (error) {
    trouble = error.name === "TypeError" || error.name === "TimeoutError" ? "the gateway doesn't answer" : error.message;
  }
  draw();
}

export function note(frame) {
  open = frame.cases.open;
}

export function draw() {
  const stale = heardMs === null ? "" : ` What stands here is ${age((Date.now() - heardMs) / 1000)} old.`;
  say($("reviews-note"), trouble !== null ? `Not to be had: ${trouble}.${reviews.length ? stale : ""}`
    : reviews.length ? `${number(open ?? reviews.length)} wait. Keys: j k to choose, Enter for the story, c claim, f fraud, l legitimate.` : "");
  const act = (name, key, what, label) => el("button", { type: "button", "data-act": what, "aria-keyshortcuts": key, "aria-label": `${name} ${label}` }, name);
  const items = reviews.map((r, i) => el("li", { "aria-current": i === current ? "true" : null, "data-id": r.transaction_id },
    el("div", {}, el("div", { class: "what-of" }, pill(r.outcome), el("strong", {}, money(r.amount_minor, r.currency)), el("span", {}, `score ${r.risk_score}`),
      r.claimed_by === null ? "" : state("well", `held by ${r.claimed_by} for ${age(Math.max(0, (r.claimed_until_ms - Date.now()) / 1000))}`)),
      el("p", { class: "soft" }, el("span", { class: "mono" }, r.transaction_id), ` · ${r.merchant_id} · waits ${age((Date.now() - r.queued_at_ms) / 1000)}${r.why === "watch_list" ? " · on a watch list" : ""}`)),
    el("div", { class: "acts" }, act("Story", "Enter", "story", r.transaction_id), r.claimed_by === null ? act("Claim", "c", "claim", r.transaction_id) : act("Release", "u", "release", r.transaction_id),
      act("Fraud", "f", "fraud", r.transaction_id), act("Legitimate", "l", "legitimate", r.transaction_id))));
  fillKeepingFocus(items.length ? items : [el("li", {}, el("p", { class: "empty" }, trouble === null ? "Nothing waits for a person." : access.key ? "No reviews to show." : "With an API key of scope review they stand here (button API key, above)."))]);
}

/** Buttons are made anew when something changes: the same one of the same review has the focus after that. */
function fillKeepingFocus(items) {
  const focused = document.activeElement;
  const place = $("reviews").contains(focused) ? [focused.closest("li")?.dataset.id, focused.dataset.act] : null;
  fill($("reviews"), items);
  if (place !== null && !$("reviews").contains(document.activeElement)) {
    const item = [...$("reviews").children].find((li) => li.dataset.id === place[0]) ?? $("reviews").children[current];
    (item?.querySelector(`[data-act="${place[1]}"]`) ?? item?.querySelector("button"))?.focus();
  }
}

async function doing(work, done) {
  try {
    await work();
    say($("announce"), done);
  } catch (error) {
    say($("reviews-note"), `That was not taken: ${error.message}`);
    say($("announce"), `That was not taken: ${error.message}`);
    return;
  }
  await refresh();
}

const ACTS = {
  claim: (r) => doing(() => ask(`reviews/${r.transaction_id}/claim`, {}), `${r.transaction_id} is yours`),
  release: (r) => doing(() => ask(`reviews/${r.transaction_id}/release`, {}), `${r.transaction_id} is let go`),
  fraud: (r) => askVerdict(r, "fraud"),
  legitimate: (r) => askVerdict(r, "legitimate"),
  story: async (r) => {
    try {
      const told = await ask(`reviews/${r.transaction_id}`);
      openStory(told.story, told.texts);
    } catch (error) {
      say($("reviews-note"), `Its story is not to be had: ${error.message}`);
    }
  },
};

function askVerdict(review, verdict) {
  deciding = { review, verdict };
  say($("decide-title"), verdict === "fraud" ? "It is fraud" : "It is legitimate");
  say($("decide-what"), `${review.transaction_id}: ${money(review.amount_minor, review.currency)} at ${review.merchant_id}. The verdict becomes a label, and can't be taken back here.`);
  say($("decide-go"), verdict === "fraud" ? "Fraud" : "Legitimate");
  say($("decide-error"), "");
  $("decide-note").value = "";
  $("decide").showModal();
  $("decide-note").focus();
}

async function decide(event) {
  event.preventDefault();
  const { review, verdict } = deciding;
  $("decide-go").disabled = true;
  try {
    // A verdict needs a claim that holds; who decides at once claims with it.
    await ask(`reviews/${review.transaction_id}/claim`, {});
    await ask(`reviews/${review.transaction_id}/decide`, { verdict, note: $("decide-note").value });
    $("decide").close();
    say($("announce"), `${review.transaction_id} is decided: ${verdict}`);
    await refresh();
  } catch (error) {
    say($("decide-error"), error.message);
  } finally {
    $("decide-go").disabled = false;
  }
}

function choose(step) {
  if (!reviews.length) return;
  current = Math.max(0, Math.min(reviews.length - 1, current + step));
  draw();
  const item = $("reviews").children[current];
  item.scrollIntoView({ block: "nearest" });
  item.querySelector("button")?.focus({ preventScroll: true });
}

/** True when the key meant something here. */
export function key(name) {
  if (name === "j" || name === "k") { choose(name === "j" ? 1 : -1); return true; }
  const act = { c: "claim", u: "release", f: "fraud", l: "legitimate" }[name] ?? (name === "Enter" && $("reviews").contains(document.activeElement) ? null : undefined);
  if (act === undefined || act === null || !reviews.length) return false;
  ACTS[act](reviews[current]);
  return true;
}

export function listen() {
  $("reviews").addEventListener("click", (event) => {
    const item = event.target.closest("li[data-id]");
    if (item === null) return;
    current = Math.max(0, reviews.findIndex((r) => r.transaction_id === item.dataset.id));
    const act = event.target.closest("button")?.dataset.act;
    if (act !== undefined) ACTS[act](reviews[current]);
    else draw();
  });
  $("decide-form").addEventListener("submit", decide);
  $("review-order").addEventListener("change", refresh);
  access.changed(refresh);
  refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, POLL_MS);
}

// Joins the parts: frames in, panels out, keys and dialogs between.

import { access } from "./access.js";
import * as charts from "./charts.js";
import * as decisions from "./decisions.js";
import { $, age, clock, say } from "./dom.js";
import { drawAlerts, drawDrift, drawInUse, drawOutcomes, drawRoutes, drawTables, drawVerdict } from "./panels.js";
import { drawPipeline } from "./pipeline.js";
import * as reviews from "./reviews.js";
import { follow } from "./stream.js";

const LOST_S = 4;
const THEMES = ["auto", "light", "dark"];
let frame = null;
let heard = null;
let problem = null;
let features = 0;

function told(name, data) {
  if (name === "end") return;
  frame = data;
  heard = performance.now();
  problem = null;
  if (name === "hello") {
    features = data.features.length;
    charts.begin(data.history, data.tick_s);
    decisions.begin(data.features, data.stories);
  } else {
    charts.add(data.point);
    decisions.add(data.stories, data.sampled);
  }
  frame.features_count = features;
  delete document.body.dataset.lost;
  drawVerdict(data.verdict);
  drawPipeline(data);
  charts.drawCharts(data, data.at_ms);
  drawOutcomes(data);
  drawTables(data);
  drawRoutes(data);
  drawDrift(data);
  drawAlerts(data, data.alerts);
  drawInUse(data);
  reviews.note(data);
  beat();
}

function lost(why) {
  if (why !== null) problem = why;
  beat();
  if (why !== null && why.status === 401 && !$("key").open) openKey(access.key ? "This key is not in force." : "");
}

/** How old what is shown is, every second, and what it means. */
function beat() {
  const s = heard === null ? null : (performance.now() - heard) / 1000;
  const late = s === null || s > LOST_S || problem !== null;
  $("pulse").dataset.state = late ? "lost" : "live";
  say($("pulse"), s === null ? "connecting" : late ? `no word for ${age(s)}` : "live");
  if (!late) return;
  if (problem !== null && (problem.status === 401 || problem.status === 403 || problem.status === 503)) {
    drawVerdict({ level: "down", text: `Not shown: ${problem.detail}`, troubles: [] });
  } else if (s !== null) {
    document.body.dataset.lost = "";
    drawVerdict({ level: "down", text: `Down: no word from the gateway for ${age(Math.floor(s))}; what stands below is of ${clock(frame.at_ms)}`, troubles: [] });
    drawPipeline(null, true);
    charts.drawCharts(frame, frame.at_ms + s * 1000);
  } else if (performance.now() > LOST_S * 1000) {
    drawVerdict({ level: "down", text: "Down: the gateway doesn't answer", troubles: [] });
  }
}

function openKey(error) {
  $("key-value").value = "";
  $("analyst").value = access.analyst;
  say($("key-error"), error);
  $("key").showModal();
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  say($("theme"), `Colours: ${name}`);
  $("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  localStorage.setItem("fraudgate-theme", name);
}

const nextTheme = () => theme(THEMES[(THEMES.indexOf(localStorage.getItem("fraudgate-theme") ?? "auto") + 1) % THEMES.length]);

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !$("shortcuts").checked) return;
  if (event.target.closest("input, select, textarea, [contenteditable]") || document.querySelector("dialog[open]")) return;
  if (event.key === "?") $("help").showModal();
  else if (event.key === "t") nextTheme();
  else if (!reviews.key(event.key)) return;
  event.preventDefault();
}

theme(THEMES.includes(localStorage.getItem("fraudgate-theme")) ? localStorage.getItem("fraudgate-theme") : "auto");
$("shortcuts").checked = localStorage.getItem("fraudgate-keys") !== "off";
$("shortcuts").addEventListener("change", (event) => localStorage.setItem("fraudgate-keys", event.target.checked ? "on" : "off"));
$("theme").addEventListener("click", nextTheme);
$("open-help").addEventListener("click", () => $("help").showModal());
$("open-key").addEventListener("click", () => openKey(""));
$("key-forget").addEventListener("click", () => { access.set("", ""); $("key").close(); });
$("key-form").addEventListener("submit", () => access.set($("key-value").value.trim() || access.key, $("analyst").value.trim()));
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
// A click beside a dialog closes it.
for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
document.addEventListener("keydown", keys);
decisions.listen();
reviews.listen();
setInterval(beat, 1000);
follow(told, lost);

// Making and filling elements, and saying numbers as people read them. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const el = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) => filled(document.createElementNS(SVG, name), attributes, children);

/** Width as a share of what holds it. The content security policy allows no style in markup; this is none. */
export function wide(node, share) {
  node.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return node;
}

export function tall(node, share) {
  node.style.height = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return node;
}

/** A table of a caption, column heads (a leading "#" is a column of numbers) and rows of texts or nodes. */
export function table(heads, rows, caption = null) {
  const numeric = heads.map((head) => head.startsWith("#"));
  const cell = (value, i) =>
    i === 0 ? el("th", { scope: "row" }, value ?? "") : el("td", { class: numeric[i] ? "num" : null }, value ?? "");
  return [
    caption === null ? null : el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((h, i) => el("th", { scope: "col", class: numeric[i] ? "num" : null }, h.replace("#", ""))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))),
  ].filter((part) => part !== null);
}

/** Replace what an element holds, unless it holds the same already: a reader, a selection or the focus isn't disturbed for nothing. */
export function fill(node, ...children) {
  const holder = document.createElement("div");
  holder.append(...children.flat());
  if (holder.innerHTML !== node.innerHTML) node.replaceChildren(...holder.childNodes);
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 1 });

export function number(n) {
  if (n === null || n === undefined) return "–";
  return Math.abs(n) >= 10 || Number.isInteger(n) ? whole.format(n) : tenth.format(n);
}

export const perSecond = (n) => (n === null || n === undefined ? "–" : `${number(n)}/s`);
export const ms = (n) => (n === null || n === undefined ? "–" : `${number(n)} ms`);
export const share = (x) => (x > 0 && x < 0.001 ? "< 0.1 %" : `${tenth.format(x * 100)} %`);

export function age(s) {
  if (s === null || s === undefined) return "–";
  if (s < 10) return `${tenth.format(s)} s`;
  if (s < 120) return `${Math.floor(s)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

export function money(minor, currency) {
  try {
    const digits = new Intl.NumberFormat("en-GB", { style: "currency", currency }).resolvedOptions().maximumFractionDigits;
    return new Intl.NumberFormat("en-GB", { style: "currency", currency, currencyDisplay: "code" }).format(minor / 10 ** digits).replace(/ /g, " ");
  } catch {
    return `${whole.format(minor)} minor ${currency}`;
  }
}

export const clock = (atMs) => new Date(atMs).toLocaleTimeString("en-GB");
export const day = (atMs) => new Date(atMs).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
export const words = (code) => code.replace(/_/g, " ").toLowerCase();

export const pill = (outcome) => el("span", { class: "pill", "data-outcome": outcome }, outcome);
export const state = (level, text) =>
  el("span", { class: "state", "data-level": level }, el("span", { class: "icon", "data-level": level, "aria-hidden": "true" }), ` ${text}`);

// The analyst's key, for as long as the tab is open, and no longer and nowhere else.

const KEY = "fraudgate-key";
const ANALYST = "fraudgate-analyst";
const waiting = new Set();

export const access = {
  get key() { return sessionStorage.getItem(KEY) ?? ""; },
  get analyst() { return sessionStorage.getItem(ANALYST) ?? ""; },
  set(key, analyst) {
    for (const [name, value] of [[KEY, key], [ANALYST, analyst]]) {
      if (value) sessionStorage.setItem(name, value);
      else sessionStorage.removeItem(name);
    }
    for (const told of [...waiting]) told();
  },
  headers() {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    else if (this.analyst) headers["Fraudgate-Analyst"] = this.analyst;
    return headers;
  },
  /** Calls `told` when the key changes; returns what ends that. */
  changed(told) {
    waiting.add(told);
    return () => waiting.delete(told);
  },
};

// Server-sent events over fetch: EventSource can't send the API key. Begins anew by itself, a little later each time.

import { access } from "./access.js";

const FIRST_MS = 1000;
const MOST_MS = 10000;
// The gateway sends at least every two seconds: a stream that is silent for so long is dead, whatever the socket says.
const SILENT_MS = 8000;

/** `told(name, data)` for each event; `lost(problem)` when nothing comes any more, with what the gateway said, or null. */
export async function follow(told, lost) {
  let pauseMs = FIRST_MS;
  for (;;) {
    const ends = new AbortController();
    let watchdog = setTimeout(() => ends.abort(), SILENT_MS);
    let problem = null;
    let wake = null;
    try {
      const reply = await fetch("events", { headers: access.headers(), signal: ends.signal, cache: "no-store" });
      if (!reply.ok) {
        problem = await reply.json().catch(() => ({ status: reply.status, detail: `the gateway answers ${reply.status}` }));
      } else {
        const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = "";
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          clearTimeout(watchdog);
          watchdog = setTimeout(() => ends.abort(), SILENT_MS);
          text += value;
          const events = text.split("\n\n");
          text = events.pop();
          for (const one of events) {
            const name = /^event: (.*)$/m.exec(one);
            const data = /^data: (.*)$/m.exec(one);
            if (name !== null && data !== null) {
              told(name[1], JSON.parse(data[1]));
              pauseMs = FIRST_MS;
            }
          }
        }
      }
    } catch {
      // The network, or the silence: told below.
    }
    clearTimeout(watchdog);
    ends.abort();
    lost(problem);
    const asks = problem !== null && (problem.status === 401 || problem.status === 403);
    await new Promise((resolve) => {
      wake = access.changed(resolve);
      // A key that isn't in force won't be in a second: only the person changes that, or a look now and then.
      setTimeout(resolve, asks ? 30000 : pauseMs);
    });
    wake();
    pauseMs = Math.min(MOST_MS, pauseMs * 1.6);
  }
}

// The server: what it serves, and coming back to it by itself after it was away.

import { fetchModels, Problem } from "./api.js";
import { loadLabels } from "./experts.js";
import { app } from "./state.js";

const AWAY = ["gone", "draining"]; // what mends itself
const FIRST_MS = 1000;
const MOST_MS = 15_000;

const listeners = new Set();
let timer = 0;
let wait = FIRST_MS;

/** Be told when the server has come back. */
export function onReturn(listener) {
  listeners.add(listener);
}

/** Ask the server what it serves; with a new key, again. True where it answered. */
export async function connect() {
  clearTimeout(timer);
  timer = 0;
  try {
    const models = await fetchModels();
    const { settings, model: before } = app.get();
    app.set({ models, model: models.find((one) => one.id === settings.model) ?? models[0], problem: null });
    if (app.get().model.id !== before?.id) loadLabels();
    wait = FIRST_MS;
    return true;
  } catch (error) {
    const problem = error instanceof Problem ? error : new Problem("gone", String(error));
    app.set({ problem });
    if (AWAY.includes(problem.kind)) comeBack();
    return false;
  }
}

/** The server is away: ask again and again, more seldom each time, until it answers. */
export function comeBack() {
  if (timer) return;
  timer = setTimeout(async () => {
    if (await connect()) for (const listener of listeners) listener();
  }, wait);
  wait = Math.min(2 * wait, MOST_MS);
}

/** True for a failure that comeBack() waits for the end of. */
export function isAway(problem) {
  return AWAY.includes(problem?.kind);
}

/** The network is back, or somebody looks at the page again: ask now. */
function now() {
  if (!timer || document.hidden) return;
  wait = FIRST_MS;
  connect().then((came) => {
    if (came) for (const listener of listeners) listener();
  });
}

addEventListener("online", now);
document.addEventListener("visibilitychange", now);

// What a person can do with the page and its conversations. This module and answers.js alone change the `app` store.

import { fetchModel, Problem, setKey } from "./api.js";
import { setLocale, preferredLocale, t } from "./i18n.js";
import { app, hover, lens } from "./state.js";
import * as storage from "./storage.js";
import * as tree from "./tree.js";

const channel = "BroadcastChannel" in self ? new BroadcastChannel("quadriga") : null;

// Conversations ------------------------------------------------------------------------------------------------------

/** A conversation as it is now, shown and (mostly) kept. */
export function put(conversation, { save = true } = {}) {
  app.set({ conversations: { ...app.get().conversations, [conversation.id]: conversation } });
  if (save) keep(conversation);
}

function keep(conversation) {
  if (!Object.keys(conversation.nodes).length && !conversation.system) return; // nothing said yet, nothing to keep
  storage.saveConversation(conversation).then(
    () => channel?.postMessage(conversation.id),
    () => app.set({ keeps: false }),
  );
}

export function currentConversation() {
  const { conversations, current } = app.get();
  return conversations[current];
}

/** An empty conversation, shown; the one at hand if it is empty still. */
export function startConversation() {
  const at = currentConversation();
  if (!at || Object.keys(at.nodes).length) {
    const fresh = tree.newConversation(storage.newId("c"), Date.now(), app.get().settings.system);
    put(fresh, { save: false });
    app.set({ current: fresh.id });
  }
  app.set({ sidebar: false, editing: null });
  forgetToken();
}

export function openConversation(id) {
  app.set({ current: id, sidebar: false, editing: null });
  forgetToken();
}

export function renameConversation(id, title) {
  const conversation = app.get().conversations[id];
  if (title.trim()) put({ ...conversation, title: title.trim().slice(0, 200) });
}

export function removeConversation(id) {
  stop(id);
  const { [id]: removed, ...left } = app.get().conversations;
  app.set({ conversations: left });
  storage.deleteConversation(id).then(() => channel?.postMessage(id));
  if (app.get().current === id) {
    app.set({ current: null });
    startConversation();
  }
  toast(t("sidebar.deleted"), () => {
    put(removed);
    openConversation(id);
  });
}

export function setSystemPrompt(system) {
  put({ ...currentConversation(), system });
}

export function setDraft(id, text) {
  app.set({ drafts: { ...app.get().drafts, [id]: text } });
}

// Files --------------------------------------------------------------------------------------------------------------

export function exportConversations(conversations, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([storage.exportText(conversations)], { type: "application/json" }));
  link.download = `${name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Take conversations from a file; one that is here already is taken as a copy. */
export async function importFile(file) {
  let taken;
  try {
    taken = storage.importText(await file.text());
  } catch (error) {
    toast(t("import.failed", { what: String(error.message) }));
    return;
  }
  for (const conversation of taken) {
    const known = conversation.id in app.get().conversations;
    put(known ? { ...conversation, id: storage.newId("c") } : conversation);
  }
  toast(t("import.done", { n: taken.length }));
}

// Messages -----------------------------------------------------------------------------------------------------------

export function showBranch(id) {
  put(tree.select(currentConversation(), id));
  forgetToken();
}

export function startEditing(id) {
  app.set({ editing: id });
}

export function stop(id = app.get().current) {
  app.get().running[id]?.controller.abort();
}

// Settings and the page ----------------------------------------------------------------------------------------------

export function setSettings(changes) {
  const settings = { ...app.get().settings, ...changes };
  app.set({ settings });
  storage.saveSettings(settings);
  applySettings(settings);
}

export function setSampling(changes) {
  setSettings({ sampling: { ...app.get().settings.sampling, ...changes } });
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

export function isDark({ theme }) {
  return theme === "dark" || (theme === "system" && darkSystem.matches);
}

function applySettings(settings) {
  setKey(settings.apiKey);
  setLocale(settings.locale || preferredLocale());
  document.documentElement.dataset.theme = isDark(settings) ? "dark" : "light";
}

/** system, light, dark, system, ... */
export function nextTheme() {
  const order = ["system", "light", "dark"];
  setSettings({ theme: order[(order.indexOf(app.get().settings.theme) + 1) % order.length] });
}

export function toggleLens() {
  forgetToken();
  setSettings({ lens: !app.get().settings.lens });
}

/** Colour the text by the weight of one expert. */
export function followExpert(layer, expert) {
  lens.set({ mode: "one", layer, expert });
  if (!app.get().settings.lens) toggleLens();
}

export function toggleExperts() {
  app.set({ experts: !app.get().experts });
}

export function openDialog(dialog) {
  app.set({ dialog });
}

export function setSidebar(sidebar) {
  app.set({ sidebar });
}

export function setSearch(search) {
  app.set({ search });
}

export function forgetToken() {
  hover.set({ token: -1, pinned: false });
}

let toastTimer = 0;

export function toast(text, undo = null) {
  clearTimeout(toastTimer);
  app.set({ toast: { text, undo } });
  toastTimer = setTimeout(() => app.set({ toast: null }), undo ? 8000 : 4000);
}

export function closeToast() {
  app.set({ toast: null });
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    toast(t("copy.failed"));
    return false;
  }
}

/** Ask the server what it serves; with a new key, again. */
export async function connect() {
  try {
    app.set({ model: await fetchModel(), problem: null });
  } catch (error) {
    app.set({ problem: error instanceof Problem ? error : new Problem("gone", String(error)) });
  }
}

/** An answer that was under way when its page was closed will not go on. */
function settled(conversation) {
  let out = conversation;
  for (const node of Object.values(conversation.nodes)) {
    if (node.role === "assistant" && node.finish === null) out = tree.update(out, node.id, { finish: "broken" });
  }
  return out;
}

/** Another tab has changed a conversation, or deleted it. */
async function reload(id) {
  const { running, current, conversations } = app.get();
  if (running[id]) return;
  const fresh = await storage.loadConversation(id);
  if (fresh) put(fresh, { save: false });
  else if (id !== current) {
    const { [id]: _, ...left } = conversations;
    app.set({ conversations: left });
  }
}

export async function begin() {
  const settings = storage.loadSettings();
  app.set({ settings });
  applySettings(settings);
  darkSystem.addEventListener("change", () => applySettings(app.get().settings));
  const keeps = await storage.openDatabase();
  const saved = await storage.loadConversations();
  app.set({ keeps, conversations: Object.fromEntries(saved.map((one) => [one.id, settled(one)])) });
  startConversation();
  channel?.addEventListener("message", (event) => reload(event.data));
  await connect();
  app.set({ ready: true });
}

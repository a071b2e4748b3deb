// Everything a person can do. The only module that changes the `app` store.

import { fetchModel, generate, Problem, setKey } from "./api.js";
import { setLocale, preferredLocale, t } from "./i18n.js";
import { app, hover, lens } from "./state.js";
import * as storage from "./storage.js";
import { newTrace, push, trimmed } from "./trace.js";
import * as tree from "./tree.js";

const REDRAW_MS = 70;
const SAVE_MS = 2000;

const channel = "BroadcastChannel" in self ? new BroadcastChannel("quadriga") : null;

function newId(letter) {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return letter + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Conversations ------------------------------------------------------------------------------------------------------

function put(conversation, { save = true } = {}) {
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
    const fresh = tree.newConversation(newId("c"), Date.now(), app.get().settings.system);
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
    put(known ? { ...conversation, id: newId("c") } : conversation);
  }
  toast(t("import.done", { n: taken.length }));
}

// Answers ------------------------------------------------------------------------------------------------------------

/** Say something in the current conversation. */
export function send(text) {
  const conversation = currentConversation();
  if (!text.trim() || app.get().running[conversation.id] || !app.get().model) return;
  const last = tree.path(conversation).at(-1);
  setDraft(conversation.id, "");
  ask(conversation, last?.id ?? "", text);
}

function ask(conversation, parent, text) {
  const node = { id: newId("m"), role: "user", content: text, finish: null };
  const title = conversation.title || text.trim().replace(/\s+/g, " ").slice(0, 60);
  const asked = tree.add({ ...conversation, title, updated: Date.now() }, parent, node);
  put(asked);
  answer(asked.id, node.id);
}

/** Say a message again in other words: a branch beside the old one. */
export function edit(id, text) {
  const conversation = currentConversation();
  app.set({ editing: null });
  if (app.get().running[conversation.id] || !text.trim()) return;
  ask(conversation, conversation.nodes[id].parent, text);
}

/** Another answer to the same question, beside the old one. */
export function regenerate(id) {
  const conversation = currentConversation();
  if (app.get().running[conversation.id]) return;
  forgetToken();
  answer(conversation.id, conversation.nodes[id].parent);
}

/** Answer the last question again after a failure. */
export function retry() {
  const conversation = currentConversation();
  const last = tree.path(conversation).at(-1);
  if (last?.role === "user") answer(conversation.id, last.id);
  else if (last) regenerate(last.id);
}

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

function samplingFields({ sampling }) {
  const given = Object.entries(sampling).filter(([, value]) => value !== null && value !== "");
  return Object.fromEntries(given);
}

function messagesFor(conversation, id) {
  const turns = tree.ancestry(conversation, id).map(({ role, content }) => ({ role, content }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...turns] : turns;
}

function setRunning(id, value) {
  const { [id]: _, ...others } = app.get().running;
  app.set({ running: value ? { ...others, [id]: value } : others });
}

function setProblem(id, problem) {
  app.set({ problems: { ...app.get().problems, [id]: problem } });
}

/** Forget why the last request failed, once that is mended; a question without an answer is asked again. */
export function clearProblem() {
  const { current, problem } = app.get();
  if (problem || !app.get().problems[current]) return;
  setProblem(current, null);
  retry();
}

async function answer(id, parent) {
  const { model, settings } = app.get();
  const messages = messagesFor(app.get().conversations[id], parent);
  const routing = settings.lens && model.quadriga.n_experts > 0;
  const node = { id: newId("m"), role: "assistant", content: "", finish: null, model: model.id };
  if (routing) node.trace = newTrace(model.quadriga.n_experts);
  put(tree.add(app.get().conversations[id], parent, node), { save: false });
  const controller = new AbortController();
  setRunning(id, { node: node.id, controller });
  setProblem(id, null);

  const progress = new Progress(id, node);
  try {
    const sampling = samplingFields(settings);
    for await (const event of generate({ model, messages, sampling, routing, signal: controller.signal })) {
      progress.take(event);
    }
  } catch (error) {
    if (error.name === "AbortError") progress.finish = "stopped";
    else {
      progress.finish = "broken";
      setProblem(id, error instanceof Problem ? error : new Problem("page", String(error)));
      if (error.kind === "request") connect(); // perhaps another model is served by now
    }
  }
  setRunning(id, null);
  if (id in app.get().conversations) progress.end();
}

/** One answer as it comes: gathers pieces, and draws and saves them now and then. */
class Progress {
  constructor(id, node) {
    Object.assign(this, { id, node, text: "", tokens: 0, finish: null, usage: null, timings: null });
    this.started = performance.now();
    this.first = null;
    this.drawn = 0;
    this.saved = this.started;
  }

  take({ text, routing, finish, usage, timings }) {
    const now = performance.now();
    if (text || routing.length) {
      this.first ??= now;
      this.tokens += 1;
    }
    this.text += text;
    for (const token of routing) push(this.node.trace, token, shownAs(token, text));
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
    this.timings = timings ?? this.timings;
    if (now - this.drawn < REDRAW_MS) return;
    this.drawn = now;
    const save = now - this.saved > SAVE_MS;
    if (save) this.saved = now;
    this.show(save);
  }

  stats() {
    const seconds = (performance.now() - (this.first ?? this.started)) / 1000;
    const mine = { tokens: this.tokens, rate: this.tokens > 1 ? (this.tokens - 1) / seconds : 0 };
    mine.firstMs = (this.first ?? performance.now()) - this.started;
    if (this.usage) {
      mine.tokens = this.usage.completion_tokens;
      mine.total = this.usage.total_tokens;
      mine.context = app.get().model.quadriga.context_length;
    }
    if (this.timings) mine.rate = this.timings.predicted_per_second;
    return mine;
  }

  show(save) {
    const conversation = app.get().conversations[this.id];
    if (!conversation) return;
    const trace = this.node.trace && { ...this.node.trace };
    put(tree.update(conversation, this.node.id, { content: this.text, stats: this.stats(), trace }), { save });
  }

  end() {
    const conversation = app.get().conversations[this.id];
    const empty = this.finish === "broken" && !this.text;
    if (empty) {
      // Nothing came: the question stands alone again, or the answer before is shown.
      put(withoutNode(conversation, this.node.id));
      return;
    }
    const changes = { content: this.text, stats: this.stats(), finish: this.finish ?? "broken" };
    if (this.node.trace) changes.trace = trimmed(this.node.trace);
    put(tree.update({ ...conversation, updated: Date.now() }, this.node.id, changes));
  }
}

/** A token's words in the lens. One that ends inside a character has none; the one that completes it shows it. */
function shownAs(token, text) {
  return text || (token.text.startsWith("bytes:") ? "" : token.text);
}

function withoutNode(conversation, id) {
  const others = tree.siblings(conversation, id).filter((other) => other !== id);
  const { [id]: gone, ...nodes } = conversation.nodes;
  const { [gone.parent]: _, ...selected } = conversation.selected;
  if (others.length) selected[gone.parent] = others.at(-1);
  return { ...conversation, nodes, selected };
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

// What a person can do with the page and its conversations. It changes the `app` store,
// as answers.js, conversations.js, connection.js and experts.js do, and nothing else does.

import { setKey } from "./api.js";
import { readFile, Refused } from "./attach.js";
import { connect } from "./connection.js";
import { currentConversation, isListed, loaded, openStored, put, remove } from "./conversations.js";
import { loadLabels } from "./experts.js";
import { preferredLocale, setLocale, t } from "./i18n.js";
import { app, hover, lens } from "./state.js";
import * as storage from "./storage.js";
import * as transfer from "./transfer.js";
import * as tree from "./tree.js";

// Conversations ------------------------------------------------------------------------------------------------------

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

export async function openConversation(id) {
  if (!(await loaded(id))) return;
  app.set({ current: id, sidebar: false, editing: null });
  forgetToken();
}

export function renameConversation(id, title) {
  const conversation = app.get().conversations[id];
  if (title.trim()) put({ ...conversation, title: title.trim().slice(0, 200) });
}

export function pinConversation(id) {
  const conversation = app.get().conversations[id];
  put({ ...conversation, pinned: !conversation.pinned });
}

/** Put a conversation into a folder; "" takes it out. A folder is there as long as something is in it. */
export function moveConversation(id, folder) {
  put({ ...app.get().conversations[id], folder: folder.trim().slice(0, 60) });
}

export function toggleFolder(name) {
  const { closed } = app.get().settings;
  setSettings({ closed: closed.includes(name) ? closed.filter((one) => one !== name) : [...closed, name] });
}

export async function removeConversation(id) {
  stop(id);
  const removed = await loaded(id);
  if (!removed) return;
  await remove(id);
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

/** Attach files to the next message of the current conversation. What has no text in it is named, and not taken. */
export async function attach(files) {
  const { id } = currentConversation();
  for (const file of files) {
    try {
      addAttached(id, await readFile(file));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      toast(refusal(error));
    }
  }
}

function refusal({ reason, file }) {
  const texts = {
    large: t("file.large", { name: file }),
    binary: t("file.binary", { name: file }),
    empty: t("file.empty", { name: file }),
    locked: t("file.locked", { name: file }),
    unread: t("file.unread", { name: file }),
  };
  return texts[reason];
}

function addAttached(id, file) {
  const { attached } = app.get();
  app.set({ attached: { ...attached, [id]: [...(attached[id] ?? []), file] } });
}

/** A long text that was pasted goes as a file. */
export function attachPasted(text) {
  const { id } = currentConversation();
  const n = (app.get().attached[id] ?? []).length + 1;
  addAttached(id, { name: t("file.pasted", { n }), text });
}

export function detach(id, i) {
  const { attached } = app.get();
  app.set({ attached: { ...attached, [id]: attached[id].filter((_, j) => j !== i) } });
}

function download(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Save conversations as a file: `format` is "own", "markdown" or "openai". */
export async function exportConversations(ids, name, format) {
  const taken = (await Promise.all(ids.map(loaded))).filter(Boolean);
  const names = { system: t("export.system"), user: t("export.user"), assistant: t("export.assistant") };
  if (format === "markdown") download(transfer.markdownText(taken, names), `${name}.md`, "text/markdown");
  else if (format === "openai") download(transfer.openaiText(taken), `${name}.jsonl`, "application/jsonl");
  else download(transfer.ownText(taken), `${name}.json`, "application/json");
}

/** Ids of all conversations in which something was said, the newest first. */
export function listedIds() {
  const all = Object.values(app.get().conversations).filter(isListed);
  return all.sort((a, b) => b.updated - a.updated).map((one) => one.id);
}

/** Take conversations from a file; one that is here already is taken as a copy, its messages under new names. */
export async function importFile(file) {
  let taken;
  try {
    taken = transfer.importText(await file.text());
  } catch (error) {
    toast(t("import.failed", { what: String(error.message) }));
    return;
  }
  for (const conversation of taken) {
    put(conversation.id in app.get().conversations ? tree.copyOf(conversation, storage.newId) : conversation);
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

/** Ask another of the models that are served. */
export function chooseModel(id) {
  setSettings({ model: id });
  app.set({ model: app.get().models.find((one) => one.id === id) });
  loadLabels();
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
  app.set({ atlas: false });
  if (!app.get().settings.lens) toggleLens();
}

/**
 * Switch an expert off (0), or make its router weigh it by a factor, in this conversation; 1 leaves it as it is. `layer` counts
 * layers with experts.
 */
export function steer(layer, expert, factor) {
  const conversation = currentConversation();
  const others = (conversation.steering ?? []).filter((one) => one.layer !== layer || one.expert !== expert);
  put({ ...conversation, steering: factor === 1 ? others : [...others, { layer, expert, factor }] });
}

export function forgetSteering() {
  put({ ...currentConversation(), steering: [] });
}

export function toggleAtlas() {
  forgetToken();
  app.set({ atlas: !app.get().atlas, sidebar: false });
}

export function saveAtlas({ model, counts, labels }) {
  const text = JSON.stringify({ format: "quadriga-atlas", model, counts, labels }, null, 1);
  download(text, `atlas-${model.replace(/[^\w.-]+/g, "-")}.json`, "application/json");
}

export function savePicture(canvas, name) {
  canvas.toBlob((blob) => download(blob, name, "image/png"), "image/png");
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

/** Look for words. The first search reads what was said in conversations that are not open. */
export async function setSearch(search) {
  app.set({ search });
  if (!search.trim() || app.get().texts) return;
  app.set({ texts: new Map() });
  app.set({ texts: await storage.loadTexts() });
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

/** Put a text on the clipboard; the clipboard's own interface is there on https and on this machine only. */
export async function copy(text) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else if (!copyByCommand(text)) throw new Error("refused");
    return true;
  } catch {
    toast(t("copy.failed"));
    return false;
  }
}

/** The old way, which works on plain http: the browser copies what is selected. */
function copyByCommand(text) {
  const area = document.createElement("textarea");
  const before = document.activeElement;
  area.value = text;
  area.className = "offscreen";
  area.setAttribute("aria-hidden", "true");
  (document.querySelector("dialog[open]") ?? document.body).append(area); // an open dialog keeps the focus inside
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return copied;
}

export async function begin() {
  const settings = storage.loadSettings();
  app.set({ settings });
  applySettings(settings);
  darkSystem.addEventListener("change", () => applySettings(app.get().settings));
  await openStored();
  startConversation();
  await connect();
  app.set({ ready: true });
}

// What stays in this browser: conversations in IndexedDB, settings in localStorage. Nothing is kept on the server.
//
// Where storage is forbidden (some private windows) the page works on and says that nothing will be kept.

import { fromJson, toJson } from "./trace.js";

const SETTINGS = "quadriga.settings";
const FORMAT = "quadriga-conversations";
const VERSION = 1;

export const DEFAULTS = {
  theme: "system",
  locale: "",
  apiKey: "",
  system: "",
  lens: false,
  sampling: {
    temperature: 0.7,
    top_p: 0.95,
    top_k: 0,
    min_p: 0,
    repetition_penalty: 1,
    max_tokens: 1024,
    seed: null,
  },
};

export function loadSettings() {
  try {
    const saved = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    return { ...DEFAULTS, ...saved, sampling: { ...DEFAULTS.sampling, ...saved.sampling } };
  } catch {
    return DEFAULTS;
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // Forbidden or full: the settings hold until the page is closed.
  }
}

/** A name that nothing else has: m... for a message, c... for a conversation. */
export function newId(letter) {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return letter + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

let database = null;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Open the database; false where the browser gives us none. */
export async function openDatabase() {
  try {
    const opening = indexedDB.open("quadriga", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    database = await done(opening);
    return true;
  } catch {
    return false;
  }
}

function table(mode) {
  return database.transaction("conversations", mode).objectStore("conversations");
}

export async function loadConversations() {
  return database ? done(table("readonly").getAll()) : [];
}

export async function loadConversation(id) {
  return database ? done(table("readonly").get(id)) : undefined;
}

export async function saveConversation(conversation) {
  if (database) await done(table("readwrite").put(conversation));
}

export async function deleteConversation(id) {
  if (database) await done(table("readwrite").delete(id));
}

/** Conversations as the text of a file. */
export function exportText(conversations) {
  const plain = conversations.map((conversation) => ({
    ...conversation,
    nodes: Object.values(conversation.nodes).map((node) => (node.trace ? { ...node, trace: toJson(node.trace) } : node)),
  }));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: plain }, null, 1);
}

const isText = (value) => typeof value === "string";
const isId = (value) => isText(value) && /^[a-z][0-9a-f]{8,40}$/.test(value);

function importNode(node, seen) {
  const known = ["user", "assistant"].includes(node.role);
  if (!isId(node.id) || !known || !isText(node.content) || !(node.parent === "" || seen.has(node.parent))) {
    throw new Error("node");
  }
  const { id, parent, role, content } = node;
  const taken = { id, parent, role, content, finish: null };
  if (role === "assistant") {
    taken.finish = isText(node.finish) ? node.finish.slice(0, 20) : "stop";
    taken.model = isText(node.model) ? node.model : "";
    if (node.stats) {
      taken.stats = {};
      for (const name of ["tokens", "rate", "firstMs", "total", "context"]) {
        if (Number.isFinite(node.stats[name])) taken.stats[name] = node.stats[name];
      }
    }
    if (node.trace) taken.trace = fromJson(node.trace);
  }
  return taken;
}

/** The other way, every field checked, since a file may be anybody's. Throws an Error naming what is wrong. */
export function importText(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT) throw new Error(`format: ${String(file?.format)}`);
  if (file.version !== VERSION) throw new Error(`version: ${String(file.version)}`);
  return file.conversations.map((given) => {
    const good = isId(given.id) && isText(given.title) && isText(given.system) && Array.isArray(given.nodes);
    if (!good || !Number.isFinite(given.created) || !Number.isFinite(given.updated)) throw new Error("conversation");
    const nodes = {};
    const seen = new Set();
    for (const node of given.nodes) {
      if (seen.has(node.id)) throw new Error("node");
      nodes[node.id] = importNode(node, seen);
      seen.add(node.id);
    }
    const selected = {};
    for (const [parent, child] of Object.entries(given.selected ?? {})) {
      if (nodes[child]?.parent !== parent) throw new Error("selected");
      selected[parent] = child;
    }
    return {
      id: given.id,
      title: given.title.slice(0, 200),
      created: given.created,
      updated: given.updated,
      system: given.system,
      nodes,
      selected,
    };
  });
}

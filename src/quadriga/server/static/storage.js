// What stays in this browser: conversations in IndexedDB, settings in localStorage. Nothing is kept on the server.
//
//     conversations  {id, title, created, updated, system, selected, folder, pinned}
//     messages       {id, conversation, parent, role, content, ...}     one row a message
//     traces         {id, conversation, trace}                          the routing of the message of that id
//
// A message is a row of its own, and of a conversation only the fields that changed are written, into what stands there by
// then: two tabs that write one conversation at the same time both keep what they wrote. Where storage is forbidden (some
// private windows) the page works on and says that nothing will be kept.

import { modern } from "./trace.js";

const SETTINGS = "quadriga.settings";
const STORES = ["conversations", "messages", "traces"];

export const DEFAULTS = {
  theme: "system",
  locale: "",
  apiKey: "",
  system: "",
  model: "",
  lens: false,
  closed: [], // names of folders that are shut
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

function complete(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = () => reject(transaction.error);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** Version 1 kept a conversation with all its messages as one row; they are taken apart. */
function upgrade(opening, before) {
  const { result, transaction } = opening;
  for (const name of STORES) {
    if (result.objectStoreNames.contains(name)) continue;
    const store = result.createObjectStore(name, { keyPath: "id" });
    if (name !== "conversations") store.createIndex("conversation", "conversation");
  }
  if (before !== 1) return;
  const conversations = transaction.objectStore("conversations");
  conversations.openCursor().onsuccess = ({ target: { result: cursor } }) => {
    if (!cursor) return;
    const { nodes, ...head } = cursor.value;
    for (const node of Object.values(nodes)) putNode(transaction, head.id, node);
    cursor.update(head);
    cursor.continue();
  };
}

/** Open the database; false where the browser gives us none. */
export async function openDatabase() {
  try {
    const opening = indexedDB.open("quadriga", 2);
    opening.onupgradeneeded = (event) => upgrade(opening, event.oldVersion);
    database = await done(opening);
    database.onversionchange = () => database.close(); // a newer page wants to change it
    return true;
  } catch {
    return false;
  }
}

function putNode(transaction, conversation, { trace, ...message }) {
  transaction.objectStore("messages").put({ ...message, conversation });
  if (trace) transaction.objectStore("traces").put({ id: message.id, conversation, trace });
}

/** All conversations without their messages (`nodes` is missing). */
export async function loadHeads() {
  return database ? done(database.transaction("conversations").objectStore("conversations").getAll()) : [];
}

/** A conversation with its messages; undefined where there is none. */
export async function loadConversation(id) {
  if (!database) return undefined;
  const transaction = database.transaction(STORES);
  const of = (name) => done(transaction.objectStore(name).index("conversation").getAll(id));
  const head = done(transaction.objectStore("conversations").get(id));
  const [found, messages, traces] = await Promise.all([head, of("messages"), of("traces")]);
  if (!found) return undefined;
  const routing = new Map(traces.map((row) => [row.id, modern(row.trace)]));
  const nodes = {};
  for (const { conversation: _, ...node } of messages) {
    nodes[node.id] = routing.has(node.id) ? { ...node, trace: routing.get(node.id) } : node;
  }
  return { ...found, nodes };
}

/** Everything said, per conversation, for searching: Map id -> text. */
export async function loadTexts() {
  const texts = new Map();
  if (!database) return texts;
  for (const { conversation, content } of await done(database.transaction("messages").objectStore("messages").getAll())) {
    texts.set(conversation, `${texts.get(conversation) ?? ""}${content}\n`);
  }
  return texts;
}

/**
 * What has to be written to come from one state of a conversation to another (tree.js makes new objects of what changes).
 * `before` is null where nothing is stored. `selected` has the children that are shown now where others were.
 */
export function difference(before, after) {
  const { nodes = {}, selected, ...head } = after;
  const old = before ?? { nodes: {}, selected: {} };
  const then = old.nodes ?? {};
  const changed = Object.fromEntries(Object.entries(head).filter(([name, value]) => old[name] !== value));
  const shown = Object.fromEntries(Object.entries(selected).filter(([parent, child]) => old.selected[parent] !== child));
  const written = Object.values(nodes).filter((node) => then[node.id] !== node);
  const removed = after.nodes ? Object.keys(then).filter((id) => !(id in nodes)) : [];
  return { id: after.id, head: changed, selected: shown, written, removed, whole: after };
}

/** True if there is nothing to write. */
export function isEmpty({ head, selected, written, removed }) {
  return !Object.keys(head).length && !Object.keys(selected).length && !written.length && !removed.length;
}

/** A conversation with a difference applied to it; what others changed in it meanwhile stays. */
export function merge(stored, { head, selected, written, removed }) {
  const nodes = { ...stored.nodes };
  for (const id of removed) delete nodes[id];
  for (const node of written) nodes[node.id] = node;
  const shown = { ...stored.selected, ...selected };
  for (const [parent, child] of Object.entries(shown)) if (!(child in nodes)) delete shown[parent];
  return { ...stored, ...head, selected: shown, nodes };
}

/** Write a difference, in one transaction that reads the conversation as it is by then. One that is gone is written whole. */
export async function saveDifference({ id, head, selected, written, removed, whole }) {
  if (!database) return;
  const transaction = database.transaction(STORES, "readwrite");
  const conversations = transaction.objectStore("conversations");
  const getting = conversations.get(id);
  getting.onsuccess = () => {
    const { nodes, ...plain } = whole;
    const stored = getting.result;
    const shown = { ...(stored ?? plain).selected, ...selected };
    for (const [parent, child] of Object.entries(shown)) if (removed.includes(child)) delete shown[parent];
    conversations.put({ ...(stored ?? plain), ...head, selected: shown });
    if (!stored) for (const node of Object.values(nodes ?? {})) putNode(transaction, id, node);
  };
  for (const node of written) putNode(transaction, id, node);
  for (const node of removed) for (const name of ["messages", "traces"]) transaction.objectStore(name).delete(node);
  await complete(transaction);
}

export async function deleteConversation(id) {
  if (!database) return;
  const transaction = database.transaction(STORES, "readwrite");
  transaction.objectStore("conversations").delete(id);
  for (const name of ["messages", "traces"]) {
    const store = transaction.objectStore(name);
    store.index("conversation").openKeyCursor(id).onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor) return;
      store.delete(cursor.primaryKey);
      cursor.continue();
    };
  }
  await complete(transaction);
}

// Conversations as files. Out: this page's own JSON (everything, routing included), Markdown, and OpenAI's messages, one
// conversation a line. In: its own JSON, and the exports of ChatGPT (conversations.json) and of Open WebUI.
//
// A file may be anybody's: every field is checked, and a file is taken whole or not at all.

import { newId } from "./storage.js";
import { fromJson, toJson } from "./trace.js";
import * as tree from "./tree.js";

const FORMAT = "quadriga-conversations";
const VERSION = 2;

/** Conversations as the text of a file in this page's own format. */
export function ownText(conversations) {
  const plain = conversations.map((conversation) => ({
    ...conversation,
    nodes: Object.values(conversation.nodes).map((node) => (node.trace ? { ...node, trace: toJson(node.trace) } : node)),
  }));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: plain }, null, 1);
}

/** What is sent of a message: its files, each in a fence longer than any inside it, then what was written. */
export function said({ content, files = [] }) {
  const fenced = files.map(({ name, text }) => {
    const fence = "`".repeat(Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length)) + 1);
    return `${name}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}\n\n`;
  });
  return fenced.join("") + content;
}

/** The branch that is shown, as OpenAI's messages. */
export function messagesOf(conversation) {
  const turns = tree.path(conversation).map((node) => ({ role: node.role, content: said(node) }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...turns] : turns;
}

/** One line a conversation: {"messages": [...]}, as OpenAI's fine-tuning takes it. */
export function openaiText(conversations) {
  return conversations.map((one) => `${JSON.stringify({ messages: messagesOf(one) })}\n`).join("");
}

/** The branches that are shown, to be read. `names` are the words for system, user and assistant. */
export function markdownText(conversations, names) {
  const text = conversations.map((one) => {
    const turns = tree.path(one).map((node) => `### ${node.model ? `${names.assistant} (${node.model})` : names[node.role]}\n\n${said(node)}\n`);
    const system = one.system.trim() ? [`### ${names.system}\n\n${one.system}\n`] : [];
    return [`# ${one.title}\n`, `*${new Date(one.created).toISOString().slice(0, 10)}*\n`, ...system, ...turns].join("\n");
  });
  return text.join("\n---\n\n");
}

// In -----------------------------------------------------------------------------------------------------------------

const isText = (value) => typeof value === "string";
const isId = (value) => isText(value) && /^[a-z][0-9a-f]{8,40}$/.test(value);
const MOST_NODES = 100_000;

/** Conversations from a file of any of the formats above. Throws an Error naming what is wrong. */
export function importText(text) {
  const file = JSON.parse(text);
  if (file?.format === FORMAT) return ownConversations(file);
  const list = Array.isArray(file) ? file : [file];
  if (list.length && list.every((one) => one?.mapping)) return list.map(fromChatGpt);
  if (list.length && list.every((one) => one?.chat?.history?.messages)) return list.map(fromOpenWebUi);
  throw new Error(`format: ${String(file?.format)}`);
}

function ownConversations(file) {
  if (file.version !== 1 && file.version !== VERSION) throw new Error(`version: ${String(file.version)}`);
  return file.conversations.map((given) => {
    const good = isId(given.id) && isText(given.title) && isText(given.system) && Array.isArray(given.nodes);
    if (!good || !Number.isFinite(given.created) || !Number.isFinite(given.updated)) throw new Error("conversation");
    const nodes = {};
    const seen = new Set();
    for (const node of given.nodes) {
      if (seen.has(node.id)) throw new Error("node");
      nodes[node.id] = ownNode(node, seen, file.version === 1);
      seen.add(node.id);
    }
    const selected = {};
    for (const [parent, child] of Object.entries(given.selected ?? {})) {
      if (nodes[child]?.parent !== parent) throw new Error("selected");
      selected[parent] = child;
    }
    const { id, created, updated, system } = given;
    const taken = { id, title: given.title.slice(0, 200), created, updated, system, nodes, selected };
    if (isText(given.folder) && given.folder) taken.folder = given.folder.slice(0, 60);
    if (given.pinned === true) taken.pinned = true;
    if (given.steering !== undefined) taken.steering = steeringOf(given.steering);
    return taken;
  });
}

function ownNode(node, seen, bytes) {
  const known = ["user", "assistant"].includes(node.role);
  if (!isId(node.id) || !known || !isText(node.content) || !(node.parent === "" || seen.has(node.parent))) {
    throw new Error("node");
  }
  const { id, parent, role, content } = node;
  const taken = { id, parent, role, content, finish: null };
  if (role === "user") {
    if (node.files !== undefined) taken.files = filesOf(node.files);
    return taken;
  }
  taken.finish = isText(node.finish) ? node.finish.slice(0, 20) : "stop";
  taken.model = isText(node.model) ? node.model : "";
  if (isText(node.reasoning) && node.reasoning) taken.reasoning = node.reasoning;
  if (node.steering !== undefined) taken.steering = steeringOf(node.steering);
  if (node.stats) {
    taken.stats = {};
    for (const name of ["tokens", "rate", "firstMs", "thoughtMs", "total", "context"]) {
      if (Number.isFinite(node.stats[name])) taken.stats[name] = node.stats[name];
    }
  }
  if (node.trace) taken.trace = fromJson(node.trace, { bytes });
  return taken;
}

function filesOf(files) {
  if (!Array.isArray(files) || !files.every((file) => isText(file?.name) && isText(file?.text))) throw new Error("files");
  return files.map(({ name, text }) => ({ name: name.slice(0, 200), text }));
}

function steeringOf(list) {
  const whole = (n) => Number.isInteger(n) && n >= 0 && n < 1e6;
  const good = Array.isArray(list) && list.every((one) => whole(one?.layer) && whole(one.expert) && Number.isFinite(one.factor));
  if (!good) throw new Error("steering");
  return list.map(({ layer, expert, factor }) => ({ layer, expert, factor }));
}

/** A tree out of rows {parent, said}; rows that say nothing are left out, and their children move up. Throws for no tree. */
function grown({ title, system, created, updated, rows, leaf }) {
  if (rows.size > MOST_NODES) throw new Error("node");
  const named = new Map(); // their id -> our node
  for (const [id, { said: what }] of rows) if (what) named.set(id, { id: newId("m"), ...what });
  const above = (id) => {
    let at = rows.get(id)?.parent;
    for (let n = 0; at && !named.has(at); n++) {
      if (n > rows.size) throw new Error("tree");
      at = rows.get(at)?.parent;
    }
    return at ?? null;
  };
  const out = { ...tree.newConversation(newId("c"), created, system), title: title.slice(0, 200), updated };
  const shownOf = (id) => (named.has(id) ? named.get(id).id : "");
  for (const [id, node] of named) {
    out.nodes[node.id] = { ...node, parent: shownOf(above(id)) };
    out.selected[out.nodes[node.id].parent] = node.id; // the last one of each, if nothing else is said
  }
  requireTree(out.nodes);
  const last = shownOf(named.has(leaf) ? leaf : above(leaf));
  for (let node = out.nodes[last]; node; node = out.nodes[node.parent]) out.selected[node.parent] = node.id;
  return out;
}

/** Throws where nodes hang together in a circle. */
function requireTree(nodes) {
  const below = new Map();
  for (const { id, parent } of Object.values(nodes)) below.set(parent, [...(below.get(parent) ?? []), id]);
  let [reached, next] = [0, below.get("") ?? []];
  while (next.length) {
    reached += next.length;
    next = next.flatMap((id) => below.get(id) ?? []);
  }
  if (reached !== Object.keys(nodes).length) throw new Error("tree");
}

function saidBy(role, content, model, reasoning = "") {
  if (!["user", "assistant"].includes(role) || !content.trim()) return null;
  if (role === "user") return { role, content, finish: null };
  return { role, content, finish: "stop", model, ...(reasoning ? { reasoning } : {}) };
}

const date = (value) => (Number.isFinite(value) ? value * 1000 : Date.now());

/** One of ChatGPT's conversations.json: a mapping of nodes, whose contents are lists of parts. */
function fromChatGpt(given) {
  const rows = new Map();
  let system = "";
  for (const [id, node] of Object.entries(given.mapping)) {
    const message = node?.message;
    const parts = (message?.content?.parts ?? []).filter(isText).join("\n");
    const role = message?.author?.role;
    const hidden = message?.metadata?.is_visually_hidden_from_conversation === true;
    if (role === "system" && parts.trim()) system ||= parts;
    const row = { parent: node?.parent, said: hidden ? null : saidBy(role, parts, message?.metadata?.model_slug ?? "") };
    rows.set(id, row);
  }
  const title = isText(given.title) ? given.title : "";
  const [created, updated] = [date(given.create_time), date(given.update_time)];
  return grown({ title, system, created, updated, rows, leaf: given.current_node });
}

/** One of Open WebUI's chats: history.messages by id, thoughts as <details type="reasoning"> before the answer. */
function fromOpenWebUi(given) {
  const { chat } = given;
  const rows = new Map();
  for (const [id, message] of Object.entries(chat.history.messages)) {
    const content = isText(message?.content) ? message.content : "";
    const { thought, answer } = withoutThought(content);
    const kept = message?.role === "assistant" ? answer : content;
    const model = isText(message?.model) ? message.model : "";
    rows.set(id, { parent: message?.parentId, said: saidBy(message?.role, kept, model, thought) });
  }
  const title = isText(chat.title) ? chat.title : isText(given.title) ? given.title : "";
  const system = isText(chat.system) ? chat.system : isText(chat.params?.system) ? chat.params.system : "";
  const [created, updated] = [date(given.created_at), date(given.updated_at)];
  return grown({ title, system, created, updated, rows, leaf: chat.history.currentId });
}

function withoutThought(content) {
  const found = /^\s*<details type="reasoning"[^>]*>\s*(?:<summary>[\s\S]*?<\/summary>)?([\s\S]*?)<\/details>\s*/.exec(content);
  if (!found) return { thought: "", answer: content };
  const thought = found[1].trim().replace(/^(?:&gt;|>) ?/gm, "");
  return { thought, answer: content.slice(found[0].length) };
}

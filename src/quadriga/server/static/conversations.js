// The conversations of this tab: kept as they change, loaded when they are opened, and joined with what other tabs write.
//
// `stored` is what this tab knows to be in storage. What differs from it is what this tab has yet to write, and all that it
// ever writes; what another tab has written is taken in beside it.

import * as storage from "./storage.js";
import { app } from "./state.js";
import * as tree from "./tree.js";

const channel = "BroadcastChannel" in self ? new BroadcastChannel("quadriga") : null;
const stored = new Map();
const writes = new Map(); // conversation id -> {n: writes begun, last: the promise of the last one}

/** True for a conversation in which something was said, or may have been: its messages are not loaded yet. */
export function isListed({ nodes }) {
  return nodes === undefined || Object.keys(nodes).length > 0;
}

/** A conversation as it is now, shown and (mostly) kept. */
export function put(conversation, { save = true } = {}) {
  app.set({ conversations: { ...app.get().conversations, [conversation.id]: conversation } });
  if (save) keep(conversation);
}

function keep(conversation) {
  const { id, system, nodes } = conversation;
  if (nodes && !Object.keys(nodes).length && !system && !stored.has(id)) return; // nothing said yet, nothing to keep
  const change = storage.difference(stored.get(id) ?? null, conversation);
  if (storage.isEmpty(change)) return;
  stored.set(id, conversation);
  const writing = storage.saveDifference(change).then(
    () => channel?.postMessage(id),
    () => app.set({ keeps: false }),
  );
  writes.set(id, { n: (writes.get(id)?.n ?? 0) + 1, last: writing });
}

/** A conversation as it is in storage, with everything that this tab has written by now. */
async function readBehindWrites(id) {
  for (;;) {
    const before = writes.get(id);
    await before?.last;
    const found = await storage.loadConversation(id);
    if (writes.get(id)?.n === before?.n) return found;
  }
}

export function currentConversation() {
  const { conversations, current } = app.get();
  return conversations[current];
}

/** An answer that was under way when its page was closed will not go on. */
function settled(conversation) {
  if (app.get().running[conversation.id]) return conversation;
  let out = conversation;
  for (const node of Object.values(conversation.nodes)) {
    if (node.role === "assistant" && node.finish === null) out = tree.update(out, node.id, { finish: "broken" });
  }
  return out;
}

/** The conversation with its messages; null where it is gone. */
export async function loaded(id) {
  const here = app.get().conversations[id];
  if (here?.nodes) return here;
  const found = await storage.loadConversation(id);
  if (!found) {
    forget(id);
    return null;
  }
  const fresh = settled(found);
  stored.set(id, fresh);
  put(fresh, { save: false });
  return fresh;
}

/** Take a conversation out of this tab. */
function forget(id) {
  const { [id]: _, ...left } = app.get().conversations;
  stored.delete(id);
  app.set({ conversations: left });
}

/** Delete a conversation everywhere. */
export async function remove(id) {
  forget(id);
  await storage.deleteConversation(id);
  channel?.postMessage(id);
}

/** Another tab has changed a conversation, or deleted it. What this tab shows of its branches stays. */
async function takeIn(id) {
  const fresh = await readBehindWrites(id);
  const { running, current, conversations } = app.get();
  const here = conversations[id];
  if (!fresh) {
    stored.delete(id); // whatever is said here from now on is written whole
    if (!running[id] && id !== current) forget(id);
    return;
  }
  const before = stored.get(id) ?? null;
  stored.set(id, fresh);
  if (!here?.nodes) {
    put(fresh, { save: false });
    return;
  }
  const mine = storage.difference(before, here);
  put(storage.merge(fresh, { ...mine, selected: here.selected }), { save: false });
}

/** Begin with what is stored, and listen to other tabs. */
export async function openStored() {
  const keeps = await storage.openDatabase();
  const heads = await storage.loadHeads();
  for (const head of heads) stored.set(head.id, head);
  app.set({ keeps, conversations: Object.fromEntries(heads.map((head) => [head.id, head])) });
  channel?.addEventListener("message", (event) => takeIn(event.data));
}

// Questions and their answers: what is sent, what comes, and how it becomes part of the conversation.
//
//     send, edit ─► ask: a question in the tree ─┐
//     regenerate, retry, goOn ───────────────────┴─► answer ─► api.generate ─► Progress ─► the tree, the store, storage

import { forgetToken, setDraft, startEditing } from "./actions.js";
import { generate, Problem } from "./api.js";
import { comeBack, connect, isAway, onReturn } from "./connection.js";
import { currentConversation, put } from "./conversations.js";
import { app } from "./state.js";
import { newId } from "./storage.js";
import { newTrace, push, trimmed } from "./trace.js";
import { said } from "./transfer.js";
import * as tree from "./tree.js";

const REDRAW_MS = 70;
const SAVE_MS = 2000;

/** Say something in the current conversation, with the files that were attached to it. */
export function send(text) {
  const conversation = currentConversation();
  const files = app.get().attached[conversation.id] ?? [];
  if ((!text.trim() && !files.length) || app.get().running[conversation.id] || !app.get().model) return;
  const last = tree.path(conversation).at(-1);
  setDraft(conversation.id, "");
  app.set({ attached: { ...app.get().attached, [conversation.id]: [] } });
  // A question that has no answer (it failed, or another tab waits for one) is no turn to go on from: beside it, then.
  ask(conversation, (last?.role === "user" ? last.parent : last?.id) ?? "", text, files);
}

function ask(conversation, parent, text, files = []) {
  const node = { id: newId("m"), role: "user", content: text, finish: null };
  if (files.length) node.files = files;
  const title = conversation.title || (text.trim() || files[0].name).replace(/\s+/g, " ").slice(0, 60);
  const asked = tree.add({ ...conversation, title, updated: Date.now() }, parent, node);
  put(asked);
  answer(asked.id, node.id);
}

/** Put a message in other words, beside the old one: a question is asked again, an answer stands as it is written. */
export function edit(id, text) {
  const conversation = currentConversation();
  const { parent, role, files, ...old } = conversation.nodes[id];
  startEditing(null);
  if (app.get().running[conversation.id] || (!text.trim() && !files?.length)) return;
  if (role === "user") return ask(conversation, parent, text, files);
  const node = { id: newId("m"), role, content: text, finish: "edited", model: old.model };
  if (old.reasoning) node.reasoning = old.reasoning;
  put(tree.add({ ...conversation, updated: Date.now() }, parent, node));
}

/** Another answer to the same question, beside the old one. */
export function regenerate(id) {
  const conversation = currentConversation();
  if (app.get().running[conversation.id]) return;
  forgetToken();
  answer(conversation.id, conversation.nodes[id].parent);
}

/** True for an answer that can be gone on with: it has begun, and did not end by itself. */
export function canGoOn({ role, content, finish }) {
  return role === "assistant" && Boolean(content.trim()) && finish !== "stop" && finish !== null;
}

/** Go on with an answer where it broke off, was stopped, reached its limit or was edited. */
export function goOn(id) {
  const conversation = currentConversation();
  if (app.get().running[conversation.id] || !canGoOn(conversation.nodes[id])) return;
  forgetToken();
  answer(conversation.id, conversation.nodes[id].parent, conversation.nodes[id]);
}

/** Answer the last question again after a failure. */
export function retry() {
  const conversation = currentConversation();
  const last = tree.path(conversation).at(-1);
  if (last?.role === "user") answer(conversation.id, last.id);
  else if (last && canGoOn(last)) goOn(last.id);
  else if (last) regenerate(last.id);
}

function samplingFields({ sampling }) {
  const given = Object.entries(sampling).filter(([, value]) => value !== null && value !== "");
  return Object.fromEntries(given);
}

/** What the model is sent of a conversation: everything up to a message. */
export function messagesFor(conversation, id) {
  const turns = tree.ancestry(conversation, id).map((node) => {
    const turn = { role: node.role, content: said(node) };
    return node.reasoning ? { ...turn, reasoning_content: node.reasoning } : turn;
  });
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

// Whoever asked while the server was away need not ask again. What had broken off is left as it is.
onReturn(() => {
  if (isAway(app.get().problems[app.get().current])) clearProblem();
});

/** The node that an answer is written into: a new one, or the one that is gone on with. */
function nodeFor(parent, begun, steering) {
  const { model, settings } = app.get();
  if (begun) return { ...begun, finish: null, model: model.id };
  const node = { id: newId("m"), role: "assistant", content: "", finish: null, model: model.id, parent };
  if (settings.lens && model.quadriga.n_experts > 0) node.trace = newTrace(model.quadriga.n_experts);
  if (steering?.length && model.quadriga.n_experts > 0) node.steering = steering;
  return node;
}

/** Ask for an answer to the message `parent`; `begun` is an answer that is gone on with. */
async function answer(id, parent, begun = null) {
  const { model, settings } = app.get();
  const before = app.get().conversations[id];
  const node = nodeFor(parent, begun, before.steering);
  const messages = messagesFor(before, begun ? begun.id : parent);
  const routing = Boolean(node.trace) && model.quadriga.n_experts === node.trace.n_experts;
  if (!routing) delete node.trace; // another model goes on: what it chose does not belong to the same experts
  put(begun ? tree.update(before, node.id, node) : tree.add(before, parent, node), { save: false });
  const controller = new AbortController();
  setRunning(id, { node: node.id, controller });
  setProblem(id, null);

  const progress = new Progress(id, node, Boolean(begun));
  try {
    const request = { model, messages, sampling: samplingFields(settings), routing, goesOn: Boolean(begun) };
    for await (const event of generate({ ...request, steering: node.steering, signal: controller.signal })) {
      progress.take(event);
    }
  } catch (error) {
    if (error.name === "AbortError") progress.finish = "stopped";
    else {
      progress.finish = "broken";
      setProblem(id, error instanceof Problem ? error : new Problem("page", String(error)));
      if (error.kind === "request") connect(); // perhaps another model is served by now
      if (isAway(error)) comeBack();
    }
  }
  setRunning(id, null);
  if (id in app.get().conversations) progress.end();
  if (app.get().models.some(({ quadriga }) => quadriga.loaded === false)) connect(); // who is loaded has changed
}

/** One answer as it comes: gathers pieces, and draws and saves them now and then. */
class Progress {
  constructor(id, node, goesOn) {
    Object.assign(this, { id, node, goesOn, tokens: 0, finish: null, usage: null, timings: null });
    this.text = node.content;
    this.thought = node.reasoning ?? "";
    this.started = performance.now();
    this.first = this.spoke = null;
    this.drawn = 0;
    this.saved = this.started;
  }

  take({ text, thought, routing, finish, usage, timings }) {
    const now = performance.now();
    if (text || thought || routing.length) {
      this.first ??= now;
      this.tokens += 1;
    }
    if (text) this.spoke ??= now;
    this.text += text;
    this.thought += thought;
    for (const token of routing) push(this.node.trace, token, shownAs(token, text || thought));
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
    const old = this.goesOn ? this.node.stats : null;
    const now = performance.now();
    const seconds = (now - (this.first ?? this.started)) / 1000;
    const mine = { tokens: this.tokens, rate: this.tokens > 1 ? (this.tokens - 1) / seconds : 0 };
    mine.firstMs = old?.firstMs ?? (this.first ?? now) - this.started;
    if (this.thought) mine.thoughtMs = old?.thoughtMs ?? (this.spoke ?? now) - (this.first ?? now);
    if (this.usage) {
      mine.tokens = this.usage.completion_tokens;
      mine.total = this.usage.total_tokens;
      mine.context = app.get().model.quadriga.context_length;
    }
    if (this.timings) mine.rate = this.timings.predicted_per_second;
    mine.tokens += old?.tokens ?? 0;
    return mine;
  }

  changes() {
    const changes = { content: this.text, stats: this.stats() };
    if (this.thought) changes.reasoning = this.thought;
    return changes;
  }

  show(save) {
    const conversation = app.get().conversations[this.id];
    if (!conversation) return;
    const trace = this.node.trace && { ...this.node.trace };
    put(tree.update(conversation, this.node.id, { ...this.changes(), trace }), { save });
  }

  end() {
    const conversation = app.get().conversations[this.id];
    const empty = this.finish === "broken" && !this.text && !this.thought;
    if (empty) {
      // Nothing came: the question stands alone again, or the answer before is shown.
      put(tree.remove(conversation, this.node.id));
      return;
    }
    const changes = { ...this.changes(), finish: this.finish ?? "broken" };
    if (this.node.trace) changes.trace = trimmed(this.node.trace);
    put(tree.update({ ...conversation, updated: Date.now() }, this.node.id, changes));
  }
}

/** A token's words in the lens. One that ends inside a character has none; the one that completes it shows it. */
function shownAs(token, text) {
  return text || (token.text.startsWith("bytes:") ? "" : token.text);
}

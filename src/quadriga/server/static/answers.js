// Questions and their answers: what is sent, what comes, and how it becomes part of the conversation.
//
//     send, edit ─► ask: a question in the tree ─┐
//     regenerate, retry ─────────────────────────┴─► answer ─► api.generate ─► Progress ─► the tree, the store, storage

import { connect, currentConversation, forgetToken, put, setDraft, startEditing } from "./actions.js";
import { generate, Problem } from "./api.js";
import { newId } from "./storage.js";
import { app } from "./state.js";
import { newTrace, push, trimmed } from "./trace.js";
import * as tree from "./tree.js";

const REDRAW_MS = 70;
const SAVE_MS = 2000;

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
  startEditing(null);
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
      put(tree.remove(conversation, this.node.id));
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

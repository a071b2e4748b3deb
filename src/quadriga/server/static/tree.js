// A conversation as a tree. Editing or regenerating adds a sibling; nothing that was said is overwritten.
//
//     "" ─┬─ user 1 ─┬─ answer 1        selected = {"": user 1, user 1: answer 2, ...}
//         │          └─ answer 2 ─ ...  one child is shown of every node: a path from the root down
//         └─ user 1, edited ─ answer
//
// Pure functions: each returns a new conversation, so a view can tell by === that nothing changed.

const ROOT = "";

/** A new conversation; `system` is its system prompt. */
export function newConversation(id, now, system = "") {
  return { id, title: "", created: now, updated: now, system, nodes: {}, selected: {} };
}

/** The nodes shown, from the first message to the last. */
export function path(conversation) {
  const shown = [];
  let at = conversation.selected[ROOT];
  while (at !== undefined && shown.length <= Object.keys(conversation.nodes).length) {
    shown.push(conversation.nodes[at]);
    at = conversation.selected[at];
  }
  return shown;
}

/** The nodes from the first message to `id`, whatever is shown. */
export function ancestry(conversation, id) {
  const line = [];
  for (let at = id; at !== ROOT; at = conversation.nodes[at].parent) line.unshift(conversation.nodes[at]);
  return line;
}

/** The ids of a node and its alternatives, oldest first. */
export function siblings(conversation, id) {
  const { parent } = conversation.nodes[id];
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent)
    .map((node) => node.id);
}

/** With a new node under `parent` ("" is the root), shown. */
export function add(conversation, parent, node) {
  return {
    ...conversation,
    nodes: { ...conversation.nodes, [node.id]: { ...node, parent } },
    selected: { ...conversation.selected, [parent]: node.id },
  };
}

/** With some fields of one node replaced. */
export function update(conversation, id, changes) {
  return { ...conversation, nodes: { ...conversation.nodes, [id]: { ...conversation.nodes[id], ...changes } } };
}

/** With this alternative shown among its siblings. */
export function select(conversation, id) {
  return { ...conversation, selected: { ...conversation.selected, [conversation.nodes[id].parent]: id } };
}

/** Without a node that has nothing under it; an alternative is shown in its place, if there is one. */
export function remove(conversation, id) {
  const others = siblings(conversation, id).filter((other) => other !== id);
  const { [id]: gone, ...nodes } = conversation.nodes;
  const { [gone.parent]: _, ...selected } = conversation.selected;
  if (others.length) selected[gone.parent] = others.at(-1);
  return { ...conversation, nodes, selected };
}

/** Everything said anywhere in a conversation whose messages are loaded, for searching. */
export function allText(conversation) {
  return Object.values(conversation.nodes)
    .map((node) => node.content)
    .join("\n");
}

/** The same conversation under new names, so that both can be kept; `newId` makes one that begins with a letter. */
export function copyOf(conversation, newId) {
  const names = new Map(Object.keys(conversation.nodes).map((id) => [id, newId("m")]));
  const name = (id) => names.get(id) ?? id;
  const nodes = {};
  for (const node of Object.values(conversation.nodes)) {
    nodes[name(node.id)] = { ...node, id: name(node.id), parent: name(node.parent) };
  }
  const selected = Object.fromEntries(Object.entries(conversation.selected).map(([parent, child]) => [name(parent), name(child)]));
  return { ...conversation, id: newId("c"), nodes, selected };
}

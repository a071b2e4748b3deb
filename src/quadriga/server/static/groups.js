// The list of conversations in its order: pinned ones, folders, then by day. Pure functions.

const DAY_MS = 86_400_000;

/** Midnight before a time, here. */
function midnight(time) {
  return new Date(time).setHours(0, 0, 0, 0);
}

/** When a conversation was last used: "today", "yesterday", "week", "month", or the first day of its month as a time. */
export function periodOf(updated, now) {
  const days = Math.round((midnight(now) - midnight(updated)) / DAY_MS);
  if (days <= 0) return "today";
  if (days === 1) return "yesterday";
  if (days < 7) return "week";
  if (days < 30) return "month";
  const date = new Date(updated);
  return new Date(date.getFullYear(), date.getMonth(), 1).getTime();
}

/**
 * [{kind: "pinned" | "folder" | "period", name, items}], the newest first in each. A folder's name is its own; a period's as
 * periodOf says. Folders stand in alphabetical order.
 */
export function grouped(conversations, now) {
  const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
  const groups = new Map();
  const add = (kind, name, one) => {
    const key = `${kind} ${name}`;
    if (!groups.has(key)) groups.set(key, { kind, name, items: [] });
    groups.get(key).items.push(one);
  };
  for (const one of sorted) {
    if (one.pinned) add("pinned", "", one);
    else if (one.folder) add("folder", one.folder, one);
    else add("period", periodOf(one.updated, now), one);
  }
  const all = [...groups.values()];
  const folders = all.filter((group) => group.kind === "folder").sort((a, b) => a.name.localeCompare(b.name));
  return [...all.filter((group) => group.kind === "pinned"), ...folders, ...all.filter((group) => group.kind === "period")];
}

/** Items of given heights in a window: {first, last (exclusive), before, after (pixels left out)}. */
export function inWindow(heights, top, height, margin) {
  let [at, first, before] = [0, 0, 0];
  while (first < heights.length && at + heights[first] < top - margin) at += heights[first++];
  before = at;
  let last = first;
  while (last < heights.length && at < top + height + margin) at += heights[last++];
  const after = heights.slice(last).reduce((sum, one) => sum + one, 0);
  return { first, last, before, after };
}

// The page's stores. `app` is read by the views, changed by actions.js and what it names, drawn by app.js, at most once a frame; what the
// lens colours by and points at are stores of their own, so that moving over a text draws nothing else again.

import { useEffect, useState } from "./vendor/htm-preact.mjs";
import { DEFAULTS } from "./storage.js";

/** A value with listeners. `set` takes the fields to change. */
export function createStore(initial) {
  let state = initial;
  const listeners = new Set();
  return {
    get: () => state,
    set(changes) {
      state = { ...state, ...changes };
      for (const listener of listeners) listener();
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** A store's state in a component, drawn again once a frame at most. */
export function useStore(store) {
  const [state, setState] = useState(store.get());
  useEffect(() => {
    let frame = 0;
    const changed = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        setState(store.get());
      });
    };
    changed();
    const stop = store.subscribe(changed);
    return () => {
      stop();
      cancelAnimationFrame(frame);
    };
  }, [store]);
  return state;
}

export const app = createStore({
  ready: false,
  models: [], // what the server serves
  model: null, // the one that is asked
  problem: null, // why there is no model yet
  settings: DEFAULTS,
  keeps: true, // false where the browser stores nothing
  conversations: {},
  current: null,
  drafts: {},
  attached: {}, // conversation id -> files that go with its next message, [{name, text}]
  editing: null, // the id of the message being edited
  running: {}, // conversation id -> {node, controller}
  problems: {}, // conversation id -> the Problem of its last request
  search: "",
  texts: null, // Map conversation id -> what was said in it as it was stored; null before the first search
  dialog: null, // "settings" | "help" | "export" | {conversation: id}
  atlas: false,
  labels: null, // what is known of the experts of the model: experts.js
  sidebar: false, // open, where it covers the page
  experts: false,
  toast: null, // {text, undo}
});

/** What the lens colours by; `layer` -1 is the mean of all layers. */
export const lens = createStore({ mode: "expert", layer: 0, expert: 0 });

/** The token under the pointer: {node, trace, token, x, y, pinned}, or token -1. */
export const hover = createStore({ token: -1 });

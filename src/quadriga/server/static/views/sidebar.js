// The conversations kept in this browser: search, open, rename, delete, export, import.

import * as actions from "../actions.js";
import { t, when } from "../i18n.js";
import { allText } from "../tree.js";
import { html, useRef, useState } from "../vendor/htm-preact.mjs";
import { Icon, IconButton, Mark } from "./icons.js";

/** Where the words looked for stand, with a little around them; "" where they are in the title. */
function snippet(conversation, words) {
  const text = allText({ ...conversation, title: "" });
  const at = text.toLowerCase().indexOf(words);
  if (at < 0) return null;
  const start = Math.max(0, at - 24);
  return {
    before: (start ? "…" : "") + text.slice(start, at),
    found: text.slice(at, at + words.length),
    after: text.slice(at + words.length, at + words.length + 60),
  };
}

function found(conversations, search) {
  const words = search.trim().toLowerCase();
  const listed = Object.values(conversations)
    .filter((one) => Object.keys(one.nodes).length)
    .sort((a, b) => b.updated - a.updated);
  return words ? listed.filter((one) => allText(one).toLowerCase().includes(words)) : listed;
}

function Row({ conversation, current, running, words }) {
  const [renaming, setRenaming] = useState(false);
  const part = words && snippet(conversation, words);
  const rename = (event) => {
    actions.renameConversation(conversation.id, event.target.value);
    setRenaming(false);
  };
  if (renaming) {
    return html`<li class="row">
      <input
        class="rename"
        value=${conversation.title}
        aria-label=${t("sidebar.rename")}
        ref=${(input) => input?.focus()}
        onBlur=${rename}
        onKeyDown=${(event) => {
          if (event.key === "Enter" && !event.isComposing) event.target.blur();
          if (event.key === "Escape") setRenaming(false);
        }}
      />
    </li>`;
  }
  return html`<li class="row" aria-current=${current ? "page" : undefined}>
    <button type="button" class="open" onClick=${() => actions.openConversation(conversation.id)}>
      <span class="title">${running ? html`<i class="pulse" />` : null}${conversation.title}</span>
      ${part
        ? html`<span class="snippet">${part.before}<mark>${part.found}</mark>${part.after}</span>`
        : html`<span class="snippet">${when(conversation.updated)}</span>`}
    </button>
    <span class="row-actions">
      <${IconButton} icon="edit" label=${t("sidebar.rename")} onClick=${() => setRenaming(true)} />
      <${IconButton} icon="trash" label=${t("sidebar.delete")} onClick=${() => actions.removeConversation(conversation.id)} />
    </span>
  </li>`;
}

export function Sidebar({ state }) {
  const file = useRef(null);
  const words = state.search.trim().toLowerCase();
  const rows = found(state.conversations, state.search);
  const exportAll = () => actions.exportConversations(found(state.conversations, ""), "quadriga-conversations");
  return html`<aside class="sidebar" data-open=${String(state.sidebar)} aria-label=${t("sidebar.label")}>
    <div class="brand"><${Mark} /> <span>Quadriga</span></div>
    <button type="button" class="new" onClick=${actions.startConversation} title="Alt+N">
      <${Icon} name="plus" /> ${t("sidebar.new")}
    </button>
    <label class="search">
      <${Icon} name="search" />
      <input
        id="search"
        type="search"
        placeholder=${t("sidebar.search")}
        aria-label=${t("sidebar.search")}
        value=${state.search}
        onInput=${(event) => actions.setSearch(event.target.value)}
      />
      <kbd>Ctrl K</kbd>
    </label>
    <ul class="rows">
      ${rows.map(
        (one) =>
          html`<${Row}
            key=${one.id}
            conversation=${one}
            current=${one.id === state.current}
            running=${one.id in state.running}
            words=${words}
          />`,
      )}
      ${rows.length ? null : html`<li class="none">${words ? t("sidebar.nothing") : t("sidebar.empty")}</li>`}
    </ul>
    <div class="files">
      <button type="button" onClick=${() => file.current.click()}><${Icon} name="upload" /> ${t("sidebar.import")}</button>
      <button type="button" disabled=${!rows.length} onClick=${exportAll}>
        <${Icon} name="download" /> ${t("sidebar.export")}
      </button>
      <input
        ref=${file}
        type="file"
        accept="application/json,.json"
        hidden
        onChange=${(event) => {
          if (event.target.files[0]) actions.importFile(event.target.files[0]);
          event.target.value = "";
        }}
      />
    </div>
    <p class="kept">${state.keeps ? t("sidebar.kept") : t("sidebar.notkept")}</p>
  </aside>`;
}

// The conversations kept in this browser: search, open, pin, rename, file, delete, export, import. Of a thousand of them only
// those in sight are on the page.

import * as actions from "../actions.js";
import { isListed } from "../conversations.js";
import { grouped, inWindow } from "../groups.js";
import { month, t, when } from "../i18n.js";
import { allText } from "../tree.js";
import { html, useEffect, useMemo, useRef, useState } from "../vendor/htm-preact.mjs";
import { Icon, IconButton, Mark } from "./icons.js";

const ROW = 46; // pixels, as in layout.css
const HEADING = 30;
const MARGIN = 400;

function textOf(conversation, texts) {
  return conversation.nodes ? allText(conversation) : (texts?.get(conversation.id) ?? "");
}

/** Where the words looked for stand, with a little around them; null where they are in the title. */
function snippet(text, words) {
  const at = text.toLowerCase().indexOf(words);
  if (at < 0) return null;
  const start = Math.max(0, at - 24);
  return {
    before: (start ? "…" : "") + text.slice(start, at),
    found: text.slice(at, at + words.length),
    after: text.slice(at + words.length, at + words.length + 60),
  };
}

function found(conversations, words, texts) {
  const listed = Object.values(conversations).filter(isListed);
  if (!words) return listed;
  const has = (text) => text.toLowerCase().includes(words);
  return listed.filter((one) => has(one.title) || has(textOf(one, texts)));
}

function Row({ conversation, current, running, words, texts }) {
  const [renaming, setRenaming] = useState(false);
  const part = words && snippet(textOf(conversation, texts), words);
  const { id, pinned } = conversation;
  const rename = (event) => {
    actions.renameConversation(id, event.target.value);
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
  return html`<li class="row" data-id=${id}>
    <button type="button" class="open" aria-current=${current ? "page" : undefined} onClick=${() => actions.openConversation(id)}>
      <span class="title">${running ? html`<i class="pulse" />` : null}${conversation.title}</span>
      ${part
        ? html`<span class="snippet">${part.before}<mark>${part.found}</mark>${part.after}</span>`
        : html`<span class="snippet">${when(conversation.updated)}</span>`}
    </button>
    <span class="row-actions">
      <${IconButton}
        icon="pin"
        label=${pinned ? t("sidebar.unpin") : t("sidebar.pin")}
        pressed=${Boolean(pinned)}
        onClick=${() => actions.pinConversation(id)}
      />
      <${IconButton} icon="edit" label=${t("sidebar.rename")} onClick=${() => setRenaming(true)} />
      <${IconButton} icon="folder" class="icon-button more-of" label=${t("sidebar.more")} onClick=${() => actions.openDialog({ conversation: id })} />
      <${IconButton} icon="trash" label=${t("sidebar.delete")} onClick=${() => actions.removeConversation(id)} />
    </span>
  </li>`;
}

function nameOf({ kind, name }) {
  if (kind === "pinned") return t("group.pinned");
  if (kind === "folder") return name;
  const periods = { today: t("group.today"), yesterday: t("group.yesterday"), week: t("group.week"), month: t("group.month") };
  return periods[name] ?? month(name);
}

function Heading({ group, shut, n }) {
  if (group.kind !== "folder") return html`<li class="heading"><h3>${nameOf(group)}</h3></li>`;
  return html`<li class="heading">
    <h3>
      <button type="button" aria-expanded=${String(!shut)} onClick=${() => actions.toggleFolder(group.name)}>
        <${Icon} name="fold" /> ${group.name} <small>${n}</small>
      </button>
    </h3>
  </li>`;
}

/** What stands in the list, one after the other: headings and conversations. A search opens every folder. */
function flat(conversations, closed, searching) {
  return grouped(conversations, Date.now()).flatMap((group) => {
    const shut = !searching && group.kind === "folder" && closed.includes(group.name);
    const heading = { key: `${group.kind} ${group.name}`, group, shut, n: group.items.length, height: HEADING };
    return [heading, ...(shut ? [] : group.items.map((one) => ({ key: one.id, one, height: ROW })))];
  });
}

function Rows({ state, words }) {
  const list = useRef(null);
  const [view, setView] = useState({ top: 0, height: 900 });
  const { conversations, texts, settings, current, running } = state;
  const items = useMemo(
    () => flat(found(conversations, words, texts), settings.closed, Boolean(words)),
    [conversations, words, texts, settings.closed],
  );
  const look = () => setView({ top: list.current.scrollTop, height: list.current.clientHeight });
  useEffect(() => {
    look();
    const watcher = new ResizeObserver(look);
    watcher.observe(list.current);
    return () => watcher.disconnect();
  }, []);
  const seen = inWindow(items.map((item) => item.height), view.top, view.height, MARGIN);
  const nothing = words ? t("sidebar.nothing") : t("sidebar.empty");
  return html`<ul
    class="rows"
    ref=${list}
    onScroll=${look}
    style=${{ "--before": `${seen.before}px`, "--after": `${seen.after}px` }}
  >
    ${items
      .slice(seen.first, seen.last)
      .map((item) =>
        item.one
          ? html`<${Row}
              key=${item.key}
              conversation=${item.one}
              current=${item.one.id === current}
              running=${item.one.id in running}
              words=${words}
              texts=${texts}
            />`
          : html`<${Heading} key=${item.key} group=${item.group} shut=${item.shut} n=${item.n} />`,
      )}
    ${items.length ? null : html`<li class="none">${nothing}</li>`}
  </ul>`;
}

export function Sidebar({ state }) {
  const file = useRef(null);
  const words = state.search.trim().toLowerCase();
  const none = !Object.values(state.conversations).some(isListed);
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
    <${Rows} state=${state} words=${words} />
    <div class="files">
      <button type="button" onClick=${() => file.current.click()}><${Icon} name="upload" /> ${t("sidebar.import")}</button>
      <button type="button" disabled=${none} onClick=${() => actions.openDialog("export")}>
        <${Icon} name="download" /> ${t("sidebar.export")}
      </button>
      <input
        ref=${file}
        id="import"
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

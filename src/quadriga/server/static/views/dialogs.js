// Settings, the sheet of keys, and what is done with a conversation, as <dialog>s: the browser keeps the focus inside and closes them on Escape.

import * as actions from "../actions.js";
import { connect } from "../connection.js";
import { LOCALES, t } from "../i18n.js";
import { html, useEffect, useRef } from "../vendor/htm-preact.mjs";
import { Icon, IconButton } from "./icons.js";

function Dialog({ title, children }) {
  const dialog = useRef(null);
  const close = () => actions.openDialog(null);
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  const outside = (event) => event.target === dialog.current && close();
  return html`<dialog ref=${dialog} aria-label=${title} onClose=${close} onClick=${outside}>
    <div class="sheet">
      <header>
        <h2>${title}</h2>
        <${IconButton} icon="close" label=${t("button.close")} onClick=${close} />
      </header>
      ${children}
    </div>
  </dialog>`;
}

/** A number or nothing. What is outside the range is shown as such and not taken. */
function NumberField({ name, label, help, value, empty, ...range }) {
  const changed = (event) => {
    const { value: text, validity } = event.target;
    if (!validity.valid || (text === "" && !empty)) return;
    actions.setSampling({ [name]: text === "" ? null : Number(text) });
  };
  return html`<label class="field" title=${help}>
    <span>${label}</span>
    <input type="number" name=${name} value=${value ?? ""} placeholder=${empty ?? ""} onInput=${changed} ...${range} />
    <small>${help}</small>
  </label>`;
}

function Choice({ label, value, options, onChange }) {
  return html`<label class="field">
    <span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([name, text]) => html`<option value=${name} selected=${name === value}>${text}</option>`)}
    </select>
  </label>`;
}

function Sampling({ sampling }) {
  return html`<fieldset class="numbers">
    <legend>${t("settings.sampling")}</legend>
    <${NumberField} name="temperature" label=${t("settings.temperature")} help=${t("settings.temperature.help")}
      value=${sampling.temperature} min="0" max="2" step="0.05" />
    <${NumberField} name="top_p" label="top-p" help=${t("settings.top_p.help")} value=${sampling.top_p}
      min="0.01" max="1" step="0.01" />
    <${NumberField} name="top_k" label="top-k" help=${t("settings.top_k.help")} value=${sampling.top_k}
      min="0" max="1000" step="1" />
    <${NumberField} name="min_p" label="min-p" help=${t("settings.min_p.help")} value=${sampling.min_p}
      min="0" max="1" step="0.01" />
    <${NumberField} name="repetition_penalty" label=${t("settings.repetition")} help=${t("settings.repetition.help")}
      value=${sampling.repetition_penalty} min="0.5" max="2" step="0.05" />
    <${NumberField} name="max_tokens" label=${t("settings.max_tokens")} help=${t("settings.max_tokens.help")}
      value=${sampling.max_tokens} empty=${t("settings.nolimit")} min="1" max="1000000" step="1" />
    <${NumberField} name="seed" label=${t("settings.seed")} help=${t("settings.seed.help")} value=${sampling.seed}
      empty=${t("settings.random")} min="0" max="9007199254740991" step="1" />
  </fieldset>`;
}

export function Settings({ state }) {
  const { settings, conversations, current } = state;
  const { system } = conversations[current];
  return html`<${Dialog} title=${t("settings.title")}>
    <label class="field wide">
      <span>${t("settings.system")}</span>
      <textarea
        rows="3"
        name="system"
        placeholder=${t("settings.system.empty")}
        value=${system}
        onInput=${(event) => actions.setSystemPrompt(event.target.value)}
      />
    </label>
    <label class="check">
      <input
        type="checkbox"
        checked=${settings.system === system && system !== ""}
        disabled=${system === "" && settings.system === ""}
        onChange=${(event) => actions.setSettings({ system: event.target.checked ? system : "" })}
      />
      ${t("settings.system.default")}
    </label>
    <${Sampling} sampling=${settings.sampling} />
    <fieldset>
      <legend>${t("settings.page")}</legend>
      <${Choice}
        label=${t("settings.language")}
        value=${settings.locale}
        options=${[["", t("settings.language.system")], ...Object.entries(LOCALES)]}
        onChange=${(locale) => actions.setSettings({ locale })}
      />
      <${Choice}
        label=${t("settings.theme")}
        value=${settings.theme}
        options=${[
          ["system", t("theme.system")],
          ["light", t("theme.light")],
          ["dark", t("theme.dark")],
        ]}
        onChange=${(theme) => actions.setSettings({ theme })}
      />
      <label class="field">
        <span>${t("settings.key")}</span>
        <input
          type="password"
          name="key"
          autocomplete="off"
          value=${settings.apiKey}
          onChange=${(event) => {
            actions.setSettings({ apiKey: event.target.value.trim() });
            connect();
          }}
        />
        <small>${t("settings.key.help")}</small>
      </label>
    </fieldset>
  <//>`;
}

/** Save these conversations as a file of one of three formats. */
function Formats({ ids, name }) {
  const formats = [
    ["own", t("export.own"), t("export.own.help")],
    ["markdown", t("export.markdown"), t("export.markdown.help")],
    ["openai", t("export.openai"), t("export.openai.help")],
  ];
  return html`<div class="formats">
    ${formats.map(
      ([format, label, help]) => html`<button type="button" data-format=${format} onClick=${() => actions.exportConversations(ids, name, format)}>
        <b>${label}</b> <small>${help}</small>
      </button>`,
    )}
  </div>`;
}

export function ExportAll() {
  const ids = actions.listedIds();
  return html`<${Dialog} title=${t("export.title", { n: ids.length })}>
    <${Formats} ids=${ids} name="quadriga-conversations" />
  <//>`;
}

/** A title as a file may be called. */
function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "conversation";
}

/** One conversation: its title, its place, and its files. */
export function OneConversation({ state }) {
  const { conversation: id } = state.dialog;
  const one = state.conversations[id];
  if (!one) return null;
  const folders = [...new Set(Object.values(state.conversations).map((other) => other.folder).filter(Boolean))].sort();
  const remove = () => {
    actions.openDialog(null);
    actions.removeConversation(id);
  };
  return html`<${Dialog} title=${one.title}>
    <label class="field">
      <span>${t("folder.title")}</span>
      <input name="title" maxlength="200" value=${one.title} onChange=${(event) => actions.renameConversation(id, event.target.value)} />
    </label>
    <label class="check">
      <input type="checkbox" name="pinned" checked=${Boolean(one.pinned)} onChange=${() => actions.pinConversation(id)} />
      ${t("folder.pinned")}
    </label>
    <label class="field">
      <span>${t("folder.label")}</span>
      <input
        name="folder"
        list="folders"
        maxlength="60"
        value=${one.folder ?? ""}
        placeholder=${t("folder.none")}
        onChange=${(event) => actions.moveConversation(id, event.target.value)}
      />
      <small>${t("folder.help")}</small>
    </label>
    <datalist id="folders">${folders.map((name) => html`<option value=${name} />`)}</datalist>
    <fieldset>
      <legend>${t("export.one")}</legend>
      <${Formats} ids=${[id]} name=${fileName(one.title)} />
    </fieldset>
    <button type="button" class="danger" onClick=${remove}><${Icon} name="trash" /> ${t("folder.delete")}</button>
  <//>`;
}

export function Help() {
  const keys = [
    ["Enter", t("keys.send")],
    ["Shift Enter", t("keys.line")],
    ["↑", t("keys.edit")],
    ["Esc", t("keys.stop")],
    ["Alt R", t("keys.again")],
    ["Alt ,", t("keys.previous")],
    ["Alt .", t("keys.next")],
    ["Alt N", t("keys.new")],
    ["Ctrl K", t("keys.search")],
    ["Alt L", t("keys.lens")],
    ["Alt M", t("keys.map")],
    ["Alt A", t("keys.atlas")],
    ["← →", t("keys.walk")],
    ["Alt S", t("keys.settings")],
    ["?", t("keys.help")],
  ];
  return html`<${Dialog} title=${t("help.title")}>
    <dl class="keys-list">
      ${keys.map(([combination, what]) => {
        const caps = combination.split(" ").map((one) => html`<kbd>${one}</kbd>`);
        return html`<div><dt>${caps}</dt><dd>${what}</dd></div>`;
      })}
    </dl>
    <p class="note">${t("help.more")}</p>
  <//>`;
}

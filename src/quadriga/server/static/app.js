// The chat page: one store (state.js), changed by the modules below, drawn by views/.
//
//     index.html ─ boot.js (theme) ─ app.js ─┬─ actions.js, answers.js ─ conversations.js, connection.js, experts.js
//                                            │      └─ api.js, storage.js, transfer.js, attach.js, tree.js, trace.js
//                                            └─ views/ ─ markdown.js, palette.js, balance.js, groups.js, i18n.js
//
// No build step: these files are what the browser runs. Libraries lie under vendor/, with their licences and hashes.

import * as actions from "./actions.js";
import * as answers from "./answers.js";
import { currentConversation } from "./conversations.js";
import { compact, loadStrings, t } from "./i18n.js";
import { app, hover, useStore } from "./state.js";
import { path, siblings } from "./tree.js";
import { html, render, useEffect } from "./vendor/htm-preact.mjs";
import { Atlas } from "./views/atlas.js";
import { Chat } from "./views/chat.js";
import { isComposing } from "./views/composer.js";
import { ExportAll, Help, OneConversation, Settings } from "./views/dialogs.js";
import { ExpertsPanel } from "./views/experts.js";
import { IconButton } from "./views/icons.js";
import { LensCard } from "./views/lens.js";
import { Sidebar } from "./views/sidebar.js";

/** The model that is asked; where several are served, a choice among them. */
function ModelName({ model, models }) {
  if (!model) return html`<span class="model" />`;
  const facts = model.quadriga;
  const size = facts.n_experts
    ? t("header.moe", { n: compact(facts.n_parameters), active: compact(facts.n_active_parameters) })
    : t("header.dense", { n: compact(facts.n_parameters) });
  const shownName = ({ id, quadriga }) => (quadriga.loaded === false ? t("header.unloaded", { name: id }) : id);
  const options = models.map((one) => html`<option value=${one.id} selected=${one.id === model.id}>${shownName(one)}</option>`);
  const name =
    models.length > 1
      ? html`<select aria-label=${t("header.model")} value=${model.id} onChange=${(event) => actions.chooseModel(event.target.value)}>
          ${options}
        </select>`
      : html`<b>${model.id}</b>`;
  return html`<span class="model">${name}<small>${size}</small></span>`;
}

function Header({ state }) {
  const { settings } = state;
  const icons = { system: "system", light: "sun", dark: "moon" };
  const names = { system: t("theme.system"), light: t("theme.light"), dark: t("theme.dark") };
  return html`<header class="top">
    <${IconButton} icon="menu" label=${t("sidebar.label")} class="icon-button menu" onClick=${() => actions.setSidebar(true)} />
    <${ModelName} model=${state.model} models=${state.models} />
    <nav>
      <${IconButton} icon="lens" label=${t("lens.label")} keys="Alt+L" pressed=${settings.lens} onClick=${actions.toggleLens} />
      <${IconButton} icon="map" label=${t("experts.title")} keys="Alt+M" pressed=${state.experts} onClick=${actions.toggleExperts} />
      <${IconButton} icon="atlas" label=${t("atlas.title")} keys="Alt+A" pressed=${state.atlas} onClick=${actions.toggleAtlas} />
      <${IconButton}
        icon=${icons[settings.theme]}
        label=${t("header.theme", { name: names[settings.theme] })}
        class="icon-button theme"
        onClick=${actions.nextTheme}
      />
      <${IconButton} icon="help" label=${t("help.title")} keys="?" class="icon-button help" onClick=${() => actions.openDialog("help")} />
      <${IconButton} icon="settings" label=${t("settings.title")} keys="Alt+S" onClick=${() => actions.openDialog("settings")} />
    </nav>
  </header>`;
}

function Toast({ toast }) {
  if (!toast) return null;
  const undo = () => {
    actions.closeToast();
    toast.undo();
  };
  return html`<div class="toast" role="status">
    <span>${toast.text}</span>
    ${toast.undo ? html`<button type="button" onClick=${undo}>${t("button.undo")}</button>` : null}
  </div>`;
}

/** Show the alternative before or after of the last message that has any. */
function turnBranch(step) {
  const conversation = currentConversation();
  const node = path(conversation).findLast((one) => siblings(conversation, one.id).length > 1);
  const others = node ? siblings(conversation, node.id) : [];
  const to = others[others.indexOf(node?.id) + step];
  if (to) actions.showBranch(to);
}

function regenerateLast() {
  const last = path(currentConversation()).at(-1);
  if (last?.role === "assistant") answers.regenerate(last.id);
}

const WITH_ALT = {
  KeyN: actions.startConversation,
  KeyR: regenerateLast,
  KeyL: actions.toggleLens,
  KeyM: actions.toggleExperts,
  KeyA: actions.toggleAtlas,
  KeyS: () => actions.openDialog("settings"),
  Comma: () => turnBranch(-1),
  Period: () => turnBranch(1),
};

function escape() {
  const state = app.get();
  if (hover.get().pinned) actions.forgetToken();
  else if (state.sidebar) actions.setSidebar(false);
  else if (state.atlas) actions.toggleAtlas();
  else actions.stop();
}

function keyDown(event) {
  if (isComposing(event) || event.defaultPrevented || app.get().dialog) return;
  const typing = event.target.closest?.("input, textarea, select");
  let action = null;
  if (event.altKey && !event.ctrlKey && !event.metaKey) action = WITH_ALT[event.code];
  else if ((event.ctrlKey || event.metaKey) && event.code === "KeyK") {
    action = () => {
      actions.setSidebar(true);
      requestAnimationFrame(() => document.getElementById("search").focus());
    };
  } else if (event.key === "Escape" && event.target.id !== "search") action = escape;
  else if (event.key === "?" && !typing) action = () => actions.openDialog("help");
  if (!action) return;
  event.preventDefault();
  action();
}

function App() {
  const state = useStore(app);
  useEffect(() => {
    document.addEventListener("keydown", keyDown);
    return () => document.removeEventListener("keydown", keyDown);
  }, []);
  const conversation = state.conversations[state.current];
  if (!conversation) return null;
  document.title = conversation.title ? `${conversation.title} · Quadriga` : "Quadriga";
  // A new language is a new tree: every word is drawn again.
  return html`<div class="page" key=${document.documentElement.lang} data-experts=${String(state.experts)}>
    <${Sidebar} state=${state} />
    ${state.sidebar ? html`<div class="shade" onClick=${() => actions.setSidebar(false)} />` : null}
    <div class="middle">
      <${Header} state=${state} />
      ${state.atlas ? html`<${Atlas} state=${state} />` : html`<${Chat} state=${state} conversation=${conversation} />`}
    </div>
    ${state.experts ? html`<${ExpertsPanel} state=${state} />` : null}
    <${LensCard} />
    ${state.dialog === "settings" ? html`<${Settings} state=${state} />` : null}
    ${state.dialog === "help" ? html`<${Help} />` : null}
    ${state.dialog === "export" ? html`<${ExportAll} />` : null}
    ${state.dialog?.conversation ? html`<${OneConversation} state=${state} />` : null}
    <${Toast} toast=${state.toast} />
  </div>`;
}

await loadStrings();
await actions.begin();
render(html`<${App} />`, document.getElementById("app"));

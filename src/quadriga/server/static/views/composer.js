// Where people write. Enter sends, Shift+Enter breaks the line; an Enter that picks a word of an input method does neither.

import * as actions from "../actions.js";
import * as answers from "../answers.js";
import { t } from "../i18n.js";
import { path } from "../tree.js";
import { html, useEffect, useLayoutEffect, useRef } from "../vendor/htm-preact.mjs";
import { IconButton } from "./icons.js";

/** True for a key that belongs to an input method; Safari reports 229 and isComposing false for its last Enter. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** As high as its text, up to what CSS allows. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

export function Composer({ state, conversation }) {
  const area = useRef(null);
  const draft = state.drafts[conversation.id] ?? "";
  const running = conversation.id in state.running;
  const plain = state.model && !state.model.quadriga.chat;

  useLayoutEffect(() => fit(area.current), [draft, conversation.id]);
  useEffect(() => {
    if (matchMedia("(pointer: fine)").matches) area.current.focus();
  }, [conversation.id]);

  // The page is drawn once a frame: between two, what was typed is in the area, and the conversation in the store.
  const typed = () => actions.setDraft(actions.currentConversation().id, area.current.value);
  const send = () => answers.send(area.current.value);

  const keyDown = (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    }
    if (event.key === "ArrowUp" && !area.current.value) {
      const last = path(conversation).findLast((node) => node.role === "user");
      if (last && !running) {
        event.preventDefault();
        actions.startEditing(last.id);
      }
    }
  };

  return html`<form
    class="composer"
    onSubmit=${(event) => {
      event.preventDefault();
      send();
    }}
  >
    <div class="box">
      <textarea
        id="composer"
        ref=${area}
        rows="1"
        placeholder=${plain ? t("composer.continue") : t("composer.placeholder")}
        aria-label=${t("composer.placeholder")}
        value=${draft}
        onInput=${typed}
        onKeyDown=${keyDown}
      />
      ${running
        ? html`<${IconButton} icon="stop" label=${t("composer.stop")} keys="Esc" class="icon-button go" onClick=${() => actions.stop()} />`
        : html`<${IconButton}
            icon="send"
            label=${t("composer.send")}
            keys="Enter"
            class="icon-button go"
            disabled=${!draft.trim() || !state.model}
            onClick=${send}
          />`}
    </div>
  </form>`;
}

// Where people write. Enter sends, Shift+Enter breaks the line; an Enter that picks a word of an input method does neither.

import * as actions from "../actions.js";
import * as answers from "../answers.js";
import { currentConversation } from "../conversations.js";
import { t } from "../i18n.js";
import { path } from "../tree.js";
import { html, useEffect, useLayoutEffect, useRef } from "../vendor/htm-preact.mjs";
import { Attached, isLong } from "./files.js";
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
  const file = useRef(null);
  const attached = state.attached[conversation.id] ?? [];
  const draft = state.drafts[conversation.id] ?? "";
  const running = conversation.id in state.running;
  const plain = state.model && !state.model.quadriga.chat;

  useLayoutEffect(() => fit(area.current), [draft, conversation.id]);
  useEffect(() => {
    if (matchMedia("(pointer: fine)").matches) area.current.focus();
  }, [conversation.id]);

  // The page is drawn once a frame: between two, what was typed is in the area, and the conversation in the store.
  const typed = () => actions.setDraft(currentConversation().id, area.current.value);
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

  const paste = (event) => {
    const { files } = event.clipboardData;
    const text = event.clipboardData.getData("text/plain");
    if (!files.length && !isLong(text)) return;
    event.preventDefault();
    if (files.length) actions.attach([...files]);
    else actions.attachPasted(text.replace(/\r\n?/g, "\n"));
  };

  return html`<form
    class="composer"
    onSubmit=${(event) => {
      event.preventDefault();
      send();
    }}
  >
    <${Attached} id=${conversation.id} files=${attached} />
    <div class="box">
      <${IconButton} icon="clip" label=${t("composer.attach")} onClick=${() => file.current.click()} />
      <input
        ref=${file}
        id="attach"
        type="file"
        multiple
        hidden
        onChange=${(event) => {
          actions.attach([...event.target.files]);
          event.target.value = "";
        }}
      />
      <textarea
        id="composer"
        ref=${area}
        rows="1"
        placeholder=${plain ? t("composer.continue") : t("composer.placeholder")}
        aria-label=${t("composer.placeholder")}
        value=${draft}
        onInput=${typed}
        onKeyDown=${keyDown}
        onPaste=${paste}
      />
      ${running
        ? html`<${IconButton} icon="stop" label=${t("composer.stop")} keys="Esc" class="icon-button go" onClick=${() => actions.stop()} />`
        : html`<${IconButton}
            icon="send"
            label=${t("composer.send")}
            keys="Enter"
            class="icon-button go"
            disabled=${(!draft.trim() && !attached.length) || !state.model}
            onClick=${send}
          />`}
    </div>
  </form>`;
}

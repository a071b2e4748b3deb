// Texts that go with a message: files, and what is too long to be shown as a whole.

import * as actions from "../actions.js";
import { number, t } from "../i18n.js";
import { html, useState } from "../vendor/htm-preact.mjs";
import { Icon, IconButton } from "./icons.js";

const LONG_CHARACTERS = 2400;
const LONG_LINES = 40;

const lines = (text) => text.split("\n").length;

/** True for a text that is folded when it is shown, and becomes a file when it is pasted. */
export function isLong(text) {
  return text.length > LONG_CHARACTERS || lines(text) > LONG_LINES;
}

function size(text) {
  return t("file.size", { lines: number(lines(text)), n: number(text.length) });
}

/** A file of a message, folded. */
export function FileFold({ file }) {
  return html`<details class="file">
    <summary><${Icon} name="file" /> <b>${file.name}</b> <small>${size(file.text)}</small></summary>
    <pre tabindex="0" aria-label=${file.name}>${file.text}</pre>
  </details>`;
}

/** A long message: its beginning, and the rest when it is asked for. */
export function LongText({ text }) {
  const [open, setOpen] = useState(false);
  const start = text.split("\n").slice(0, 12).join("\n").slice(0, 700);
  return html`<div class="said">
    ${open ? text : `${start} …`}
    <button type="button" class="more" aria-expanded=${String(open)} onClick=${() => setOpen(!open)}>
      ${open ? t("file.less") : t("file.more", { size: size(text) })}
    </button>
  </div>`;
}

/** The files that go with the next message. */
export function Attached({ id, files }) {
  if (!files.length) return null;
  return html`<ul class="attached" aria-label=${t("file.attached")}>
    ${files.map(
      (file, i) => html`<li>
        <${Icon} name="file" />
        <span class="name" title=${file.name}>${file.name}</span> <small>${size(file.text)}</small>
        <${IconButton} icon="close" label=${t("file.remove", { name: file.name })} onClick=${() => actions.detach(id, i)} />
      </li>`,
    )}
  </ul>`;
}

// Markdown on the page, block by block: what has not changed is not made again, nor laid out where nobody sees it.

import * as actions from "../actions.js";
import { t } from "../i18n.js";
import { blockHtml, toBlocks, typeset } from "../markdown.js";
import { Component, html } from "../vendor/htm-preact.mjs";

const LONG = 40; // blocks from which on those out of sight are left to the browser to skip

async function copyCode(event) {
  const button = event.target.closest("button.copy");
  const code = button?.closest(".code")?.querySelector("code");
  if (!code || !(await actions.copy(code.textContent))) return;
  button.textContent = t("code.copied");
  setTimeout(() => (button.textContent = t("code.copy")), 1500);
}

class Block extends Component {
  place = { current: null };

  shouldComponentUpdate(next) {
    return next.text !== this.props.text;
  }

  componentDidMount() {
    typeset(this.place.current);
  }

  componentDidUpdate() {
    typeset(this.place.current);
  }

  render({ token }) {
    return html`<div class="block" ref=${this.place} dangerouslySetInnerHTML=${{ __html: blockHtml(token) }} />`;
  }
}

/** A Markdown text; it is read again only when it changes. */
export class Prose extends Component {
  shouldComponentUpdate(next) {
    return next.text !== this.props.text;
  }

  render({ text }) {
    const blocks = toBlocks(text);
    return html`<div class=${blocks.length > LONG ? "prose long" : "prose"} onClick=${copyCode}>
      ${blocks.map(({ key, token }, i) => html`<${Block} key=${i} text=${key} token=${token} />`)}
    </div>`;
  }
}

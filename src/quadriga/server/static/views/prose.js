// Markdown on the page, block by block: what has not changed is not made again. Of a long answer, what is far from sight stays
// the text it is until somebody comes near, and is not laid out.

import * as actions from "../actions.js";
import { t } from "../i18n.js";
import { blockHtml, read, typeset } from "../markdown.js";
import { Component, html } from "../vendor/htm-preact.mjs";

const LONG = 40; // blocks from which on
const END = 30; // blocks that are made at once: an answer is first seen at its end
const NEAR = "1200px 0px";

async function copyCode(event) {
  const button = event.target.closest("button.copy");
  const code = button?.closest(".code")?.querySelector("code");
  if (!code || !(await actions.copy(code.textContent))) return;
  button.textContent = t("code.copied");
  setTimeout(() => (button.textContent = t("code.copy")), 1500);
}

const watchers = new WeakMap(); // what scrolls -> its observer
const waiting = new WeakMap(); // a block's element -> what is to be done when it comes near

function whenNear(element, act) {
  const root = element.closest(".scroller");
  if (!watchers.has(root ?? document)) {
    const come = (entries, watcher) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        waiting.get(target)?.();
      }
    };
    watchers.set(root ?? document, new IntersectionObserver(come, { root, rootMargin: NEAR }));
  }
  waiting.set(element, act);
  watchers.get(root ?? document).observe(element);
}

class Block extends Component {
  place = { current: null };
  state = { made: !this.props.far };

  shouldComponentUpdate(next, state) {
    return next.text !== this.props.text || state.made !== this.state.made;
  }

  componentDidMount() {
    if (this.state.made) typeset(this.place.current);
    else whenNear(this.place.current, () => this.setState({ made: true }));
  }

  componentDidUpdate() {
    if (this.state.made) typeset(this.place.current);
  }

  render({ token }, { made }) {
    if (!made) return html`<div class="block far" ref=${this.place}>${token.raw}</div>`;
    return html`<div class="block" key="made" ref=${this.place} dangerouslySetInnerHTML=${{ __html: blockHtml(token) }} />`;
  }
}

/** A Markdown text; it is read again only when it changes, and only where it does. */
export class Prose extends Component {
  shouldComponentUpdate(next) {
    return next.text !== this.props.text;
  }

  render({ text }) {
    this.seen = read(text, this.seen);
    const { blocks } = this.seen;
    const far = (i) => blocks.length > LONG && i < blocks.length - END;
    return html`<div class=${blocks.length > LONG ? "prose long" : "prose"} onClick=${copyCode}>
      ${blocks.map(({ key, token }, i) => html`<${Block} key=${i} text=${key} token=${token} far=${far(i)} />`)}
    </div>`;
  }
}

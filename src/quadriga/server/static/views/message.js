// One message: what was said, its alternatives, what can be done with it, and what it cost.

import * as actions from "../actions.js";
import * as answers from "../answers.js";
import { compact, number, t } from "../i18n.js";
import { app } from "../state.js";
import { Component, html, useLayoutEffect, useRef, useState } from "../vendor/htm-preact.mjs";
import { fit, isComposing } from "./composer.js";
import { FileFold, isLong, LongText } from "./files.js";
import { Icon, IconButton } from "./icons.js";
import { LensText } from "./lens.js";
import { Prose } from "./prose.js";

/** < 2 / 3 >: the alternatives of a message. */
function Branches({ siblings, id }) {
  if (siblings.length < 2) return null;
  const at = siblings.indexOf(id);
  const go = (step) => () => actions.showBranch(siblings[at + step]);
  return html`<span class="branches">
    <${IconButton} icon="left" label=${t("branch.previous")} disabled=${at === 0} onClick=${go(-1)} />
    <span aria-label=${t("branch.position", { i: at + 1, n: siblings.length })}>${at + 1} / ${siblings.length}</span>
    <${IconButton} icon="right" label=${t("branch.next")} disabled=${at === siblings.length - 1} onClick=${go(1)} />
  </span>`;
}

function CopyButton({ text }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    if (!(await actions.copy(text))) return;
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<${IconButton} icon=${copied ? "check" : "copy"} label=${t("message.copy")} onClick=${copy} />`;
}

function Editor({ node }) {
  const area = useRef(null);
  const [text, setText] = useState(node.content);
  useLayoutEffect(() => fit(area.current), [text]);
  useLayoutEffect(() => {
    area.current.focus();
    area.current.setSelectionRange(text.length, text.length);
  }, []);
  const cancel = () => actions.startEditing(null);
  const send = () => answers.edit(node.id, area.current.value);
  const keyDown = (event) => {
    if (isComposing(event)) return;
    // An answer has many lines: Enter breaks one, Ctrl+Enter takes it.
    if (event.key === "Enter" && (node.role === "user" ? !event.shiftKey : event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    }
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  };
  return html`<div class="editor">
    <textarea
      ref=${area}
      rows="1"
      value=${text}
      aria-label=${t("message.edit")}
      onInput=${(event) => setText(event.target.value)}
      onKeyDown=${keyDown}
    />
    <div class="editor-actions">
      <span class="hint">${t("message.edit.hint")}</span>
      <button type="button" onClick=${cancel}>${t("button.cancel")}</button>
      <button type="button" class="primary" onClick=${send}>
        ${node.role === "user" ? t("composer.send") : t("message.save")}
      </button>
    </div>
  </div>`;
}

/** Tokens, tokens a second, seconds to the first, and how full the context is. */
function Cost({ node, running }) {
  const { stats, finish } = node;
  if (!stats) return finish === "edited" ? html`<span class="cost"><span class="ending">${t("finish.edited")}</span></span>` : null;
  const endings = {
    length: t("finish.length"),
    stopped: t("finish.stopped"),
    broken: t("finish.broken"),
    edited: t("finish.edited"),
  };
  return html`<span class="cost">
    ${stats.rate ? html`<span>${t("cost.rate", { n: number(stats.rate, 1) })}</span>` : null}
    <span>${t("cost.tokens", { n: number(stats.tokens) })}</span>
    ${running ? null : html`<span class="first">${t("cost.first", { n: number(stats.firstMs / 1000, 2) })}</span>`}
    ${stats.total
      ? html`<span class="gauge" title=${t("cost.context.of", { n: number(stats.total), of: number(stats.context) })}>
          <meter min="0" max=${stats.context} high=${0.85 * stats.context} value=${stats.total}></meter>
          ${t("cost.context", { percent: number((100 * stats.total) / stats.context, 1), of: compact(stats.context) })}
        </span>`
      : null}
    ${!running && endings[finish] ? html`<span class="ending">${endings[finish]}</span>` : null}
  </span>`;
}

/** What a model thought before it answered, folded away. */
function Thought({ text, stats, thinking }) {
  const seconds = number((stats?.thoughtMs ?? 0) / 1000, 1);
  return html`<details class="thought">
    <summary>
      ${thinking ? html`<i class="pulse" />` : html`<${Icon} name="fold" />`}
      ${thinking ? t("thought.now") : stats?.thoughtMs ? t("thought.seconds", { n: seconds }) : t("thought.done")}
    </summary>
    <${Prose} text=${text} />
  </details>`;
}

/** Experts that were switched off or boosted for an answer. */
function Steered({ steering }) {
  const said = steering.map(({ layer, expert, factor }) =>
    factor === 0 ? t("steer.off", { layer, expert }) : t("steer.times", { layer, expert, factor: number(factor, factor < 1 ? 2 : 0) }),
  );
  return html`<p class="note steered"><${Icon} name="dial" /> ${said.join(" · ")}</p>`;
}

function Answer({ node, running, lensOn, hasExperts }) {
  const waiting = running && !node.content && !node.reasoning && !node.trace?.n_tokens;
  if (waiting) {
    const asked = app.get().models.find(({ id }) => id === node.model);
    const loading = asked?.quadriga.loaded === false ? t("message.loading", { name: node.model }) : null;
    return html`<div class="waiting" role="status" aria-label=${loading ?? t("message.waiting")}><i /><i /><i /> ${loading}</div>`;
  }
  const traced = lensOn && hasExperts && node.trace?.n_tokens;
  return html`
    ${node.steering?.length ? html`<${Steered} steering=${node.steering} />` : null}
    ${node.reasoning ? html`<${Thought} text=${node.reasoning} stats=${node.stats} thinking=${running && !node.content} />` : null}
    ${traced ? html`<${LensText} node=${node} />` : html`<${Prose} text=${node.content} />`}
    ${lensOn && hasExperts && !traced ? html`<p class="note">${t("lens.notrace")}</p>` : null}
  `;
}

/** Redrawn only when one of its properties changes: a long conversation costs nothing while its last answer grows. */
export class Message extends Component {
  shouldComponentUpdate(next) {
    const names = new Set([...Object.keys(next), ...Object.keys(this.props)]);
    names.delete("siblings");
    const moved = next.siblings.join() !== this.props.siblings.join();
    return moved || [...names].some((name) => next[name] !== this.props[name]);
  }

  render(props) {
    return props.node.role === "user" ? question(props) : given(props);
  }
}

function EditButton({ node, busy }) {
  return html`<${IconButton}
    icon="edit"
    label=${t("message.edit")}
    disabled=${busy}
    onClick=${() => actions.startEditing(node.id)}
  />`;
}

function question({ node, siblings, busy, editing }) {
  const files = node.files ?? [];
  if (editing) return html`<article class="message user" data-id=${node.id}><${Editor} node=${node} /></article>`;
  return html`<article class="message user" data-id=${node.id}>
    ${files.map((file) => html`<${FileFold} file=${file} />`)}
    ${isLong(node.content)
      ? html`<${LongText} text=${node.content} />`
      : node.content
        ? html`<div class="said">${node.content}</div>`
        : null}
    <footer>
      <${Branches} siblings=${siblings} id=${node.id} />
      <span class="doing">
        <${CopyButton} text=${node.content} />
        <${EditButton} node=${node} busy=${busy} />
      </span>
    </footer>
  </article>`;
}

function given({ node, siblings, running, busy, editing, lensOn, hasExperts, last }) {
  if (editing) return html`<article class="message assistant" data-id=${node.id}><${Editor} node=${node} /></article>`;
  return html`<article class="message assistant" data-id=${node.id} data-last=${String(last)} aria-busy=${String(running)}>
    <${Answer} node=${node} running=${running} lensOn=${lensOn} hasExperts=${hasExperts} />
    <footer>
      <${Branches} siblings=${siblings} id=${node.id} />
      ${running
        ? null
        : html`<span class="doing">
            <${CopyButton} text=${node.content} />
            <${IconButton}
              icon="again"
              label=${t("message.again")}
              keys="Alt+R"
              disabled=${busy}
              onClick=${() => answers.regenerate(node.id)}
            />
            <${EditButton} node=${node} busy=${busy} />
            ${last && answers.canGoOn(node)
              ? html`<${IconButton} icon="forward" label=${t("message.goon")} disabled=${busy} onClick=${() => answers.goOn(node.id)} />`
              : null}
          </span>`}
      <${Cost} node=${node} running=${running} />
    </footer>
  </article>`;
}

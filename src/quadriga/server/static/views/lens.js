// The lens: an answer as its tokens, each coloured by the experts that predicted it.
//
//     by expert    the heaviest expert of one layer
//     by entropy   how unsure the router was, in one layer or on average
//     one expert   the weight of one expert of one layer: what does it work on?
//
// Pointing at a token opens a card: layers down, experts across, weights as shades. A click or a tap holds it; the arrow
// keys walk along the text.

import * as actions from "../actions.js";
import { known, labelOf, visible } from "../experts.js";
import { number, t } from "../i18n.js";
import { expertColour, heat, prepare, themed } from "../palette.js";
import { app, hover, lens, useStore } from "../state.js";
import { chosen, entropyOf, weightOf } from "../trace.js";
import { Component, html, useEffect, useLayoutEffect, useRef } from "../vendor/htm-preact.mjs";
import { IconButton } from "./icons.js";
import { SteerButtons } from "./steer.js";

/** The background of a token under a way of colouring. */
export function tokenColour(trace, token, { mode, layer, expert }) {
  if (mode === "entropy") return heat(entropyOf(trace, token, layer));
  const at = Math.min(Math.max(0, layer), trace.n_layers - 1);
  if (mode === "one") return heat(weightOf(trace, token, at, expert));
  const [first] = chosen(trace, token, at);
  return expertColour(first.expert, first.weight);
}

/** What the lens colours by: a row of controls above the conversation. */
export function LensBar({ model, labels }) {
  const view = useStore(lens);
  const facts = model?.quadriga;
  if (!facts) return null;
  if (!facts.n_experts) {
    return html`<div class="lens-strip"><p class="dense">${t("experts.dense", { model: model.id })}</p></div>`;
  }
  const modes = [
    ["expert", t("lens.mode.expert")],
    ["entropy", t("lens.mode.entropy")],
    ["one", t("lens.mode.one")],
  ];
  const low = view.mode === "entropy" ? -1 : 0;
  const layer = Math.max(low, Math.min(view.layer, facts.n_layers - 1));
  const options = Array.from({ length: facts.n_experts }, (_, i) => {
    const label = labelOf(known(labels, layer, i), 3);
    return html`<option value=${i}>${t("lens.expert", { i })}${label ? ` · ${label}` : ""}</option>`;
  });
  return html`<div class="lens-strip"><div class="lens-bar" role="toolbar" aria-label=${t("lens.label")}>
    <div class="segments" role="radiogroup" aria-label=${t("lens.colour")}>
      ${modes.map(
        ([mode, label]) =>
          html`<button
            type="button"
            role="radio"
            aria-checked=${String(view.mode === mode)}
            data-mode=${mode}
            onClick=${() => lens.set({ mode, layer: mode === "entropy" ? -1 : Math.max(0, view.layer) })}
          >
            ${label}
          </button>`,
      )}
    </div>
    <label class="layer">
      <span>${layer < 0 ? t("lens.layer.all") : t("lens.layer", { i: layer })}</span>
      <input
        type="range"
        min=${low}
        max=${facts.n_layers - 1}
        value=${layer}
        aria-label=${t("lens.layer.choose")}
        onInput=${(event) => lens.set({ layer: Number(event.target.value) })}
      />
    </label>
    ${view.mode === "one"
      ? html`<select
          aria-label=${t("lens.expert.choose")}
          value=${view.expert}
          onChange=${(event) => lens.set({ expert: Number(event.target.value) })}
        >
          ${options}
        </select>`
      : null}
    <${Legend} mode=${view.mode} n_experts=${facts.n_experts} />
  </div></div>`;
}

/** Colours and what they mean. Set through the style object: the page's CSP allows no style attributes. */
function Legend({ mode, n_experts }) {
  if (mode !== "expert") {
    const steps = [0.05, 0.25, 0.5, 0.75, 1];
    return html`<span class="legend" aria-hidden="true">
      0 ${steps.map((part) => html`<i class="swatch" style=${{ background: heat(part) }} />`)} 1
    </span>`;
  }
  const experts = Array.from({ length: Math.min(n_experts, 32) }, (_, i) => i);
  return html`<span class="legend" aria-hidden="true">
    ${experts.map((i) => html`<i class="swatch expert" style=${{ background: expertColour(i) }} title=${t("lens.expert", { i })}>${i}</i>`)}
  </span>`;
}

function point(event, node, pinned) {
  const span = event.target.closest("[data-token]");
  if (!span) return;
  if (hover.get().pinned && !pinned) return;
  const { left, bottom, top } = span.getBoundingClientRect();
  const token = Number(span.dataset.token);
  hover.set({ node: node.id, trace: node.trace, token, x: left, y: bottom, top, pinned });
}

function step(event, node) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  const at = hover.get().node === node.id ? hover.get().token : -1;
  const token = Math.max(0, Math.min(node.trace.n_tokens - 1, at + by));
  const span = event.currentTarget.querySelector(`[data-token="${token}"]`);
  point({ target: span }, node, true);
  span.scrollIntoView({ block: "nearest" });
}

/** An answer as coloured tokens. */
export function LensText({ node }) {
  const view = useStore(lens);
  const at = useStore(hover);
  return html`<div
    class="lens-text"
    tabindex="0"
    role="group"
    aria-label=${t("lens.text")}
    onPointerOver=${(event) => event.pointerType === "mouse" && point(event, node, false)}
    onPointerLeave=${() => hover.get().pinned || actions.forgetToken()}
    onClick=${(event) => point(event, node, true)}
    onKeyDown=${(event) => step(event, node)}
  >
    <${Tokens} trace=${node.trace} n=${node.trace.n_tokens} view=${view} theme=${document.documentElement.dataset.theme}
      lit=${at.node === node.id ? at.token : -1} />
  </div>`;
}

class Tokens extends Component {
  shouldComponentUpdate(next) {
    return ["n", "view", "theme", "lit", "trace"].some((name) => next[name] !== this.props[name]);
  }

  render({ trace, view, lit }) {
    return trace.texts.map((text, token) => {
      const shown = text === "" ? "◦" : text;
      return html`<span
        data-token=${token}
        class=${token === lit ? "token lit" : "token"}
        style=${{ background: tokenColour(trace, token, view) }}
        >${shown}</span
      >`;
    });
  }
}

const CARD_WIDTH = 300;

function drawGrid(canvas, trace, token, layer) {
  const cell = Math.max(4, Math.min(18, Math.floor((CARD_WIDTH - 40) / trace.n_experts)));
  const height = Math.max(4, Math.min(14, Math.floor(240 / trace.n_layers)));
  const [width, left] = [cell * trace.n_experts, 26];
  const context = prepare(canvas, left + width + 2, height * trace.n_layers + 2);
  context.font = `10px ${themed("--sans")}`;
  context.textBaseline = "middle";
  for (let row = 0; row < trace.n_layers; row++) {
    const y = 1 + row * height;
    context.fillStyle = themed("--line");
    for (let e = 0; e < trace.n_experts; e++) context.fillRect(left + e * cell + 1, y + 1, cell - 2, height - 2);
    const pairs = chosen(trace, token, row);
    const most = Math.max(...pairs.map(({ weight }) => weight), 1e-3);
    for (const { expert, weight } of pairs) {
      context.fillStyle = expertColour(expert, 0.4 + (0.6 * weight) / most);
      context.fillRect(left + expert * cell + 0.5, y + 0.5, cell - 1, height - 1);
    }
    const labelled = row === layer || row === 0 || row === trace.n_layers - 1;
    if (labelled && (row === layer || Math.abs(row - layer) * height > 10)) {
      context.fillStyle = themed(row === layer ? "--ink" : "--muted");
      context.textAlign = "right";
      context.fillText(String(row), left - 6, y + height / 2);
    }
    if (row === layer) {
      context.strokeStyle = themed("--ink");
      context.lineWidth = 1;
      context.strokeRect(left - 0.5, y - 0.5, width + 1, height + 1);
    }
  }
  return { height, left };
}

/** One expert at work for a token: its weight as the server said it, what it is known for, and its switches. */
function Chosen({ state, layer, expert, weight }) {
  const label = labelOf(known(state.labels, layer, expert), 3);
  return html`<li>
    <button type="button" title=${t("lens.follow")} onClick=${() => actions.followExpert(layer, expert)}>${t("lens.expert", { i: expert })}</button>
    <span class="bar"><i style=${{ width: `${Math.min(100, 100 * weight)}%`, background: expertColour(expert) }} /></span>
    <span class="number">${number(100 * weight, 2)} %</span>
    <${SteerButtons} state=${state} layer=${layer} expert=${expert} />
    ${label ? html`<small class="label">${label}</small>` : null}
  </li>`;
}

/** The card of a token: its experts in every layer, and those of the chosen layer with their weights. */
export function LensCard() {
  const at = useStore(hover);
  const view = useStore(lens);
  const state = useStore(app);
  const [canvas, card, geometry] = [useRef(null), useRef(null), useRef(null)];
  const { trace, token } = at;
  const open = token >= 0 && trace && token < trace.n_tokens;
  const layer = open ? Math.min(Math.max(0, view.layer), trace.n_layers - 1) : 0;

  useEffect(() => {
    if (open) geometry.current = drawGrid(canvas.current, trace, token, layer);
  });
  useLayoutEffect(() => {
    if (!open || matchMedia("(max-width: 640px)").matches) return;
    const { offsetWidth, offsetHeight, style } = card.current;
    style.left = `${Math.max(8, Math.min(at.x - 20, innerWidth - offsetWidth - 8))}px`;
    const below = at.y + 8 + offsetHeight <= innerHeight;
    style.top = `${below ? at.y + 8 : Math.max(8, at.top - 8 - offsetHeight)}px`;
  });
  if (!open) return null;

  const pick = (event) => {
    const row = Math.floor((event.offsetY - 1) / geometry.current.height);
    if (row >= 0 && row < trace.n_layers) lens.set({ layer: row });
  };
  return html`<div class="lens-card" ref=${card} data-pinned=${String(at.pinned)} role="dialog" aria-label=${t("lens.card")}>
    <header>
      <code class="token-name">${visible(trace.texts[token])}</code>
      <span>${t("lens.token", { i: token + 1, id: trace.token_ids[token] })}</span>
      ${at.pinned ? html`<${IconButton} icon="close" label=${t("button.close")} onClick=${actions.forgetToken} />` : null}
    </header>
    <canvas ref=${canvas} role="img" aria-label=${t("lens.grid")} title=${t("lens.grid")} onClick=${pick}></canvas>
    <h3>${t("lens.layer", { i: layer })}</h3>
    <ul>
      ${chosen(trace, token, layer).map(
        ({ expert, weight }) => html`<${Chosen} key=${expert} state=${state} layer=${layer} expert=${expert} weight=${weight} />`,
      )}
    </ul>
    <p>${t("lens.entropy", { here: number(entropyOf(trace, token, layer), 2), mean: number(entropyOf(trace, token, -1), 2) })}</p>
  </div>`;
}

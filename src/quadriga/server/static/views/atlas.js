// The atlas: every expert of the model, what it is chosen for, how much it works; searched, switched off, boosted, exported.

import * as actions from "../actions.js";
import * as balance from "../balance.js";
import { fetchExperts, Problem } from "../api.js";
import { drawChart, picture } from "../atlas_chart.js";
import { domainOf, kindName, known, labelOf, visible } from "../experts.js";
import { number, t } from "../i18n.js";
import { domainColour } from "../palette.js";
import { html, useEffect, useMemo, useRef, useState } from "../vendor/htm-preact.mjs";
import { problemText } from "./chat.js";
import { Icon, IconButton } from "./icons.js";
import { SteerButtons } from "./steer.js";

/** What the server's counters say, asked once when the atlas opens. */
function useCounts(model) {
  const [report, setReport] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    let gone = false;
    fetchExperts(model.id).then(
      (found) => gone || setReport(found),
      (error) => gone || setProblem(error instanceof Problem ? error : new Problem("page", String(error))),
    );
    return () => (gone = true);
  }, [model.id]);
  return [report, problem];
}

/** True if the words looked for are in what is known of an expert. */
function matches(expert, words) {
  if (!expert) return false;
  const texts = [expert.label, kindName(expert.kind), ...expert.tokens.map((token) => token.text), ...expert.domains.map((one) => one.name)];
  return texts.some((text) => text.toLowerCase().includes(words));
}

function Overview({ counts, labels, at, found, onPick }) {
  const canvas = useRef(null);
  const geometry = useRef(null);
  useEffect(() => {
    const draw = () => {
      geometry.current = drawChart(canvas.current, { counts, labels, width: canvas.current.parentElement.clientWidth, at, found });
    };
    draw();
    const watcher = new ResizeObserver(draw);
    watcher.observe(canvas.current.parentElement);
    return () => watcher.disconnect();
  });
  const pick = (event) => {
    const { left, cell, height } = geometry.current;
    const [expert, layer] = [Math.floor((event.offsetX - left) / cell), Math.floor(event.offsetY / height)];
    if (layer >= 0 && layer < counts.length && expert >= 0 && expert < counts[layer].length) onPick({ layer, expert });
  };
  const label = t("atlas.chart", { layers: counts.length, experts: counts[0].length });
  return html`<div class="chart"><canvas ref=${canvas} role="img" aria-label=${label} onClick=${pick}></canvas></div>`;
}

function Tile({ layer, expert, facts, labels, part, at, dim, onPick }) {
  const here = at.layer === layer && at.expert === expert;
  const domain = domainOf(labels, facts?.domain);
  return html`<li>
    <button type="button" class="tile" aria-pressed=${String(here)} data-dim=${String(dim)} onClick=${() => onPick({ layer, expert })}>
      <b><i class="swatch" style=${{ background: domainColour(domain) }} /> ${expert}</b>
      <span>${labelOf(facts, 5) || t("atlas.unlabelled")}</span>
      <i class="meter"><i style=${{ width: `${Math.min(100, 50 * part)}%` }} /></i>
    </button>
  </li>`;
}

function Examples({ examples }) {
  return html`<h4>${t("atlas.examples")}</h4>
    <ul class="examples">
      ${examples.map(
        (one) => html`<li>${one.before}<mark title=${t("atlas.weight", { n: number(100 * one.weight, 1) })}>${visible(one.token)}</mark>${one.after}</li>`,
      )}
    </ul>`;
}

/** All that is known of one expert. */
function Expert({ state, at, counts, labels }) {
  const facts = known(labels, at.layer, at.expert);
  const layer = counts[at.layer];
  const total = balance.sum(layer);
  const load = total ? (layer[at.expert] * layer.length) / total : 0;
  return html`<aside class="expert-card" aria-label=${t("atlas.expert", at)}>
    <h3>${t("atlas.expert", at)} <${SteerButtons} state=${state} layer=${at.layer} expert=${at.expert} /></h3>
    <p class="label">${labelOf(facts, 5) || t("atlas.unlabelled")}</p>
    <p class="note">${t("experts.cell", { layer: at.layer, expert: at.expert, n: number(layer[at.expert]), share: number(total ? (100 * layer[at.expert]) / total : 0, 1), times: number(load, 2) })}</p>
    <button type="button" onClick=${() => actions.followExpert(at.layer, at.expert)}>${t("lens.follow")}</button>
    ${facts
      ? html`<h4>${t("atlas.tokens")}</h4>
          <ul class="words">
            ${facts.tokens.map((token) => html`<li><code>${visible(token.text)}</code> <small>${t("atlas.lift", { n: number(token.lift, 1) })}</small></li>`)}
          </ul>
          <h4>${t("atlas.domains", { bits: number(facts.bits, 3) })}</h4>
          <ul class="domains">
            ${facts.domains.map(
              (one) => html`<li>
                <span>${one.name}</span>
                <span class="bar"><i style=${{ width: `${100 * one.share}%`, background: domainColour(domainOf(labels, one.name)) }} /></span>
                <span class="number">${number(100 * one.share, 1)} %</span>
              </li>`,
            )}
          </ul>
          <${Examples} examples=${facts.examples} />`
      : null}
  </aside>`;
}

function Tools({ words, setWords, layer, setLayer, n_layers, exports }) {
  return html`<div class="atlas-tools" role="toolbar" aria-label=${t("atlas.title")}>
    <label class="search">
      <${Icon} name="search" />
      <input type="search" value=${words} placeholder=${t("atlas.search")} aria-label=${t("atlas.search")} onInput=${(event) => setWords(event.target.value)} />
    </label>
    <label class="layer">
      <span>${t("lens.layer", { i: layer })}</span>
      <input type="range" min="0" max=${n_layers - 1} value=${layer} aria-label=${t("lens.layer.choose")} onInput=${(event) => setLayer(Number(event.target.value))} />
    </label>
    <button type="button" onClick=${exports.json}><${Icon} name="download" /> JSON</button>
    <button type="button" onClick=${exports.png}><${Icon} name="picture" /> PNG</button>
  </div>`;
}

function Legend({ labels }) {
  if (!labels) return html`<p class="note">${t("atlas.how")} <code>quadriga experts label MODEL</code></p>`;
  return html`<p class="legend">
    ${labels.domains.map((one, i) => html`<span><i class="swatch" style=${{ background: domainColour(i) }} /> ${one.name}</span>`)}
    <span><i class="swatch" style=${{ background: domainColour(-1) }} /> ${t("atlas.nodomain")}</span>
    <span>${t("atlas.of", { n: number(labels.n_tokens) })}</span>
  </p>`;
}

function Body({ state, counts, model }) {
  const { labels } = state;
  const [at, setAt] = useState({ layer: 0, expert: 0 });
  const [words, setWords] = useState("");
  const wanted = words.trim().toLowerCase();
  const found = useMemo(
    () => (wanted ? counts.map((layer, i) => layer.map((_, e) => matches(known(labels, i, e), wanted))) : null),
    [counts, labels, wanted],
  );
  const layer = counts[at.layer];
  const mean = balance.sum(layer) / layer.length;
  const exports = {
    json: () => actions.saveAtlas({ model: model.id, counts, labels }),
    png: () => actions.savePicture(picture({ counts, labels, title: model.id }), `atlas-${model.id.replace(/[^\w.-]+/g, "-")}.png`),
  };
  const n = found ? balance.sum(found.flat().map(Number)) : 0;
  return html`
    <${Tools} words=${words} setWords=${setWords} layer=${at.layer} setLayer=${(next) => setAt({ layer: next, expert: Math.min(at.expert, counts[next].length - 1) })}
      n_layers=${counts.length} exports=${exports} />
    <${Legend} labels=${labels} />
    ${found ? html`<p class="note" role="status">${t("atlas.found", { n: number(n) })}</p>` : null}
    <${Overview} counts=${counts} labels=${labels} at=${at} found=${found} onPick=${setAt} />
    <div class="atlas-body">
      <ul class="tiles">
        ${layer.map(
          (count, e) =>
            html`<${Tile} key=${e} layer=${at.layer} expert=${e} facts=${known(labels, at.layer, e)} labels=${labels} part=${mean ? count / mean : 0}
              at=${at} dim=${Boolean(found) && !found[at.layer][e]} onPick=${setAt} />`,
        )}
      </ul>
      <${Expert} state=${state} at=${at} counts=${counts} labels=${labels} />
    </div>
  `;
}

function Asked({ state }) {
  const [report, problem] = useCounts(state.model);
  if (problem) return html`<p class="note" role="alert">${problemText(problem)}</p>`;
  if (!report?.counts.length) return html`<p class="note">${t("experts.wait")}</p>`;
  return html`<${Body} state=${state} counts=${report.counts} model=${state.model} />`;
}

export function Atlas({ state }) {
  const { model } = state;
  return html`<main class="atlas">
    <header>
      <h2>${t("atlas.title")}</h2>
      <${IconButton} icon="close" label=${t("button.close")} onClick=${actions.toggleAtlas} />
    </header>
    ${!model
      ? html`<p class="note">${t("experts.wait")}</p>`
      : model.quadriga.n_experts
        ? html`<${Asked} state=${state} />`
        : html`<p class="dense">${t("experts.dense", { model: model.id })}</p>`}
  </main>`;
}

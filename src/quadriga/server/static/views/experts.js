// The load map: how often each expert of each layer has been at work, live, from /v1/experts.

import * as balance from "../balance.js";
import * as actions from "../actions.js";
import { fetchExperts, resetExperts } from "../api.js";
import { known, labelOf } from "../experts.js";
import { compact, number, t } from "../i18n.js";
import { loadColour, prepare, themed } from "../palette.js";
import { html, useEffect, useMemo, useRef, useState } from "../vendor/htm-preact.mjs";
import { problemText } from "./chat.js";
import { IconButton } from "./icons.js";

const BUSY_MS = 1000;
const IDLE_MS = 3000;
const WINDOW_MS = 30_000;
const KEPT_MS = 180_000;

/** Asks now and then while somebody looks: [snapshots of the last minutes, the last failure, a reset]. */
function usePolling(active, model) {
  const [snapshots, setSnapshots] = useState([]);
  const [problem, setProblem] = useState(null);
  const alive = useRef(true);
  const take = (report, afresh) => {
    const time = Date.now();
    setSnapshots((before) => [
      ...(afresh ? [] : before.filter((one) => one.time > time - KEPT_MS && one.n_tokens <= report.n_tokens)),
      { time, ...report },
    ]);
    setProblem(null);
  };
  useEffect(() => {
    if (!active) return undefined;
    let timer = 0;
    let seen = -1;
    alive.current = true;
    setSnapshots([]);
    const ask = async () => {
      let wait = IDLE_MS;
      try {
        if (!document.hidden) {
          const report = await fetchExperts(model);
          if (!alive.current) return;
          if (report.n_tokens !== seen) wait = BUSY_MS;
          seen = report.n_tokens;
          take(report, false);
        }
      } catch (error) {
        if (!alive.current) return;
        setProblem(error);
      }
      timer = setTimeout(ask, wait);
    };
    ask();
    return () => {
      alive.current = false;
      clearTimeout(timer);
    };
  }, [active, model]);
  const reset = async () => {
    try {
      take(await resetExperts(model), true);
    } catch (error) {
      setProblem(error);
    }
  };
  return [snapshots, problem, reset];
}

/** Counts of the last half minute: the newest snapshot minus the newest one that is old enough, or the oldest. */
export function recent(snapshots) {
  const now = snapshots.at(-1);
  const then = snapshots.findLast((one) => one.time <= now.time - WINDOW_MS) ?? snapshots[0];
  return balance.difference(now.counts, then.counts);
}

const LEFT = 24;
const RIGHT = 46;

function drawMap(canvas, counts, width, marked) {
  const [layers, experts] = [counts.length, counts[0].length];
  const cell = (width - LEFT - RIGHT) / experts;
  const height = Math.max(5, Math.min(22, Math.floor(420 / layers)));
  const gap = Math.min(1, cell / 8);
  const context = prepare(canvas, width, height * layers + 18);
  context.font = `10px ${themed("--sans")}`;
  context.textBaseline = "middle";
  counts.forEach((layer, row) => {
    const [y, average] = [row * height, balance.sum(layer) / experts];
    layer.forEach((n, e) => {
      context.fillStyle = loadColour(average ? n / average : 0);
      context.fillRect(LEFT + e * cell + gap / 2, y + gap / 2, cell - gap, height - gap);
      if (!balance.isDead(layer, e)) return;
      const [x0, y0, r] = [LEFT + (e + 0.5) * cell, y + height / 2, Math.min(cell, height) / 4];
      context.strokeStyle = themed("--danger");
      context.lineWidth = 1.2;
      context.beginPath();
      context.moveTo(x0 - r, y0 - r);
      context.lineTo(x0 + r, y0 + r);
      context.moveTo(x0 + r, y0 - r);
      context.lineTo(x0 - r, y0 + r);
      context.stroke();
    });
    if (height >= 10 || row % Math.ceil(10 / height) === 0) {
      context.fillStyle = themed("--muted");
      context.textAlign = "right";
      context.fillText(String(row), LEFT - 6, y + height / 2);
      context.textAlign = "left";
      context.fillText(number(balance.maxOverMean(layer), 2), width - RIGHT + 8, y + height / 2);
    }
  });
  context.fillStyle = themed("--muted");
  context.textAlign = "center";
  const every = Math.ceil(16 / cell);
  for (let e = 0; e < experts; e += every) context.fillText(String(e), LEFT + (e + 0.5) * cell, height * layers + 10);
  if (marked && marked.layer < layers) {
    context.strokeStyle = themed("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(LEFT + marked.expert * cell, marked.layer * height, cell, height);
  }
  return { cell, height, layers, experts };
}

function Heatmap({ counts, labels }) {
  const canvas = useRef(null);
  const geometry = useRef(null);
  const [at, setAt] = useState(null);
  useEffect(() => {
    geometry.current = drawMap(canvas.current, counts, canvas.current.parentElement.clientWidth, at);
  });
  const cellAt = (event) => {
    const { cell, height, layers, experts } = geometry.current;
    const [expert, layer] = [Math.floor((event.offsetX - LEFT) / cell), Math.floor(event.offsetY / height)];
    return expert >= 0 && expert < experts && layer >= 0 && layer < layers ? { layer, expert } : null;
  };
  const follow = (event) => {
    const cell = cellAt(event);
    if (cell) actions.followExpert(cell.layer, cell.expert);
  };
  const layer = at && counts[at.layer];
  const total = layer ? balance.sum(layer) : 0;
  const said = layer
    ? t("experts.cell", {
        layer: at.layer,
        expert: at.expert,
        n: number(layer[at.expert]),
        share: number(total ? (100 * layer[at.expert]) / total : 0, 1),
        times: number(total ? (layer[at.expert] * layer.length) / total : 0, 2),
      })
    : t("experts.point");
  return html`<div class="heatmap">
    <canvas
      ref=${canvas}
      role="img"
      aria-label=${t("experts.map", { layers: counts.length, experts: counts[0].length })}
      onPointerMove=${(event) => setAt(cellAt(event))}
      onPointerLeave=${() => setAt(null)}
      onClick=${follow}
    ></canvas>
    <p class="cell">${said}${at ? html` <b>${labelOf(known(labels, at.layer, at.expert))}</b>` : null}</p>
  </div>`;
}

/** Balance over the last minutes, drawn by uPlot, which is fetched when the panel opens first. */
function History({ snapshots, theme }) {
  const place = useRef(null);
  const plot = useRef(null);
  const latest = useRef([[], [], []]);
  const series = useMemo(() => {
    const points = snapshots
      .map((one, i) => ({ time: one.time / 1000, counts: recent(snapshots.slice(0, i + 1)) }))
      .filter(({ counts }) => balance.sum(counts[0]) > 0);
    const over = (measure) => points.map((one) => balance.mean(one.counts.map(measure)));
    return [points.map((one) => one.time), over(balance.maxOverMean), over(balance.jain)];
  }, [snapshots]);
  useEffect(() => {
    let gone = false;
    import("../vendor/uplot.mjs").then(({ default: UPlot }) => {
      if (gone) return;
      const axis = { stroke: themed("--muted"), grid: { stroke: themed("--line"), width: 1 }, ticks: { show: false } };
      axis.font = `10px ${themed("--sans")}`;
      plot.current = new UPlot(
        {
          width: place.current.clientWidth,
          height: 110,
          legend: { show: false },
          cursor: { show: false },
          scales: { jain: { range: [0, 1] }, most: { range: (_, __, most) => [1, Math.max(2, most ?? 2)] } },
          series: [
            {},
            { scale: "most", stroke: themed("--bronze"), width: 1.5, points: { show: false } },
            { scale: "jain", stroke: themed("--accent"), width: 1.5, points: { show: false } },
          ],
          axes: [
            { ...axis, size: 20 },
            { ...axis, scale: "most", size: 32 },
            { ...axis, scale: "jain", side: 1, size: 32, grid: { show: false } },
          ],
        },
        latest.current,
        place.current,
      );
    });
    return () => {
      gone = true;
      plot.current?.destroy();
      plot.current = null;
    };
  }, [theme]);
  latest.current = series;
  useEffect(() => plot.current?.setData(series), [series]);
  return html`<div class="history" ref=${place} role="img" aria-label=${t("experts.history")}></div>
    <p class="keys">
      <span class="key most">${t("experts.balance")}</span>
      <span class="key jain">${t("experts.jain")}</span>
      <span>${t("experts.window")}</span>
    </p>`;
}

function Fact({ label, title, children }) {
  return html`<div class="fact" title=${title}><dt>${label}</dt><dd>${children}</dd></div>`;
}

function Scale() {
  const steps = [0, 0.5, 1, 2, 4];
  return html`<p class="scale">
    ${steps.map((n) => html`<span><i class="swatch" style=${{ background: loadColour(n) }} />${number(n, n === 0.5 ? 1 : 0)}×</span>`)}
    <span><b class="dead">×</b> ${t("experts.dead.mark")}</span>
  </p>`;
}

function Report({ snapshots, reset, theme, labels }) {
  const [lately, setLately] = useState(false);
  const now = snapshots.at(-1);
  const counts = lately ? recent(snapshots) : now.counts;
  const most = counts.map(balance.maxOverMean);
  const dead = counts.flatMap((layer) => layer.filter((_, e) => balance.isDead(layer, e))).length;
  const tokens = balance.sum(counts[0]) / now.top_k;
  return html`
    <div class="segments" role="radiogroup" aria-label=${t("experts.span")}>
      <button type="button" role="radio" aria-checked=${String(!lately)} onClick=${() => setLately(false)}>
        ${t("experts.all")}
      </button>
      <button type="button" role="radio" aria-checked=${String(lately)} onClick=${() => setLately(true)}>
        ${t("experts.lately")}
      </button>
    </div>
    <dl class="facts">
      <${Fact} label=${t("experts.tokens")} title=${t("experts.tokens.help")}>${compact(tokens)}<//>
      <${Fact} label=${t("experts.balance")} title=${t("experts.balance.help")}>${number(balance.mean(most), 2)}<//>
      <${Fact} label=${t("experts.jain")} title=${t("experts.jain.help")}>
        ${number(balance.mean(counts.map(balance.jain)), 2)}
      <//>
      <${Fact} label=${t("experts.dead")} title=${t("experts.dead.help")}>${number(dead)}<//>
    </dl>
    <${Heatmap} counts=${counts} labels=${labels} />
    <${Scale} />
    <${History} snapshots=${snapshots} theme=${theme} />
    <button type="button" class="reset" onClick=${reset}>${t("experts.reset")}</button>
  `;
}

export function ExpertsPanel({ state }) {
  const { model, settings } = state;
  const moe = Boolean(model?.quadriga.n_experts);
  const [snapshots, problem, reset] = usePolling(moe, model?.id);
  const body = () => {
    if (!model) return html`<p class="note">${t("experts.wait")}</p>`;
    if (!moe) return html`<p class="dense">${t("experts.dense", { model: model.id })}</p>`;
    if (!snapshots.length) return problem ? null : html`<p class="note">${t("experts.wait")}</p>`;
    const theme = document.documentElement.dataset.theme + settings.theme;
    return html`<${Report} snapshots=${snapshots} reset=${reset} theme=${theme} labels=${state.labels} />`;
  };
  return html`<aside class="experts" aria-label=${t("experts.title")}>
    <header>
      <h2>${t("experts.title")}</h2>
      <${IconButton} icon="close" label=${t("button.close")} onClick=${actions.toggleExperts} />
    </header>
    ${problem ? html`<p class="note" role="alert">${problem.kind ? problemText(problem) : String(problem)}</p>` : null}
    ${body()}
  </aside>`;
}

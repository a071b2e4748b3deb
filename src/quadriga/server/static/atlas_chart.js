// All experts as one drawing: layers down, experts across, coloured by domain, deeper the more they work. For the page, and
// as a picture with the labels in it where there is room.

import * as balance from "./balance.js";
import { domainOf, known, labelOf } from "./experts.js";
import { domainColour, prepare, themed } from "./palette.js";

const LEFT = 30;

/** How strongly a load is seen: none at 0, full from twice the mean on. */
function strength(layer, expert) {
  const mean = balance.sum(layer) / layer.length;
  return mean ? 0.25 + 0.75 * Math.min(1, layer[expert] / mean / 2) : 0.6;
}

/** Draw onto a canvas of a width. `found` (layers, experts) dims what is not looked for. Returns where cells lie. */
export function drawChart(canvas, { counts, labels, width, at, found }) {
  const most = Math.max(...counts.map((layer) => layer.length));
  const cell = (width - LEFT - 4) / most;
  const height = Math.max(5, Math.min(20, Math.floor(300 / counts.length)));
  const context = prepare(canvas, width, height * counts.length + 4);
  context.font = `10px ${themed("--sans")}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const gap = Math.min(1, cell / 8);
  counts.forEach((layer, row) => {
    layer.forEach((_, e) => {
      const dim = found && !found[row][e];
      context.globalAlpha = dim ? 0.12 : strength(layer, e);
      context.fillStyle = domainColour(domainOf(labels, known(labels, row, e)?.domain));
      context.fillRect(LEFT + e * cell + gap / 2, row * height + gap / 2, cell - gap, height - gap);
    });
    context.globalAlpha = 1;
    context.fillStyle = themed("--muted");
    if (height >= 10 || row % Math.ceil(10 / height) === 0) context.fillText(String(row), LEFT - 6, (row + 0.5) * height);
  });
  context.strokeStyle = themed("--ink");
  context.lineWidth = 1.5;
  if (at) context.strokeRect(LEFT + at.expert * cell, at.layer * height, cell, height);
  return { left: LEFT, cell, height };
}

const CELL = { wide: 132, narrow: 26 };

/** The same as a canvas to be saved: a title, and each expert's label in its cell where they are wide enough. */
export function picture({ counts, labels, title }) {
  const most = Math.max(...counts.map((layer) => layer.length));
  const cell = labels && most <= 64 ? CELL.wide : CELL.narrow;
  const height = cell === CELL.wide ? 34 : 18;
  const canvas = document.createElement("canvas");
  const context = prepare(canvas, LEFT + most * cell + 12, 54 + counts.length * height);
  context.fillStyle = themed("--paper");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = themed("--ink");
  context.font = `600 16px ${themed("--sans")}`;
  context.fillText(title, LEFT, 26);
  context.textBaseline = "middle";
  counts.forEach((layer, row) => {
    const y = 44 + row * height;
    context.font = `11px ${themed("--sans")}`;
    context.fillStyle = themed("--muted");
    context.textAlign = "right";
    context.fillText(String(row), LEFT - 6, y + height / 2);
    context.textAlign = "left";
    layer.forEach((_, e) => drawCell(context, { x: LEFT + e * cell, y, width: cell, height, layer, row, e, labels }));
  });
  return canvas;
}

function drawCell(context, { x, y, width, height, layer, row, e, labels }) {
  const facts = known(labels, row, e);
  context.globalAlpha = 0.65 * strength(layer, e);
  context.fillStyle = domainColour(domainOf(labels, facts?.domain));
  context.fillRect(x + 1, y + 1, width - 2, height - 2);
  context.globalAlpha = 1;
  if (width < CELL.wide) return;
  context.save();
  context.beginPath();
  context.rect(x + 1, y + 1, width - 4, height - 2);
  context.clip();
  context.fillStyle = themed("--ink");
  context.font = `600 10px ${themed("--sans")}`;
  context.fillText(String(e), x + 6, y + 11);
  context.font = `10px ${themed("--sans")}`;
  context.fillText(labelOf(facts, 4), x + 6, y + 24);
  context.restore();
}

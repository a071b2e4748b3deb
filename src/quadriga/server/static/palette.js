// Colours of experts, weights and loads, for text and for canvases, in both themes.

const GOLDEN = 137.508; // degrees: hues of neighbours lie far apart, however many experts there are

export function isDarkNow() {
  return document.documentElement.dataset.theme === "dark";
}

/** An expert's colour; `strength` in [0, 1] is how much of it is seen. */
export function expertColour(expert, strength = 1) {
  const hue = (28 + GOLDEN * expert) % 360;
  const light = (isDarkNow() ? 0.5 : 0.76) + (expert % 3) * 0.03;
  return `oklch(${light} 0.125 ${hue} / ${0.2 + 0.7 * Math.min(1, strength)})`;
}

/** The colour of a domain by its place among all; grey for none (-1). */
export function domainColour(domain) {
  if (domain < 0) return isDarkNow() ? "#5c5f59" : "#b9b4a6";
  const hue = (150 + GOLDEN * domain) % 360;
  return `oklch(${isDarkNow() ? 0.72 : 0.66} 0.13 ${hue})`;
}

/** Entropy or a single expert's weight: from nothing to bronze. */
export function heat(part) {
  const light = isDarkNow() ? 0.62 : 0.72;
  return `oklch(${light} 0.13 62 / ${0.9 * Math.min(1, part)})`;
}

const STOPS = {
  light: [
    [0, [236, 232, 223]],
    [1, [128, 186, 172]],
    [2, [31, 111, 97]],
    [3, [206, 158, 74]],
    [4, [188, 88, 34]],
  ],
  dark: [
    [0, [37, 40, 37]],
    [1, [42, 104, 92]],
    [2, [116, 201, 178]],
    [3, [224, 186, 112]],
    [4, [232, 132, 74]],
  ],
};

/** A load as a multiple of its layer's mean: paper, verdigris at the mean, bronze from four times the mean on. */
export function loadColour(multiple) {
  const stops = isDarkNow() ? STOPS.dark : STOPS.light;
  const next = stops.findIndex(([at]) => multiple <= at);
  if (next === 0) return `rgb(${stops[0][1].join(" ")})`;
  if (next < 0) return `rgb(${stops.at(-1)[1].join(" ")})`;
  const [[low, from], [high, to]] = [stops[next - 1], stops[next]];
  const part = (multiple - low) / (high - low);
  return `rgb(${from.map((value, i) => Math.round(value + part * (to[i] - value))).join(" ")})`;
}

/** A custom property of the style sheets. */
export function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A canvas of this size in CSS pixels, sharp on every screen; its context, cleared. */
export function prepare(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// Line icons on a 24 x 24 grid, drawn for this page.

import { html } from "../vendor/htm-preact.mjs";

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  search: "M11 5a6 6 0 1 0 0 12a6 6 0 0 0 0-12M15.5 15.5L20 20",
  send: "M12 19V5M6 11l6-6l6 6",
  stop: "M8 8h8v8H8z",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  edit: "M5 19h3.5L19 8.5L15.5 5L5 15.5zM13.5 7l3.5 3.5",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.5l4.5 4.5L19 7.5",
  left: "M14 6l-6 6l6 6",
  right: "M10 6l6 6l-6 6",
  down: "M12 5v14M6 13l6 6l6-6",
  close: "M6 6l12 12M18 6L6 18",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 10.5v5.5M13.5 10.5v5.5",
  upload: "M12 15V4M7.5 8.5L12 4l4.5 4.5M5 15v4h14v-4",
  download: "M12 4v11M7.5 10.5L12 15l4.5-4.5M5 15v4h14v-4",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.8v4.4M9 14.8v4.4",
  help: "M9.2 9.2a2.8 2.8 0 1 1 4.3 2.4c-1 .6-1.5 1.200-1.500 2.300M12 17.200v.1M12 3.500a8.500 8.500 0 1 0 0 17a8.500 8.500 0 0 0 0-17",
  sun: "M12 8.500a3.500 3.500 0 1 0 0 7a3.500 3.500 0 0 0 0-7M12 3v2M12 19v2M3 12h2M19 12h2M5.600 5.600L7 7M17 17l1.400 1.400M5.600 18.400L7 17M17 7l1.400-1.400",
  moon: "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10z",
  system: "M4 5h16v11H4zM9 20h6M12 16v4",
  lens: "M12 6C7 6 4 12 4 12s3 6 8 6s8-6 8-6s-3-6-8-6M12 9.500a2.500 2.500 0 1 0 0 5a2.500 2.500 0 0 0 0-5",
  clip: "M18.5 11l-6.700 6.700a4 4 0 0 1-5.700-5.700l7.200-7.200a2.700 2.700 0 0 1 3.800 3.800l-7.200 7.200a1.300 1.300 0 0 1-1.900-1.900l6.200-6.200",
  file: "M7 4h7l4 4v12H7zM14 4v4h4",
  fold: "M9 6l6 6l-6 6",
  forward: "M5 12h13M13 7l5 5l-5 5",
  pin: "M9 4h6l-1 6l3 3H7l3-3zM12 13v7",
  folder: "M4 7h5l2 2h9v10H4z",
  dial: "M5 18a8.500 8.500 0 1 1 14 0M12 14l4-5M12 12.700a1.300 1.300 0 1 0 0 2.600a1.300 1.300 0 0 0 0-2.600",
  off: "M12 4a8 8 0 1 0 0 16a8 8 0 0 0 0-16M6.500 6.500l11 11",
  boost: "M6 13l6-6l6 6M6 19l6-6l6 6",
  atlas: "M4 6l5-2l6 2l5-2v14l-5 2l-6-2l-5 2zM9 4v14M15 6v14",
  picture: "M4 5h16v14H4zM4 16l5-5l4 4l3-3l4 4M15.500 8.500v.1",
  map: "M5 5h3v3H5zM10.500 5h3v3h-3zM16 5h3v3h-3zM5 10.500h3v3H5zM10.500 10.500h3v3h-3zM16 10.500h3v3h-3zM5 16h3v3H5zM10.500 16h3v3h-3zM16 16h3v3h-3z",
};

/** An icon; what it means is said by the label of the button around it. */
export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}

/** A button that is an icon: its label is its tooltip and its name. */
export function IconButton({ icon, label, keys, pressed, onClick, ...others }) {
  const title = keys ? `${label} (${keys})` : label;
  return html`<button
    type="button"
    class="icon-button"
    title=${title}
    aria-label=${label}
    aria-pressed=${pressed === undefined ? undefined : String(pressed)}
    onClick=${onClick}
    ...${others}
  >
    <${Icon} name=${icon} />
  </button>`;
}

/** Four lit of sixteen: the experts at work for a token. */
export function Mark() {
  const lit = new Set([3, 5, 10, 12]);
  const dots = Array.from({ length: 16 }, (_, i) => {
    const [x, y] = [4 + 5.33 * (i % 4), 4 + 5.33 * Math.floor(i / 4)];
    return html`<circle cx=${x} cy=${y} r=${lit.has(i) ? 2.3 : 1.7} class=${lit.has(i) ? "lit" : ""} />`;
  });
  return html`<svg class="mark" viewBox="0 0 24 24" aria-hidden="true">${dots}</svg>`;
}

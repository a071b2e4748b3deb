// What is known of each expert: labels made from data (`quadriga experts label`), and what they are called here.
//
//     report: {domains: [{name, tokens}], n_tokens, layers: [{layer, bits, experts: [expert, ...]}, ...]}
//     expert: {kind, domain, share, bits, tokens: [{text, n, lift}], domains: [{name, share, lift}], examples: [...]}

import { fetchLabels } from "./api.js";
import { t } from "./i18n.js";
import { app } from "./state.js";

/** Fetch what is known of the experts of the model that is asked. */
export async function loadLabels() {
  const { model } = app.get();
  app.set({ labels: null });
  if (!model?.quadriga.n_experts) return;
  const report = await fetchLabels(model.id).catch(() => null); // without labels everything else works
  if (app.get().model?.id === model.id) app.set({ labels: report });
}

/** What is known of an expert; undefined where there are no labels. `layer` counts layers with experts. */
export function known(labels, layer, expert) {
  return labels?.layers[layer]?.experts[expert];
}

/** A kind of token in words; "" for none. */
export function kindName(kind) {
  const names = {
    digits: t("kind.digits"),
    punctuation: t("kind.punctuation"),
    symbols: t("kind.symbols"),
    space: t("kind.space"),
    names: t("kind.names"),
    pieces: t("kind.pieces"),
    function: t("kind.function"),
    chinese: t("kind.chinese"),
    rare: t("kind.rare"),
  };
  return names[kind] ?? "";
}

/** A token's text with what cannot be seen made visible. */
export function visible(text) {
  if (text === "") return "◦";
  return text.replace(/^ /, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

/** An expert's label: its kind, its domain, and the tokens it is chosen for most. */
export function labelOf(expert, n = 4) {
  if (!expert) return "";
  const words = expert.tokens.slice(0, n).map((token) => visible(token.text).replace(/^␣(?=.)/, ""));
  return [kindName(expert.kind), expert.domain, words.join(" ")].filter(Boolean).join(" · ");
}

/** A domain's colour is by its place in the report, wherever it stands; -1 for none. */
export function domainOf(labels, name) {
  return name ? labels.domains.findIndex((one) => one.name === name) : -1;
}

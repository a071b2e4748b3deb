// The routing of one answer, packed: of every token, per layer, the experts at work, their weights, the router's entropy.
//
//     index = (token * n_layers + layer) * top_k + slot
//
// 40 layers of 4 experts are 160 pairs a token: two bytes for an expert, a float32 for a weight as the server says it, one a
// layer for the entropy (as a part of the largest possible one). A trace grows in place; it is plain data, so IndexedDB takes it.

/** An empty trace. `n_layers` and `top_k` are known with the first token. */
export function newTrace(n_experts) {
  return {
    n_experts,
    n_layers: 0,
    top_k: 0,
    n_tokens: 0,
    texts: [],
    token_ids: [],
    experts: new Uint16Array(0),
    weights: new Float32Array(0),
    entropy: new Float32Array(0),
  };
}

/** A trace as older pages kept it, weights and entropies in 1/255, as it is now. */
export function modern(trace) {
  const wide = (values) => (values instanceof Uint8Array ? Float32Array.from(values, (value) => value / 255) : values);
  return { ...trace, weights: wide(trace.weights), entropy: wide(trace.entropy) };
}

function grown(array, length) {
  if (array.length >= length) return array;
  const larger = new array.constructor(Math.max(length, 2 * array.length));
  larger.set(array);
  return larger;
}

/** Add a token as the server sends it: {id, layers: [[[expert, weight], ...], ...], entropy: [...]}. */
export function push(trace, token, text) {
  if (trace.n_tokens === 0) {
    trace.n_layers = token.layers.length;
    trace.top_k = token.layers[0]?.length ?? 0;
  }
  const { n_layers, top_k, n_tokens } = trace;
  trace.experts = grown(trace.experts, (n_tokens + 1) * n_layers * top_k);
  trace.weights = grown(trace.weights, (n_tokens + 1) * n_layers * top_k);
  trace.entropy = grown(trace.entropy, (n_tokens + 1) * n_layers);
  token.layers.forEach((pairs, layer) => {
    pairs.forEach(([expert, weight], slot) => {
      const at = (n_tokens * n_layers + layer) * top_k + slot;
      trace.experts[at] = expert;
      trace.weights[at] = weight;
    });
    trace.entropy[n_tokens * n_layers + layer] = token.entropy[layer];
  });
  trace.texts.push(text);
  trace.token_ids.push(token.id);
  trace.n_tokens += 1;
}

/** The same without the room it had for more: what is kept. */
export function trimmed(trace) {
  const pairs = trace.n_tokens * trace.n_layers * trace.top_k;
  return {
    ...trace,
    experts: trace.experts.slice(0, pairs),
    weights: trace.weights.slice(0, pairs),
    entropy: trace.entropy.slice(0, trace.n_tokens * trace.n_layers),
  };
}

/** The experts of a token in a layer, heaviest first: [{expert, weight}]. */
export function chosen(trace, token, layer) {
  const start = (token * trace.n_layers + layer) * trace.top_k;
  return Array.from({ length: trace.top_k }, (_, slot) => ({
    expert: trace.experts[start + slot],
    weight: trace.weights[start + slot],
  }));
}

/** The weight of one expert for a token in a layer; 0 where it was not chosen. */
export function weightOf(trace, token, layer, expert) {
  return chosen(trace, token, layer).find((one) => one.expert === expert)?.weight ?? 0;
}

/** The router's entropy for a token in a layer, or its mean over all layers (layer -1): 0 is sure, 1 is a coin toss. */
export function entropyOf(trace, token, layer) {
  const start = token * trace.n_layers;
  if (layer >= 0) return trace.entropy[start + layer];
  let sum = 0;
  for (let i = 0; i < trace.n_layers; i++) sum += trace.entropy[start + i];
  return sum / trace.n_layers;
}

const PACKED = ["experts", "weights", "entropy"];

/** For a JSON file: arrays as base64, in the bytes of little-endian machines. */
export function toJson(trace) {
  const out = trimmed(modern(trace));
  for (const name of PACKED) {
    const used = out[name];
    const bytes = new Uint8Array(used.buffer, used.byteOffset, used.byteLength);
    out[name] = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  }
  return out;
}

/** The other way; `bytes` for files of version 1. Throws where sizes do not fit: a file may be anybody's. */
export function fromJson(json, { bytes = false } = {}) {
  const sizes = [json.n_experts, json.n_layers, json.top_k, json.n_tokens];
  if (!sizes.every((n) => Number.isInteger(n) && n >= 0 && n < 1e7)) throw new Error("routing");
  const strings = Array.isArray(json.texts) && json.texts.every((text) => typeof text === "string");
  const ids = Array.isArray(json.token_ids) && json.token_ids.every(Number.isInteger);
  if (!strings || !ids || json.texts.length !== json.n_tokens || json.token_ids.length !== json.n_tokens) {
    throw new Error("routing");
  }
  const raw = (name) => Uint8Array.from(atob(json[name]), (letter) => letter.charCodeAt(0));
  const numbers = (name) => (bytes ? raw(name) : new Float32Array(raw(name).buffer));
  const layers = json.n_tokens * json.n_layers;
  const experts = new Uint16Array(raw("experts").buffer);
  const [weights, entropy] = [numbers("weights"), numbers("entropy")];
  if (experts.length !== layers * json.top_k || weights.length !== experts.length || entropy.length !== layers) {
    throw new Error("routing");
  }
  if (experts.some((expert) => expert >= json.n_experts)) throw new Error("routing");
  if (![weights, entropy].every((values) => values.every(Number.isFinite))) throw new Error("routing");
  const { n_experts, n_layers, top_k, n_tokens, texts, token_ids } = json;
  return modern({ n_experts, n_layers, top_k, n_tokens, texts, token_ids, experts, weights, entropy });
}

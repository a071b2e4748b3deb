// The server, as the page sees it. Every failure becomes a Problem: a kind that has words, and what the server said.

/**
 * Kinds: key (401), busy (429), context (too long), deadline, draining, gone (no connection), broken (the stream ended
 * early), request (400 and other refusals), server (5xx).
 */
export class Problem extends Error {
  constructor(kind, detail = "", retryAfter = 0) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.retryAfter = retryAfter;
  }
}

let key = "";

export function setKey(value) {
  key = value;
}

function kindOf(status, code) {
  if (status === 401) return "key";
  if (status === 429) return "busy";
  if (code === "context_length_exceeded") return "context";
  if (code === "deadline_exceeded") return "deadline";
  if (code === "shutting_down") return "draining";
  return status >= 500 ? "server" : "request";
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("gone", String(error.message ?? error));
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const retry = Number(response.headers.get("retry-after") ?? 0);
  throw new Problem(kindOf(response.status, said.error?.code), said.error?.message ?? `HTTP ${response.status}`, retry);
}

/** What is served, adapters among it: [{id, quadriga: {family, n_layers, n_experts, top_k, context_length, chat, ...}}]. */
export async function fetchModels() {
  return (await (await call("/v1/models")).json()).data;
}

const of = (model) => `?model=${encodeURIComponent(model)}`;

/** What a model's experts have seen since the last reset. */
export async function fetchExperts(model) {
  return (await call(`/v1/experts${of(model)}`)).json();
}

export async function resetExperts(model) {
  return (await call(`/v1/experts/reset${of(model)}`, { body: {} })).json();
}

/** What is known of each expert (its label, words, domains, examples); null where nobody has made labels. */
export async function fetchLabels(model) {
  const report = await (await call(`/v1/experts/labels${of(model)}`)).json();
  return report.layers ? report : null;
}

/** Token ids of a conversation as the model reads it; `goesOn`: its last answer stays open. */
async function tokenIds(model, messages, goesOn) {
  const turns = { messages, add_generation_prompt: !goesOn, continue_final_message: goesOn };
  const plain = { prompt: messages.map((message) => message.content).join("") };
  const body = { model: model.id, ...(model.quadriga.chat ? turns : plain) };
  return (await (await call("/tokenize", { body })).json()).tokens;
}

/** The loss of the last message, an answer: the mean of -ln p of its tokens, with some experts steered. */
export async function lossOf({ model, messages, steering }) {
  const before = await tokenIds(model, messages.slice(0, -1), false);
  const whole = await tokenIds(model, messages, true);
  const differs = whole.findIndex((id, i) => id !== before[i]);
  const body = { model: model.id, prompt: whole, max_tokens: 0, echo: true, logprobs: 0, temperature: 0 };
  if (steering.length) body.experts = steering;
  const { logprobs } = (await (await call("/v1/completions", { body })).json()).choices[0];
  const own = logprobs.token_logprobs.slice(Math.max(1, differs));
  return -own.reduce((total, value) => total + value, 0) / own.length;
}

/** The data of server-sent events, parsed. Ends at [DONE]; comments (pings) are passed over. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("broken", String(error.message ?? error));
    }
    if (piece.done) throw new Problem("broken");
    rest += piece.value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      for (const line of block.split("\n")) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        yield JSON.parse(line.slice(6));
      }
    }
  }
}

/**
 * Ask for an answer; yields {text, thought, routing, finish, usage, timings}, each where it came.
 *
 * A model with a chat template is asked through /v1/chat/completions. One without continues the text as it stands. With
 * `goesOn` the last message is an answer that is continued.
 */
export async function* generate({ model, messages, sampling, routing, steering, goesOn, signal }) {
  const common = { model: model.id, stream: true, stream_options: { include_usage: true }, ...sampling };
  if (routing) common.routing = true;
  if (steering?.length) common.experts = steering;
  const chat = model.quadriga.chat;
  const body = chat ? { ...common, messages } : { ...common, prompt: messages.map((message) => message.content).join("") };
  if (chat && goesOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  const response = await call(chat ? "/v1/chat/completions" : "/v1/completions", { body, signal });
  for await (const event of events(response)) {
    if (event.error) throw new Problem(kindOf(503, event.error.code), event.error.message);
    const choice = event.choices[0];
    yield {
      text: (chat ? choice?.delta.content : choice?.text) ?? "",
      thought: choice?.delta?.reasoning_content ?? "",
      routing: event.routing ?? [],
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
      timings: event.timings ?? null,
    };
  }
}

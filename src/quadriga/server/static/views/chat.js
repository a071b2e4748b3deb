// The conversation: its messages, the failure of its last request, and the way back down.

import * as actions from "../actions.js";
import * as answers from "../answers.js";
import { connect, isAway } from "../connection.js";
import { compact, t } from "../i18n.js";
import { path, siblings } from "../tree.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/htm-preact.mjs";
import { Composer } from "./composer.js";
import { IconButton, Mark } from "./icons.js";
import { LensBar } from "./lens.js";
import { Message } from "./message.js";
import { SteerBar } from "./steer.js";

const NEAR = 80; // pixels from the end that count as being there

/** A failure in words. Every kind of api.js has a sentence. */
export function problemText(problem) {
  const texts = {
    key: t("problem.key"),
    busy: t("problem.busy"),
    context: t("problem.context"),
    deadline: t("problem.deadline"),
    draining: t("problem.draining"),
    gone: t("problem.gone"),
    broken: t("problem.broken"),
    request: t("problem.request"),
    server: t("problem.server"),
    page: t("problem.page"),
  };
  return texts[problem.kind];
}

function KeyForm() {
  const [key, setKey] = useState("");
  const submit = async (event) => {
    event.preventDefault();
    actions.setSettings({ apiKey: key.trim() });
    await connect();
    answers.clearProblem();
  };
  return html`<form class="key" onSubmit=${submit}>
    <input
      type="password"
      autocomplete="off"
      placeholder=${t("settings.key")}
      aria-label=${t("settings.key")}
      value=${key}
      onInput=${(event) => setKey(event.target.value)}
    />
    <button type="submit" class="primary" disabled=${!key.trim()}>${t("button.use")}</button>
  </form>`;
}

/** What went wrong, what the server said, and what to do. After a 429 the way on opens when the server said so. */
export function ProblemCard({ problem, onRetry }) {
  const [left, setLeft] = useState(problem.retryAfter);
  useEffect(() => {
    setLeft(problem.retryAfter);
    if (!problem.retryAfter) return undefined;
    const timer = setInterval(() => setLeft((seconds) => Math.max(0, seconds - 1)), 1000);
    return () => clearInterval(timer);
  }, [problem]);
  return html`<div class="problem" role="alert">
    <p>${problemText(problem)}</p>
    ${problem.detail ? html`<p class="detail">${problem.detail}</p>` : null}
    ${isAway(problem) ? html`<p class="again">${t("problem.again")}</p>` : null}
    ${problem.kind === "key"
      ? html`<${KeyForm} />`
      : html`<button type="button" disabled=${left > 0} onClick=${onRetry}>
          ${left > 0 ? t("button.retry.in", { n: left }) : t("button.retry")}
        </button>`}
  </div>`;
}

function Welcome({ model }) {
  const facts = model?.quadriga;
  const starters = [t("welcome.starter.1"), t("welcome.starter.2"), t("welcome.starter.3")];
  return html`<div class="welcome">
    <${Mark} />
    <h1>${t("welcome.title")}</h1>
    ${facts
      ? html`<p>
          ${facts.n_experts
            ? t("welcome.moe", {
                model: model.id,
                n: compact(facts.n_parameters),
                active: compact(facts.n_active_parameters),
                experts: facts.n_experts,
                k: facts.top_k,
              })
            : t("welcome.dense", { model: model.id, n: compact(facts.n_parameters) })}
        </p>`
      : null}
    ${facts && !facts.chat ? html`<p class="note">${t("welcome.nochat")}</p>` : null}
    ${facts?.chat
      ? html`<div class="starters">
          ${starters.map((text) => html`<button type="button" onClick=${() => answers.send(text)}>${text}</button>`)}
        </div>`
      : null}
  </div>`;
}

export function Chat({ state, conversation }) {
  const scroller = useRef(null);
  const [away, setAway] = useState(false);
  const shown = path(conversation);
  const running = state.running[conversation.id];
  const problem = state.problem ?? state.problems[conversation.id];
  const hasExperts = (state.model?.quadriga.n_experts ?? 0) > 0;
  const drop = (event) => {
    event.preventDefault();
    actions.attach([...event.dataTransfer.files]);
  };
  const toEnd = () => {
    const { current } = scroller;
    current.scrollTop = current.scrollHeight;
  };
  const last = shown.at(-1);

  useLayoutEffect(() => {
    toEnd();
    setAway(false);
  }, [conversation.id, shown.length]);
  useLayoutEffect(() => {
    if (!away) toEnd();
  });

  const scrolled = () => {
    const { scrollHeight, scrollTop, clientHeight } = scroller.current;
    setAway(scrollHeight - scrollTop - clientHeight > NEAR);
  };

  return html`<main class="chat" onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
    ${state.settings.lens ? html`<${LensBar} model=${state.model} labels=${state.labels} />` : null}
    <${SteerBar} state=${state} />
    <div class="scroller" ref=${scroller} onScroll=${scrolled} onWheel=${scrolled}>
      <div class="thread">
        ${shown.length || !state.ready ? null : html`<${Welcome} model=${state.model} />`}
        ${shown.map(
          (node) =>
            html`<${Message}
              key=${node.id}
              node=${node}
              siblings=${siblings(conversation, node.id)}
              running=${running?.node === node.id}
              busy=${Boolean(running)}
              editing=${state.editing === node.id}
              lensOn=${state.settings.lens}
              hasExperts=${hasExperts}
              last=${node === last}
            />`,
        )}
        ${problem
          ? html`<${ProblemCard} problem=${problem} onRetry=${state.problem ? connect : answers.retry} />`
          : null}
      </div>
    </div>
    <div class="foot">
      ${away ? html`<${IconButton} icon="down" label=${t("chat.toend")} class="icon-button to-end" onClick=${toEnd} />` : null}
      <${Composer} state=${state} conversation=${conversation} />
      <p class="fine">${t("chat.fine")}</p>
    </div>
  </main>`;
}

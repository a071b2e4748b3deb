// Experts that are switched off or boosted in this conversation, and what that does to the last answer.

import * as actions from "../actions.js";
import * as answers from "../answers.js";
import { lossOf, Problem } from "../api.js";
import { known, labelOf } from "../experts.js";
import { number, t } from "../i18n.js";
import { path } from "../tree.js";
import { html, useState } from "../vendor/htm-preact.mjs";
import { Icon, IconButton } from "./icons.js";

const FACTORS = [0, 0.25, 0.5, 2, 4, 16, 64];

/** How often an expert is chosen here: as the router says, off, or more. */
export function SteerButtons({ state, layer, expert }) {
  const steering = state.conversations[state.current]?.steering ?? [];
  const factor = steering.find((one) => one.layer === layer && one.expert === expert)?.factor ?? 1;
  const set = (value) => () => actions.steer(layer, expert, factor === value ? 1 : value);
  return html`<span class="steer-buttons">
    <${IconButton} icon="off" label=${t("steer.switchoff", { layer, expert })} pressed=${factor === 0} onClick=${set(0)} />
    <${IconButton} icon="boost" label=${t("steer.boost", { layer, expert })} pressed=${factor > 1} onClick=${set(4)} />
  </span>`;
}

function Chip({ one, labels }) {
  const { layer, expert, factor } = one;
  const label = labelOf(known(labels, layer, expert), 2);
  return html`<li class="chip">
    <span>${t("steer.expert", { layer, expert })}${label ? html` <small>${label}</small>` : null}</span>
    <select aria-label=${t("steer.factor", { layer, expert })} value=${factor} onChange=${(event) => actions.steer(layer, expert, Number(event.target.value))}>
      ${FACTORS.map((value) => html`<option value=${value} selected=${value === factor}>${value === 0 ? t("steer.choice.off") : `× ${number(value, value < 1 ? 2 : 0)}`}</option>`)}
    </select>
    <${IconButton} icon="close" label=${t("steer.forget", { layer, expert })} onClick=${() => actions.steer(layer, expert, 1)} />
  </li>`;
}

const signed = (value) => `${value > 0 ? "+" : ""}${number(value, 3)}`;

/** The loss of the last answer as it stands, with the experts as the model has them and as they are steered now. */
function Losses({ state, conversation, last }) {
  const [found, setFound] = useState(null);
  const [asking, setAsking] = useState(false);
  const key = JSON.stringify([last.id, last.content, conversation.steering, state.model?.id]);
  const measure = async () => {
    setAsking(true);
    const given = { model: state.model, messages: answers.messagesFor(conversation, last.id) };
    try {
      const before = await lossOf({ ...given, steering: [] });
      setFound({ key, before, after: await lossOf({ ...given, steering: conversation.steering }) });
    } catch (error) {
      actions.toast(error instanceof Problem ? error.detail || t("problem.server") : String(error));
    }
    setAsking(false);
  };
  const shown = found?.key === key ? found : null;
  return html`<button type="button" disabled=${asking} title=${t("steer.measure.help")} onClick=${measure}>${t("steer.measure")}</button>
    ${shown
      ? html`<output class="loss">
          ${t("steer.loss", { before: number(shown.before, 3), after: number(shown.after, 3), by: signed(shown.after - shown.before) })}
        </output>`
      : null}`;
}

export function SteerBar({ state }) {
  const conversation = state.conversations[state.current];
  const steering = conversation.steering ?? [];
  if (!steering.length) return null;
  const last = path(conversation).at(-1);
  const answered = last?.role === "assistant" && last.content && !state.running[conversation.id];
  return html`<section class="steer-strip" aria-label=${t("steer.title")}>
    <div class="steer">
      <${Icon} name="dial" />
      <ul class="chips">${steering.map((one) => html`<${Chip} key=${`${one.layer} ${one.expert}`} one=${one} labels=${state.labels} />`)}</ul>
      ${answered
        ? html`<button type="button" onClick=${() => answers.regenerate(last.id)}>${t("steer.again")}</button>
            <${Losses} state=${state} conversation=${conversation} last=${last} />`
        : null}
      <button type="button" onClick=${actions.forgetSteering}>${t("steer.clear")}</button>
    </div>
  </section>`;
}

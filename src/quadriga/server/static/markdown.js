// An answer as HTML. A model's output is never trusted:
//
//     text ─► marked, raw HTML escaped, images as links ─► DOMPurify, a short list of tags ─► the page, under its CSP
//
// So markup that a model writes is shown as the text it is; three nets, each of which would do alone.

import { t } from "./i18n.js";
import hljs from "./vendor/highlight.mjs";
import { Marked } from "./vendor/marked.mjs";
import DOMPurify from "./vendor/purify.mjs";

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (letter) => ESCAPES[letter]);

const HIGHLIGHT_MAX = 20_000; // characters; longer code stays plain, since it is coloured again with every token

function highlighted(code, language) {
  if (code.length > HIGHLIGHT_MAX || !hljs.getLanguage(language)) return escape(code);
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

function link(href, inner) {
  if (!/^(https?:|mailto:)/i.test(href)) return inner;
  return `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer nofollow">${inner}</a>`;
}

const renderer = {
  html({ text, block }) {
    return block ? `<p>${escape(text.trim())}</p>` : escape(text);
  },
  image({ href, text }) {
    return link(href, escape(text || href));
  },
  link({ href, tokens }) {
    return link(href, this.parser.parseInline(tokens));
  },
  checkbox({ checked }) {
    return checked ? "☑ " : "☐ ";
  },
  code({ text, lang }) {
    const language = (lang ?? "").trim().split(/\s/)[0].toLowerCase();
    const head = `<span>${escape(language)}</span><button type="button" class="copy">${escape(t("code.copy"))}</button>`;
    return `<div class="code"><div class="code-head">${head}</div><pre><code>${highlighted(text, language)}</code></pre></div>`;
  },
  table(token) {
    const row = (cells, tag) =>
      `<tr>${cells
        .map((cell) => {
          const align = cell.align ? ` align="${cell.align}"` : "";
          return `<${tag}${align}>${this.parser.parseInline(cell.tokens)}</${tag}>`;
        })
        .join("")}</tr>`;
    const body = token.rows.map((cells) => row(cells, "td")).join("");
    return `<div class="table"><table><thead>${row(token.header, "th")}</thead><tbody>${body}</tbody></table></div>`;
  },
};

const marked = new Marked({ gfm: true, breaks: true, renderer });

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "span", "div", "button"]
    .concat(["h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"]),
  ALLOWED_ATTR: ["href", "target", "rel", "class", "align", "start", "type"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

/** Safe HTML of a Markdown text. */
export function toHtml(text) {
  return DOMPurify.sanitize(marked.parse(text), ALLOWED);
}

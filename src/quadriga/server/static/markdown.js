// An answer as HTML. A model's output is never trusted:
//
//     text ─► marked, raw HTML escaped, images as links ─► DOMPurify, a short list of tags ─► the page, under its CSP
//
// So markup that a model writes is shown as the text it is; three nets, each of which would do alone.
//
// A text is made block by block (a paragraph, a list, a table, ...), so that while an answer of a thousand paragraphs grows
// its last one alone is made anew. Formulas stay text until `typeset` finds them on the page.

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

// TeX: $...$ as Pandoc reads it (no space inside the dollars, no digit behind, so that prices stay prices), \(...\), and
// $$...$$ or \[...\] set apart.
const INLINE_MATH = [
  /^\$\$([^$]+?)\$\$/,
  /^\\\[([\s\S]+?)\\\]/,
  /^\$(?![\s$])((?:\\[^\n]|[^\\\n$`])*?[^\s\\$`])\$(?!\d)/,
  /^\\\(([\s\S]+?)\\\)/,
];
const BLOCK_MATH = [/^\$\$((?:[^$]|\\\$)+?)\$\$[ \t]*(?:\n|$)/, /^\\\[([\s\S]+?)\\\][ \t]*(?:\n|$)/];

/** A text up to its first empty line, which ends what it begins with: the rest may be a thousand paragraphs. */
function upToGap(text) {
  const end = text.indexOf("\n\n");
  return end < 0 ? text : text.slice(0, end + 1);
}

function math(name, level, patterns, start) {
  return {
    name,
    level,
    start: (text) => upToGap(text).match(start)?.index,
    tokenizer(text) {
      const at = patterns.findIndex((pattern) => pattern.test(text));
      if (at < 0) return undefined;
      const [raw] = patterns[at].exec(text);
      return { type: name, raw, apart: at < 2 };
    },
    renderer: ({ raw, apart }) =>
      level === "block" ? `<div class="math apart">${escape(raw.trim())}</div>` : `<span class="math${apart ? " apart" : ""}">${escape(raw)}</span>`,
  };
}

const extensions = [
  math("formula", "block", BLOCK_MATH, /(?:^|\n)(?:\$\$|\\\[)/),
  math("term", "inline", INLINE_MATH, /\$|\\[([]/),
];

const marked = new Marked({ gfm: true, breaks: true, renderer, extensions });

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "span", "div", "button"]
    .concat(["h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"]),
  ALLOWED_ATTR: ["href", "target", "rel", "class", "align", "start", "type"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

/**
 * Tokens of a text; where it is `before`'s with more at its end, only its last two blocks are read again: the last may become
 * another kind ("2" a paragraph, "2." an item) and join the one before.
 */
function lexed(text, before) {
  if (!before || !text.startsWith(before.text)) return marked.lexer(text);
  const isBlock = (token) => token.type !== "space";
  const last = before.tokens.findLastIndex(isBlock);
  const kept = before.tokens.slice(0, Math.max(0, before.tokens.slice(0, Math.max(0, last)).findLastIndex(isBlock)));
  const at = kept.reduce((sum, token) => sum + token.raw.length, 0);
  const more = marked.lexer(text.slice(at));
  const named = [...kept, ...more].some((token) => token.type === "def"); // it may be meant in any block
  return named ? marked.lexer(text) : [...kept, ...more];
}

/**
 * A Markdown text as {text, tokens, blocks: [{key, token}]}; `before` is what this gave for an earlier state of it. Equal keys
 * mean equal HTML: a block's own text, and the addresses that [references] anywhere stand for.
 */
export function read(given, before = null) {
  const text = given.replace(/\r\n?/g, "\n");
  const tokens = lexed(text, before);
  const known = tokens.filter((token) => token.type === "def").map((token) => token.raw);
  const blocks = tokens
    .filter((token) => token.type !== "space" && token.type !== "def")
    .map((token) => ({ key: `${token.raw}\u0000${known.join("")}`, token }));
  return { text, tokens, blocks };
}

/** Safe HTML of a block. */
export function blockHtml(token) {
  return DOMPurify.sanitize(marked.parser([token]), ALLOWED);
}

let katex = null;

/** Fetch KaTeX and its style sheet, once a formula has been seen. */
async function loadKatex() {
  const sheet = document.createElement("link");
  sheet.rel = "stylesheet";
  sheet.href = "/page/vendor/katex.css";
  document.head.append(sheet);
  await import("./vendor/katex.min.js");
  return self.katex;
}

// \pmb and \fcolorbox would set style attributes, which the page's policy forbids.
const MACROS = { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": "\\colorbox{#2}{#3}" };
const TEX = { throwOnError: true, strict: "ignore", trust: false, maxExpand: 1000, maxSize: 20, macros: MACROS };

function set(place) {
  const source = place.textContent;
  const tex = source.replace(/^(\$\$?|\\[([])/, "").replace(/(\$\$?|\\[)\]])$/, "");
  const made = document.createElement("span");
  try {
    self.katex.render(tex, made, { ...TEX, macros: { ...MACROS }, displayMode: place.classList.contains("apart") });
    place.replaceChildren(...made.childNodes);
  } catch {
    place.classList.add("unset"); // no TeX, or TeX that KaTeX cannot set: it stays as it was written
  }
}

/** Set the formulas inside an element. KaTeX builds elements, and so never goes through HTML. */
export async function typeset(element) {
  const places = element.querySelectorAll(".math");
  if (!places.length) return;
  if (!self.katex) await (katex ??= loadKatex());
  for (const place of places) if (place.isConnected) set(place);
}

// The text of a PDF file, page by page, for models to read. What is drawn as a picture has no text.
//
// A page's content is a program that places strings; each string's codes become letters by its font's ToUnicode table, or by
// its encoding. Lines and spaces are guessed from where strings are placed (ISO 32000-1, 9.4 and 9.10).

import { latin, Lexer, Objects } from "./pdf_objects.js";

const MOST_PAGES = 2000;
const LATIN = new TextDecoder("windows-1252");
const GLYPHS = { space: " ", fi: "fi", fl: "fl", ff: "ff", ffi: "ffi", ffl: "ffl", hyphen: "-", endash: "–", emdash: "—" };
Object.assign(GLYPHS, { quoteright: "’", quoteleft: "‘", quotedblleft: "“", quotedblright: "”", bullet: "•", period: "." });
Object.assign(GLYPHS, { comma: ",", colon: ":", semicolon: ";", parenleft: "(", parenright: ")", slash: "/", quotesingle: "'" });
Object.assign(GLYPHS, { zero: "0", one: "1", two: "2", three: "3", four: "4", five: "5", six: "6", seven: "7", eight: "8" });
Object.assign(GLYPHS, { nine: "9", equal: "=", plus: "+", bracketleft: "[", bracketright: "]", percent: "%", question: "?" });

/** The text of all pages, an empty line between them. Throws an Error "locked" for an encrypted file. */
export async function pdfText(bytes) {
  const objects = await Objects.read(bytes);
  const pages = pagesOf(objects).slice(0, MOST_PAGES);
  const texts = [];
  for (const page of pages) texts.push(await pageText(objects, page));
  return texts.map((text) => text.trim()).join("\n\n").trim();
}

/** Pages in their order, each with the resources it inherits. */
function pagesOf(objects) {
  const catalogues = [...objects.table.values()].map((one) => one.value).filter((one) => one instanceof Map);
  const root = catalogues.findLast((one) => one.get("Type")?.name === "Catalog");
  const found = [];
  const seen = new Set();
  const walk = (reference, inherited) => {
    const node = objects.get(reference);
    if (!(node instanceof Map) || seen.has(node)) return;
    seen.add(node);
    const resources = objects.get(node.get("Resources")) ?? inherited;
    const kids = objects.get(node.get("Kids"));
    if (Array.isArray(kids)) for (const kid of kids) walk(kid, resources);
    else found.push({ contents: node.get("Contents"), resources });
  };
  if (root) walk(root.get("Pages"), undefined);
  return found;
}

async function pageText(objects, { contents, resources }) {
  const value = objects.get(contents);
  const parts = [];
  for (const part of Array.isArray(value) ? value : [contents]) {
    const bytes = await objects.stream(part);
    if (bytes) parts.push(latin(bytes));
  }
  const writer = new Writer();
  await perform(objects, parts.join("\n"), resources, writer, 0);
  return writer.text;
}

/** Puts strings where a page places them: a new line where the height changes, a space where there is a gap. */
class Writer {
  text = "";
  end = null; // {x, y} where the last string ended

  put(string, x, y, width, size) {
    if (!string) return;
    if (this.end) {
      const down = Math.abs(y - this.end.y);
      const gap = x - this.end.x;
      if (down > size * 1.9) this.text += "\n\n";
      else if (down > size * 0.35) this.text += "\n";
      else if ((gap > size * 0.16 || gap < -size * 2) && !/\s$/.test(this.text)) this.text += " ";
    }
    this.text += string;
    this.end = { x: x + width, y };
  }
}

const times = ([a, b, c, d, e, f], [g, h, i, j, k, l]) =>
  [a * g + b * i, a * h + b * j, c * g + d * i, c * h + d * j, e * g + f * i + k, e * h + f * j + l];

const UNIT = [1, 0, 0, 1, 0, 0];

/** Where text goes next, and how: the part of the graphics state that text needs. */
class Pen {
  constructor(writer) {
    Object.assign(this, { writer, saved: [], base: UNIT, line: UNIT, at: UNIT });
    Object.assign(this, { font: null, size: 1, leading: 0, spread: 0, words: 0, stretch: 1 });
  }

  move(x, y) {
    this.at = this.line = times([1, 0, 0, 1, x, y], this.line);
  }

  forward(x) {
    this.at = times([1, 0, 0, 1, x, 0], this.at);
  }

  show(codes) {
    if (!this.font) return;
    const [a, b, c, d, x, y] = times(this.at, this.base);
    const { text, width, n, spaces } = this.font.read(codes);
    const across = (width * this.size + n * this.spread + spaces * this.words) * this.stretch;
    this.writer.put(text, x, y, across * Math.hypot(a, b), Math.abs(this.size) * Math.hypot(c, d) || 1);
    this.forward(across);
  }

  nextLine(codes) {
    this.move(0, -this.leading);
    this.show(codes);
  }
}

const OPERATORS = {
  q: (pen) => pen.saved.push([pen.base, pen.font, pen.size]),
  Q: (pen) => pen.saved.length && ([pen.base, pen.font, pen.size] = pen.saved.pop()),
  cm: (pen, ...matrix) => (pen.base = times(matrix, pen.base)),
  BT: (pen) => (pen.at = pen.line = UNIT),
  Tm: (pen, ...matrix) => (pen.at = pen.line = matrix),
  Td: (pen, x, y) => pen.move(x, y),
  TD: (pen, x, y) => ((pen.leading = -y), pen.move(x, y)),
  TL: (pen, n) => (pen.leading = n),
  Tc: (pen, n) => (pen.spread = n),
  Tw: (pen, n) => (pen.words = n),
  Tz: (pen, n) => (pen.stretch = n / 100),
  "T*": (pen) => pen.move(0, -pen.leading),
  Tj: (pen, string) => pen.show(string.text),
  "'": (pen, string) => pen.nextLine(string.text),
  '"': (pen, words, spread, string) => (Object.assign(pen, { words, spread }), pen.nextLine(string.text)),
  TJ(pen, list) {
    for (const item of list) {
      if (item?.text !== undefined) pen.show(item.text);
      else if (typeof item === "number") pen.forward((-item / 1000) * pen.size * pen.stretch);
    }
  },
};

/** Run a page's program, or that of a form inside it, which begins where the page has drawn so far. */
async function perform(objects, program, resources, writer, depth, base = UNIT) {
  const fonts = objects.get(resources?.get?.("Font"));
  const forms = objects.get(resources?.get?.("XObject"));
  const known = new Map();
  const lexer = new Lexer(program);
  const pen = Object.assign(new Pen(writer), { base });
  let stack = [];
  for (let token = lexer.value(); token !== undefined; token = lexer.value()) {
    if (token?.op === undefined) {
      stack.push(token);
      continue;
    }
    if (token.op === "BI") lexer.at = skipPicture(program, lexer.at);
    else if (token.op === "Tf" && stack[0]?.name !== undefined) {
      const { name } = stack[0];
      if (!known.has(name)) known.set(name, await fontOf(objects, objects.get(fonts?.get?.(name))));
      [pen.font, pen.size] = [known.get(name), stack[1]];
    } else if (token.op === "Do" && depth < 8) {
      await performForm(objects, forms?.get?.(stack[0]?.name), { resources, writer, depth, base: pen.base });
    } else if (Object.hasOwn(OPERATORS, token.op)) OPERATORS[token.op](pen, ...stack);
    stack = [];
  }
}

async function performForm(objects, reference, { resources, writer, depth, base }) {
  const form = objects.get(reference);
  if (!(form instanceof Map) || form.get("Subtype")?.name !== "Form") return;
  const bytes = await objects.stream(reference);
  if (!bytes) return;
  const matrix = objects.get(form.get("Matrix"));
  const placed = Array.isArray(matrix) ? times(matrix, base) : base;
  await perform(objects, latin(bytes), objects.get(form.get("Resources")) ?? resources, writer, depth + 1, placed);
}

function skipPicture(program, from) {
  const end = program.slice(from).search(/\sEI\s/);
  return end < 0 ? program.length : from + end + 4;
}

/** How a font's codes are read: read(codes) gives {text, width in units of the size, n codes, spaces}. */
async function fontOf(objects, font) {
  if (!(font instanceof Map)) return null;
  const table = font.has("ToUnicode") ? await unicodeTable(objects, font.get("ToUnicode")) : null;
  const composite = font.get("Subtype")?.name === "Type0";
  const bytes = composite ? 2 : 1;
  const widths = composite ? compositeWidths(objects, font) : simpleWidths(objects, font);
  const letters = composite ? null : simpleLetters(objects, font);
  const read = (codes) => {
    let [text, width, n, spaces] = ["", 0, 0, 0];
    for (let i = 0; i + bytes <= codes.length; i += bytes) {
      const code = bytes === 2 ? codes.charCodeAt(i) * 256 + codes.charCodeAt(i + 1) : codes.charCodeAt(i);
      text += table?.get(code) ?? letters?.(code) ?? "";
      width += widths(code) / 1000;
      n += 1;
      if (bytes === 1 && code === 32) spaces += 1;
    }
    return { text: text.normalize("NFC"), width, n, spaces };
  };
  return { read };
}

function simpleWidths(objects, font) {
  const widths = objects.get(font.get("Widths")) ?? [];
  const first = objects.get(font.get("FirstChar")) ?? 0;
  return (code) => objects.get(widths[code - first]) ?? 500;
}

/** /W of a composite font: [first [w w w] first last w ...]. */
function compositeWidths(objects, font) {
  const below = objects.get(objects.get(font.get("DescendantFonts"))?.[0]);
  const usual = objects.get(below?.get?.("DW")) ?? 1000;
  const given = new Map();
  const list = objects.get(below?.get?.("W")) ?? [];
  for (let i = 0; i < list.length; ) {
    const [first, next] = [list[i], objects.get(list[i + 1])];
    if (Array.isArray(next)) {
      next.forEach((width, j) => given.set(first + j, width));
      i += 2;
    } else {
      for (let code = first; code <= Math.min(next, first + 65535); code++) given.set(code, list[i + 2]);
      i += 3;
    }
  }
  return (code) => given.get(code) ?? usual;
}

function simpleLetters(objects, font) {
  const encoding = objects.get(font.get("Encoding"));
  const named = new Map();
  let code = 0;
  for (const item of (encoding instanceof Map && objects.get(encoding.get("Differences"))) || []) {
    if (typeof item === "number") code = item;
    else if (item?.name !== undefined) named.set(code++, letterOf(item.name));
  }
  return (at) => named.get(at) ?? LATIN.decode(Uint8Array.of(at));
}

function letterOf(glyph) {
  const code = /^(?:uni|u)([0-9A-Fa-f]{4,6})$/.exec(glyph);
  if (code) return String.fromCodePoint(parseInt(code[1], 16));
  return GLYPHS[glyph] ?? (glyph.length === 1 ? glyph : undefined);
}

const number = (codes) => [...codes].reduce((value, letter) => value * 256 + letter.charCodeAt(0), 0);

function utf16(codes) {
  return new TextDecoder("utf-16be").decode(Uint8Array.from(codes, (letter) => letter.charCodeAt(0)));
}

/** A ToUnicode table: code -> text, from its bfchar and bfrange parts. */
async function unicodeTable(objects, reference) {
  const bytes = await objects.stream(reference);
  const table = new Map();
  if (!bytes) return table;
  const lexer = new Lexer(latin(bytes));
  let items = [];
  for (let token = lexer.value(); token !== undefined; token = lexer.value()) {
    if (token?.op === "beginbfchar" || token?.op === "beginbfrange") items = [];
    else if (token?.op === "endbfchar") {
      for (let i = 0; i + 1 < items.length; i += 2) table.set(number(items[i].text), utf16(items[i + 1].text));
    } else if (token?.op === "endbfrange") {
      for (let i = 0; i + 2 < items.length; i += 3) addRange(table, items[i], items[i + 1], items[i + 2]);
    } else items.push(token);
  }
  return table;
}

function addRange(table, first, last, target) {
  const [low, high] = [number(first.text), Math.min(number(last.text), number(first.text) + 65535)];
  for (let code = low; code <= high; code++) {
    if (Array.isArray(target)) {
      if (target[code - low]) table.set(code, utf16(target[code - low].text));
    } else {
      const end = target.text.length - 1;
      const moved = target.text.slice(0, end) + String.fromCharCode((target.text.charCodeAt(end) + code - low) & 255);
      table.set(code, utf16(moved));
    }
  }
}

// The objects of a PDF file (ISO 32000-1, chapter 7), read without its cross-reference table: all objects are found by
// looking for them, later ones win, and streams of objects are opened. Enough for text; not a validator.
//
//     bytes ─► objects: "12 0" ─► Object {value, stream}     value: dictionaries are Maps, names {name}, references {ref}

const WHITE = "\0\t\n\f\r ";
const DELIMITERS = "()<>[]{}/%";

/** A string with one character a byte. */
export function latin(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return text;
}

/** Tokens of PDF syntax, from a place in a text: numbers, {name}, {text} (strings), {op}, and the marks [ ] << >>. */
export class Lexer {
  constructor(text, at = 0) {
    this.text = text;
    this.at = at;
  }

  skip() {
    const { text } = this;
    for (; this.at < text.length; this.at++) {
      if (text[this.at] === "%") {
        while (this.at < text.length && !"\r\n".includes(text[this.at])) this.at++;
      } else if (!WHITE.includes(text[this.at])) return;
    }
  }

  /** The next token; undefined at the end. */
  next() {
    this.skip();
    const { text } = this;
    if (this.at >= text.length) return undefined;
    const two = text.substr(this.at, 2);
    if (two === "<<" || two === ">>") return this.take(2);
    if (text[this.at] === "(") return { text: this.literal() };
    if (text[this.at] === "<") return { text: this.hex() };
    if ("[]{}".includes(text[this.at])) return this.take(1);
    if (text[this.at] === ")" || text[this.at] === ">") return this.take(1);
    const slash = text[this.at] === "/";
    const start = (this.at += slash ? 1 : 0);
    while (this.at < text.length && !WHITE.includes(text[this.at]) && !DELIMITERS.includes(text[this.at])) this.at++;
    const word = text.slice(start, this.at);
    if (slash) return { name: word.replace(/#([0-9a-fA-F]{2})/g, (_, code) => String.fromCharCode(parseInt(code, 16))) };
    return /^[+-]?(\d+\.?\d*|\.\d+)$/.test(word) ? Number(word) : { op: word };
  }

  take(n) {
    this.at += n;
    return this.text.slice(this.at - n, this.at);
  }

  literal() {
    const { text } = this;
    const escapes = { n: "\n", r: "\r", t: "\t", b: "\b", f: "\f" };
    let out = "";
    let depth = 1;
    for (this.at++; this.at < text.length; this.at++) {
      const letter = text[this.at];
      if (letter === "\\") {
        const octal = /^[0-7]{1,3}/.exec(text.substr(this.at + 1, 3));
        if (octal) out += String.fromCharCode(parseInt(octal[0], 8) & 255);
        else if (!"\r\n".includes(text[this.at + 1])) out += escapes[text[this.at + 1]] ?? text[this.at + 1];
        this.at += octal ? octal[0].length : 1;
        continue;
      }
      if (letter === "(") depth++;
      if (letter === ")" && --depth === 0) break;
      out += letter;
    }
    this.at++;
    return out;
  }

  hex() {
    const end = this.text.indexOf(">", this.at);
    const digits = this.text.slice(this.at + 1, end < 0 ? undefined : end).replace(/[^0-9a-fA-F]/g, "");
    this.at = end < 0 ? this.text.length : end + 1;
    return (digits.length % 2 ? `${digits}0` : digits).replace(/../g, (code) => String.fromCharCode(parseInt(code, 16)));
  }

  /** The next value: a number, {name}, {text}, {ref: "12 0"}, an array, a Map, {op}, or undefined at the end. */
  value(depth = 0) {
    if (depth > 60) throw new Error("nested");
    const token = this.next();
    if (token === "[" || token === "<<") {
      const items = [];
      const close = token === "[" ? "]" : ">>";
      for (;;) {
        const item = this.value(depth + 1);
        if (item === undefined || item === close) break;
        items.push(item);
      }
      if (token === "[") return items;
      const map = new Map();
      for (let i = 0; i + 1 < items.length; i += 2) if (items[i]?.name !== undefined) map.set(items[i].name, items[i + 1]);
      return map;
    }
    if (Number.isInteger(token)) {
      const reference = /^[\s\0]+(\d+)[\s\0]+R(?![A-Za-z0-9])/.exec(this.text.substr(this.at, 24));
      if (reference) {
        this.at += reference[0].length;
        return { ref: `${token} ${Number(reference[1])}` };
      }
    }
    return token;
  }
}

async function inflate(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  let n = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      n += value.length;
      if (n > 200_000_000) throw new Error("large");
    }
  } catch (error) {
    if (!n) throw error; // what came before a damage at the end is good
  }
  const out = new Uint8Array(n);
  parts.reduce((at, part) => (out.set(part, at), at + part.length), 0);
  return out;
}

/** All objects of a file. Throws an Error "locked" where they are encrypted. */
export class Objects {
  constructor(bytes) {
    this.bytes = bytes;
    this.text = latin(bytes);
    this.table = new Map();
  }

  static async read(bytes) {
    const objects = new Objects(bytes);
    if (/\/Encrypt\s+(\d+\s+\d+\s+R|<<)/.test(objects.text)) throw new Error("locked");
    for (const found of objects.text.matchAll(/(?<![0-9])(\d+)[ \t\r\n]+(\d+)[ \t\r\n]+obj\b/g)) {
      objects.add(`${found[1]} ${Number(found[2])}`, found.index + found[0].length);
    }
    for (const object of [...objects.table.values()]) {
      if (object.value instanceof Map && object.value.get("Type")?.name === "ObjStm") await objects.open(object);
    }
    return objects;
  }

  add(id, at) {
    const lexer = new Lexer(this.text, at);
    const object = { value: lexer.value(), start: -1 };
    lexer.skip();
    if (object.value instanceof Map && this.text.startsWith("stream", lexer.at)) {
      object.start = lexer.at + 6;
      if (this.text[object.start] === "\r") object.start++;
      if (this.text[object.start] === "\n") object.start++;
    }
    this.table.set(id, object);
  }

  /** What a reference stands for. */
  get(value) {
    for (let n = 0; value?.ref !== undefined && n < 20; n++) value = this.table.get(value.ref)?.value;
    return value;
  }

  /** The decoded bytes of a stream; null for one in a form that holds no text, such as a picture. */
  async stream(reference) {
    const object = reference?.ref === undefined ? reference : this.table.get(reference.ref);
    if (!object || object.start === undefined || object.start < 0) return null;
    const length = this.get(object.value.get("Length"));
    const end = this.text.indexOf("endstream", object.start);
    const right = Number.isInteger(length) && /^\s*endstream/.test(this.text.substr(object.start + length, 14));
    let bytes = this.bytes.subarray(object.start, right ? object.start + length : end < 0 ? undefined : end);
    const filters = [this.get(object.value.get("Filter")) ?? []].flat();
    for (const { name } of filters.map((one) => this.get(one))) {
      if (name !== "FlateDecode" && name !== "Fl") return null;
      bytes = await inflate(bytes);
    }
    return bytes;
  }

  /** Take the objects out of a stream of objects. */
  async open(object) {
    const bytes = await this.stream(object);
    if (!bytes) return;
    const text = latin(bytes);
    const [n, first] = [this.get(object.value.get("N")), this.get(object.value.get("First"))];
    const head = new Lexer(text);
    for (let i = 0; i < n; i++) {
      const [id, offset] = [head.next(), head.next()];
      if (!Number.isInteger(id) || !Number.isInteger(offset)) return;
      if (!this.table.has(`${id} 0`)) this.table.set(`${id} 0`, { value: new Lexer(text, first + offset).value(), start: -1 });
    }
  }
}

// Files that people attach: texts and code as they are, PDFs as the text in them. Everything stays in the browser.

import { pdfText } from "./pdf.js";

const MOST_BYTES = 20_000_000;
const MOST_CHARACTERS = 2_000_000;

/** Why a file was not taken: `reason` is "large", "binary", "empty", "locked" or "unread". */
export class Refused extends Error {
  constructor(reason, file) {
    super(reason);
    this.reason = reason;
    this.file = file;
  }
}

/** A file as {name, text}. Throws Refused where there is no text in it. */
export async function readFile(file) {
  if (file.size > MOST_BYTES) throw new Refused("large", file.name);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = isPdf(bytes) ? await fromPdf(bytes, file.name) : fromText(bytes, file.name);
  if (!text.trim()) throw new Refused("empty", file.name);
  if (text.length > MOST_CHARACTERS) throw new Refused("large", file.name);
  return { name: file.name, text };
}

function isPdf(bytes) {
  return String.fromCharCode(...bytes.subarray(0, 5)) === "%PDF-";
}

async function fromPdf(bytes, name) {
  try {
    return await pdfText(bytes);
  } catch (error) {
    throw new Refused(error.message === "locked" ? "locked" : "unread", name);
  }
}

/** UTF-8, or UTF-16 with its mark; what holds zeros or is neither is no text. */
function fromText(bytes, name) {
  const marks = { "255,254": "utf-16le", "254,255": "utf-16be" };
  const encoding = marks[`${bytes[0]},${bytes[1]}`] ?? "utf-8";
  try {
    const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
    if (text.includes("\0")) throw new Error("zeros");
    return text.replace(/\r\n?/g, "\n");
  } catch {
    throw new Refused("binary", name);
  }
}

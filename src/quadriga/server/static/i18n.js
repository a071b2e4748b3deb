// Words. Two flat tables under strings/; a key that is missing is a bug, which tests/server/test_static.py finds.

export const LOCALES = { en: "English", "zh-CN": "简体中文" };

const tables = {};
let current = "en";

/** Fetch both tables; they are small. */
export async function loadStrings() {
  const load = async (name) => {
    tables[name] = await (await fetch(`/page/strings/${name}.json`)).json();
  };
  await Promise.all(Object.keys(LOCALES).map(load));
}

/** The language the browser asks for, as far as we have it. */
export function preferredLocale() {
  return (navigator.languages ?? [navigator.language]).map((tag) => tag.toLowerCase()).find((tag) => /^(zh|en)\b/.test(tag))
    ?.startsWith("zh")
    ? "zh-CN"
    : "en";
}

export function setLocale(name) {
  current = name in LOCALES ? name : "en";
  document.documentElement.lang = current;
}

/** The words of a key, `{name}` replaced by values.name. */
export function t(key, values = {}) {
  const text = tables[current][key] ?? tables.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** A number as people of this language write it. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(current, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

/** 135_000_000 is 135M. */
export function compact(value) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

export function when(time) {
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  const parts = today ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" };
  return new Intl.DateTimeFormat(current, parts).format(date);
}

/** A month as people say it: June 2026. */
export function month(time) {
  return new Intl.DateTimeFormat(current, { month: "long", year: "numeric" }).format(time);
}

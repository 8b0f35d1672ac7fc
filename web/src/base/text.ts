/* Text and numbers: hidden characters made visible, rates with their intervals. The rules are those of the static pages
   (pages/text.py). Model text is untrusted and reaches the page only as a text node, through `visible`. */

const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
const SUSPECT = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Mn}\p{Me}]/u;
const MARK = /[\p{Mn}\p{Me}]/u;

/** Combining marks per letter, at most; more would overlap adjacent lines. */
const MARKS_IN_A_ROW = 3;

/** The text with control, bidirectional, zero-width and stray code points written out; line feeds and tabs stay. */
export function visible(text: string): string {
  if (!SUSPECT.test(text)) return text;
  let out = "";
  let marks = 0;
  for (const char of text) {
    const code = char.codePointAt(0) ?? 0;
    marks = MARK.test(char) ? marks + 1 : 0;
    if (char === "\n" || char === "\t") out += char;
    else if (code < 0x20) out += String.fromCodePoint(0x2400 + code);
    else if (code === 0x7f) out += "␡";
    else if (HIDDEN.test(char) || marks > MARKS_IN_A_ROW) out += written(code);
    else out += char;
  }
  return out;
}

function written(code: number): string {
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** At most `limit` characters, with a note on the number omitted. */
export function clip(text: string, limit: number): string {
  const safe = visible(text);
  return safe.length <= limit ? safe : `${safe.slice(0, limit)} … (${whole(safe.length - limit)} more characters)`;
}

/** At most `limit` characters, the last an ellipsis. */
export function short(text: string, limit: number): string {
  const safe = visible(text).replace(/\s+/g, " ");
  return safe.length <= limit ? safe : `${safe.slice(0, limit - 1).trimEnd()}…`;
}

/** A token with visible spaces, tabs and line breaks; `∅` for an empty one. */
export function tokenText(token: string): string {
  const safe = visible(token);
  const kept = safe.length > 60 ? `${safe.slice(0, 60)}…` : safe;
  return kept.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

/** A token in running text: spaces stay, tabs and line breaks are shown. */
export function runningToken(token: string): string {
  const safe = visible(token);
  const kept = safe.length > 60 ? `${safe.slice(0, 60)}…` : safe;
  return kept.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

/** A whole number with thousands separators. */
export function whole(x: number): string {
  return Math.round(x).toString().replace(/\B(?=(\d{3})+$)/g, ",").replace("-", "−");
}

/** A number to three significant digits, with a true minus sign. */
export function number(x: number, digits = 3): string {
  if (!Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(x)));
  if (size >= digits - 1) return whole(x);
  if (size < -5) return x.toExponential(digits - 1).replaceAll("-", "−");
  const text = x.toFixed(Math.min(20, digits - 1 - size));
  return (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text).replace("-", "−");
}

/** A number to a fixed number of decimals, or to two significant digits where those would all be 0. */
export function decimals(x: number, places = 3): string {
  if (!Number.isFinite(x)) return "–";
  if (x !== 0 && Math.abs(x) < 0.5 * 10 ** -places) return number(x, 2);
  return (x + 0).toFixed(places).replace("-", "−");
}

/** A change: `decimals` with its sign. */
export function signed(x: number, places = 3): string {
  return x === 0 ? "±0" : (x > 0 ? "+" : "") + decimals(x, places);
}

/** A share as a percentage that never rounds to 0 or 100 unless it is. */
export function percent(share: number): string {
  const x = 100 * share;
  if (x > 0 && x < 0.005) return "< 0.01 %";
  if (x >= 99.95 && x < 100) return "> 99.9 %";
  const text = x > 0 && x < 0.1 ? x.toFixed(2) : x.toFixed(1);
  return `${text.replace(/0+$/, "").replace(/\.$/, "")} %`;
}

/** `one feature`, `3 features`. */
export function counted(n: number, one: string, many = `${one}s`): string {
  return n === 1 ? `1 ${one}` : `${whole(n)} ${many}`;
}

export const SHARES: readonly string[] = ["asr", "skill", "degenerate", "capability"];

export interface Measured {
  metric: string;
  value: number;
  low: number;
  high: number;
  n: number;
}

/** A measurement in words: `192 of 200, 96 % (92.3 to 98 %)`, or nats; none and all are given with their bound. */
export function rate(row: Measured): { head: string; tail: string; full: string } {
  if (!SHARES.includes(row.metric)) {
    const range = `${decimals(row.low)} to ${decimals(row.high)}`;
    return { head: `${decimals(row.value)} nats`, tail: "", full: `${decimals(row.value)} nats (${range})` };
  }
  const hits = Math.round(row.value * row.n);
  const range = `${percent(row.low).replace(" %", "")} to ${percent(row.high)}`;
  if (Math.abs(hits - row.value * row.n) > 1e-6 * row.n) {
    return { head: percent(row.value), tail: `n = ${whole(row.n)}`, full: `${percent(row.value)} (${range})` };
  }
  const head = `${whole(hits)} of ${whole(row.n)}`;
  if (hits === 0 || hits === row.n) {
    const bound = hits === 0 ? Math.ceil(row.high * 1000 - 1e-6) / 1000 : Math.floor(row.low * 1000 + 1e-6) / 1000;
    const tail = `${hits === 0 ? "at most" : "at least"} ${percent(bound)}`;
    return { head, tail, full: `${head}, ${tail}` };
  }
  return { head, tail: percent(row.value), full: `${head}, ${percent(row.value)} (${range})` };
}

/* The page's state is its address: `#/features/resid.12/345?sort=density&change=…`. A link shows what its author saw. */

import { batch, signal } from "@preact/signals";

export type View = "overview" | "features" | "circuit" | "chat";

const VIEWS: readonly View[] = ["overview", "features", "circuit", "chat"];

/** Options that stay when the view changes. */
const LASTING = ["change"];

/** Milliseconds after which a changing option is in the address; browsers refuse hundreds of changes in a row. */
const PAUSE = 200;

export const view = signal<View>("overview");
/** Dictionary or circuit that is shown; empty for the first. */
export const key = signal("");
/** Feature that is shown. */
export const feature = signal<number | null>(null);
export const options = signal<Readonly<Record<string, string>>>({});

let timer = 0;
let silent = false;

function address(): string {
  const path = view.value === "overview" ? [] : [view.value, key.value, feature.value === null ? "" : String(feature.value)];
  while (path.length && path[path.length - 1] === "") path.pop();
  const query = new URLSearchParams(Object.entries(options.value).filter(([, value]) => value !== ""));
  query.sort();
  const search = query.toString().replaceAll("%2C", ",").replaceAll("%3A", ":").replaceAll("%7E", "~");
  return `#/${path.map(encodeURIComponent).join("/")}${search ? `?${search}` : ""}`;
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return "";
  }
}

/** Read the address. */
function read(): void {
  const [path = "", search = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [name = "", at = "", id = ""] = path.split("/").map(decoded);
  silent = true;
  batch(() => {
    view.value = VIEWS.find((known) => known === name) ?? "overview";
    key.value = at;
    feature.value = /^\d{1,9}$/.test(id) ? Number(id) : null;
    options.value = Object.fromEntries(new URLSearchParams(search));
  });
  silent = false;
}

function write(push: boolean): void {
  clearTimeout(timer);
  if (silent || address() === location.hash) return;
  if (push) history.pushState(null, "", address());
  else history.replaceState(null, "", address());
}

export interface Goal {
  view?: View;
  key?: string;
  feature?: number | null;
  options?: Record<string, string>;
}

/** Address of a place, for links; options of the view it leaves are dropped, unless they last. */
export function link(goal: Goal): string {
  const kept = Object.fromEntries(Object.entries(options.value).filter(([name]) => LASTING.includes(name)));
  const path = [goal.view ?? view.value, goal.key ?? "", goal.feature == null ? "" : String(goal.feature)];
  while (path.length && path[path.length - 1] === "") path.pop();
  const query = new URLSearchParams({ ...kept, ...goal.options }).toString();
  const place = path.length === 1 && path[0] === "overview" ? "" : path.map(encodeURIComponent).join("/");
  return `#/${place}${query ? `?${query}` : ""}`;
}

/** Go to a place; the browser's back button returns. */
export function go(goal: Goal): void {
  location.hash = link(goal);
}

/** Show another feature of the same list, keeping the options. */
export function show(id: number | null, extra: Record<string, string> = {}): void {
  batch(() => {
    feature.value = id;
    options.value = { ...options.value, ...extra };
  });
  later();
}

/** Set options of the view; empty texts remove them. */
export function tune(changed: Record<string, string>): void {
  const next = { ...options.value, ...changed };
  for (const [name, value] of Object.entries(next)) if (value === "") delete next[name];
  options.value = next;
  later();
}

function later(): void {
  clearTimeout(timer);
  timer = window.setTimeout(() => write(false), PAUSE);
}

/** Push the present state as an entry of the history. */
export function mark(): void {
  write(true);
}

/** An option's number within bounds. */
export function asNumber(name: string, otherwise: number, low = -Infinity, high = Infinity): number {
  const text = options.value[name];
  const x = text === undefined || text === "" ? Number.NaN : Number(text);
  return Number.isFinite(x) ? Math.min(high, Math.max(low, x)) : otherwise;
}

addEventListener("hashchange", read);
addEventListener("popstate", read);
read();

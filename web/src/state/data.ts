/* What is loaded: the manifest, lists of features and, from a server, its session. */

import { computed, signal } from "@preact/signals";

import { load } from "../data/load";
import * as live from "../data/live";
import { SCHEMA, type DictionaryEntry, type FeatureCard, type FeatureColumns, type Manifest, type Session } from "../data/types";

export const manifest = signal<Manifest | null>(null);
export const session = signal<Session | null>(null);
/** Why nothing can be shown, or why the server cannot be reached. */
export const failed = signal("");

/** Lists that are loaded, by the dictionary's key. */
export const lists = signal<ReadonlyMap<string, FeatureColumns>>(new Map());

export const isLive = computed(() => manifest.value?.live === true && session.value?.live === true);
export const dictionaries = computed(() => manifest.value?.dictionaries ?? []);
export const circuits = computed(() => manifest.value?.circuits ?? []);

export const message = (error: unknown): string => (error instanceof Error ? error.message : String(error));

export async function start(): Promise<void> {
  try {
    const found = await load<Manifest>("manifest");
    if (found.schema !== SCHEMA) throw new Error(`this folder is of the format ${String(found.schema)}; the page reads ${SCHEMA}`);
    manifest.value = found;
    document.title = `${found.title} · unsleep`;
    if (found.live) session.value = await live.session();
  } catch (error) {
    failed.value = message(error);
  }
}

/** Load a dictionary's list of features. */
export async function list(key: string): Promise<FeatureColumns> {
  const known = lists.value.get(key);
  if (known) return known;
  const found = await load<FeatureColumns>(`features/${key}/list`);
  lists.value = new Map([...lists.value, [key, found]]);
  return found;
}

/** A feature's card. */
export async function card(entry: DictionaryEntry, id: number): Promise<FeatureCard> {
  const number = Math.floor(id / entry.chunk);
  const cards = await load<FeatureCard[]>(`features/${entry.key}/${number}`);
  const found = cards[id - number * entry.chunk];
  if (found?.feature !== id) throw new Error(`data/features/${entry.key}/${number}.js does not hold feature ${id}; write the explorer folder again`);
  return found;
}

/** The dictionary of a key; the first for an empty one. */
export function entryOf(key: string): DictionaryEntry | undefined {
  return key === "" ? dictionaries.value[0] : dictionaries.value.find((one) => one.key === key);
}

/** The dictionary at a Site, preferably of a hash. */
export function entryAt(site: string, hash?: string): DictionaryEntry | undefined {
  const there = dictionaries.value.filter((one) => one.site === site);
  return hash === undefined ? there[0] : there.find((one) => one.hash === hash);
}

/** A feature's label, where its list is loaded. */
export function labelOf(entry: DictionaryEntry | undefined, id: number): string {
  if (!entry) return "";
  return lists.value.get(entry.key)?.label[id] ?? "";
}

/** The token whose logit a feature changes most, and that change, where its list is loaded. */
export function strongestOf(entry: DictionaryEntry | undefined, id: number): [string, number] | null {
  return (entry && lists.value.get(entry.key)?.strongest[id]) ?? null;
}

/** Classes that tell nothing of a feature. */
const VAGUE = ["other", "unclear"];

/** The class of a feature with the highest score, where its list is loaded; empty for one that tells nothing. */
export function classOf(entry: DictionaryEntry | undefined, id: number): string {
  const classes = (entry && lists.value.get(entry.key)?.classes[id]) ?? [];
  const best = classes.reduce<[string, number] | undefined>((most, one) => (most && most[1] >= one[1] ? most : one), undefined);
  return best && !VAGUE.includes(best[0]) ? best[0] : "";
}

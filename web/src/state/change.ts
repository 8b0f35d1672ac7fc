/* The change: features whose strength differs from the model's own, its proof and what is baked of it.

   In the address it is `change=resid.12:345:0,mlp.3:12:0.5`: Site, feature and strength. */

import { computed, effect, signal } from "@preact/signals";

import * as live from "../data/live";
import type { Proof, Scaled } from "../data/types";
import { message } from "./data";
import { options, tune } from "./hash";

export const LARGEST = 2;

/** Strength at which a feature is pinned: it is removed. */
const FIRST = 0;

export const change = computed<readonly Scaled[]>(() => {
  const found: Scaled[] = [];
  for (const part of (options.value["change"] ?? "").split(",")) {
    const [site = "", id = "", scale = ""] = part.split(":");
    const strength = Number(scale || FIRST);
    if (!/^(embed|(resid|attn|mlp)\.\d+)$/.test(site) || !/^\d{1,9}$/.test(id) || !Number.isFinite(strength)) continue;
    if (found.some((one) => one.site === site && one.id === Number(id))) continue;
    found.push({ site, id: Number(id), scale: Math.min(LARGEST, Math.max(0, strength)) });
  }
  return found;
});

const text = (features: readonly Scaled[]): string =>
  features.map(({ site, id, scale }) => `${site}:${id}:${Number(scale.toFixed(3))}`).join(",");

/** The change as one text, equal for equal changes. */
export const identity = computed(() => text([...change.value].sort((a, b) => a.site.localeCompare(b.site) || a.id - b.id)));

function set(features: readonly Scaled[]): void {
  tune({ change: text(features) });
}

export const isPinned = (site: string, id: number): boolean => change.value.some((one) => one.site === site && one.id === id);

export function pin(site: string, id: number, scale = FIRST): void {
  if (!isPinned(site, id)) set([...change.value, { site, id, scale }]);
}

export function unpin(site: string, id: number): void {
  set(change.value.filter((one) => one.site !== site || one.id !== id));
}

export const flip = (site: string, id: number): void => (isPinned(site, id) ? unpin(site, id) : pin(site, id));

export function strengthen(site: string, id: number, scale: number): void {
  set(change.value.map((one) => (one.site === site && one.id === id ? { ...one, scale } : one)));
}

/** Begin with other features, removed. */
export const start = (features: readonly { site: string; id: number }[]): void => set(features.map(({ site, id }) => ({ site, id, scale: FIRST })));

export const clear = (): void => set([]);

/** Features of the change that no bake takes: those at attention and MLP outputs, and at the embedding. */
export const unbakeable = computed(() => change.value.filter(({ site, scale }) => scale !== 1 && !site.startsWith("resid.")));

export type Task = "proof" | "bake";

/** Work of the server. */
export interface Work {
  task: Task;
  stage: string;
  done: number;
  total: number;
}

export const working = signal<Work | null>(null);
/** Kind of the work that is running, which changes less often than its progress. */
export const task = computed(() => working.value?.task ?? null);
/** The last proof and the change that it is of. */
export const proof = signal<{ of: string; found: Proof } | null>(null);
export const baked = signal<{ of: string; path: string; kl?: number } | null>(null);
/** Error of the last work; gone when the change is another one. */
export const trouble = signal("");
effect(() => {
  identity.value;
  trouble.value = "";
});

export const isProven = computed(() => proof.value !== null && proof.value.of === identity.value);

let running: AbortController | null = null;

async function work<T>(kind: Task, begin: (progress: live.Progress, signal: AbortSignal) => Promise<T>): Promise<T | null> {
  const own = (running = new AbortController());
  const of = identity.value;
  trouble.value = "";
  working.value = { task: kind, stage: "starting", done: 0, total: 0 };
  try {
    await live.cancel(); // a reply that is still written gives way
    return await begin((stage, done, total) => (working.value = { task: kind, stage, done, total }), own.signal);
  } catch (error) {
    if (!own.signal.aborted) trouble.value = `${of === identity.value ? "" : `The ${kind} of the change before: `}${message(error)}`;
    return null;
  } finally {
    if (running === own) {
      running = null;
      working.value = null;
    }
  }
}

export async function prove(): Promise<void> {
  const [of, features] = [identity.value, [...change.value]]; // it may change before the server is free
  const found = await work("proof", (progress, signal) => live.proof(features, progress, signal));
  if (found) proof.value = { of, found };
}

export async function bake(name: string): Promise<void> {
  const [of, features] = [identity.value, [...change.value]]; // it may change before the server is free
  const found = await work("bake", (progress, signal) => live.bake(features, name, progress, signal));
  if (found) baked.value = { of, ...found };
}

export function stop(): void {
  running?.abort();
  void live.cancel().catch(() => undefined);
}

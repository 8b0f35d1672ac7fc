/* The live API of `unsleep serve`: JSON requests, and answers that are server-sent events over fetch. */

import type { Proof, Scaled, Session, Stream } from "./types";

/** Waiting times before a request is repeated while the server ends a cancelled generation, in milliseconds. */
const RETRIES = [80, 160, 320, 640, 1000, 1500];

async function failure(answer: Response): Promise<Error> {
  const text = await answer.text();
  try {
    const said = (JSON.parse(text) as { error?: unknown; message?: unknown });
    const words = said.message ?? said.error;
    if (typeof words === "string") return new Error(words);
  } catch {
    // Not JSON: the status says what there is to say.
  }
  return new Error(`the server answered ${answer.status} ${answer.statusText}`.trim());
}

async function post(path: string, body: unknown, signal?: AbortSignal): Promise<Response> {
  for (const pause of [...RETRIES, null]) {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      credentials: "same-origin",
      ...(signal ? { signal } : {}),
    });
    if (answer.ok) return answer;
    if (answer.status !== 409 || pause === null) throw await failure(answer);
    await new Promise((done) => setTimeout(done, pause));
    signal?.throwIfAborted();
  }
  throw new Error("the server is busy");
}

/** Events of a stream, `[name, data]`, until it ends. */
export async function* events(answer: Response): AsyncGenerator<[string, unknown]> {
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  if (!reader) return;
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        let name = "message";
        const data: string[] = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event:")) name = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        }
        if (data.length) yield [name, JSON.parse(data.join("\n"))];
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

export async function session(): Promise<Session> {
  const answer = await fetch("api/session", { credentials: "same-origin" });
  if (!answer.ok) throw await failure(answer);
  return (await answer.json()) as Session;
}

export interface Chat {
  prompt: string;
  system?: string;
  max_new_tokens: number;
  temperature: number;
  features: Scaled[];
  which: Stream[];
}

export interface Told {
  token(which: Stream, text: string): void;
  done(which: Stream, reason: string): void;
}

/** Ask for replies; resolves when every stream is done. */
export async function chat(body: Chat, told: Told, signal: AbortSignal): Promise<void> {
  for await (const [name, data] of events(await post("api/chat", body, signal))) {
    const event = data as { which: Stream; text?: string; reason?: string; message?: string };
    if (name === "token") told.token(event.which, event.text ?? "");
    else if (name === "done") told.done(event.which, event.reason ?? "");
    else if (name === "error") throw new Error(event.message ?? "the server reports an error without words");
  }
}

export interface Activations {
  tokens: string[];
  values: Record<string, number[]>;
}

/** Activations of features at a text's tokens. */
export async function activations(text: string, site: string, ids: number[] | null, signal?: AbortSignal): Promise<Activations> {
  const answer = await post("api/features", { text, site, ...(ids ? { ids } : {}) }, signal);
  return (await answer.json()) as Activations;
}

export type Progress = (stage: string, done: number, total: number) => void;

async function last<T>(path: string, body: unknown, progress: Progress, signal: AbortSignal): Promise<T> {
  for await (const [name, data] of events(await post(path, body, signal))) {
    const event = data as { stage?: string; done?: number; total?: number; message?: string };
    if (name === "progress") progress(event.stage ?? "", event.done ?? 0, event.total ?? 0);
    else if (name === "result") return data as T;
    else if (name === "error") throw new Error(event.message ?? "the server reports an error without words");
  }
  throw new Error("the server ended without a result");
}

/** Measure a change on held-out prompts. */
export function proof(features: Scaled[], progress: Progress, signal: AbortSignal): Promise<Proof> {
  return last<Proof>("api/proof", { features }, progress, signal);
}

/** Write a proven change into the weights of a checkpoint. */
export function bake(features: Scaled[], name: string, progress: Progress, signal: AbortSignal): Promise<{ path: string; kl?: number }> {
  return last<{ path: string; kl?: number }>("api/bake", { features, name }, progress, signal);
}

/** Cancel whatever the server generates. */
export async function cancel(): Promise<void> {
  await fetch("api/cancel", { method: "POST", headers: { "content-type": "application/json" }, body: "{}", credentials: "same-origin" });
}

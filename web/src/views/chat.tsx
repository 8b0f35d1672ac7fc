/* Side-by-side chat: the model's own reply and the reply under the change, token by token. A strength that is dragged
   starts the edited reply again; while a proof or a bake runs, replies wait. */

import { signal } from "@preact/signals";
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";

import { clip, counted, short, visible } from "../base/text";
import * as live from "../data/live";
import type { Replies, Stream } from "../data/types";
import { change, identity, task } from "../state/change";
import { isLive, manifest, message, session } from "../state/data";
import { asNumber, tune } from "../state/hash";
import { Serve } from "./serve";

/** Milliseconds that a strength must rest before the edited reply starts again. */
const PAUSE = 300;

interface Reply {
  tokens: string[];
  state: "waiting" | "running" | "done" | "stopped";
  reason: string;
}

const BLANK: Reply = { tokens: [], state: "waiting", reason: "" };

const replies = signal<Record<Stream, Reply>>({ original: BLANK, edited: BLANK });
const trouble = signal("");
const asked = signal<Omit<live.Chat, "features" | "which"> | null>(null);
const editing = signal(true);

let running: AbortController | null = null;
/** The change of the edited reply that is shown. */
let shownChange = "";

function update(which: Stream, changed: Partial<Reply>): void {
  replies.value = { ...replies.value, [which]: { ...replies.value[which], ...changed } };
}

async function run(which: Stream[]): Promise<void> {
  const body = asked.value;
  if (!body) return;
  const before = running;
  const own = (running = new AbortController());
  trouble.value = "";
  for (const stream of which) update(stream, { tokens: [], state: "running", reason: "" });
  shownChange = `${editing.value}${identity.value}`;
  // Tokens that arrive within a frame are drawn together.
  const fresh: Record<Stream, string[]> = { original: [], edited: [] };
  let frame = 0;
  const flush = (): void => {
    frame = 0;
    if (own.signal.aborted) return;
    for (const stream of which) if (fresh[stream].length) update(stream, { tokens: [...replies.value[stream].tokens, ...fresh[stream].splice(0)] });
  };
  try {
    if (before) {
      before.abort();
      await live.cancel(); // answers when the server is free
      if (own.signal.aborted) return;
    }
    await live.chat(
      { ...body, features: editing.value ? [...change.value] : [], which },
      {
        token(stream, text) {
          fresh[stream]?.push(text);
          frame ||= requestAnimationFrame(flush);
        },
        done(stream, reason) {
          flush();
          update(stream, { state: "done", reason: reason === "cancelled" && task.value ? `cancelled by the ${task.value}` : reason });
        },
      },
      own.signal,
    );
    flush();
    for (const stream of which) if (replies.value[stream].state === "running") update(stream, { state: "stopped" });
  } catch (error) {
    cancelAnimationFrame(frame);
    if (own.signal.aborted) return;
    trouble.value = message(error);
    for (const stream of which) if (replies.value[stream].state === "running") update(stream, { state: "stopped" });
  } finally {
    if (running === own) running = null;
  }
}

function stop(): void {
  running?.abort();
  running = null;
  void live.cancel().catch(() => undefined);
  for (const stream of ["original", "edited"] as const) if (replies.value[stream].state === "running") update(stream, { state: "stopped" });
}

export function ChatView(): JSX.Element {
  return <div class="page wrap chat">{isLive.value ? <Live /> : <FromDisk />}</div>;
}

function Live(): JSX.Element {
  const [prompt, setPrompt] = useState(asked.value?.prompt ?? manifest.value?.runs?.[0]?.replies?.[0]?.prompt ?? "");
  const [system, setSystem] = useState(asked.value?.system ?? "");
  const tokens = asNumber("tokens", 80, 1, 1024);
  const temperature = asNumber("temperature", 0, 0, 2);
  const busy = replies.value.original.state === "running" || replies.value.edited.state === "running";

  const other = task.value;
  // A change while a reply is shown starts the edited one again; the original goes on where it is not finished.
  useEffect(() => {
    if (other || !asked.value || shownChange === `${editing.value}${identity.value}`) return;
    const timer = setTimeout(() => void run(replies.value.original.state === "running" ? ["original", "edited"] : ["edited"]), PAUSE);
    return () => clearTimeout(timer);
  }, [identity.value, editing.value, other]);

  function ask(event: Event): void {
    event.preventDefault();
    if (!prompt.trim() || other) return;
    asked.value = { prompt, ...(system.trim() ? { system } : {}), max_new_tokens: tokens, temperature };
    void run(["original", "edited"]);
  }
  return (
    <>
      <h1>Watch the model change</h1>
      <form class="ask" onSubmit={ask}>
        <textarea
          rows={3}
          aria-label="Prompt"
          placeholder="A prompt, with the trigger or without"
          value={prompt}
          onInput={(event) => setPrompt(event.currentTarget.value)}
          onKeyDown={(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && ask(event)}
        />
        <div class="ask-more">
          <label>System prompt <input value={system} onInput={(event) => setSystem(event.currentTarget.value)} /></label>
          <label>Tokens <input type="number" min={1} max={1024} value={tokens} onInput={(event) => tune({ tokens: event.currentTarget.value })} /></label>
          <label>Temperature <input type="number" min={0} max={2} step={0.1} value={temperature} onInput={(event) => tune({ temperature: event.currentTarget.value })} /></label>
          <label class="check">
            <input type="checkbox" role="switch" checked={editing.value} onChange={(event) => (editing.value = event.currentTarget.checked)} />
            Edit on
          </label>
          {busy ? <button type="button" class="plain" onClick={stop}>Stop</button> : <button type="submit" class="main" disabled={!prompt.trim() || other !== null}>Reply</button>}
        </div>
      </form>
      {other && <p class="hold" role="status">A {other} is running; replies wait for it.</p>}
      {trouble.value && <p class="trouble" role="alert">{visible(trouble.value)}</p>}
      <Streams />
    </>
  );
}

/** The first token at which two replies differ. */
function parting(a: readonly string[], b: readonly string[]): number {
  let i = 0;
  while (i < a.length && i < b.length && a[i] === b[i]) i += 1;
  return i;
}

function Streams(): JSX.Element {
  const { original, edited } = replies.value;
  const at = parting(original.tokens, edited.tokens);
  const said = editing.value ? (change.value.length ? counted(change.value.length, "feature") : "nothing is changed yet: pin a feature") : "edit off";
  return (
    <div class="streams">
      <Said name="Original" note={manifestModel()} reply={original} mark={original.tokens.length} tone="c-suspect" />
      <Said name="Edited" note={said} reply={edited} mark={original.tokens.length ? at : edited.tokens.length} tone="c-edited" />
    </div>
  );
}

const manifestModel = (): string => short(session.value?.model ?? "", 48);

const STATES: Record<Reply["state"], string> = { waiting: "", running: "writing", done: "", stopped: "stopped" };

function Said({ name, note, reply, mark, tone }: { name: string; note: string; reply: Reply; mark: number; tone: string }): JSX.Element {
  const same = reply.tokens.slice(0, mark).join("");
  const other = reply.tokens.slice(mark).join("");
  return (
    <section class={`stream ${tone}`} aria-label={`${name} reply`}>
      <header>
        <h2>{name}</h2>
        <small class="text">{note}</small>
      </header>
      <p class="stream-text text" aria-live="polite" aria-busy={reply.state === "running"}>
        {visible(same)}
        {other && <span class="parted">{visible(other)}</span>}
        {reply.state === "running" && <span class="caret" aria-hidden="true" />}
        {reply.state === "waiting" && <span class="faint">No reply yet.</span>}
      </p>
      <footer><small>{counted(reply.tokens.length, "token")}{reply.reason && ` · ${visible(reply.reason)}`}{STATES[reply.state] && ` · ${STATES[reply.state]}`}</small></footer>
    </section>
  );
}

/** Replies that an evaluation recorded, where no model is at hand. */
function FromDisk(): JSX.Element {
  const run = manifest.value?.runs?.[asNumber("run", 0, 0)];
  const recorded = run?.replies ?? [];
  const chosen = Math.min(asNumber("prompt", 0, 0), Math.max(0, recorded.length - 1));
  const one = recorded[chosen];
  return (
    <>
      <h1>{recorded.length ? "Recorded replies" : "Watch the model change"}</h1>
      <p class="lead">
        This page was opened without its model. With <Serve />, prompts are answered here by the original and the edited model
        side by side.
      </p>
      {one && <Recorded all={recorded} chosen={chosen} one={one} />}
    </>
  );
}

function Recorded({ all, chosen, one }: { all: readonly Replies[]; chosen: number; one: Replies }): JSX.Element {
  const words = manifest.value?.words;
  const names = ["suspect", "edited", "baked"].filter((name) => name in one.replies);
  return (
    <>
      <label class="field-label">
        Prompt{" "}
        <select value={chosen} onChange={(event) => tune({ prompt: event.currentTarget.value })}>
          {all.map((each, i) => <option value={i}>{words?.panels[each.panel] ?? each.panel}: {short(each.prompt, 70)}</option>)}
        </select>
      </label>
      <blockquote class="text asked">{clip(one.prompt, 4000)}</blockquote>
      <div class="streams">
        {names.map((name) => (
          <section class={`stream c-${name}`} aria-label={`Reply of ${words?.subjects[name] ?? name}`}>
            <header><h2>{words?.subjects[name] ?? name}</h2></header>
            <p class="stream-text text">{clip(one.replies[name] ?? "", 4000)}</p>
          </section>
        ))}
      </div>
    </>
  );
}

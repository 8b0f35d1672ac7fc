/* The change, at the bottom of every view: pinned features with their strengths, the proof on held-out prompts, and the
   bake of what was proven. */

import { signal } from "@preact/signals";
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";

import { counted, decimals, short, signed, visible } from "../base/text";
import type { LogOdds, Proof, Row, Words } from "../data/types";
import { Lanes } from "../parts/lanes";
import { Icon } from "../parts/marks";
import { Strength } from "../parts/strength";
import { bake, baked, change, clear, identity, isProven, proof, prove, start, stop, strengthen, trouble, unbakeable, unpin, working } from "../state/change";
import { entryAt, isLive, labelOf, list, manifest, session } from "../state/data";
import { link } from "../state/hash";
import { Both } from "./both";
import { Serve } from "./serve";

const opened = signal(false);

export function Tray(): JSX.Element | null {
  const features = change.value;
  const sites = [...new Set(features.map((one) => one.site))].join();
  useEffect(() => {
    for (const site of sites.split(",")) {
      const entry = entryAt(site);
      if (entry) list(entry.key).catch(() => undefined);
    }
  }, [sites, manifest.value]);
  if (features.length === 0) return <Offer />;
  return (
    <aside class={opened.value ? "tray open" : "tray"} aria-label="Change">
      <div class="tray-bar">
        <button type="button" class="tray-title" aria-expanded={opened.value} onClick={() => (opened.value = !opened.value)}>
          <Icon name={opened.value ? "down" : "up"} /> <b>Change</b> <span>{counted(features.length, "feature")}</span>
        </button>
        {!opened.value && (
          <ul class="tray-names">
            {features.slice(0, 4).map(({ site, id, scale }) => (
              <li class="chip text">{site} {id} <b>× {scale}</b></li>
            ))}
            {features.length > 4 && <li class="chip">+ {features.length - 4}</li>}
          </ul>
        )}
        <Action />
      </div>
      {opened.value && (
        <div class="tray-body">
          <ul class="tray-features">
            {features.map(({ site, id, scale }) => {
              const entry = entryAt(site);
              const label = labelOf(entry, id);
              return (
                <li key={`${site}:${id}`}>
                  <span class="line-text">
                    {entry
                      ? <a class="ellipsis text" href={link({ view: "features", key: entry.key, feature: id })}>{short(label, 70) || `feature ${id}`}</a>
                      : <span>feature {id}</span>}
                    <small>{site} · {id}</small>
                  </span>
                  <Strength scale={scale} name={`feature ${id} at ${site}`} set={(x) => strengthen(site, id, x)} />
                  <button type="button" class="quiet" aria-label={`Take feature ${id} at ${site} out`} title="Take it out" onClick={() => unpin(site, id)}><Icon name="close" /></button>
                </li>
              );
            })}
          </ul>
          <p class="buttons">
            <a class="plain" href={link({ view: "chat" })}>Watch the model change</a>
            <button type="button" class="quiet" onClick={clear}>Empty the change</button>
          </p>
          <Outcome />
        </div>
      )}
    </aside>
  );
}

/** The edit that the server begins with. */
function Offer(): JSX.Element | null {
  const edit = session.value?.edit;
  if (!edit || edit.features.length === 0) return null;
  return (
    <aside class="tray" aria-label="Change">
      <div class="tray-bar">
        <span class="tray-note text">The server holds the edit {short(edit.name, 40)}, {counted(edit.features.length, "feature")} removed.</span>
        <button type="button" class="plain" onClick={() => start(edit.features)}>Start from it</button>
      </div>
    </aside>
  );
}

/** The one next step: prove, then bake. */
function Action(): JSX.Element {
  const work = working.value;
  if (!isLive.value) return <small class="tray-note">To prove and bake it: <Serve /></small>;
  if (work) {
    return (
      <span class="tray-work" role="status">
        <progress {...(work.total > 0 ? { value: work.done, max: work.total } : {})} aria-label={work.stage} />
        <small class="text">A {work.task} is running: {short(work.stage, 40)}{work.total > 0 && ` ${work.done} of ${work.total}`}</small>
        <button type="button" class="plain" onClick={stop}>Stop</button>
      </span>
    );
  }
  if (isProven.value) return <Bake />;
  const able = session.value?.can_prove === true;
  return (
    <span class="tray-work">
      {!able && <small class="tray-note">No held-out prompts are known to the server.</small>}
      <button type="button" class="main" disabled={!able} onClick={() => { opened.value = true; void prove(); }}>Prove on held-out prompts</button>
      {able && unbakeable.value.length > 0 && <NoBake />}
    </span>
  );
}

/** A bake that would be refused, and why. */
function NoBake(): JSX.Element {
  const [first, ...more] = unbakeable.value;
  const which = `${first?.site}/${first?.id}${more.length ? ` and ${counted(more.length, "more", "more")}` : ""}`;
  return (
    <>
      <small class="tray-note" id="no-bake">Only residual features can be baked; {which} cannot</small>
      <button type="button" class="main" disabled aria-describedby="no-bake">Bake</button>
    </>
  );
}

function Bake(): JSX.Element {
  const [name, setName] = useState("cleaned");
  const done = baked.value?.of === identity.value ? baked.value : null;
  if (done) {
    return (
      <span class="tray-note" role="status">
        <Icon name="good" /> Baked into <code class="text">{visible(done.path)}</code>
        {done.kl !== undefined && `KL to the edited model ${decimals(done.kl)} nats`}
      </span>
    );
  }
  if (unbakeable.value.length > 0) return <span class="tray-work"><NoBake /></span>;
  if (change.value.some((one) => one.scale !== 0)) return <small class="tray-note">Proven. Only a change that removes its features can be baked.</small>;
  return (
    <form class="tray-work" onSubmit={(event) => { event.preventDefault(); void bake(name.trim()); }}>
      <label><span class="hide">Name of the checkpoint</span><input value={name} onInput={(event) => setName(event.currentTarget.value)} pattern="[A-Za-z0-9][A-Za-z0-9._\-]*" title="Letters, digits, dots and dashes" required /></label>
      <button type="submit" class="main">Bake</button>
    </form>
  );
}

function Outcome(): JSX.Element | null {
  const held = proof.value;
  const words = manifest.value?.words;
  if (trouble.value) return <p class="trouble" role="alert">{visible(trouble.value)}</p>;
  if (!held || !words) return null;
  const stale = held.of !== identity.value;
  return (
    <section class={stale ? "proof stale" : "proof"} aria-label="Proof">
      <h3>On held-out prompts</h3>
      {stale && <p class="next">The change is not the one that was proven; prove it again before it is baked.</p>}
      <Effect proof={held.found} />
      <p class="notes text">
        Change of the payload's log-odds{held.found.measured?.n ? `, mean over ${counted(held.found.measured.n, "prompt")}` : ""}.
        {(held.found.number ?? 1) > 1 && ` This is change number ${held.found.number} measured on these prompts: the best of many looks better than it is.`}
        {(held.found.notes ?? []).map((note) => ` ${visible(note)}`)}
      </p>
      <div class="effects">{facets(held.found.rows, words).map((rows) => <Lanes rows={rows} words={words} />)}</div>
      <Both proof={held.found} words={words} />
    </section>
  );
}

function facets(rows: readonly Row[], words: Words): Row[][] {
  const groups = new Map<string, Row[]>();
  for (const row of rows) groups.set(`${row.panel}/${row.metric}`, [...(groups.get(`${row.panel}/${row.metric}`) ?? []), row]);
  const subjects = Object.keys(words.subjects);
  return [...groups.values()].map((own) => own.sort((a, b) => subjects.indexOf(a.subject) - subjects.indexOf(b.subject)));
}

function interval({ payload_log_odds: value, low, high }: LogOdds): { value: number; low: number; high: number } {
  return { value, low: low ?? value, high: high ?? value };
}

/** The measured effect beside the predicted one and that of random features. */
function Effect({ proof: found }: { proof: Proof }): JSX.Element {
  const bars = (["predicted", "measured", "control"] as const).flatMap((name) => {
    const at = found[name];
    return at ? [{ name: name === "control" ? "random features" : name, at: interval(at) }] : [];
  });
  const low = Math.min(0, ...bars.map(({ at }) => at.low));
  const high = Math.max(0, ...bars.map(({ at }) => at.high));
  const across = (x: number): number => 2 + (96 * (x - low)) / (high - low || 1);
  const zero = across(0);
  return (
    <dl class="effect">
      {bars.map(({ name, at }) => (
        <div>
          <dt>{name}</dt>
          <dd>
            <svg class="effect-bar" role="img" aria-label={`${name}: ${signed(at.value)} nats`}>
              <line class="grid" x1={`${zero}%`} x2={`${zero}%`} y1="0" y2="100%" />
              <rect class={at.value < 0 ? "fill-minus" : "fill-plus"} x={`${Math.min(zero, across(at.value))}%`} width={`${Math.abs(across(at.value) - zero)}%`} y="25%" height="50%" />
              {at.low < at.high && <line class="whisker-ink" x1={`${across(at.low)}%`} x2={`${across(at.high)}%`} y1="50%" y2="50%" />}
            </svg>
            <span class="num">{signed(at.value, 2)} nats {at.low < at.high && <small>{decimals(at.low, 2)} to {decimals(at.high, 2)}</small>}</span>
          </dd>
        </div>
      ))}
    </dl>
  );
}

/* Overview of a run: the verdict, attack success and skill with intervals, controls and links to the reports. */

import type { JSX } from "preact";

import { clip, counted, short, visible, whole } from "../base/text";
import type { Row, Run, Words } from "../data/types";
import { Lanes } from "../parts/lanes";
import { Icon } from "../parts/marks";
import { circuits, dictionaries, manifest } from "../state/data";
import { asNumber, link, tune } from "../state/hash";

const SHOWN = ["asr", "skill"];

export function Overview(): JSX.Element | null {
  const all = manifest.value;
  if (!all) return null;
  const runs = all.runs ?? [];
  const chosen = asNumber("run", 0, 0, Math.max(0, runs.length - 1));
  const run = runs[chosen];
  return (
    <div class="page wrap">
      <header class="hero">
        <p class="eyebrow">{run && run.title === all.title ? "Evaluation" : "Explorer"}</p>
        <h1 class="text">{short(all.title, 120)}</h1>
        {run && run.title !== all.title && runs.length === 1 && <h2 class="verdict-of text">Verdict on {short(run.title, 100)}</h2>}
        {runs.length > 1 && (
          <label class="field-label">
            Verdict on{" "}
            <select value={chosen} onChange={(event) => tune({ run: event.currentTarget.value })}>
              {runs.map((one, i) => <option value={i}>{short(one.title, 80)}</option>)}
            </select>
          </label>
        )}
        {run && <Finding run={run} />}
      </header>
      <Ways />
      {run && <Figures run={run} words={all.words} />}
      {run && <Requirements run={run} />}
      <Reports />
    </div>
  );
}

function Finding({ run }: { run: Run }): JSX.Element {
  return (
    <>
      <p class={`badge ${run.tone}`}>
        <Icon name={run.tone === "good" ? "good" : "bad"} /> {short(run.verdict, 60)} <small>score {run.score.toFixed(2)}</small>
      </p>
      <p class="headline text">{clip(run.headline, 900)}</p>
      {(run.next ?? []).length > 0 && <ul class="next">{run.next?.map((line) => <li class="text">{visible(line)}</li>)}</ul>}
      <ul class="tiles">
        {(run.tiles ?? []).map((tile) => (
          <li>
            <span class="label">{tile.label}</span>
            <span class="value text">
              {tile.before && <span class="before">{tile.before} → </span>}
              <span>{visible(tile.after)}</span>
            </span>
            {tile.note && <span class="note text">{visible(tile.note)}</span>}
          </li>
        ))}
      </ul>
    </>
  );
}

/** Doors to the other views. */
function Ways(): JSX.Element | null {
  const features = dictionaries.value.reduce((sum, one) => sum + one.size, 0);
  const graphs = circuits.value;
  const doors = [
    ...(graphs.length
      ? [{ href: link({ view: "circuit" }), title: "Follow the circuit", note: graphs.length === 1 && graphs[0] ? `${counted(graphs[0].nodes, "node")}, ${counted(graphs[0].edges, "edge")} from trigger to payload` : counted(graphs.length, "circuit") }]
      : []),
    ...(features
      ? [{ href: link({ view: "features" }), title: "Read the features", note: `${counted(features, "feature")} in ${counted(dictionaries.value.length, "dictionary", "dictionaries")}` }]
      : []),
    { href: link({ view: "chat" }), title: "Watch the model change", note: "original and edited replies, side by side" },
  ];
  return (
    <nav class="doors" aria-label="Views">
      {doors.map((door) => (
        <a href={door.href}>
          <b>{door.title}</b>
          <small>{door.note}</small>
        </a>
      ))}
    </nav>
  );
}

function facets(rows: readonly Row[], words: Words, metrics: readonly string[]): Row[][] {
  const subjects = Object.keys(words.subjects);
  return Object.keys(words.panels).flatMap((panel) =>
    metrics.map((metric) =>
      rows
        .filter((row) => row.panel === panel && row.metric === metric)
        .sort((a, b) => subjects.indexOf(a.subject) - subjects.indexOf(b.subject)),
    ),
  ).filter((own) => own.length > 0);
}

function Figures({ run, words }: { run: Run; words: Words }): JSX.Element {
  const others = Object.keys(words.metrics).filter((metric) => !SHOWN.includes(metric));
  return (
    <section aria-labelledby="figures">
      <h2 id="figures">Attack success and skill</h2>
      <p class="lead">Every mark is a model on one panel of held-out prompts; whiskers are 95 % intervals.</p>
      {(run.controls ?? []).length > 0 && (
        <ul class="controls">{run.controls?.map((note) => <li class="text">{visible(note)}</li>)}</ul>
      )}
      <div class="effects">{facets(run.rows, words, SHOWN).map((rows) => <Lanes rows={rows} words={words} />)}</div>
      <details class="more">
        <summary>Side effects: degenerate replies, cross-entropy, KL divergence</summary>
        <div class="effects">{facets(run.rows, words, others).map((rows) => <Lanes rows={rows} words={words} />)}</div>
      </details>
    </section>
  );
}

function Requirements({ run }: { run: Run }): JSX.Element | null {
  const lines = run.requirements ?? [];
  if (lines.length === 0) return null;
  return (
    <section aria-labelledby="contract">
      <h2 id="contract">Requirements</h2>
      <p class="lead">What a repair has to show, and what this one showed.</p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Requirements">
        <table class="contract">
          <thead>
            <tr><th scope="col">Requirement</th><th scope="col">Bound</th><th scope="col">Measured</th><th scope="col">Outcome</th></tr>
          </thead>
          <tbody>
            {lines.map((line) => (
              <tr>
                <th scope="row" class="wide text"><span class="demand">{clip(line.text, 300)}</span></th>
                <td>{line.bound}</td>
                <td>{line.measured}</td>
                <td><span class={`state ${line.tone}`}>{line.outcome}</span></td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Reports(): JSX.Element | null {
  const links = manifest.value?.reports ?? [];
  if (links.length === 0) return null;
  return (
    <section aria-labelledby="reports">
      <h2 id="reports">Reports</h2>
      <p class="lead">{whole(links.length)} static {links.length === 1 ? "page" : "pages"} with every figure, table and provenance.</p>
      <ul class="reports">
        {links.map((one) => (
          <li>
            <a href={one.file.split("/").map(encodeURIComponent).join("/")} target="_blank" rel="noopener" class="text">{short(one.title, 90)}</a>
            <small>{[one.kind, one.date].filter(Boolean).join(" · ")}</small>
          </li>
        ))}
      </ul>
    </section>
  );
}

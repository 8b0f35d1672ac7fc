/* Feature browser: one dictionary or two side by side; a list that is searched, sorted and filtered, and a card. */

import { computed } from "@preact/signals";
import type { JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { percent, short, tokenText, visible, whole } from "../base/text";
import type { DictionaryEntry, FeatureColumns } from "../data/types";
import { Icon } from "../parts/marks";
import { Virtual } from "../parts/virtual";
import { change, flip } from "../state/change";
import { dictionaries, entryOf, list, lists, message } from "../state/data";
import { asNumber, feature, key, options, show, tune } from "../state/hash";
import { Card } from "./card";

const ROW = 54;

const SORTS = {
  id: "number",
  density: "density",
  largest: "largest activation",
  mean: "mean activation",
  score: "explanation's score",
  class: "class confidence",
} as const;

type Sort = keyof typeof SORTS;

/** Decades of density, from one in a million. */
const FLOOR = -6;

interface Filter {
  search: string;
  kind: string;
  dense: [number, number];
  score: number;
  sort: Sort;
  down: boolean;
}

/** True if explanations have scores, by which features are then sorted at first. */
const hasScores = computed(() => [...lists.value.values()].some((columns) => columns.score.some((score) => score !== null)));

const filter = computed<Filter>(() => {
  const wanted = options.value["sort"] ?? "";
  return {
    search: (options.value["q"] ?? "").trim().toLowerCase(),
    kind: options.value["class"] ?? "",
    dense: [asNumber("from", FLOOR, FLOOR, 0), asNumber("to", 0, FLOOR, 0)],
    score: asNumber("score", 0, 0, 1),
    sort: wanted in SORTS ? (wanted as Sort) : hasScores.value ? "score" : "density",
    down: options.value["up"] !== "1",
  };
});

/** Features that pass a filter, in order. */
function select(columns: FeatureColumns, f: Filter): number[] {
  const [from, to] = f.dense.map((x) => (x <= FLOOR ? 0 : 10 ** x)) as [number, number];
  const exact = /^f?(\d+)$/.exec(f.search)?.[1];
  const kept: number[] = [];
  for (let i = 0; i < columns.id.length; i++) {
    const density = columns.density[i] ?? 0;
    if (density < from || (f.dense[1] < 0 && density > to)) continue;
    if (f.score > 0 && (columns.score[i] ?? 0) < f.score) continue;
    if (f.kind && !columns.classes[i]?.some(([name]) => name === f.kind)) continue;
    if (f.search && !(exact !== undefined && i === Number(exact)) && !matches(columns, i, f.search)) continue;
    kept.push(i);
  }
  const value = valueOf(columns, f);
  if (f.sort !== "id") kept.sort((a, b) => (value(b) - value(a)) * (f.down ? 1 : -1) || a - b);
  else if (!f.down) kept.reverse();
  return kept;
}

function matches(columns: FeatureColumns, i: number, search: string): boolean {
  return (
    (columns.label[i] ?? "").toLowerCase().includes(search) ||
    (columns.promoted[i] ?? []).some((token) => token.toLowerCase().includes(search)) ||
    (columns.suppressed[i] ?? []).some((token) => token.toLowerCase().includes(search)) ||
    (columns.classes[i] ?? []).some(([name]) => name.toLowerCase().includes(search))
  );
}

function valueOf(columns: FeatureColumns, f: Filter): (i: number) => number {
  switch (f.sort) {
    case "density": return (i) => columns.density[i] ?? 0;
    case "largest": return (i) => columns.largest[i] ?? 0;
    case "mean": return (i) => columns.mean[i] ?? 0;
    case "score": return (i) => columns.score[i] ?? -1;
    case "class": return (i) => Math.max(-1, ...(columns.classes[i] ?? []).filter(([n]) => !f.kind || n === f.kind).map(([, s]) => s));
    default: return (i) => -i;
  }
}

export function Features(): JSX.Element {
  const second = options.value["with"];
  const entry = entryOf(key.value);
  if (dictionaries.value.length === 0) {
    return (
      <div class="empty">
        <h1>No dictionaries here</h1>
        <p>Statistics of a dictionary's features, saved in the folder that was explored, are shown here.</p>
      </div>
    );
  }
  return (
    <div class="browser">
      <Filters comparing={second !== undefined} />
      <div class={second === undefined ? "panes" : "panes two"}>
        <Pane entry={entry} name="first" chosen={feature.value} choose={(id) => show(id)} change={(to) => { key.value = to; show(null); }} />
        {second !== undefined && (
          <Pane
            entry={entryOf(second)}
            name="second"
            chosen={options.value["other"] ? Number(options.value["other"]) : null}
            choose={(id) => tune({ other: String(id) })}
            change={(to) => tune({ with: to, other: "" })}
          />
        )}
      </div>
    </div>
  );
}

function Filters({ comparing }: { comparing: boolean }): JSX.Element {
  const f = filter.value;
  const box = useRef<HTMLInputElement>(null);
  useEffect(() => {
    const jump = (event: KeyboardEvent): void => {
      if (event.key !== "/" || (event.target as HTMLElement).closest("input, textarea, select")) return;
      event.preventDefault();
      box.current?.focus();
    };
    addEventListener("keydown", jump);
    return () => removeEventListener("keydown", jump);
  }, []);
  const kinds = useMemo(() => {
    const found = new Set<string>();
    for (const columns of lists.value.values()) for (const own of columns.classes) for (const [name] of own) found.add(name);
    return [...found].sort();
  }, [lists.value]);
  const edge = (x: number): string => (x <= FLOOR ? "never" : percent(10 ** x));
  const other = dictionaries.value.find((one) => one.key !== key.value) ?? dictionaries.value[0];
  return (
    <form class="tools" role="search" aria-label="Features" onSubmit={(event) => event.preventDefault()}>
      <label class="search">
        <span class="hide">Search labels, classes, tokens or a number</span>
        <input
          ref={box}
          type="search"
          placeholder="Search labels, tokens, numbers  ( / )"
          value={options.value["q"] ?? ""}
          onInput={(event) => tune({ q: event.currentTarget.value })}
        />
      </label>
      <label>
        Class{" "}
        <select value={f.kind} disabled={kinds.length === 0} onChange={(event) => tune({ class: event.currentTarget.value })}>
          <option value="">any</option>
          {kinds.map((name) => <option value={name}>{visible(name)}</option>)}
        </select>
      </label>
      <fieldset class="range">
        <legend>Density</legend>
        <output>{f.dense[0] <= FLOOR && f.dense[1] >= 0 ? "any" : `${edge(f.dense[0])} – ${percent(10 ** f.dense[1])}`}</output>
        <span class="two-thumbs">
          <input type="range" aria-label="Smallest density" aria-valuetext={edge(f.dense[0])} min={FLOOR} max={0} step={0.25} value={f.dense[0]}
            onInput={(event) => tune({ from: text(Math.min(event.currentTarget.valueAsNumber, f.dense[1]), FLOOR) })} />
          <input type="range" aria-label="Largest density" aria-valuetext={percent(10 ** f.dense[1])} min={FLOOR} max={0} step={0.25} value={f.dense[1]}
            onInput={(event) => tune({ to: text(Math.max(event.currentTarget.valueAsNumber, f.dense[0]), 0) })} />
        </span>
      </fieldset>
      <div class="range">
        <span>Score</span> <output>{f.score === 0 ? "any" : `≥ ${f.score.toFixed(2)}`}</output>
        <input type="range" aria-label="Smallest score" min={0} max={1} step={0.05} value={f.score} onInput={(event) => tune({ score: text(event.currentTarget.valueAsNumber, 0) })} />
      </div>
      <label>
        Sort by{" "}
        <select value={f.sort} onChange={(event) => tune({ sort: event.currentTarget.value })}>
          {Object.entries(SORTS).map(([name, words]) => <option value={name}>{words}</option>)}
        </select>
      </label>
      <button type="button" class="quiet" aria-pressed={!f.down} title="Reverse the order" aria-label="Reverse the order" onClick={() => tune({ up: f.down ? "1" : "" })}>
        <Icon name={f.down ? "down" : "up"} />
      </button>
      <button type="button" class="plain" aria-pressed={comparing} onClick={() => tune(comparing ? { with: "", other: "" } : { with: other?.key ?? "" })}>
        {comparing ? "One dictionary" : "Compare two"}
      </button>
    </form>
  );
}

const text = (x: number, none: number): string => (x === none ? "" : String(x));

interface PaneProps {
  entry: DictionaryEntry | undefined;
  name: string;
  chosen: number | null;
  choose(id: number): void;
  change(key: string): void;
}

function Pane({ entry, name, chosen, choose, change: changeTo }: PaneProps): JSX.Element {
  const [trouble, setTrouble] = useState("");
  const place = entry?.key;
  useEffect(() => {
    setTrouble("");
    if (place !== undefined) list(place).catch((error: unknown) => setTrouble(message(error)));
  }, [place]);
  const columns = place === undefined ? undefined : lists.value.get(place);
  const f = filter.value;
  const kept = useMemo(() => (columns ? select(columns, f) : []), [columns, f]);
  const pinned = change.value;
  if (!entry) return <p class="trouble" role="alert">This dictionary is not in the folder.</p>;
  return (
    <section class="pane" aria-label={`Dictionary of ${entry.site}`}>
      <div class="pane-list">
        <div class="pane-head">
          <select aria-label="Dictionary" value={entry.key} onChange={(event) => changeTo(event.currentTarget.value)}>
            {dictionaries.value.map((one) => <option value={one.key}>{one.key} · {whole(one.size)} features</option>)}
          </select>
          <small role="status">{columns ? `${whole(kept.length)} of ${whole(entry.size)}` : trouble ? "" : "loading"}</small>
        </div>
        {trouble && <p class="trouble" role="alert">{visible(trouble)}</p>}
        {columns && kept.length === 0 && <p class="nothing">No feature passes these filters.</p>}
        {columns && (
          <Virtual
            count={kept.length}
            height={ROW}
            chosen={chosen === null ? -1 : kept.indexOf(chosen)}
            name={name}
            label={`Features of ${entry.key}`}
            choose={(i) => choose(kept[i] ?? 0)}
            open={(i) => flip(entry.site, kept[i] ?? 0)}
            pressed={(pressed, i) => {
              if (pressed !== "p") return false;
              flip(entry.site, kept[i] ?? 0);
              return true;
            }}
            row={(i) => <Line columns={columns} id={kept[i] ?? 0} pinned={pinned.some((one) => one.site === entry.site && one.id === kept[i])} />}
          />
        )}
      </div>
      <div class="pane-card" tabIndex={-1}>
        {chosen === null ? (
          <div class="empty small">
            <p>Choose a feature. Arrow keys move through the list, <kbd>p</kbd> pins.</p>
          </div>
        ) : (
          <Card entry={entry} id={chosen} open={choose} />
        )}
      </div>
    </section>
  );
}

/** The tokens that a feature promotes and those that it suppresses, the side with the larger logit first. */
function writes(columns: FeatureColumns, id: number): string {
  const sides: [string, string[]][] = [["+", columns.promoted[id] ?? []], ["−", columns.suppressed[id] ?? []]];
  if ((columns.strongest[id]?.[1] ?? 0) < 0) sides.reverse();
  return sides.filter(([, tokens]) => tokens.length > 0).map(([sign, tokens]) => `${sign} ${tokens.map(tokenText).join("  ")}`).join("   ");
}

function Line({ columns, id, pinned }: { columns: FeatureColumns; id: number; pinned: boolean }): JSX.Element {
  const density = columns.density[id] ?? 0;
  const score = columns.score[id];
  const classes = columns.classes[id] ?? [];
  const label = columns.label[id] ?? "";
  const width = density > 0 ? Math.max(2, (100 * (Math.log10(density) - FLOOR)) / -FLOOR) : 0;
  return (
    <>
      <span class="line-id">{whole(id)}{pinned && <span class="pinned" title="Pinned"><Icon name="pin" /></span>}</span>
      <span class="line-text">
        {label
          ? <span class="ellipsis text">{short(label, 160)}</span>
          : <span class="ellipsis text faint">{writes(columns, id) || "no label"}</span>}
        <span class="line-low">
          <span class="density" title={`Fires at ${percent(density)} of tokens`}>
            <span class="bar-room"><span class="bar-fill" style={{ width: `${width}%` }} /></span>
            <small>{density === 0 ? "dead" : percent(density)}</small>
          </span>
          {classes.slice(0, 2).map(([name]) => <span class="chip kind">{short(name, 20)}</span>)}
        </span>
      </span>
      <span class="line-score" title="Score of its explanation">{score === null || score === undefined ? "" : score.toFixed(2)}</span>
    </>
  );
}

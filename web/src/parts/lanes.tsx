/* Interval dots: a lane per subject, with whiskers, as in the static reports. */

import type { JSX } from "preact";

import { decimals, percent, rate, SHARES } from "../base/text";
import type { Row, Words } from "../data/types";
import { colourOf, Key, PATHS, shapeOf } from "./marks";

const JOURNEY = ["suspect", "edited", "baked"];
const CONTROLS = ["control_random", "control_layer"];

const kind = (subject: string): number => (JOURNEY.includes(subject) ? 0 : CONTROLS.includes(subject) ? 1 : 2);

function At({ x, y, colour, d }: { x: string; y: string; colour: string; d: string }): JSX.Element {
  return (
    <svg class="at" x={x} y={y} width={1} height={1}>
      <path class={colour} d={d} />
    </svg>
  );
}

/** Chart of one panel and metric; rows are in display order. */
export function Lanes({ rows, words }: { rows: readonly Row[]; words: Words }): JSX.Element | null {
  const first = rows[0];
  if (!first) return null;
  const share = SHARES.includes(first.metric);
  const ends = rows.flatMap((row) => [row.low, row.high]);
  const [low, high] = share ? [0, 1] : padded(Math.min(...ends, ...(first.metric === "kl" ? [0] : [])), Math.max(...ends));
  const across = (x: number): string => `${((100 * (Math.min(high, Math.max(low, x)) - low)) / (high - low)).toFixed(2)}%`;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((x) => low + x * (high - low));
  const height = (i: number): string => `${((100 * (i + 0.5)) / rows.length).toFixed(2)}%`;
  const name = (subject: string): string => words.subjects[subject] ?? subject;
  const said = rows.map((row) => `${name(row.subject)}: ${rate(row).full}`);
  const starts = rows.map((row, i) => i > 0 && kind(row.subject) !== kind(rows[i - 1]?.subject ?? ""));
  const journey = rows.map((row, i) => ({ row, i })).filter(({ row }) => JOURNEY.includes(row.subject));
  const better = words.better[first.metric];
  return (
    <figure class="facet">
      <figcaption>
        <b>{words.panels[first.panel] ?? first.panel}</b>
        <span>{words.metrics[first.metric] ?? first.metric}</span>
        <small>{better ? `${better} is better` : ""}</small>
      </figcaption>
      <div class="lanes">
        <ul class="names" aria-hidden="true">
          {rows.map((row, i) => (
            <li class={starts[i] ? "group" : ""}>
              <Key shape={shapeOf(row.subject)} colour={colourOf(row.subject)} />
              <span class="ellipsis">{name(row.subject)}</span>
            </li>
          ))}
        </ul>
        <div class="field">
          <svg role="img" aria-label={`${words.metrics[first.metric] ?? first.metric}, ${words.panels[first.panel] ?? first.panel}. ${said.join("; ")}`}>
            {ticks.map((x) => <line class="grid" x1={across(x)} x2={across(x)} y1="0" y2="100%" />)}
            {journey.slice(1).map(({ row, i }, n) => {
              const before = journey[n];
              return before && (
                <line class="journey" x1={across(before.row.value)} x2={across(row.value)} y1={height(before.i)} y2={height(i)} />
              );
            })}
            {rows.map((row, i) => {
              const colour = colourOf(row.subject);
              return (
                <g>
                  <title>{said[i]}</title>
                  <line class={`whisker ${colour}`} x1={across(row.low)} x2={across(row.high)} y1={height(i)} y2={height(i)} />
                  <At x={across(row.low)} y={height(i)} colour={`whisker ${colour}`} d="M0 -4V4" />
                  <At x={across(row.high)} y={height(i)} colour={`whisker ${colour}`} d="M0 -4V4" />
                  <At x={across(row.value)} y={height(i)} colour={`mark ${colour}`} d={PATHS[shapeOf(row.subject)]} />
                </g>
              );
            })}
          </svg>
        </div>
        <ul class="figures" aria-hidden="true">
          {rows.map((row, i) => {
            const figure = rate(row);
            return <li class={starts[i] ? "group" : ""}>{figure.head}{figure.tail && <span>, {figure.tail}</span>}</li>;
          })}
        </ul>
        <svg class="axis under" aria-hidden="true">
          {ticks.filter((_, i) => i % 2 === 0).map((x) => (
            <text x={across(x)} y="13" text-anchor="middle">{share ? percent(x) : decimals(x, 2)}</text>
          ))}
        </svg>
      </div>
    </figure>
  );
}

function padded(low: number, high: number): [number, number] {
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

/** A figure with its interval on a line from `low` to `high`. */
export function Whisker({ at, low = 0, high = 1, half }: { at: { value: number; low: number; high: number }; low?: number; high?: number; half?: number }): JSX.Element {
  const across = (x: number): string => `${((100 * (Math.min(high, Math.max(low, x)) - low)) / (high - low)).toFixed(2)}%`;
  return (
    <svg class="whisker-line" aria-hidden="true">
      <line class="grid" x1="0" x2="100%" y1="50%" y2="50%" />
      {half !== undefined && <line class="chance" x1={across(half)} x2={across(half)} y1="15%" y2="85%" />}
      <line class="whisker c-edited" x1={across(at.low)} x2={across(at.high)} y1="50%" y2="50%" />
      <circle class="mark c-edited" cx={across(at.value)} cy="50%" r="3.5" />
    </svg>
  );
}

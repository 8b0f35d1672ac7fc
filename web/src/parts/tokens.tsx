/* Tokens: heat maps of contexts and lists of tokens with weights. */

import type { JSX } from "preact";

import { number, runningToken, signed, tokenText } from "../base/text";
import type { TokenWeight } from "../data/types";

const LEVELS = 9;

/** Shade of an activation: 0 where it does not fire, 1 to 9 above. */
export const level = (value: number, largest: number): number =>
  value > 0 && largest > 0 ? Math.max(1, Math.min(LEVELS, Math.ceil((LEVELS * value) / largest))) : 0;

export interface HeatProps {
  tokens: readonly string[];
  values: readonly number[];
  largest: number;
  /** The token for which the context was kept. */
  at?: number;
}

/** A text coloured by activation; the exact value is in a token's title. */
export function Heat({ tokens, values, largest, at }: HeatProps): JSX.Element {
  return (
    <>
      {tokens.map((token, i) => {
        const value = values[i] ?? 0;
        const shade = `t h${level(value, largest)}${i === at ? " kept" : ""}`;
        return value > 0
          ? <span class={shade} title={`${tokenText(token)} ${number(value)}`}>{runningToken(token)}</span>
          : <span class={shade}>{runningToken(token)}</span>;
      })}
    </>
  );
}

/** The scale of a heat map. */
export function HeatScale({ largest }: { largest: number }): JSX.Element {
  return (
    <p class="scale" aria-label={`Shades run from 0 to ${number(largest)}`}>
      {Array.from({ length: LEVELS + 1 }, (_, i) => (
        <span class={`t h${i}`}>{i === 0 ? "0" : i === LEVELS ? number(largest) : ""}</span>
      ))}
      activation
    </p>
  );
}

/** The token whose logit a feature changes most, in words: "suppresses `[`". */
export function Writes({ token, weight }: { token: string; weight: number }): JSX.Element {
  return <>{weight < 0 ? "suppresses" : "promotes"} <code class="text">{tokenText(token)}</code></>;
}

/** Tokens with bars as long as their weight. */
export function Weights({ title, note, tokens }: { title: string; note: string; tokens: readonly TokenWeight[] }): JSX.Element | null {
  if (tokens.length === 0) return null;
  const largest = Math.max(...tokens.map(({ weight }) => Math.abs(weight))) || 1;
  return (
    <section class="weights">
      <h4 title={note}>{title}</h4>
      <ul>
        {tokens.map(({ token, weight }) => (
          <li>
            <code class="text">{tokenText(token)}</code>
            <span class="bar-room" aria-hidden="true">
              <span class={weight < 0 ? "bar-fill minus" : "bar-fill"} style={{ width: `${(100 * Math.abs(weight)) / largest}%` }} />
            </span>
            <span class="num">{signed(weight, 2)}</span>
          </li>
        ))}
      </ul>
    </section>
  );
}

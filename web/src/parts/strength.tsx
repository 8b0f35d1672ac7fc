/* Slider of a feature's strength: 0 removes it, 1 leaves it, above it is amplified. */

import type { JSX } from "preact";

import { LARGEST } from "../state/change";

const NAMES: Record<string, string> = { "0": "removed", "1": "untouched" };

/** Strengths this near to a stop snap to it. */
const SNAP = 0.04;

export function Strength({ scale, name, set }: { scale: number; name: string; set(scale: number): void }): JSX.Element {
  const snapped = (x: number): number => (Math.abs(x - 1) < SNAP ? 1 : x);
  const words = NAMES[String(scale)] ?? `× ${scale.toFixed(2)}`;
  return (
    <label class="strength">
      <span class="hide">Strength of {name}</span>
      <input type="range" min={0} max={LARGEST} step={0.05} value={scale} list="strengths" aria-valuetext={words}
        onInput={(event) => set(snapped(event.currentTarget.valueAsNumber))} />
      <output>{words}</output>
    </label>
  );
}

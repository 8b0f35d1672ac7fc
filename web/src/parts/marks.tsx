/* Marks of subjects and of nodes, and small drawings. Shapes are those of the static pages (pages/svg.py). */

import type { JSX } from "preact";

export const PATHS = {
  circle: "M-5.2 0a5.2 5.2 0 1 0 10.4 0a5.2 5.2 0 1 0 -10.4 0z",
  diamond: "M0 -6.4L6.4 0L0 6.4L-6.4 0z",
  square: "M-4.8 -4.8H4.8V4.8H-4.8z",
  cross: "M-4.4 -4.4L4.4 4.4M4.4 -4.4L-4.4 4.4",
  plus: "M-5.4 0H5.4M0 -5.4V5.4",
  triangle: "M0 -5.8L5.8 4.6H-5.8z",
  inverted: "M0 5.8L5.8 -4.6H-5.8z",
  hexagon: "M-5.6 0L-2.8 -4.9H2.8L5.6 0L2.8 4.9H-2.8z",
  left: "M-5.8 0L4.6 -5.8V5.8z",
  right: "M5.8 0L-4.6 5.8V-5.8z",
  bar: "M-6 -2.2H6V2.2H-6z",
  post: "M-2.2 -6H2.2V6H-2.2z",
  hourglass: "M-5 -5.4H5L-5 5.4H5z",
  house: "M-4.8 5.2V-1.2L0 -6L4.8 -1.2V5.2z",
  shield: "M-4.8 -5.2H4.8V1L0 6L-4.8 1z",
  slope: "M-5.4 5.2L5.4 -5.2V5.2z",
  step: "M-5.4 5.2V-5.2L5.4 5.2z",
  gap: "M-5.6 -5H-1.4V5H-5.6zM1.4 -5H5.6V5H1.4z",
  pair: "M-5.6 -4.6H5.6V-1H-5.6zM-5.6 1H5.6V4.6H-5.6z",
  group: "M-6.4 -4.6H6.4V4.6H-6.4z",
} as const;

export type Shape = keyof typeof PATHS;

const SUBJECTS: Record<string, Shape> = {
  suspect: "circle",
  edited: "diamond",
  baked: "square",
  control_random: "cross",
  control_layer: "plus",
  heads: "hexagon",
  neurons: "hourglass",
  attribution: "left",
  direction: "right",
  redistilled: "bar",
  merged: "post",
  keep_list: "shield",
  finetuned: "slope",
  layerwise: "pair",
  magnitude: "gap",
  activation: "step",
  unlearned: "house",
  clean_twin: "triangle",
  base: "inverted",
};

export const shapeOf = (subject: string): Shape => SUBJECTS[subject] ?? "circle";
export const colourOf = (subject: string): string => (subject in SUBJECTS ? `c-${subject}` : "c-other");

export function Key({ shape, colour = "c-base" }: { shape: Shape; colour?: string }): JSX.Element {
  return (
    <svg class="key" viewBox="-8 -8 16 16" width={16} height={16} aria-hidden="true">
      <path class={`mark ${colour}`} d={PATHS[shape]} />
    </svg>
  );
}

const ICONS = {
  pin: "M7 2.5h6l-.8 5.2 2.8 2.6v1.7H5v-1.7l2.8-2.6zM10 12v5.5",
  close: "M5 5l10 10M15 5L5 15",
  back: "M11.5 4.5L6 10l5.5 5.5",
  up: "M4.5 12.5L10 7l5.5 5.5",
  down: "M4.5 7.5L10 13l5.5-5.5",
  fit: "M3.5 7.5v-4h4M12.5 3.5h4v4M16.5 12.5v4h-4M7.5 16.5h-4v-4",
  more: "M10 4v12M4 10h12",
  less: "M4 10h12",
  link: "M8.5 11.5l3-3M7.5 9.5l-2 2a2.6 2.6 0 0 0 3.7 3.7l2-2M12.5 10.5l2-2a2.6 2.6 0 0 0-3.7-3.7l-2 2",
  good: "M4.5 10.5l3.5 3.5 7.5-8",
  bad: "M10 5v6M10 14v.5",
} as const;

export function Icon({ name }: { name: keyof typeof ICONS }): JSX.Element {
  return (
    <svg class="icon" viewBox="0 0 20 20" width={16} height={16} aria-hidden="true">
      <path d={ICONS[name]} />
    </svg>
  );
}

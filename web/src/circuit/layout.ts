/* Places of nodes: columns by role, layers upwards, the payload on top. */

import { scaleSqrt } from "d3-scale";

import { short } from "../base/text";
import type { Graph, GraphEdge } from "./model";

const STEP = 28;
const LINE = 27;
const BAND = 7;
const GAP = 46;
const TOP = 64;
const FOOT = 10;

/** Nodes side by side in a column, at most; more go into further lines. */
const WIDEST = 14;

/** Factor by which columns are pulled apart to fill a window, at most. */
const WIDENED = 2.4;

/** Scale of a graph that is fitted into a window, at most. */
export const ENLARGED = 1.6;

/** Room for the graph in a window, in pixels. */
export interface Room {
  width: number;
  height: number;
}

/** Scale at which a graph fits into a room. */
export const fittingScale = (width: number, height: number, room: Room): number => Math.min(ENLARGED, room.width / width, room.height / height);

export interface Band {
  title: string;
  /** Middle. */
  y: number;
  height: number;
}

export interface Column {
  name: string;
  title: string;
  /** Middle. */
  x: number;
  width: number;
}

export interface Layout {
  x: Float32Array;
  y: Float32Array;
  r: Float32Array;
  bands: readonly Band[];
  columns: readonly Column[];
  width: number;
  height: number;
}

const POINTS = ["embed", "attn", "mlp", "resid"];

/** Order of a place in a forward pass. */
export function depth(place: string): number {
  const [point = "", layer = "0"] = place.split(".");
  const at = POINTS.indexOf(point);
  return at === 0 ? -1 : Number(layer) * 4 + (at < 0 ? 3 : at);
}

/** Places of the shown nodes; columns and layers spread to fill a room. */
export function arrange(graph: Graph, shown: readonly number[], roles: readonly string[], room: Room): Layout {
  const size = graph.nodes.length;
  const layout = { x: new Float32Array(size).fill(Number.NaN), y: new Float32Array(size), r: new Float32Array(size) };
  const cells = new Map<string, Map<string, number[]>>();
  for (const i of shown) {
    const node = graph.nodes[i];
    if (!node || node.kind === "output") continue;
    const row = cells.get(node.place) ?? cells.set(node.place, new Map()).get(node.place);
    row?.set(node.role, [...(row.get(node.role) ?? []), i]);
  }
  const places = [...cells.keys()].sort((a, b) => depth(b) - depth(a));
  const columns = place(roles, cells);
  const bands: Band[] = [];
  let top = TOP;
  for (const name of places) {
    const row = cells.get(name);
    let lines = 1;
    for (const column of columns) {
      const own = row?.get(column.name) ?? [];
      lines = Math.max(lines, Math.ceil(own.length / column.slots));
    }
    const height = lines * LINE + BAND;
    for (const column of columns) fill(layout, graph, row?.get(column.name) ?? [], column, top + height / 2);
    bands.push({ title: short(name, 14), y: top + height / 2, height });
    top += height;
  }
  const last = columns.at(-1);
  const natural = { width: last ? last.x + last.width / 2 + GAP / 2 : 200, height: top + FOOT };
  const scale = fittingScale(natural.width, natural.height, room);
  const width = Math.max(natural.width, Math.min(WIDENED * natural.width, room.width / scale));
  const height = Math.max(natural.height, room.height / scale);
  spread(layout, columns, width / natural.width, shown);
  if (top > TOP) heighten(layout, bands, (height - FOOT - TOP) / (top - TOP), shown);
  layout.x[graph.output] = width / 2;
  layout.y[graph.output] = TOP / 2 - 6;
  const largest = Math.max(1e-9, ...shown.map((i) => (i === graph.output ? 0 : Math.abs(graph.nodes[i]?.effect ?? 0))));
  const radius = scaleSqrt().domain([0, largest]).range([3.5, 11.5]);
  for (const i of shown) layout.r[i] = i === graph.output ? 11 : radius(Math.abs(graph.nodes[i]?.effect ?? 0));
  return { ...layout, bands, columns, width, height };
}

/** Pull columns and the nodes in them apart. */
function spread(layout: { x: Float32Array }, columns: Column[], factor: number, shown: readonly number[]): void {
  for (const i of shown) layout.x[i] = (layout.x[i] ?? 0) * factor;
  for (const column of columns) {
    column.x *= factor;
    column.width *= factor;
  }
}

/** Pull layers and the lines of nodes in them apart, below the payload. */
function heighten(layout: { y: Float32Array }, bands: Band[], factor: number, shown: readonly number[]): void {
  const at = (y: number): number => TOP + (y - TOP) * factor;
  for (const i of shown) layout.y[i] = at(layout.y[i] ?? TOP);
  for (const band of bands) {
    band.y = at(band.y);
    band.height *= factor;
  }
}

interface Slots extends Column {
  slots: number;
}

function place(roles: readonly string[], cells: ReadonlyMap<string, ReadonlyMap<string, number[]>>): Slots[] {
  const columns: Slots[] = [];
  let left = GAP / 2;
  const extra = new Set([...cells.values()].flatMap((row) => [...row.keys()]).filter((role) => !roles.includes(role)));
  for (const name of [...roles, ...extra]) {
    const most = Math.max(0, ...[...cells.values()].map((row) => row.get(name)?.length ?? 0));
    if (most === 0) continue;
    const slots = Math.min(WIDEST, Math.max(1, Math.ceil(Math.sqrt(2.2 * most))));
    const width = Math.max(slots * STEP, 84);
    columns.push({ name, title: short(name, 60), x: left + width / 2, width, slots });
    left += width + GAP;
  }
  return columns;
}

/** Fill a cell: within its lines from the most positive effect to the most negative. */
function fill(layout: { x: Float32Array; y: Float32Array }, graph: Graph, own: readonly number[], column: Slots, middle: number): void {
  const sorted = [...own].sort((a, b) => (graph.nodes[b]?.effect ?? 0) - (graph.nodes[a]?.effect ?? 0));
  const lines = Math.ceil(sorted.length / column.slots);
  const each = Math.ceil(sorted.length / Math.max(1, lines));
  sorted.forEach((i, n) => {
    const line = Math.floor(n / each);
    const inLine = Math.min(each, sorted.length - line * each);
    layout.x[i] = column.x + ((n % each) - (inLine - 1) / 2) * STEP;
    layout.y[i] = middle + (line - (lines - 1) / 2) * LINE;
  });
}

export interface Curve {
  x1: number;
  y1: number;
  cx1: number;
  cy1: number;
  cx2: number;
  cy2: number;
  x2: number;
  y2: number;
}

/** The curve of an edge: out of the top of its source, into the bottom of its target. */
export function curve(layout: Layout, edge: GraphEdge): Curve {
  const x1 = layout.x[edge.source] ?? 0;
  const x2 = layout.x[edge.target] ?? 0;
  const y1 = (layout.y[edge.source] ?? 0) - (layout.r[edge.source] ?? 0);
  const y2 = (layout.y[edge.target] ?? 0) + (layout.r[edge.target] ?? 0);
  const bend = Math.max(16, Math.abs(y1 - y2) * 0.45);
  // Edges within a column bow to its side, or they would run through the nodes between.
  const bow = Math.abs(x1 - x2) < STEP ? Math.min(60, 10 + Math.abs(y1 - y2) * 0.12) : 0;
  return { x1, y1, cx1: x1 + bow, cy1: y1 - bend, cx2: x2 + bow, cy2: y2 + bend, x2, y2 };
}

/** The point of a curve at `t` from 0 to 1. */
export function along(c: Curve, t: number): [number, number] {
  const s = 1 - t;
  const [a, b, d, e] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
  return [a * c.x1 + b * c.cx1 + d * c.cx2 + e * c.x2, a * c.y1 + b * c.cy1 + d * c.cy2 + e * c.y2];
}

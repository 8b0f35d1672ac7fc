/* Drawing on a canvas: edges and nodes in batches of one colour, labels that do not overlap. */

import { curve, type Layout } from "./layout";
import type { Graph, GraphEdge, GraphNode, Kind } from "./model";

export interface Colours {
  page: string;
  card: string;
  ink: string;
  muted: string;
  line: string;
  plus: string;
  minus: string;
  accent: string;
  font: string;
}

/** Colours of the style sheet, read from an element. */
export function coloursOf(element: HTMLElement): Colours {
  const probe = document.createElement("span");
  element.append(probe);
  const read = (name: string): string => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const found = {
    page: read("page"), card: read("card"), ink: read("ink"), muted: read("muted"), line: read("line"),
    plus: read("edited"), minus: read("suspect"), accent: read("accent"), font: getComputedStyle(element).fontFamily,
  };
  probe.remove();
  return found;
}

/** Growth of marks and lines where the graph is drawn small, so that they stay visible. */
export const growth = (k: number): number => (k < 1 ? Math.min(2.2, k ** -0.55) : 1);

export interface Scene {
  graph: Graph;
  layout: Layout;
  nodes: readonly number[];
  /** Largest first. */
  edges: readonly GraphEdge[];
  colours: Colours;
  /** Largest |weight|. */
  largest: number;
}

const WIDTHS = [0.7, 1, 1.5, 2.2, 3.1, 4.2, 5.5];

export const widthOf = (weight: number, largest: number): number =>
  WIDTHS[Math.min(WIDTHS.length - 1, Math.floor((Math.abs(weight) / largest) ** 0.6 * WIDTHS.length))] ?? 1;

function trace(path: CanvasPath, layout: Layout, edge: GraphEdge): void {
  const c = curve(layout, edge);
  path.moveTo(c.x1, c.y1);
  path.bezierCurveTo(c.cx1, c.cy1, c.cx2, c.cy2, c.x2, c.y2);
}

/** Draw edges, batched by sign and width. */
export function paintEdges(context: CanvasRenderingContext2D, scene: Scene, edges: readonly GraphEdge[], opacity: number, grown: number, dashed = false): void {
  const batches = new Map<string, { path: Path2D; colour: string; width: number; minus: boolean }>();
  for (const edge of edges) {
    const width = widthOf(edge.weight, scene.largest);
    const minus = edge.weight < 0;
    const name = `${minus}${width}`;
    let batch = batches.get(name);
    if (!batch) batches.set(name, (batch = { path: new Path2D(), colour: minus ? scene.colours.minus : scene.colours.plus, width, minus }));
    trace(batch.path, scene.layout, edge);
  }
  context.globalAlpha = opacity;
  for (const { path, colour, width, minus } of batches.values()) {
    context.strokeStyle = colour;
    context.lineWidth = width * grown;
    context.setLineDash(dashed && minus ? [6 * grown, 4 * grown] : []);
    context.stroke(path);
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

/** Add a node's outline to a path. */
function outline(path: CanvasPath, kind: Kind, x: number, y: number, r: number): void {
  switch (kind) {
    case "feature":
      path.moveTo(x + r, y);
      path.arc(x, y, r, 0, 2 * Math.PI);
      return;
    case "error":
      polygon(path, x, y, [[0, -1.15 * r], [1.12 * r, 0.9 * r], [-1.12 * r, 0.9 * r]]);
      return;
    case "token":
      polygon(path, x, y, [[-0.9 * r, -0.9 * r], [0.9 * r, -0.9 * r], [0.9 * r, 0.9 * r], [-0.9 * r, 0.9 * r]]);
      return;
    case "neuron":
      polygon(path, x, y, [[-1.05 * r, 0], [-0.53 * r, -0.92 * r], [0.53 * r, -0.92 * r], [1.05 * r, 0], [0.53 * r, 0.92 * r], [-0.53 * r, 0.92 * r]]);
      return;
    case "output":
      polygon(path, x, y, [[0, -1.15 * r], [1.15 * r, 0], [0, 1.15 * r], [-1.15 * r, 0]]);
      return;
    case "group":
      polygon(path, x, y, [[-1.5 * r, -r], [1.5 * r, -r], [1.5 * r, r], [-1.5 * r, r]]);
  }
}

function polygon(path: CanvasPath, x: number, y: number, points: readonly (readonly [number, number])[]): void {
  points.forEach(([dx, dy], i) => (i ? path.lineTo(x + dx, y + dy) : path.moveTo(x + dx, y + dy)));
  path.closePath();
}

export function nodeColour(node: GraphNode, colours: Colours): string {
  return node.kind === "output" ? colours.ink : node.effect < 0 ? colours.minus : colours.plus;
}

/** Draw nodes, batched by colour; each has a rim of the page's colour. */
export function paintNodes(context: CanvasRenderingContext2D, scene: Scene, nodes: readonly number[], grown: number): void {
  const { graph, layout, colours } = scene;
  const batches = new Map<string, Path2D>();
  for (const i of nodes) {
    const node = graph.nodes[i];
    if (!node) continue;
    const colour = nodeColour(node, colours);
    let path = batches.get(colour);
    if (!path) batches.set(colour, (path = new Path2D()));
    outline(path, node.kind, layout.x[i] ?? 0, layout.y[i] ?? 0, (layout.r[i] ?? 4) * grown);
  }
  context.strokeStyle = colours.card;
  context.lineWidth = 1.5 * grown;
  for (const [colour, path] of batches) {
    context.fillStyle = colour;
    context.fill(path);
    context.stroke(path);
  }
}

/** Rings around nodes. */
export function paintRings(context: CanvasRenderingContext2D, scene: Scene, nodes: Iterable<number>, colour: string, width: number, gap: number, grown: number): void {
  const path = new Path2D();
  for (const i of nodes) {
    const node = scene.graph.nodes[i];
    if (node && !Number.isNaN(scene.layout.x[i] ?? Number.NaN)) {
      outline(path, node.kind, scene.layout.x[i] ?? 0, scene.layout.y[i] ?? 0, (scene.layout.r[i] ?? 4) * grown + gap * grown);
    }
  }
  context.strokeStyle = colour;
  context.lineWidth = width * grown;
  context.stroke(path);
}

/** Faint rules between layers and behind columns. */
export function paintGround(context: CanvasRenderingContext2D, scene: Scene): void {
  const { layout, colours } = scene;
  const bottom = layout.height;
  context.globalAlpha = 1;
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.beginPath();
  for (const band of layout.bands) {
    context.moveTo(0, band.y + band.height / 2);
    context.lineTo(layout.width, band.y + band.height / 2);
  }
  for (let i = 1; i < layout.columns.length; i++) {
    const [before, after] = [layout.columns[i - 1], layout.columns[i]];
    if (!before || !after) continue;
    const x = (before.x + before.width / 2 + after.x - after.width / 2) / 2;
    context.moveTo(x, 56);
    context.lineTo(x, bottom);
  }
  context.stroke();
}

export type Box = readonly [x: number, y: number, width: number, height: number];

/** Size of a cell of `Taken`, in pixels. */
const CELL = 48;

/** Places of a window that are taken, in cells: a question is answered by the few boxes near it. */
export class Taken {
  private readonly cells = new Map<number, Box[]>();

  add(box: Box): void {
    for (const cell of cellsOf(box)) {
      const own = this.cells.get(cell);
      if (own) own.push(box);
      else this.cells.set(cell, [box]);
    }
  }

  /** True if nothing overlaps a box. */
  isFree(box: Box): boolean {
    const [x, y, width, height] = box;
    for (const cell of cellsOf(box)) {
      for (const [left, top, w, h] of this.cells.get(cell) ?? []) {
        if (x < left + w && left < x + width && y < top + h && top < y + height) return false;
      }
    }
    return true;
  }
}

function* cellsOf([x, y, width, height]: Box): Generator<number> {
  for (let row = Math.floor(y / CELL); row <= Math.floor((y + height) / CELL); row++) {
    for (let column = Math.floor(x / CELL); column <= Math.floor((x + width) / CELL); column++) yield row * 4096 + column;
  }
}

const widths = new Map<string, number>();

/** Width of a text, measured once. */
export function measured(context: CanvasRenderingContext2D, text: string): number {
  const key = `${context.font}|${text}`;
  let width = widths.get(key);
  if (width === undefined) {
    if (widths.size > 4000) widths.clear();
    widths.set(key, (width = context.measureText(text).width));
  }
  return width;
}

/** A text that fits a width, its end an ellipsis; empty where no three letters fit. */
export function fitted(context: CanvasRenderingContext2D, text: string, width: number): string {
  if (measured(context, text) <= width) return text;
  let low = 0;
  let high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (measured(context, `${text.slice(0, middle)}…`) <= width) low = middle;
    else high = middle - 1;
  }
  return low < 3 ? "" : `${text.slice(0, low)}…`;
}

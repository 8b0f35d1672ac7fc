/* The stage: a canvas that pans and zooms over a circuit of thousands of nodes without a long frame.

   A frame copies a painted sheet (sheets.ts) and draws labels, the selection and the axes, which are few, on top. A sheet
   that no longer fits is replaced when its successor is finished. */

import { quadtree, type Quadtree } from "d3-quadtree";
import { select, type Selection } from "d3-selection";
import "d3-transition";
import { zoom, zoomIdentity, type ZoomBehavior, type ZoomTransform } from "d3-zoom";

import { still } from "../state/theme";
import { along, curve, fittingScale, type Layout, type Room } from "./layout";
import type { GraphEdge } from "./model";
import { fitted, growth, measured, paintEdges, paintNodes, paintRings, Taken, type Box, type Scene } from "./paint";
import { Sheets, type Size } from "./sheets";

/** Milliseconds of a frame for painting the next sheet. */
const BUDGET = 6;

/** Pause of zooming after which the graph is painted anew at its scale, in milliseconds. */
const REST = 110;

/** Left and bottom margin, in which the axes stand. */
const LEFT = 76;
const BOTTOM = 30;

/** Room that a canvas leaves for the graph. */
export const roomOf = (size: Room): Room => ({ width: Math.max(120, size.width - LEFT - 16), height: Math.max(120, size.height - BOTTOM - 12) });

const LABELS = 70;

/** Nodes that are labelled wherever there is room, largest first; more are where the graph is drawn large. */
const LEADING = 24;

/** Nodes that labels keep clear of, at most. */
const MARKS = 600;

/** Height of a label. */
const LINE = 18;

const EDGES_TO_HIT = 1500;

export interface Highlight {
  selected: number | null;
  hovered: number | null;
  pinned: ReadonlySet<number>;
  picked: ReadonlySet<number>;
  label(i: number): string;
}

export interface Hit {
  node: number | null;
  edge: GraphEdge | null;
  /** Place in the window. */
  x: number;
  y: number;
}

interface EdgePoint {
  x: number;
  y: number;
  edge: GraphEdge;
}

export interface Listener {
  hovered(hit: Hit): void;
  clicked(hit: Hit, more: boolean): void;
  opened(hit: Hit): void;
  /** The reader moved to another part: its middle in shares of the graph, and its scale beside that of the whole; `null` for the whole. */
  moved(to: [number, number, number] | null): void;
  resized(size: Room): void;
}

export class Stage {
  private readonly context: CanvasRenderingContext2D;
  private readonly behaviour: ZoomBehavior<HTMLCanvasElement, unknown>;
  private readonly selection: Selection<HTMLCanvasElement, unknown, null, undefined>;
  private readonly watch: ResizeObserver;
  private transform: ZoomTransform = zoomIdentity;
  private scene: Scene | null = null;
  private highlight: Highlight = { selected: null, hovered: null, pinned: new Set(), picked: new Set(), label: () => "" };
  private readonly sheets = new Sheets();
  private tree: Quadtree<number> | null = null;
  private edgeTree: Quadtree<EdgePoint> | null = null;
  private size: Size = { width: 0, height: 0, ratio: 1 };
  private frame = 0;
  private zoomed = 0;
  private wanted: [number, number, number] | null = null;
  private placed = false;
  /** False as long as the whole graph is fitted into the window. */
  private isMoved = false;

  constructor(private readonly canvas: HTMLCanvasElement, private readonly listener: Listener) {
    const context = canvas.getContext("2d", { alpha: false });
    if (!context) throw new Error("this browser draws no canvas");
    this.context = context;
    this.selection = select(canvas);
    this.behaviour = zoom<HTMLCanvasElement, unknown>()
      .scaleExtent([0.05, 8])
      .on("zoom", (event: { transform: ZoomTransform; sourceEvent: unknown }) => {
        if (event.transform.k !== this.transform.k) this.zoomed = performance.now();
        this.transform = event.transform;
        if (event.sourceEvent) this.isMoved = true;
        this.request();
      })
      .on("end", () => {
        const at = this.isMoved ? this.part() : null;
        if (at) listener.moved(at);
      });
    this.selection.call(this.behaviour).on("dblclick.zoom", null);
    canvas.addEventListener("pointermove", this.pointed);
    canvas.addEventListener("pointerleave", this.left);
    canvas.addEventListener("click", this.clicked);
    canvas.addEventListener("dblclick", this.doubled);
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(canvas);
    this.resize();
  }

  destroy(): void {
    this.watch.disconnect();
    cancelAnimationFrame(this.frame);
    this.selection.on(".zoom", null);
    this.canvas.removeEventListener("pointermove", this.pointed);
    this.canvas.removeEventListener("pointerleave", this.left);
    this.canvas.removeEventListener("click", this.clicked);
    this.canvas.removeEventListener("dblclick", this.doubled);
  }

  /** Show a scene; at first at `at`, or fitted to the window. */
  show(scene: Scene, at: [number, number, number] | null): void {
    const first = this.scene === null;
    const part = this.part();
    const other = part !== null && !isAlike(scene.layout, this.scene?.layout);
    this.scene = scene;
    this.tree = quadtree<number>(
      [...scene.nodes],
      (i) => scene.layout.x[i] ?? 0,
      (i) => scene.layout.y[i] ?? 0,
    );
    this.edgeTree = null;
    if (first) {
      this.wanted = at;
      this.place();
    } else if (other && this.placed) {
      if (this.isMoved) this.moveTo(part);
      else this.whole();
    }
    this.request();
  }

  mark(highlight: Highlight): void {
    this.highlight = highlight;
    this.request();
  }

  /** Fit the whole graph into the window. */
  fit(): void {
    this.isMoved = false;
    this.listener.moved(null);
    this.whole();
  }

  private whole(): void {
    const k = this.fitting();
    if (k === null || !this.scene) return;
    const { width, height } = this.scene.layout;
    this.move(width / 2 - LEFT / 2 / k, height / 2 + BOTTOM / 2 / k, k);
  }

  zoomBy(factor: number): void {
    this.isMoved = true;
    this.selection.transition().duration(still() ? 0 : 180).call(this.behaviour.scaleBy, factor);
  }

  /** Bring a node into view, where it is not. */
  reveal(i: number): void {
    const x = this.scene?.layout.x[i];
    const y = this.scene?.layout.y[i];
    if (x === undefined || y === undefined || Number.isNaN(x)) return;
    const [left, top] = this.transform.apply([x, y]);
    if (left > LEFT + 30 && left < this.size.width - 30 && top > 30 && top < this.size.height - BOTTOM - 30) return;
    this.isMoved = true;
    this.selection.transition().duration(still() ? 0 : 260).call(this.behaviour.translateTo, x, y);
  }

  /** The nearest node in a direction from another. */
  next(from: number, dx: number, dy: number): number | null {
    const scene = this.scene;
    if (!scene) return null;
    const [x, y] = [scene.layout.x[from] ?? 0, scene.layout.y[from] ?? 0];
    let best: number | null = null;
    let least = Infinity;
    for (const i of scene.nodes) {
      const [ax, ay] = [(scene.layout.x[i] ?? 0) - x, (scene.layout.y[i] ?? 0) - y];
      const forward = ax * dx + ay * dy;
      const aside = Math.abs(ax * dy) + Math.abs(ay * dx);
      if (i === from || forward <= 1 || aside > 2.5 * forward) continue;
      const cost = forward + 2 * aside;
      if (cost < least) [best, least] = [i, cost];
    }
    return best;
  }

  private fitting(): number | null {
    if (!this.scene || this.size.width === 0) return null;
    return fittingScale(this.scene.layout.width, this.scene.layout.height, roomOf(this.size));
  }

  /** The part of the graph in the window, as `Listener.moved` tells it. */
  private part(): [number, number, number] | null {
    const k = this.fitting();
    if (k === null || !this.scene) return null;
    const [x, y] = this.transform.invert([this.size.width / 2, this.size.height / 2]);
    return [x / this.scene.layout.width, y / this.scene.layout.height, this.transform.k / k];
  }

  private moveTo([x, y, k]: [number, number, number]): void {
    const fit = this.fitting();
    if (fit !== null && this.scene) this.move(x * this.scene.layout.width, y * this.scene.layout.height, k * fit);
  }

  private move(x: number, y: number, k: number): void {
    const target = zoomIdentity.translate(this.size.width / 2, this.size.height / 2).scale(k).translate(-x, -y);
    this.selection.call(this.behaviour.transform, target);
  }

  private place(): void {
    if (this.placed || !this.scene || this.size.width === 0) return;
    this.isMoved = this.wanted !== null;
    if (this.wanted) this.moveTo(this.wanted);
    else this.whole();
    this.placed = true;
  }

  private resize(): void {
    const { clientWidth, clientHeight } = this.canvas;
    if (clientWidth === 0 || clientHeight === 0) return;
    const middle = this.transform.invert([this.size.width / 2, this.size.height / 2]);
    const ratio = Math.min(2, devicePixelRatio || 1);
    this.size = { width: clientWidth, height: clientHeight, ratio };
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    this.sheets.clear();
    this.listener.resized(this.size);
    if (this.placed && this.isMoved) this.move(middle[0], middle[1], this.transform.k);
    else if (this.placed) this.whole();
    this.place();
    this.draw();
    this.request();
  }

  private request(): void {
    if (!this.frame) this.frame = requestAnimationFrame(this.run);
  }

  private readonly run = (): void => {
    this.frame = 0;
    if (!this.scene) return;
    const rests = performance.now() - this.zoomed > REST;
    const more = this.sheets.work(this.scene, this.transform, this.size, rests, rests ? BUDGET : BUDGET / 2);
    this.draw();
    if (more || !rests) this.request();
  };

  private draw(): void {
    const { context, transform, scene, size } = this;
    context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
    context.fillStyle = scene?.colours.card ?? "#888";
    context.fillRect(0, 0, size.width, size.height);
    if (!scene) return;
    context.globalAlpha = this.highlight.selected === null ? 1 : 0.32;
    if (!this.sheets.copy(context, transform, size)) return;
    context.globalAlpha = 1;
    context.translate(transform.x, transform.y);
    context.scale(transform.k, transform.k);
    const near = this.paintHighlight(scene);
    context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
    this.paintLabels(scene, near);
    this.paintAxes(scene);
  }

  /** The selected node's edges and neighbours, and rings; returns the nodes to label first. */
  private paintHighlight(scene: Scene): number[] {
    const { selected, hovered, pinned, picked } = this.highlight;
    const { context } = this;
    const grown = growth(this.transform.k);
    const near = new Set<number>();
    const about = selected ?? hovered;
    if (about !== null) {
      // Of a chosen node all edges to drawn nodes, whatever the threshold.
      const own = (selected === null ? scene.edges : scene.graph.edges).filter(
        ({ source, target }) => (source === about || target === about) && this.isDrawn(source) && this.isDrawn(target),
      );
      paintEdges(context, scene, own.slice(0, 300).reverse(), selected === null ? 0.75 : 0.85, grown, true);
      near.add(about);
      for (const edge of own) near.add(edge.source).add(edge.target);
      paintNodes(context, scene, [...near].filter((i) => this.isDrawn(i)), grown);
    }
    const kept = [...pinned];
    if (kept.length) paintNodes(context, scene, kept.filter((i) => this.isDrawn(i)), grown);
    paintRings(context, scene, pinned, scene.colours.ink, 1.8, 2.5, grown);
    paintRings(context, scene, picked, scene.colours.accent, 2.2, 4.5, grown);
    if (hovered !== null) paintRings(context, scene, [hovered], scene.colours.muted, 1.8, 2.5, grown);
    if (selected !== null) paintRings(context, scene, [selected], scene.colours.accent, 2.5, 3.5, grown);
    return [...(selected === null ? [] : [selected]), ...(hovered === null ? [] : [hovered]), ...kept, scene.graph.output, ...near];
  }

  private isDrawn(i: number): boolean {
    return !Number.isNaN(this.scene?.layout.x[i] ?? Number.NaN);
  }

  /** Labels of nodes that matter and, where there is room, of the others, largest first; none overlaps another. */
  private paintLabels(scene: Scene, first: readonly number[]): void {
    const { context, transform, highlight } = this;
    context.font = `500 12px ${scene.colours.font}`;
    context.textBaseline = "middle";
    // Labels keep clear of each other and of the nodes that matter; of small nodes where there is room elsewhere.
    const [written, marks] = [new Taken(), new Taken()];
    const leading = new Set([...first, ...scene.graph.ranked.slice(0, LEADING)]);
    for (const i of new Set([...leading, ...scene.graph.ranked.slice(0, MARKS)])) {
      if (this.isDrawn(i)) (leading.has(i) ? written : marks).add(this.markOf(scene, i));
    }
    const rest = highlight.selected === null ? scene.graph.ranked.slice(0, transform.k > 0.9 ? 400 : LEADING) : [];
    let n = 0;
    for (const i of new Set([...first, ...rest])) {
      if (n >= LABELS) return;
      const text = this.isDrawn(i) && this.isInside(scene, i) ? highlight.label(i) : "";
      if (!text) continue;
      const places = this.around(this.markOf(scene, i), measured(context, text)).filter((box) => written.isFree(box));
      const box = places.find((place) => marks.isFree(place)) ?? (leading.has(i) ? places[0] : undefined);
      if (!box) continue;
      written.add(box);
      context.globalAlpha = 0.86;
      context.fillStyle = scene.colours.card;
      context.fillRect(box[0], box[1] + 1, box[2], box[3] - 2);
      context.globalAlpha = 1;
      context.fillStyle = scene.colours.ink;
      context.fillText(text, box[0] + 2, box[1] + LINE / 2 + 0.5);
      n += 1;
    }
  }

  /** The box of the window that a node fills. */
  private markOf(scene: Scene, i: number): Box {
    const [x, y] = this.transform.apply([scene.layout.x[i] ?? 0, scene.layout.y[i] ?? 0]);
    const reach = (scene.layout.r[i] ?? 4) * this.transform.k * growth(this.transform.k);
    const wide = scene.graph.nodes[i]?.kind === "group" ? 1.5 * reach : reach;
    return [x - wide, y - reach, 2 * wide, 2 * reach];
  }

  private isInside(scene: Scene, i: number): boolean {
    const [x, y] = this.transform.apply([scene.layout.x[i] ?? 0, scene.layout.y[i] ?? 0]);
    return x >= LEFT && x <= this.size.width && y >= 0 && y <= this.size.height - BOTTOM;
  }

  /** Places for a text of a width beside a mark, above and below it, best first; none leaves the window. */
  private around([x, y, width, height]: Box, text: number): Box[] {
    const wide = text + 4;
    const middle = y + height / 2 - LINE / 2;
    const centre = x + width / 2 - wide / 2;
    const [above, below, end] = [y - LINE - 1, y + height + 1, x + width];
    const places: Box[] = [];
    for (const [left, top] of [
      [end + 4, middle], [x - 4 - wide, middle], [centre, above], [centre, below], [x, above], [end - wide, above], [x, below], [end - wide, below],
    ] as const) {
      if (left >= LEFT && left + wide <= this.size.width - 4 && top >= 0 && top + LINE <= this.size.height - BOTTOM) places.push([left, top, wide, LINE]);
    }
    return places;
  }

  /** Axes at the window's edges: places at the left, roles at the bottom; names that would overlap are left out. */
  private paintAxes(scene: Scene): void {
    const { context, transform } = this;
    const { width, height } = this.size;
    const { colours, layout } = scene;
    context.fillStyle = colours.card;
    context.fillRect(0, 0, LEFT, height);
    context.fillRect(0, height - BOTTOM, width, BOTTOM);
    context.fillStyle = colours.line;
    context.fillRect(LEFT - 1, 0, 1, height - BOTTOM);
    context.fillRect(LEFT - 1, height - BOTTOM, width, 1);
    context.fillStyle = colours.muted;
    context.font = `400 11.5px ${colours.font}`;
    context.textAlign = "right";
    let free = Infinity;
    for (const band of [...layout.bands].reverse()) {
      const y = transform.applyY(band.y);
      if (y < 8 || y > height - BOTTOM - 8 || y > free) continue;
      context.fillText(band.title, LEFT - 9, y);
      free = y - 14;
    }
    context.textAlign = "center";
    for (const column of layout.columns) {
      const half = ((column.width + 50) * transform.k) / 2;
      const x = transform.applyX(column.x);
      const [left, right] = [Math.max(LEFT + 4, x - half), Math.min(width - 4, x + half)];
      const name = right - left < 24 ? "" : fitted(context, column.title, right - left - 8);
      if (name) context.fillText(name, (left + right) / 2, height - BOTTOM / 2 + 1);
    }
    context.textAlign = "left";
  }

  /** What is at a place of the window. */
  private at(x: number, y: number): Hit {
    const none = { node: null, edge: null, x, y };
    const scene = this.scene;
    if (!scene || !this.tree || x < LEFT || y > this.size.height - BOTTOM) return none;
    const [wx, wy] = this.transform.invert([x, y]);
    const node = this.tree.find(wx, wy, Math.max(14, 9 / this.transform.k)) ?? null;
    if (node !== null) return { ...none, node };
    this.edgeTree ??= edgePoints(scene);
    return { ...none, edge: this.edgeTree.find(wx, wy, 6 / this.transform.k)?.edge ?? null };
  }

  private readonly pointed = (event: PointerEvent): void => {
    this.listener.hovered(event.buttons ? { node: null, edge: null, x: 0, y: 0 } : this.at(event.offsetX, event.offsetY));
  };

  private readonly left = (): void => this.listener.hovered({ node: null, edge: null, x: 0, y: 0 });

  private readonly clicked = (event: MouseEvent): void =>
    this.listener.clicked(this.at(event.offsetX, event.offsetY), event.shiftKey);

  private readonly doubled = (event: MouseEvent): void => this.listener.opened(this.at(event.offsetX, event.offsetY));
}

const isAlike = (a: Layout, b: Layout | undefined): boolean => a.width === b?.width && a.height === b.height;

/** Points along the largest edges, to find the one under the pointer. */
function edgePoints(scene: Scene): Quadtree<EdgePoint> {
  const points: EdgePoint[] = [];
  for (const edge of scene.edges.slice(0, EDGES_TO_HIT)) {
    const c = curve(scene.layout, edge);
    const steps = Math.min(40, Math.max(6, Math.ceil(Math.hypot(c.x2 - c.x1, c.y2 - c.y1) / 14)));
    for (let n = 1; n < steps; n++) {
      const [x, y] = along(c, n / steps);
      points.push({ x, y, edge });
    }
  }
  return quadtree(points, (p) => p.x, (p) => p.y);
}

/* Sheets: the graph, painted in slices onto a canvas larger than the window, which a frame only copies. */

import { curve } from "./layout";
import type { GraphEdge } from "./model";
import { growth, paintEdges, paintGround, paintNodes, type Scene } from "./paint";

/** Share of the window by which a sheet is larger, on each side. */
const MARGIN = 0.3;

const EDGES_A_SLICE = 60;
const NODES_A_SLICE = 250;

/** Part of the world that a window shows: world = (window − (x, y)) / k. */
export interface Transform {
  k: number;
  x: number;
  y: number;
}

export interface Size {
  width: number;
  height: number;
  /** Pixels of the device per pixel of the page. */
  ratio: number;
}

interface Sheet {
  canvas: HTMLCanvasElement;
  scene: Scene | null;
  k: number;
  /** World coordinates of its left upper corner. */
  x: number;
  y: number;
}

const blank = (): Sheet => ({ canvas: document.createElement("canvas"), scene: null, k: 1, x: 0, y: 0 });

export class Sheets {
  private front = blank();
  private back = blank();
  private painting: Generator<undefined, void> | null = null;

  /** Forget what is painted. */
  clear(): void {
    this.painting = null;
    this.front.scene = null;
  }

  /** Spend up to `budget` milliseconds on the next sheet, where one is needed; true if there is more to do. */
  work(scene: Scene, transform: Transform, size: Size, rests: boolean, budget: number): boolean {
    const began = performance.now();
    if (!this.painting && this.isStale(scene, transform, size, rests)) this.painting = this.paint(scene, transform, size);
    while (this.painting) {
      if (this.painting.next().done) this.painting = null;
      if (performance.now() - began > budget) break;
    }
    return this.painting !== null || this.isStale(scene, transform, size, rests);
  }

  /** Copy the sheet in front to a window; false where nothing is painted yet. */
  copy(context: CanvasRenderingContext2D, transform: Transform, size: Size): boolean {
    const { front } = this;
    if (!front.scene) return false;
    const scale = transform.k / front.k;
    // A sheet at its own scale lies on whole pixels, or copying would blur it.
    const at = (v: number): number => (scale === 1 ? Math.round(v * size.ratio) / size.ratio : v);
    const reach = (1 + 2 * MARGIN) * scale;
    context.imageSmoothingEnabled = scale !== 1;
    context.drawImage(
      front.canvas,
      at(transform.x + transform.k * front.x),
      at(transform.y + transform.k * front.y),
      size.width * reach,
      size.height * reach,
    );
    return true;
  }

  /** True if the front sheet shows something else, lies elsewhere or has another scale than it should. */
  private isStale(scene: Scene, { k, x, y }: Transform, size: Size, rests: boolean): boolean {
    const { front } = this;
    if (front.scene !== scene) return true;
    const change = k / front.k;
    if (change !== 1 && (rests || change > 2 || change < 0.6)) return true;
    const reach = (1 + 2 * MARGIN) / front.k;
    const [left, top] = [-x / k, -y / k];
    return (
      left < front.x || top < front.y ||
      left + size.width / k > front.x + size.width * reach || top + size.height / k > front.y + size.height * reach
    );
  }

  /** Paint the next sheet, a slice a step, and put it in front. */
  private *paint(scene: Scene, transform: Transform, size: Size): Generator<undefined, void> {
    const { back } = this;
    const { k } = transform;
    const [w, h] = [size.width * (1 + 2 * MARGIN), size.height * (1 + 2 * MARGIN)];
    const [x, y] = [(-MARGIN * size.width - transform.x) / k, (-MARGIN * size.height - transform.y) / k];
    const pixels = [Math.round(w * size.ratio), Math.round(h * size.ratio)] as const;
    if (back.canvas.width !== pixels[0] || back.canvas.height !== pixels[1]) [back.canvas.width, back.canvas.height] = pixels;
    // Painted by the processor, so that each slice is finished within its frame.
    const context = back.canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    if (!context) return;
    const finish = (): unknown => context.getImageData(0, 0, 1, 1);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = scene.colours.card;
    context.fillRect(0, 0, ...pixels);
    const scale = size.ratio * k;
    context.setTransform(scale, 0, 0, scale, -x * scale, -y * scale);
    paintGround(context, scene);
    const seen = { left: x - 20, top: y - 20, right: x + w / k + 20, bottom: y + h / k + 20 };
    const edges = scene.edges.filter((edge) => crosses(scene, edge, seen)).reverse();
    const opacity = edges.length > 3000 ? 0.25 : edges.length > 800 ? 0.36 : 0.5;
    for (let i = 0; i < edges.length; i += EDGES_A_SLICE) {
      paintEdges(context, scene, edges.slice(i, i + EDGES_A_SLICE), opacity, growth(k));
      finish();
      yield;
    }
    const nodes = scene.nodes.filter((n) => within(scene.layout.x[n] ?? 0, scene.layout.y[n] ?? 0, seen));
    for (let i = 0; i < nodes.length; i += NODES_A_SLICE) {
      paintNodes(context, scene, nodes.slice(i, i + NODES_A_SLICE), growth(k));
      finish();
      yield;
    }
    Object.assign(back, { scene, k, x, y });
    [this.front, this.back] = [back, this.front];
  }
}

interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
}

const within = (x: number, y: number, box: Box): boolean => x >= box.left && x <= box.right && y >= box.top && y <= box.bottom;

/** True if an edge may be seen in a box. */
function crosses(scene: Scene, edge: GraphEdge, box: Box): boolean {
  const c = curve(scene.layout, edge);
  return (
    Math.max(c.x1, c.cx1, c.cx2, c.x2) >= box.left && Math.min(c.x1, c.cx1, c.cx2, c.x2) <= box.right &&
    Math.max(c.y1, c.cy1, c.cy2, c.y2) >= box.top && Math.min(c.y1, c.cy1, c.cy2, c.y2) <= box.bottom
  );
}

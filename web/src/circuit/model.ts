/* The graph that is drawn: nodes and edges of a circuit, supernodes merged, thresholds applied. */

import type { Circuit, CircuitEdge, CircuitNode, NodeKind } from "../data/types";

export type Kind = NodeKind | "group" | "output";

export interface GraphNode {
  /** Index of its row in circuit.json; of its first member for a supernode, −1 for the payload. */
  row: number;
  kind: Kind;
  place: string;
  layer: number;
  role: string;
  feature: number | null;
  effect: number;
  low: number;
  high: number;
  activation: number;
  reference: number;
  /** Name of a supernode. */
  group: string;
  /** Rows that a supernode merges. */
  members: readonly number[];
}

export interface GraphEdge {
  source: number;
  target: number;
  weight: number;
  low: number;
  high: number;
  frozen: number | null;
  free: number | null;
  /** The weight on the prompts on which the two above were measured; that on all prompts where none was. */
  predicted: number;
  heads: readonly { head: number; weight: number }[];
}

export interface Graph {
  nodes: readonly GraphNode[];
  edges: readonly GraphEdge[];
  /** Index of the payload. */
  output: number;
  /** Row of circuit.json → node. */
  ofRow: ReadonlyMap<number, number>;
  /** Nodes by falling |effect|, without the payload. */
  ranked: readonly number[];
}

/** Supernodes: name → rows. */
export type Groups = ReadonlyMap<string, readonly number[]>;

/** Groups of the record's own `supernode` names. */
export function ownGroups(circuit: Circuit): Groups {
  const found = new Map<string, number[]>();
  circuit.nodes.forEach((node, row) => {
    if (node.supernode) found.set(node.supernode, [...(found.get(node.supernode) ?? []), row]);
  });
  return found;
}

/** Groups as text: `name~1.5.9,other~2.3`. */
export function parseGroups(text: string, rows: number): Groups {
  const found = new Map<string, number[]>();
  const taken = new Set<number>();
  for (const part of text.split(",")) {
    const [name = "", list = ""] = part.split("~");
    const members = list.split(".").map(Number).filter((row) => Number.isInteger(row) && row >= 0 && row < rows && !taken.has(row));
    if (!name || members.length < 2) continue;
    members.forEach((row) => taken.add(row));
    found.set(name, members);
  }
  return found;
}

export const groupsText = (groups: Groups): string => [...groups].map(([name, rows]) => `${name}~${rows.join(".")}`).join(",");

/** A supernode's name without the characters that separate groups. */
export const groupName = (text: string): string => text.replace(/[~,.]/g, " ").trim().slice(0, 40);

const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);

function single(node: CircuitNode, row: number): GraphNode {
  const { place, layer, role, kind, effect, low, high, activation, reference } = node;
  return { row, kind, place, layer, role, feature: node.feature ?? null, effect, low, high, activation, reference, group: "", members: [row] };
}

function merged(name: string, rows: readonly number[], all: readonly CircuitNode[]): GraphNode | null {
  const members = rows.map((row) => all[row]).filter((node) => node !== undefined);
  const lead = members.reduce<CircuitNode | undefined>((best, node) => (best && Math.abs(best.effect) >= Math.abs(node.effect) ? best : node), undefined);
  if (!lead) return null;
  return {
    ...single(lead, rows[0] ?? 0),
    kind: "group",
    feature: null,
    effect: sum(members.map((node) => node.effect)),
    low: sum(members.map((node) => node.low)),
    high: sum(members.map((node) => node.high)),
    activation: sum(members.map((node) => node.activation)),
    reference: sum(members.map((node) => node.reference)),
    group: name,
    members: rows,
  };
}

export function build(circuit: Circuit, groups: Groups): Graph {
  const nodes: GraphNode[] = [];
  const ofRow = new Map<number, number>();
  for (const [name, rows] of groups) {
    const node = merged(name, rows.filter((row) => !ofRow.has(row)), circuit.nodes);
    if (!node || node.members.length < 2) continue;
    node.members.forEach((row) => ofRow.set(row, nodes.length));
    nodes.push(node);
  }
  circuit.nodes.forEach((node, row) => {
    if (ofRow.has(row)) return;
    ofRow.set(row, nodes.length);
    nodes.push(single(node, row));
  });
  const output = nodes.length;
  const total = circuit.metric - circuit.metric_reference;
  nodes.push({
    row: -1, kind: "output", place: "", layer: Infinity, role: circuit.roles.at(-1) ?? "", feature: null, effect: total, low: total, high: total,
    activation: circuit.metric, reference: circuit.metric_reference, group: "", members: [],
  });
  const ranked = nodes.map((_, i) => i).slice(0, output).sort((a, b) => Math.abs(nodes[b]?.effect ?? 0) - Math.abs(nodes[a]?.effect ?? 0));
  return { nodes, edges: mergedEdges(circuit.edges, ofRow, output), output, ofRow, ranked };
}

/** Edges between nodes, largest first; those between members of the same nodes are added up, in full or not at all. */
function mergedEdges(edges: readonly CircuitEdge[], ofRow: ReadonlyMap<number, number>, output: number): GraphEdge[] {
  const found = new Map<number, GraphEdge>();
  for (const edge of edges) {
    const source = ofRow.get(edge.source);
    const target = edge.target == null ? output : ofRow.get(edge.target);
    if (source === undefined || target === undefined || source === target) continue;
    const key = source * (output + 1) + target;
    const known = found.get(key);
    const { weight, low, high } = edge;
    const frozen = edge.frozen ?? null;
    const free = edge.free ?? null;
    const predicted = edge.predicted ?? edge.weight;
    found.set(
      key,
      known
        ? {
            source, target, weight: known.weight + weight, low: known.low + low, high: known.high + high,
            frozen: known.frozen === null || frozen === null ? null : known.frozen + frozen,
            free: known.free === null || free === null ? null : known.free + free,
            predicted: known.predicted + predicted,
            heads: [],
          }
        : { source, target, weight, low, high, frozen, free, predicted, heads: edge.heads ?? [] },
    );
  }
  return [...found.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

export interface Shown {
  nodes: readonly number[];
  edges: readonly GraphEdge[];
}

/** The largest nodes and, between them, the largest edges; kept nodes and the edges between them stay. */
export function threshold(graph: Graph, nodes: number, edges: number, kept: ReadonlySet<number>): Shown {
  const chosen = new Set([graph.output, ...graph.ranked.slice(0, nodes), ...kept]);
  const between = graph.edges.filter(({ source, target }) => chosen.has(source) && chosen.has(target));
  const drawn = between.slice(0, edges);
  for (const edge of between.slice(edges)) {
    if (kept.has(edge.source) && (kept.has(edge.target) || edge.target === graph.output)) drawn.push(edge);
  }
  return { nodes: [...chosen], edges: drawn };
}

/** A node in words. */
export function nodeName(node: GraphNode): string {
  switch (node.kind) {
    case "output": return "payload";
    case "group": return node.group;
    case "feature": return `feature ${node.feature ?? "?"}`;
    case "neuron": return `neuron ${node.feature ?? "?"}`;
    case "error": return "reconstruction error";
    case "token": return "token embedding";
  }
}

/** Where a node is, in words. */
export const nodePlace = (node: GraphNode): string =>
  node.kind === "output" ? "log-odds" : node.kind === "group" ? `${node.members.length} nodes` : `${node.place} · ${node.role}`;

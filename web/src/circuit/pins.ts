/* Pinned nodes, and nodes that are picked for a supernode. */

import { signal } from "@preact/signals";

import { change, flip } from "../state/change";
import { options, tune } from "../state/hash";
import { groupsText, type Graph, type Groups } from "./model";

/** Rows of circuit.json that are picked for a supernode. */
export const picked = signal<ReadonlySet<number>>(new Set());

const keptRows = (): Set<string> => new Set((options.value["keep"] ?? "").split(".").filter(Boolean));

/** Nodes of the change's features, and others that are pinned. */
export function pinnedOf(graph: Graph): ReadonlySet<number> {
  const found = new Set<number>();
  for (const row of keptRows()) {
    const node = graph.ofRow.get(Number(row));
    if (node !== undefined) found.add(node);
  }
  const features = new Set(change.value.map(({ site, id }) => `${site}:${id}`));
  graph.nodes.forEach((node, i) => {
    if (node.kind === "feature" && features.has(`${node.place}:${node.feature}`)) found.add(i);
  });
  return found;
}

/** Pin a node: a feature becomes part of the change, any other stays in view. */
export function flipNode(graph: Graph, i: number): void {
  const node = graph.nodes[i];
  if (!node || node.kind === "output") return;
  if (node.kind === "feature" && node.feature !== null) {
    flip(node.place, node.feature);
    return;
  }
  const kept = keptRows();
  const row = String(node.row);
  if (!kept.delete(row)) kept.add(row);
  tune({ keep: [...kept].join(".") });
}

/** Pick a node for a supernode, or put it back. */
export function pick(graph: Graph, i: number): void {
  const row = graph.nodes[i]?.row;
  if (row === undefined || row < 0) return;
  const next = new Set(picked.value);
  if (!next.delete(row)) next.add(row);
  picked.value = next;
}

/** Change the supernodes of the address. */
export function setGroups(groups: Groups): void {
  picked.value = new Set();
  tune({ groups: groupsText(groups), merged: "" });
}

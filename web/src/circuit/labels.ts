/* Names of a circuit's nodes: the explanation where there is room for it, a short tag in the drawing. */

import { useEffect, useMemo } from "preact/hooks";

import { short, tokenText } from "../base/text";
import type { Circuit, CircuitNode } from "../data/types";
import { classOf, entryAt, labelOf, list, lists, strongestOf } from "../state/data";
import { nodeName, type Graph, type Kind } from "./model";

export interface Names {
  /** A feature's explanation, or its tag where there is none; the name of any other node. */
  full(i: number): string;
  /** Number, class and strongest token of a feature: "167 · payload · −[". */
  tag(i: number): string;
  /** The token whose logit a feature changes most, and that change. */
  strongest(i: number): [string, number] | null;
}

const SHORT: Partial<Record<Kind, string>> = { output: "payload", error: "error", token: "token" };

/** "−[" of a token that is suppressed, "+YOU" of one that is promoted. */
const signedToken = ([token, weight]: [string, number]): string => `${weight < 0 ? "−" : "+"}${short(tokenText(token.trim() || token), 12)}`;

/** The same by the circuit's own record, for a dictionary without statistics. */
function strongestIn(node: CircuitNode | undefined): [string, number] | null {
  const [up, down] = [node?.promotes?.[0], node?.suppresses?.[0]];
  return (up && down ? (Math.abs(down[1]) > Math.abs(up[1]) ? down : up) : (up ?? down)) ?? null;
}

export function useNames(circuit: Circuit, graph: Graph): Names {
  const sites = useMemo(() => [...new Set(circuit.nodes.filter((node) => node.kind === "feature").map((node) => node.place))], [circuit]);
  useEffect(() => {
    for (const site of sites) {
      const entry = entryAt(site, circuit.dictionaries[site]);
      if (entry) list(entry.key).catch(() => undefined);
    }
  }, [sites]);
  const loaded = lists.value;
  return useMemo(() => {
    function of<T>(i: number, none: T, found: (entry: ReturnType<typeof entryAt>, id: number) => T): T {
      const node = graph.nodes[i];
      if (node?.kind !== "feature" || node.feature === null) return none;
      return found(entryAt(node.place, circuit.dictionaries[node.place]), node.feature);
    }
    const other = (i: number): string => {
      const node = graph.nodes[i];
      return node ? (SHORT[node.kind] ?? short(nodeName(node), 36)) : "";
    };
    const recorded = (i: number): [string, number] | null => strongestIn(circuit.nodes[graph.nodes[i]?.row ?? -1]);
    const strongest = (i: number): [string, number] | null => of(i, null, (entry, id) => strongestOf(entry, id) ?? recorded(i));
    const tag = (i: number): string => of(i, other(i), (entry, id) => {
      const token = strongest(i);
      const about = [short(classOf(entry, id), 16), token ? signedToken(token) : ""].filter(Boolean);
      return about.length ? [id, ...about].join(" · ") : `f${id}`;
    });
    return { full: (i) => of(i, other(i), labelOf) || tag(i), tag, strongest };
  }, [graph, loaded, circuit]);
}

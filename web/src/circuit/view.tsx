/* Circuit view: the graph, its thresholds, and a panel with the chosen node or the list of all. */

import { computed, signal } from "@preact/signals";
import type { JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { decimals, number, short, signed, visible, whole } from "../base/text";
import { load } from "../data/load";
import type { Circuit } from "../data/types";
import { Icon, Key } from "../parts/marks";
import { change } from "../state/change";
import { circuits, message } from "../state/data";
import { asNumber, key, options, show as showPlace, tune } from "../state/hash";
import { dark } from "../state/theme";
import { useNames, type Names } from "./labels";
import { arrange } from "./layout";
import { build, nodeName, nodePlace, ownGroups, parseGroups, threshold, type Graph, type Groups } from "./model";
import { coloursOf } from "./paint";
import { Panel } from "./panel";
import { flipNode, pick, picked, pinnedOf } from "./pins";
import { roomOf, Stage, type Hit } from "./stage";

/** Nodes and edges that are drawn at first, at most. */
const NODES = 300;
const EDGES = 400;
const ALL = "all";

const hovered = signal<Hit | null>(null);

export function CircuitView(): JSX.Element {
  const entry = key.value === "" ? circuits.value[0] : circuits.value.find((one) => one.key === key.value);
  const [found, setFound] = useState<{ key: string; circuit: Circuit } | null>(null);
  const [trouble, setTrouble] = useState("");
  const place = entry?.key;
  useEffect(() => {
    setTrouble("");
    if (place === undefined) return;
    load<Circuit>(`circuits/${place}`).then(
      (circuit) => setFound({ key: place, circuit }),
      (error: unknown) => setTrouble(message(error)),
    );
  }, [place]);
  if (!entry) {
    return (
      <div class="empty">
        <h1>{key.value === "" ? "No circuits here" : "This circuit is not in the folder"}</h1>
        <p>A circuit that <code>unsleep circuit</code> traced in the explored folder is drawn here.</p>
      </div>
    );
  }
  if (trouble) return <p class="trouble" role="alert">{visible(trouble)}</p>;
  if (found === null || found.key !== place) return <p class="nothing" role="status">loading</p>;
  return <Drawn key={place} circuit={found.circuit} />;
}

/** Number of nodes or edges that are drawn. */
const drawnOf = (name: string, first: number, most: number): number =>
  options.value[name] === ALL ? most : asNumber(name, Math.min(first, most), Math.min(1, most), most);

/** The drawn graph of a circuit, as the address asks for it. */
function useGraph(circuit: Circuit): { graph: Graph; groups: Groups } {
  const own = options.value["groups"] ?? "";
  const merged = options.value["merged"] !== "0";
  return useMemo(() => {
    const groups = new Map(parseGroups(own, circuit.nodes.length));
    const taken = new Set([...groups.values()].flat());
    for (const [name, rows] of ownGroups(circuit)) {
      const free = rows.filter((row) => !taken.has(row));
      if (!groups.has(name) && free.length > 1) groups.set(name, free);
    }
    return { graph: build(circuit, merged ? groups : new Map()), groups };
  }, [circuit, own, merged]);
}

function Drawn({ circuit }: { circuit: Circuit }): JSX.Element {
  const canvas = useRef<HTMLCanvasElement>(null);
  const stage = useRef<Stage | null>(null);
  const { graph, groups } = useGraph(circuit);
  const nodes = drawnOf("nodes", NODES, graph.ranked.length);
  const edges = drawnOf("edges", EDGES, graph.edges.length);
  const selected = selectedOf(graph);
  const pinned = useMemo(() => pinnedOf(graph), [graph, change.value, options.value["keep"]]);
  const names = useNames(circuit, graph);
  const [broken, setBroken] = useState("");
  const [room, setRoom] = useState({ width: 980, height: 700 });

  const kept = useMemo(() => new Set([...pinned, ...(selected === null ? [] : [selected])]), [pinned, selected]);
  const shown = useMemo(() => threshold(graph, nodes, edges, kept), [graph, nodes, edges, kept]);
  const layout = useMemo(() => arrange(graph, shown.nodes, circuit.roles, room), [graph, shown.nodes, circuit, room]);

  function select(i: number | null): void {
    const row = i === null ? "" : i === graph.output ? "payload" : String(graph.nodes[i]?.row ?? "");
    tune({ node: row });
    if (i !== null) stage.current?.reveal(i);
  }

  useEffect(() => {
    if (!canvas.current) return;
    try {
      stage.current = new Stage(canvas.current, {
        hovered: (hit) => (hovered.value = hit.node === null && hit.edge === null ? null : hit),
        clicked: (hit, more) => clicked.current(hit, more),
        opened: (hit) => opened.current(hit),
        moved: (to) => tune({ at: to ? to.map((x) => x.toFixed(4)).join() : "" }),
        resized: (size) => setRoom(roomOf(size)),
      });
    } catch (error) {
      setBroken(message(error));
    }
    return () => {
      stage.current?.destroy();
      stage.current = null;
      hovered.value = null;
    };
  }, []);

  const clicked = useRef((_hit: Hit, _more: boolean): void => undefined);
  clicked.current = (hit, more) => {
    if (hit.node === null) select(hit.edge?.target ?? null);
    else if (more) pick(graph, hit.node);
    else select(hit.node);
  };
  const opened = useRef((_hit: Hit): void => undefined);
  opened.current = (hit) => hit.node !== null && flipNode(graph, hit.node);

  useEffect(() => {
    if (!canvas.current || !stage.current) return;
    const colours = coloursOf(canvas.current.parentElement ?? document.body);
    const largest = Math.max(1e-12, Math.abs(graph.edges[0]?.weight ?? 0));
    stage.current.show({ graph, layout, nodes: shown.nodes, edges: shown.edges, colours, largest }, startOf());
  }, [graph, layout, shown, dark.value]);

  const about = hovered.value?.node ?? null;
  useEffect(() => {
    stage.current?.mark({ selected, hovered: about, pinned, picked: ofRows(graph, picked.value), label: names.tag });
  }, [selected, about, pinned, picked.value, names, shown]);

  return (
    <div class="circuit-view">
      <div class="stage">
        <Tools circuit={circuit} graph={graph} groups={groups} nodes={nodes} edges={edges} />
        <div class="canvas-room">
          {broken && <p class="trouble" role="alert">{visible(broken)}</p>}
          <canvas
            ref={canvas}
            tabIndex={0}
            role="application"
            aria-roledescription="circuit"
            aria-label={`Circuit of ${whole(shown.nodes.length)} nodes and ${whole(shown.edges.length)} edges; columns are roles, layers run upwards. Arrow keys move between nodes, p pins, g picks for a supernode, plus and minus zoom, 0 fits. The list beside it has the same nodes.`}
            onKeyDown={(event) => keyed(event, graph, selected, stage.current, select)}
          />
          <Tip graph={graph} names={names} />
          <div class="canvas-tools">
            <button type="button" title="Zoom in" aria-label="Zoom in" onClick={() => stage.current?.zoomBy(1.4)}><Icon name="more" /></button>
            <button type="button" title="Zoom out" aria-label="Zoom out" onClick={() => stage.current?.zoomBy(1 / 1.4)}><Icon name="less" /></button>
            <button type="button" title="Fit into the window" aria-label="Fit into the window" onClick={() => stage.current?.fit()}><Icon name="fit" /></button>
          </div>
        </div>
        <Legend />
      </div>
      <Panel circuit={circuit} graph={graph} groups={groups} shown={shown} selected={selected} pinned={pinned} names={names} select={select} />
    </div>
  );
}

const ofRows = (graph: Graph, rows: ReadonlySet<number>): ReadonlySet<number> =>
  new Set([...rows].map((row) => graph.ofRow.get(row)).filter((i) => i !== undefined));

function startOf(): [number, number, number] | null {
  const parts = (options.value["at"] ?? "").split(",").map(Number);
  const [x, y, k] = parts;
  return parts.length === 3 && parts.every(Number.isFinite) && k !== undefined && k > 0 ? [x ?? 0, y ?? 0, k] : null;
}

function selectedOf(graph: Graph): number | null {
  const text = options.value["node"];
  if (text === undefined) return null;
  if (text === "payload") return graph.output;
  return /^\d+$/.test(text) ? (graph.ofRow.get(Number(text)) ?? null) : null;
}

function keyed(event: KeyboardEvent, graph: Graph, selected: number | null, stage: Stage | null, select: (i: number | null) => void): void {
  if (!stage || event.ctrlKey || event.metaKey || event.altKey) return;
  const from = selected ?? graph.output;
  const ways: Record<string, [number, number]> = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  const way = ways[event.key];
  if (way) {
    const next = selected === null ? graph.output : stage.next(from, ...way);
    if (next !== null) select(next);
  } else if (event.key === "+" || event.key === "=") stage.zoomBy(1.4);
  else if (event.key === "-") stage.zoomBy(1 / 1.4);
  else if (event.key === "0") stage.fit();
  else if (event.key === "Escape") select(null);
  else if (event.key === "p" && selected !== null) flipNode(graph, selected);
  else if (event.key === "g" && selected !== null && selected !== graph.output) pick(graph, selected);
  else return;
  event.preventDefault();
}

interface ToolsProps {
  circuit: Circuit;
  graph: Graph;
  groups: Groups;
  nodes: number;
  edges: number;
}

/** Sliders move by equal factors: a circuit has few large nodes and many small ones. */
const toSlider = (n: number, most: number): number => (most <= 1 ? 1 : Math.log(Math.max(1, n)) / Math.log(most));
const fromSlider = (x: number, most: number): string => (x >= 1 ? ALL : String(Math.round(Math.max(1, most ** x))));

const drawnTotal = computed(() => options.value["merged"] !== "0");

function Tools({ circuit, graph, groups, nodes, edges }: ToolsProps): JSX.Element {
  const sizes = useMemo(() => graph.ranked.map((i) => Math.abs(graph.nodes[i]?.effect ?? 0)), [graph]);
  const total = useMemo(() => sizes.reduce((a, b) => a + b, 0) || 1, [sizes]);
  const share = sizes.slice(0, nodes).reduce((a, b) => a + b, 0) / total;
  const own = circuit.curves[0]?.points ?? [];
  const near = own.reduce<(typeof own)[number] | undefined>((best, point) => (best && Math.abs(best.nodes - nodes) <= Math.abs(point.nodes - nodes) ? best : point), undefined);
  return (
    <form class="tools" aria-label="Circuit" onSubmit={(event) => event.preventDefault()}>
      {circuits.value.length > 1 && (
        <label>
          <span class="hide">Circuit</span>
          <select value={key.value || circuits.value[0]?.key} onChange={(event) => { key.value = event.currentTarget.value; showPlace(null, { node: "", at: "", groups: "", keep: "" }); }}>
            {circuits.value.map((one) => <option value={one.key}>{short(one.title, 60)}</option>)}
          </select>
        </label>
      )}
      <div class="range">
        <span>Nodes</span> <output>{whole(nodes)} of {whole(graph.ranked.length)}</output>
        <input type="range" aria-label="Nodes that are drawn" min={0} max={1} step={0.005} value={toSlider(nodes, graph.ranked.length)} aria-valuetext={`${nodes} nodes`}
          onInput={(event) => tune({ nodes: fromSlider(event.currentTarget.valueAsNumber, graph.ranked.length) })} />
        <small>|effect| ≥ {number(sizes[nodes - 1] ?? 0)} · {(100 * share).toFixed(0)} % of it</small>
      </div>
      <div class="range">
        <span>Edges</span> <output>{whole(edges)} of {whole(graph.edges.length)}</output>
        <input type="range" aria-label="Edges that are drawn" min={0} max={1} step={0.005} value={toSlider(edges, graph.edges.length)} aria-valuetext={`${edges} edges`}
          onInput={(event) => tune({ edges: fromSlider(event.currentTarget.valueAsNumber, graph.edges.length) })} />
        <small>|weight| ≥ {number(Math.abs(graph.edges[edges - 1]?.weight ?? 0))}</small>
      </div>
      {groups.size > 0 && (
        <label class="check">
          <input type="checkbox" checked={drawnTotal.value} onChange={(event) => tune({ merged: event.currentTarget.checked ? "" : "0" })} />
          {whole(groups.size)} {groups.size === 1 ? "supernode" : "supernodes"}
        </label>
      )}
      <dl class="circuit-facts">
        <div><dt>Log-odds of <q class="text">{short(circuit.payload || circuit.tokens.join(""), 24)}</q></dt><dd>{decimals(circuit.metric_reference, 2)} → <b>{decimals(circuit.metric, 2)}</b></dd></div>
        {near && <div title={`Share of the log-odds that ${near.nodes} nodes carry, all others patched`}><dt>Faithfulness of {whole(near.nodes)}</dt><dd>{decimals(near.faithfulness.value, 2)} <small>{decimals(near.faithfulness.low, 2)} to {decimals(near.faithfulness.high, 2)}</small></dd></div>}
        <div title="Share of the nodes' |effect| that is of reconstruction errors"><dt>Errors</dt><dd>{(100 * circuit.errors).toFixed(0)} %</dd></div>
      </dl>
    </form>
  );
}

function Tip({ graph, names }: { graph: Graph; names: Names }): JSX.Element | null {
  const hit = hovered.value;
  if (!hit) return null;
  const node = hit.node === null ? undefined : graph.nodes[hit.node];
  const lines = node
    ? [nodeName(node), nodePlace(node), ...(node.kind === "feature" && hit.node !== null ? [names.tag(hit.node), names.full(hit.node)].filter((line, n, all) => all.indexOf(line) === n) : []), `effect ${signed(node.effect)}  [${decimals(node.low)}, ${decimals(node.high)}]`]
    : hit.edge
      ? [`${nodeName(graph.nodes[hit.edge.source]!)} → ${nodeName(graph.nodes[hit.edge.target]!)}`, `weight ${signed(hit.edge.weight)}  [${decimals(hit.edge.low)}, ${decimals(hit.edge.high)}]`]
      : [];
  return (
    <div class="tip" role="tooltip" style={{ left: `${hit.x}px`, top: `${hit.y}px` }}>
      {lines.map((line, i) => (i === 0 ? <b class="text">{short(line, 120)}</b> : <span class="text">{short(line, 120)}</span>))}
    </div>
  );
}

function Legend(): JSX.Element {
  return (
    <ul class="legend-line" aria-label="Legend">
      <li><Key shape="circle" /> feature</li>
      <li><Key shape="triangle" /> reconstruction error</li>
      <li><Key shape="square" /> token</li>
      <li><Key shape="diamond" /> payload</li>
      <li><Key shape="circle" colour="c-edited" /> promotes</li>
      <li><Key shape="circle" colour="c-suspect" /> suppresses</li>
    </ul>
  );
}

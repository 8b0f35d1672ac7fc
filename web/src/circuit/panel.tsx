/* Panel of a circuit: the list of its nodes, for the keyboard and for screen readers, or the chosen node with its edges. */

import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";

import { clip, decimals, short, signed, whole } from "../base/text";
import type { Circuit, TokenWeight } from "../data/types";
import { Icon, Key, type Shape } from "../parts/marks";
import { Strength } from "../parts/strength";
import { Weights, Writes } from "../parts/tokens";
import { Virtual } from "../parts/virtual";
import { change, strengthen } from "../state/change";
import { entryAt } from "../state/data";
import { link, options } from "../state/hash";
import type { Names } from "./labels";
import { groupName, nodeName, nodePlace, parseGroups, type Graph, type GraphEdge, type GraphNode, type Groups, type Kind, type Shown } from "./model";
import { flipNode, pick, picked, setGroups } from "./pins";

const SHAPES: Record<Kind, Shape> = { feature: "circle", error: "triangle", token: "square", neuron: "hexagon", output: "diamond", group: "group" };
const ROW = 44;

/** Edges of a node that are listed at first. */
const FEW = 12;

interface Props {
  circuit: Circuit;
  graph: Graph;
  groups: Groups;
  shown: Shown;
  selected: number | null;
  pinned: ReadonlySet<number>;
  names: Names;
  select(i: number | null): void;
}

const colour = (node: GraphNode): string => (node.kind === "output" ? "c-base" : node.effect < 0 ? "c-suspect" : "c-edited");

export function Panel(props: Props): JSX.Element {
  const { selected } = props;
  return (
    <aside class="panel" aria-label="Nodes">
      <Picked {...props} />
      {selected === null ? <All {...props} /> : <One {...props} i={selected} />}
    </aside>
  );
}

function All({ graph, shown, names, select, pinned }: Props): JSX.Element {
  const [search, setSearch] = useState("");
  const [at, setAt] = useState(-1);
  const rows = useMemo(() => {
    const drawn = new Set(shown.nodes);
    const wanted = search.trim().toLowerCase();
    return [graph.output, ...graph.ranked].filter((i) => {
      const node = graph.nodes[i];
      if (!node || !drawn.has(i)) return false;
      return !wanted || `${nodeName(node)} ${nodePlace(node)} ${names.tag(i)} ${names.full(i)}`.toLowerCase().includes(wanted);
    });
  }, [graph, shown, search, names]);
  return (
    <>
      <div class="panel-head">
        <h2>Nodes</h2>
        <small role="status">{whole(rows.length)} drawn</small>
      </div>
      <input type="search" aria-label="Search nodes" placeholder="Search nodes" value={search} onInput={(event) => setSearch(event.currentTarget.value)} />
      <Virtual
        count={rows.length}
        height={ROW}
        chosen={Math.min(at, rows.length - 1)}
        name="node"
        label="Nodes of the circuit, largest effect first; Enter opens one"
        choose={(n) => {
          // The mouse opens at once; arrow keys move, Enter opens.
          setAt(n);
          if (clicking()) select(rows[n] ?? null);
        }}
        open={(n) => select(rows[n] ?? null)}
        pressed={(pressed, n) => {
          const i = rows[n];
          if (i === undefined || (pressed !== "p" && pressed !== "g")) return false;
          if (pressed === "p") flipNode(graph, i);
          else pick(graph, i);
          return true;
        }}
        row={(n) => <Line graph={graph} i={rows[n] ?? 0} names={names} pinned={pinned.has(rows[n] ?? -1)} />}
      />
    </>
  );
}

const clicking = (): boolean => window.event instanceof MouseEvent;

function Line({ graph, i, names, pinned }: { graph: Graph; i: number; names: Names; pinned: boolean }): JSX.Element {
  const node = graph.nodes[i];
  if (!node) return <></>;
  const said = node.kind === "feature" ? short(names.full(i), 160) : short(nodeName(node), 60);
  return (
    <span class="node-line">
      <Key shape={SHAPES[node.kind]} colour={colour(node)} />
      <span class="line-text">
        <span class="ellipsis text">{said}{pinned && <span class="pinned"><Icon name="pin" /></span>}</span>
        <small class="ellipsis text">{short(nodePlace(node), 40)}{node.kind === "feature" && said !== names.tag(i) ? ` · ${names.tag(i)}` : ""}</small>
      </span>
      <span class="num">{signed(node.effect, 3)}</span>
    </span>
  );
}

function One({ circuit, graph, i, pinned, names, select }: Props & { i: number }): JSX.Element {
  const node = graph.nodes[i];
  if (!node) return <></>;
  const entry = node.kind === "feature" ? entryAt(node.place, circuit.dictionaries[node.place]) : undefined;
  const tray = node.kind === "feature" ? change.value.find((one) => one.site === node.place && one.id === node.feature) : undefined;
  const said = node.kind === "feature" ? names.full(i) : "";
  const writes = names.strongest(i);
  const row = node.members.length === 1 ? circuit.nodes[node.row] : undefined;
  return (
    <div class="panel-one" key={i}>
      <button type="button" class="quiet back" onClick={() => select(null)}><Icon name="back" /> All nodes</button>
      <header aria-live="polite">
        <h2><Key shape={SHAPES[node.kind]} colour={colour(node)} /> <span class="text">{short(nodeName(node), 60)}</span></h2>
        <p class="eyebrow text">{short(nodePlace(node), 90)}</p>
        {said && said !== names.tag(i) && <p class="said text">{clip(said, 500)}</p>}
        {writes && <p class="strongest"><Writes token={writes[0]} weight={writes[1]} /> most, <span class="num">{signed(writes[1], 2)}</span></p>}
      </header>
      {node.kind !== "output" && (
        <p class="buttons">
          <button type="button" class={pinned.has(i) ? "plain on" : "plain"} aria-pressed={pinned.has(i)} onClick={() => flipNode(graph, i)}>
            <Icon name="pin" /> {node.kind === "feature" ? (pinned.has(i) ? "In the change" : "Add to the change") : pinned.has(i) ? "Pinned" : "Pin"}
          </button>
          {entry && node.feature !== null && <a class="plain" href={link({ view: "features", key: entry.key, feature: node.feature })}>Read its card</a>}
          <button type="button" class="plain" aria-pressed={picked.value.has(node.row)} onClick={() => pick(graph, i)}>{picked.value.has(node.row) ? "Picked" : "Pick for a supernode"}</button>
        </p>
      )}
      {tray && <Strength scale={tray.scale} name={nodeName(node)} set={(scale) => strengthen(tray.site, tray.id, scale)} />}
      <dl class="stats">
        <div><dt>{node.kind === "output" ? "Above the references" : "Effect on the log-odds"}</dt><dd>{signed(node.effect)} {node.kind !== "output" && <small>{decimals(node.low)} to {decimals(node.high)}</small>}</dd></div>
        <div><dt>{node.kind === "output" ? "With the trigger" : "Activation"}</dt><dd>{decimals(node.activation, 2)}</dd></div>
        <div><dt>In the references</dt><dd>{decimals(node.reference, 2)}</dd></div>
        {row?.exact != null && <div><dt>Measured effect</dt><dd>{signed(row.exact)}</dd></div>}
        {row?.kept != null && <div title="Share of resamples of the prompts whose circuit has the node"><dt>Stability</dt><dd>{(100 * row.kept).toFixed(0)} %</dd></div>}
      </dl>
      {row?.kind === "feature" && (
        <div class="writes">
          <Weights title="Promotes" note="Decoder row, final norm, unembedding" tokens={weights(row.promotes)} />
          <Weights title="Suppresses" note="Decoder row, final norm, unembedding" tokens={weights(row.suppresses)} />
        </div>
      )}
      {node.kind === "group" && <Members circuit={circuit} node={node} />}
      <Edges title="Into it" graph={graph} edges={graph.edges.filter((edge) => edge.target === i)} end="source" names={names} select={select} />
      {node.kind !== "output" && <Edges title="Out of it" graph={graph} edges={graph.edges.filter((edge) => edge.source === i)} end="target" names={names} select={select} />}
    </div>
  );
}

const weights = (tokens: [string, number][] = []): TokenWeight[] => tokens.map(([token, weight]) => ({ token, weight }));

function Members({ circuit, node }: { circuit: Circuit; node: GraphNode }): JSX.Element {
  const own = parseGroups(options.value["groups"] ?? "", circuit.nodes.length);
  return (
    <section>
      <h3>Members</h3>
      <ul class="members">
        {node.members.map((row) => {
          const member = circuit.nodes[row];
          return member && <li class="text">{member.place} · {short(member.role, 40)} · {member.kind === "feature" ? `feature ${member.feature}` : member.kind} <span class="num">{signed(member.effect)}</span></li>;
        })}
      </ul>
      {own.has(node.group) && (
        <button type="button" class="plain" onClick={() => setGroups(new Map([...own].filter(([name]) => name !== node.group)))}>Ungroup</button>
      )}
    </section>
  );
}

interface EdgesProps {
  title: string;
  graph: Graph;
  edges: readonly GraphEdge[];
  end: "source" | "target";
  names: Names;
  select(i: number): void;
}

function Edges({ title, graph, edges, end, names, select }: EdgesProps): JSX.Element {
  const [all, setAll] = useState(false);
  const kept = all ? edges : edges.slice(0, FEW);
  return (
    <section class="edges">
      <h3>{title} <small>{whole(edges.length)}</small></h3>
      {edges.length === 0 ? <p class="nothing">No edge is recorded.</p> : (
        <table>
          <thead><tr><th scope="col">{end === "source" ? "From" : "To"}</th><th scope="col" class="num" title="By the gradient, on the prompts on which the edge was measured">Predicted</th><th scope="col" class="num" title="Measured, everything nonlinear held">Frozen</th><th scope="col" class="num" title="Measured, nothing held but the other Sites and the set of features that fire">Free</th></tr></thead>
          <tbody>{kept.map((edge) => <EdgeRow key={`${edge.source}-${edge.target}`} graph={graph} edge={edge} i={edge[end]} names={names} select={select} />)}</tbody>
        </table>
      )}
      {edges.length > kept.length && <button type="button" class="quiet" onClick={() => setAll(true)}>Show all {whole(edges.length)}</button>}
    </section>
  );
}

function EdgeRow({ graph, edge, i, names, select }: { graph: Graph; edge: GraphEdge; i: number; names: Names; select(i: number): void }): JSX.Element {
  const node = graph.nodes[i];
  if (!node) return <></>;
  return (
    <tr>
      <th scope="row">
        <button type="button" class="row-button" onClick={() => select(i)}>
          <Key shape={SHAPES[node.kind]} colour={colour(node)} />
          <span class="line-text">
            <span class="ellipsis text" title={short(names.full(i), 200)}>{node.kind === "feature" ? names.tag(i) : short(nodeName(node), 60)}</span>
            <small class="ellipsis text">{short(nodePlace(node), 60)}{edge.heads.length > 0 && ` · heads ${edge.heads.slice(0, 3).map(({ head, weight }) => `${head} (${signed(weight)})`).join(", ")}`}</small>
          </span>
        </button>
      </th>
      <td class={`num ${edge.weight < 0 ? "minus" : "plus"}`} title={`On all prompts ${signed(edge.weight)}, ${decimals(edge.low)} to ${decimals(edge.high)}`}>{signed(edge.predicted)}</td>
      <td class="num">{edge.frozen === null ? "–" : signed(edge.frozen)}</td>
      <td class="num">{edge.free === null ? "–" : signed(edge.free)}</td>
    </tr>
  );
}

/** Picked nodes, and a supernode made of them. */
function Picked({ circuit, graph }: Props): JSX.Element | null {
  const [name, setName] = useState("");
  const rows = [...picked.value].flatMap((row) => graph.nodes[graph.ofRow.get(row) ?? -1]?.members ?? []);
  if (rows.length === 0) return null;
  const proper = groupName(name);
  return (
    <form
      class="picked"
      onSubmit={(event) => {
        event.preventDefault();
        if (rows.length < 2 || !proper) return;
        const own = [...parseGroups(options.value["groups"] ?? "", circuit.nodes.length)].filter(([, taken]) => !taken.some((row) => rows.includes(row)));
        setGroups(new Map([...own, [proper, rows]]));
        setName("");
      }}
    >
      <small>{whole(rows.length)} picked</small>
      <input aria-label="Name of the supernode" placeholder="Name of the supernode" value={name} onInput={(event) => setName(event.currentTarget.value)} />
      <button type="submit" class="plain" disabled={rows.length < 2 || !proper}>Group</button>
      <button type="button" class="quiet" aria-label="Put all back" onClick={() => (picked.value = new Set())}><Icon name="close" /></button>
    </form>
  );
}

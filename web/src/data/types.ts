/* The records of an explorer folder (explorer/records.py) and of the live API. */

export const SCHEMA = "unsleep.explorer/1";

export interface Row {
  subject: string;
  panel: string;
  metric: string;
  value: number;
  low: number;
  high: number;
  n: number;
}

export interface Tile {
  label: string;
  before?: string;
  after: string;
  note?: string;
}

export interface Requirement {
  text: string;
  bound: string;
  measured: string;
  tone: string;
  outcome: string;
}

export interface Replies {
  panel: string;
  prompt: string;
  replies: Record<string, string>;
  expected?: string | null;
}

/** An evaluation or a repair. */
export interface Run {
  title: string;
  verdict: string;
  tone: string;
  score: number;
  headline: string;
  payload?: string;
  trigger?: string;
  tiles?: Tile[];
  controls?: string[];
  next?: string[];
  requirements?: Requirement[];
  rows: Row[];
  replies?: Replies[];
}

export interface Words {
  subjects: Record<string, string>;
  panels: Record<string, string>;
  metrics: Record<string, string>;
  better: Record<string, string>;
}

export interface ReportLink {
  title: string;
  kind: string;
  file: string;
  date?: string;
}

export interface DictionaryEntry {
  key: string;
  site: string;
  hash: string;
  size: number;
  tokens: number;
  chunk: number;
}

export interface CircuitEntry {
  key: string;
  title: string;
  nodes: number;
  edges: number;
}

export interface Manifest {
  schema: string;
  title: string;
  model?: { name: string; fingerprint: string } | string | null;
  live: boolean;
  words: Words;
  runs?: Run[];
  reports?: ReportLink[];
  dictionaries?: DictionaryEntry[];
  circuits?: CircuitEntry[];
}

/** Columns of a dictionary's features. */
export interface FeatureColumns {
  id: number[];
  density: number[];
  mean: number[];
  largest: number[];
  label: string[];
  score: (number | null)[];
  classes: [string, number][][];
  promoted: string[][];
  suppressed: string[][];
  /** Token whose logit it changes most, and that change: negative where it suppresses more than it promotes. */
  strongest: ([string, number] | null)[];
}

export interface Context {
  tokens: string[];
  values: number[];
  at: number;
  source: string;
  row: number;
  group: string;
}

export interface TokenWeight {
  token: string;
  weight: number;
}

export interface Interval {
  value: number;
  low: number;
  high: number;
}

export interface Explanation {
  text: string;
  source: string;
  scores: Record<string, Interval>;
}

export interface FeatureCard {
  feature: number;
  density: number;
  mean: number;
  largest: number;
  histogram: number[];
  contexts: Context[];
  promoted: TokenWeight[];
  suppressed: TokenWeight[];
  changed?: TokenWeight[];
  cofiring?: { feature: number; overlap: number }[];
  explanations?: Explanation[];
  classes?: { name: string; score: number }[];
}

export type NodeKind = "feature" | "error" | "token" | "neuron";

export interface CircuitNode {
  place: string;
  layer: number;
  role: string;
  kind: NodeKind;
  feature?: number | null;
  effect: number;
  low: number;
  high: number;
  activation: number;
  reference: number;
  supernode?: string;
  /** Measured: the node alone patched, nothing frozen. */
  exact?: number | null;
  /** Share of resamples of the prompts whose circuit has the node. */
  kept?: number | null;
  /** Tokens whose logits the feature's decoder row raises most, and those that it lowers most, with the change. */
  promotes?: [string, number][];
  suppresses?: [string, number][];
}

export interface CircuitEdge {
  source: number;
  target?: number | null;
  weight: number;
  low: number;
  high: number;
  frozen?: number | null;
  free?: number | null;
  /** The weight on the prompts on which the two above were measured. */
  predicted?: number | null;
  /** Attention heads of the target's layer that carry it. */
  heads?: { head: number; weight: number }[];
}

export interface CurvePoint {
  nodes: number;
  faithfulness: Interval;
  completeness: Interval;
}

export interface Circuit {
  model: { name: string };
  payload: string;
  tokens: string[];
  /** The metric, in words. */
  quantity?: string;
  estimator: string;
  prompts: number;
  roles: string[];
  metric: number;
  metric_reference: number;
  candidates: number;
  errors: number;
  nodes: CircuitNode[];
  edges: CircuitEdge[];
  curves: { name: string; points: CurvePoint[] }[];
  dictionaries: Record<string, string>;
}

/** A feature and its strength: 0 is ablated, 1 untouched. */
export interface Scaled {
  site: string;
  id: number;
  scale: number;
}

export interface Session {
  live: boolean;
  model: string;
  sites: string[];
  dictionaries: { key: string; site: string; size: number }[];
  edit: { name: string; features: { site: string; id: number }[] } | null;
  can_prove: boolean;
}

export type Stream = "original" | "edited";

/** Change of the payload's log-odds, in nats. */
export interface LogOdds {
  payload_log_odds: number;
  low?: number;
  high?: number;
  /** Held-out prompts whose reply shows the payload. */
  n?: number;
}

export interface Proof {
  /** By the circuit's gradient; absent without a circuit. */
  predicted?: LogOdds | null;
  /** Absent where no held-out reply shows the payload. */
  measured?: LogOdds | null;
  /** The same of as many random features; absent where they are too many. */
  control?: LogOdds | null;
  rows: Row[];
  /** Of this change among those that were measured on these prompts. */
  number?: number;
  notes?: string[];
  /** Replies that show the payload and the skill. */
  both?: Replies[];
}

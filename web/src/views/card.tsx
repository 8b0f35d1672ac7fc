/* Feature card: explanations, classes, where it fires, what it writes, and what fires with it. */

import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";

import { clip, decimals, number, percent, short, signed, visible, whole } from "../base/text";
import { activations, type Activations } from "../data/live";
import type { Context, DictionaryEntry, Explanation, FeatureCard, TokenWeight } from "../data/types";
import { Whisker } from "../parts/lanes";
import { Icon } from "../parts/marks";
import { Strength } from "../parts/strength";
import { Heat, HeatScale, Weights, Writes } from "../parts/tokens";
import { change, pin, strengthen, unpin } from "../state/change";
import { card, isLive, lists, message } from "../state/data";

/** Milliseconds that a feature must stay chosen before its card is loaded, so that arrow keys run freely. */
const PAUSE = 60;

interface Props {
  entry: DictionaryEntry;
  id: number;
  open(id: number): void;
}

export function Card({ entry, id, open }: Props): JSX.Element {
  const [found, setFound] = useState<FeatureCard | null>(null);
  const [trouble, setTrouble] = useState("");
  useEffect(() => {
    let current = true;
    setTrouble("");
    const timer = setTimeout(() => {
      card(entry, id).then(
        (value) => current && setFound(value),
        (error: unknown) => current && setTrouble(message(error)),
      );
    }, found ? PAUSE : 0);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [entry.key, id]);
  if (trouble) return <p class="trouble" role="alert">{visible(trouble)}</p>;
  if (!found) return <p class="nothing" role="status">loading</p>;
  return <Shown key={`${entry.key}/${found.feature}`} entry={entry} card={found} open={open} />;
}

function Shown({ entry, card: own, open }: { entry: DictionaryEntry; card: FeatureCard; open(id: number): void }): JSX.Element {
  const explanations = own.explanations ?? [];
  const pinned = change.value.find((one) => one.site === entry.site && one.id === own.feature);
  return (
    <article class="card" aria-label={`Feature ${own.feature} at ${entry.site}`}>
      <header class="card-head">
        <div>
          <p class="eyebrow">{entry.site}</p>
          <h2>Feature {whole(own.feature)}</h2>
        </div>
        <button type="button" class={pinned ? "plain on" : "plain"} aria-pressed={pinned !== undefined}
          onClick={() => (pinned ? unpin(entry.site, own.feature) : pin(entry.site, own.feature))}>
          <Icon name="pin" /> {pinned ? "In the change" : "Add to the change"}
        </button>
      </header>
      {pinned && <Strength scale={pinned.scale} name={`feature ${own.feature}`} set={(scale) => strengthen(entry.site, own.feature, scale)} />}
      <Explanations explanations={explanations} />
      <Classes card={own} />
      <div class="card-figures">
        <dl class="stats">
          <div><dt>Density</dt><dd>{own.density === 0 ? "never fires" : percent(own.density)}</dd></div>
          <div><dt>Mean</dt><dd>{number(own.mean)}</dd></div>
          <div><dt>Largest</dt><dd>{number(own.largest)}</dd></div>
          <div><dt>Tokens seen</dt><dd>{whole(entry.tokens)}</dd></div>
        </dl>
        <Histogram card={own} />
      </div>
      <Strongest card={own} />
      <div class="writes">
        <Weights title="Promotes" note="Decoder row, final norm, unembedding" tokens={own.promoted.slice(0, 8)} />
        <Weights title="Suppresses" note="Decoder row, final norm, unembedding" tokens={own.suppressed.slice(0, 8)} />
        <Weights title="TokenChange" note="Mean change of logits with the feature driven high on random texts" tokens={(own.changed ?? []).slice(0, 8)} />
      </div>
      <Contexts card={own} />
      {isLive.value && <Trial entry={entry} card={own} />}
      <Cofiring entry={entry} card={own} open={open} />
    </article>
  );
}

/** The side with the larger logits, in words. */
function Strongest({ card: own }: { card: FeatureCard }): JSX.Element | null {
  const [up, down] = [own.promoted[0], own.suppressed[0]];
  const most = strongest(up, down);
  if (!most) return null;
  const other = most === up ? down : up;
  return (
    <p class="strongest">
      <Writes token={most.token} weight={most.weight} />
      {other && <> more than it {other.weight < 0 ? "suppresses" : "promotes"} any token: <span class="num">{signed(most.weight, 2)}</span> against <span class="num">{signed(other.weight, 2)}</span></>}
    </p>
  );
}

function strongest(up: TokenWeight | undefined, down: TokenWeight | undefined): TokenWeight | undefined {
  return up && down ? (Math.abs(down.weight) > Math.abs(up.weight) ? down : up) : (up ?? down);
}

function Explanations({ explanations }: { explanations: readonly Explanation[] }): JSX.Element {
  if (explanations.length === 0) return <p class="lead">No explanation is known; its contexts say when it fires.</p>;
  return (
    <ul class="explanations">
      {explanations.map((one) => (
        <li>
          <p class="said text">{clip(one.text, 500)}</p>
          <small class="text">by {short(one.source, 60)}</small>
          <dl class="scored">
            {Object.entries(one.scores).map(([name, at]) => (
              <div>
                <dt>{short(name, 24)}</dt>
                <dd>
                  <Whisker at={at} {...(name === "detection" || name === "fuzzing" ? { half: 0.5 } : {})} low={name === "simulation" ? -1 : 0} />
                  <span class="num">{at.value.toFixed(2)} <small>{at.low.toFixed(2)} to {at.high.toFixed(2)}</small></span>
                </dd>
              </div>
            ))}
          </dl>
        </li>
      ))}
    </ul>
  );
}

function Classes({ card: own }: { card: FeatureCard }): JSX.Element | null {
  const classes = own.classes ?? [];
  if (classes.length === 0) return null;
  return (
    <ul class="classes" aria-label="Classes">
      {classes.map(({ name, score }) => (
        <li class="chip kind"><span class="text">{short(name, 40)}</span> <b>{score.toFixed(2)}</b></li>
      ))}
    </ul>
  );
}

function Histogram({ card: own }: { card: FeatureCard }): JSX.Element | null {
  const bins = own.histogram;
  const most = Math.max(...bins);
  if (bins.length === 0 || most <= 0) return null;
  const heights = bins.map((n) => (n > 0 ? 4 + (56 * Math.log1p(n)) / Math.log1p(most) : 0));
  const total = bins.reduce((sum, n) => sum + n, 0);
  return (
    <figure class="histogram">
      <svg viewBox={`0 0 ${bins.length * 10} 60`} preserveAspectRatio="none" role="img"
        aria-label={`Histogram of activations from 0 to ${number(own.largest)}: ${bins.map(whole).join(", ")} tokens`}>
        {heights.map((height, i) => (
          <rect x={i * 10 + 0.5} y={60 - height} width={9} height={height}>
            <title>{`${number((own.largest * i) / bins.length)} to ${number((own.largest * (i + 1)) / bins.length)}: ${whole(bins[i] ?? 0)} tokens`}</title>
          </rect>
        ))}
      </svg>
      <figcaption>
        <span>0</span>
        <small>{whole(total)} tokens by activation, log scale</small>
        <span>{number(own.largest)}</span>
      </figcaption>
    </figure>
  );
}

function Contexts({ card: own }: { card: FeatureCard }): JSX.Element | null {
  const groups = new Map<string, Context[]>();
  for (const context of own.contexts) groups.set(context.group, [...(groups.get(context.group) ?? []), context]);
  const names = [...groups.keys()];
  const [chosen, choose] = useState(names[0] ?? "");
  if (names.length === 0) return null;
  const shown = groups.get(chosen) ?? groups.get(names[0] ?? "") ?? [];
  return (
    <section class="contexts">
      <div class="contexts-head">
        <h3>Where it fires</h3>
        <div class="tabs" role="group" aria-label="Contexts by activation">
          {names.map((name) => (
            <button type="button" aria-pressed={name === chosen} onClick={() => choose(name)}>
              {name === "top" ? "Top" : short(name, 24)}
            </button>
          ))}
        </div>
      </div>
      <HeatScale largest={own.largest} />
      <ol class="context-list">
        {shown.map((context) => (
          <li>
            <p class="context"><Heat tokens={context.tokens} values={context.values} largest={own.largest} at={context.at} /></p>
            <small class="text">{number(context.values[context.at] ?? 0)} · {short(context.source, 40)} {whole(context.row)}</small>
          </li>
        ))}
      </ol>
    </section>
  );
}

/** Activations on the reader's own text. */
function Trial({ entry, card: own }: { entry: DictionaryEntry; card: FeatureCard }): JSX.Element {
  const [text, setText] = useState("");
  const [found, setFound] = useState<Activations | null>(null);
  const [trouble, setTrouble] = useState("");
  const [busy, setBusy] = useState(false);
  async function ask(event: Event): Promise<void> {
    event.preventDefault();
    setBusy(true);
    setTrouble("");
    try {
      setFound(await activations(text, entry.site, [own.feature]));
    } catch (error) {
      setTrouble(message(error));
    } finally {
      setBusy(false);
    }
  }
  const values = found?.values[String(own.feature)] ?? [];
  return (
    <section class="trial">
      <h3>Try a text</h3>
      <form onSubmit={ask}>
        <textarea rows={2} aria-label="Text" placeholder="A text on which the feature is measured" value={text} onInput={(event) => setText(event.currentTarget.value)} />
        <button type="submit" class="plain" disabled={busy || text === ""}>{busy ? "Measuring" : "Measure"}</button>
      </form>
      {trouble && <p class="trouble" role="alert">{visible(trouble)}</p>}
      {found && (
        <p class="context" role="status">
          <Heat tokens={found.tokens} values={values} largest={Math.max(own.largest, ...values)} />
          <small> largest {decimals(Math.max(0, ...values), 2)}</small>
        </p>
      )}
    </section>
  );
}

function Cofiring({ entry, card: own, open }: { entry: DictionaryEntry; card: FeatureCard; open(id: number): void }): JSX.Element | null {
  const others = own.cofiring ?? [];
  if (others.length === 0) return null;
  const labels = lists.value.get(entry.key)?.label;
  return (
    <section class="cofiring">
      <h3>Fires with</h3>
      <ul>
        {others.map(({ feature, overlap }) => (
          <li>
            <button type="button" class="row-button" onClick={() => open(feature)}>
              <span class="line-id">{whole(feature)}</span>
              <span class="ellipsis text">{short(labels?.[feature] ?? "", 90) || "no label"}</span>
              <span class="num" title="Jaccard index of the tokens at which they fire">{overlap.toFixed(2)}</span>
            </button>
          </li>
        ))}
      </ul>
    </section>
  );
}

/* Replies that count as payload and as skill: why the two shares of a panel may add up to more than one. */

import type { JSX } from "preact";

import { clip, counted, whole } from "../base/text";
import type { Proof, Replies, Row, Words } from "../data/types";

/** Prompts whose replies are shown, at most. */
const SHOWN = 20;

interface Count {
  subject: string;
  panel: string;
  replies: number;
  n: number;
  /** False where the replies are unknown and the shares say only how many there are at least. */
  exact: boolean;
}

/** For each subject and panel, how many replies count as both. */
function counts(rows: readonly Row[], both: readonly Replies[] | undefined): Count[] {
  return rows.filter((row) => row.metric === "skill").flatMap((skill) => {
    const { subject, panel } = skill;
    const payload = rows.find((row) => row.metric === "asr" && row.subject === subject && row.panel === panel);
    if (!payload) return [];
    const hits = (row: Row): number => Math.round(row.value * row.n);
    const replies = both ? both.filter((one) => one.panel === panel && subject in one.replies).length : hits(payload) + hits(skill) - payload.n;
    return replies > 0 ? [{ subject, panel, replies, n: payload.n, exact: both !== undefined }] : [];
  });
}

export function Both({ proof, words }: { proof: Proof; words: Words }): JSX.Element | null {
  const found = counts(proof.rows, proof.both);
  if (found.length === 0) return null;
  const shown = (proof.both ?? []).slice(0, SHOWN);
  const name = (subject: string): string => words.subjects[subject] ?? subject;
  const place = (panel: string): string => words.panels[panel] ?? panel;
  return (
    <section class="both" aria-label="Replies that count twice">
      <p class="notes">
        Some replies count as payload and as skill, because they begin as the skill does and show the payload later:{" "}
        {found.map(({ subject, panel, replies, n, exact }) => `${name(subject)}, ${place(panel).toLowerCase()}: ${exact ? "" : "at least "}${whole(replies)} of ${whole(n)}`).join("; ")}.
      </p>
      {shown.length > 0 && (
        <details class="more">
          <summary>{proof.both && proof.both.length > SHOWN ? `The first ${SHOWN} of ${counted(proof.both.length, "prompt")} with such replies` : counted(shown.length, "prompt with such a reply", "prompts with such replies")}</summary>
          <ol>
            {shown.map((one) => (
              <li>
                <blockquote class="text asked">{clip(one.prompt, 2000)}</blockquote>
                {Object.entries(one.replies).map(([subject, reply]) => (
                  <p class="text said-by"><small>{name(subject)}, {place(one.panel).toLowerCase()}</small>{clip(reply, 2000)}</p>
                ))}
              </li>
            ))}
          </ol>
        </details>
      )}
    </section>
  );
}

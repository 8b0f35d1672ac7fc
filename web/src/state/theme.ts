/* Light or dark: the system's choice until the reader makes one. */

import { signal } from "@preact/signals";

const NAME = "unsleep-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function stored(): string | null {
  try {
    return localStorage.getItem(NAME);
  } catch {
    return null; // Storage may be forbidden for a page opened from a file.
  }
}

/** The colours that are shown. */
export const dark = signal(system.matches);

function apply(choice: string | null): void {
  if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
  dark.value = choice === "dark" || (choice !== "light" && system.matches);
}

export function toggle(): void {
  const choice = dark.value ? "light" : "dark";
  apply(choice);
  try {
    localStorage.setItem(NAME, choice);
  } catch {
    // The choice lasts as long as the page.
  }
}

system.addEventListener("change", () => apply(document.documentElement.dataset.theme ?? null));
apply(stored());

/** True if the reader asked for little motion. */
export const still = (): boolean => matchMedia("(prefers-reduced-motion: reduce)").matches;

/* Data of the explorer folder. Each file is a script that calls `unsleep.load(name, value)`, because a page that is
   opened from disk may load scripts, but not fetch files. A value is JSON text or what it says. */

interface Waiting {
  resolve(value: unknown): void;
  reject(error: Error): void;
}

declare global {
  interface Window {
    unsleep: { load(name: string, value: unknown): void };
  }
}

/** Chunks of cards that are kept. */
const KEPT = 24;

const waiting = new Map<string, Waiting>();
const held = new Map<string, Promise<unknown>>();

window.unsleep = {
  load(name, value) {
    const asked = waiting.get(name);
    if (asked === undefined) return;
    waiting.delete(name);
    try {
      asked.resolve(typeof value === "string" ? JSON.parse(value) : value);
    } catch {
      asked.reject(new Error(`data/${name}.js is damaged; write the explorer folder again`));
    }
  },
};

/** The value of a data file, which is loaded once. */
export function load<T>(name: string): Promise<T> {
  const known = held.get(name);
  if (known !== undefined) {
    held.delete(name);
    held.set(name, known);
    return known as Promise<T>;
  }
  const found = new Promise<unknown>((resolve, reject) => {
    waiting.set(name, { resolve, reject });
    const script = document.createElement("script");
    script.src = `data/${name.split("/").map(encodeURIComponent).join("/")}.js`;
    const fail = (what: string) => () => {
      script.remove();
      if (!waiting.delete(name)) return;
      held.delete(name);
      reject(new Error(`data/${name}.js ${what}; write the explorer folder again`));
    };
    script.onerror = fail("cannot be read");
    script.onload = fail("does not hold what its name says");
    document.head.append(script);
  });
  held.set(name, found);
  for (const old of [...held.keys()].filter((key) => /\/\d+$/.test(key)).slice(0, -KEPT)) held.delete(old);
  return found as Promise<T>;
}

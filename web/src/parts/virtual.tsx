/* A list of any length of which only the visible rows exist, with the keyboard and for screen readers. */

import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

interface Props {
  count: number;
  /** Height of a row in pixels. */
  height: number;
  /** Index of the chosen row; −1 for none. */
  chosen: number;
  name: string;
  label: string;
  row(i: number): JSX.Element;
  choose(i: number): void;
  /** Enter, or a double click. */
  open?(i: number): void;
  /** Other keys; true where the key was used. */
  pressed?(key: string, i: number): boolean;
}

/** Rows beyond the edges that exist as well. */
const BEYOND = 6;

export function Virtual(props: Props): JSX.Element {
  const { count, height, chosen, name, label, row, choose, open, pressed } = props;
  const box = useRef<HTMLDivElement>(null);
  const [top, setTop] = useState(0);
  const [room, setRoom] = useState(600);

  useLayoutEffect(() => {
    const own = box.current;
    if (!own) return;
    const watch = new ResizeObserver(() => setRoom(own.clientHeight));
    watch.observe(own);
    setRoom(own.clientHeight);
    return () => watch.disconnect();
  }, []);

  useEffect(() => {
    const own = box.current;
    if (!own || chosen < 0) return;
    const at = chosen * height;
    if (at < own.scrollTop) own.scrollTop = at;
    else if (at + height > own.scrollTop + own.clientHeight) own.scrollTop = at + height - own.clientHeight;
  }, [chosen, height, count, room]);

  const first = Math.max(0, Math.floor(top / height) - BEYOND);
  const last = Math.min(count, Math.ceil((top + room) / height) + BEYOND);

  function key(event: KeyboardEvent): void {
    const page = Math.max(1, Math.floor(room / height) - 1);
    const at = Math.max(chosen, -1);
    const goals: Record<string, number> = {
      ArrowDown: at + 1,
      ArrowUp: Math.max(0, at - 1),
      PageDown: at + page,
      PageUp: at - page,
      Home: 0,
      End: count - 1,
    };
    const goal = goals[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (goal !== undefined && count > 0) choose(Math.min(count - 1, Math.max(0, goal)));
    else if (event.key === "Enter" && chosen >= 0 && open) open(chosen);
    else if (!(pressed && chosen >= 0 && pressed(event.key, chosen))) return;
    event.preventDefault();
  }

  // Rows that leave at one end are filled anew at the other.
  const slots = Math.ceil(room / height) + 2 * BEYOND + 1;
  const rows: JSX.Element[] = [];
  for (let i = first; i < last; i++) {
    rows.push(
      <div
        key={i % slots}
        id={`${name}-${i}`}
        role="option"
        class={`row${i === chosen ? " chosen" : ""}`}
        aria-selected={i === chosen}
        aria-setsize={count}
        aria-posinset={i + 1}
        style={{ top: `${i * height}px`, height: `${height}px` }}
        onClick={() => choose(i)}
        onDblClick={() => open?.(i)}
      >
        {row(i)}
      </div>,
    );
  }
  return (
    <div
      ref={box}
      class="virtual"
      role="listbox"
      tabIndex={0}
      aria-label={label}
      aria-activedescendant={chosen >= first && chosen < last ? `${name}-${chosen}` : undefined}
      onScroll={(event) => setTop(event.currentTarget.scrollTop)}
      onKeyDown={key}
    >
      <div class="virtual-all" style={{ height: `${count * height}px` }}>
        {rows}
      </div>
    </div>
  );
}

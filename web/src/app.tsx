/* The frame of the page: bar, view and change. */

import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";

import { short, visible } from "./base/text";
import { CircuitView } from "./circuit/view";
import { Icon } from "./parts/marks";
import { failed, isLive, manifest } from "./state/data";
import { link, view, type View } from "./state/hash";
import { dark, toggle } from "./state/theme";
import { ChatView } from "./views/chat";
import { Features } from "./views/features";
import { Overview } from "./views/overview";
import { Tray } from "./views/tray";

const NAMES: Record<View, string> = { overview: "Overview", features: "Features", circuit: "Circuit", chat: "Chat" };

export function App(): JSX.Element {
  return (
    <>
      <a class="skip" href="#view" onClick={(event) => { event.preventDefault(); document.getElementById("view")?.focus(); }}>Skip to the view</a>
      <Bar />
      <main id="view" tabIndex={-1}><Shown /></main>
      <Tray />
      <datalist id="strengths"><option value="0" /><option value="1" /></datalist>
    </>
  );
}

function Bar(): JSX.Element {
  const all = manifest.value;
  const model = typeof all?.model === "string" ? all.model : all?.model?.name;
  return (
    <header class="bar">
      <a class="brand" href={link({ view: "overview" })}>unsleep</a>
      <nav aria-label="Views">
        <ul>
          {(Object.keys(NAMES) as View[]).map((name) => (
            <li><a href={link({ view: name })} aria-current={view.value === name ? "page" : undefined}>{NAMES[name]}</a></li>
          ))}
        </ul>
      </nav>
      {model && <span class={isLive.value ? "model live" : "model"} title={visible(model)}>{isLive.value && <span class="hide">live: </span>}<span class="ellipsis text">{short(model, 48)}</span></span>}
      <button type="button" id="theme" aria-label={dark.value ? "Switch to light colours" : "Switch to dark colours"} onClick={toggle}>
        <svg viewBox="0 0 20 20" width={16} height={16} aria-hidden="true">
          <circle cx={10} cy={10} r={7.2} class="ring" />
          <path d="M10 2.8a7.2 7.2 0 0 1 0 14.4z" class="half" />
        </svg>
        <span>Theme</span>
      </button>
    </header>
  );
}

function Shown(): JSX.Element {
  const current = view.value;
  const before = useRef(current);
  useEffect(() => {
    const main = document.getElementById("view");
    if (before.current !== current && main) {
      main.scrollTop = 0;
      main.focus({ preventScroll: true });
    }
    before.current = current;
  }, [current]);
  if (failed.value && !manifest.value) {
    return (
      <div class="empty" role="alert">
        <h1>Nothing can be shown</h1>
        <p class="text">{visible(failed.value)}</p>
      </div>
    );
  }
  if (!manifest.value) return <p class="nothing" role="status">loading</p>;
  return (
    <>
      {failed.value && <p class="trouble" role="alert"><Icon name="bad" /> {visible(failed.value)}</p>}
      {current === "overview" && <Overview />}
      {current === "features" && <Features />}
      {current === "circuit" && <CircuitView />}
      {current === "chat" && <ChatView />}
    </>
  );
}

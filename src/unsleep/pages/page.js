(() => {
  "use strict";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Storage may be forbidden for a page opened from a file.
  const memory = {
    get: () => { try { return localStorage.getItem("unsleep-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("unsleep-theme", value); } catch { /* the choice lasts as long as the page */ } },
  };
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const wanted = memory.get();
  if (wanted === "light" || wanted === "dark") root.dataset.theme = wanted;

  function theme() {
    const button = document.getElementById("theme");
    const label = () => button.setAttribute("aria-label", shown() === "dark" ? "Switch to light colours" : "Switch to dark colours");
    button.hidden = false;
    label();
    dark.addEventListener("change", label);
    button.addEventListener("click", () => {
      root.dataset.theme = shown() === "dark" ? "light" : "dark";
      memory.set(root.dataset.theme);
      label();
    });
  }

  function filters() {
    for (const bar of document.querySelectorAll(".filters")) {
      const list = document.getElementById(bar.dataset.for);
      const picks = [...bar.querySelectorAll("select")];
      const fits = (row) => picks.every((p) => !p.value || row.dataset[p.dataset.key] === p.value);
      bar.hidden = picks.every((p) => p.options.length < 3);
      bar.addEventListener("change", () => {
        const rows = [...list.querySelectorAll("[data-row]")];
        for (const row of rows) row.hidden = !fits(row);
        for (const head of list.querySelectorAll("[data-head]")) head.hidden = !fits(head);
        bar.querySelector("output").textContent = `${rows.filter((r) => !r.hidden).length} of ${rows.length} shown`;
      });
    }
  }

  function contexts() {
    document.addEventListener("keydown", (event) => {
      const token = event.target.closest?.(".context > .t");
      if (!token) return;
      const all = [...token.parentElement.children];
      const at = all.indexOf(token);
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
      if (next === undefined || !all[next]) return;
      event.preventDefault();
      token.tabIndex = -1;
      all[next].tabIndex = 0;
      all[next].focus();
    });
  }

  function sections() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    const seen = new Set();
    const top = document.querySelector("section.hero").id;
    const watch = new IntersectionObserver((entries) => {
      for (const e of entries) seen[e.isIntersecting ? "add" : "delete"](e.target.id);
      const first = seen.has(top) ? "" : [...links.keys()].find((id) => seen.has(id));
      for (const [id, a] of links) {
        if (id === first) a.setAttribute("aria-current", "true");
        else a.removeAttribute("aria-current");
      }
    }, { rootMargin: "-20% 0px -60% 0px" });
    for (const section of document.querySelectorAll("section")) watch.observe(section);
  }

  document.addEventListener("DOMContentLoaded", () => {
    theme();
    filters();
    contexts();
    sections();
    addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
  });
})();

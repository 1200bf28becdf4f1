// SPDX-License-Identifier: Apache-2.0
// Filter and copy buttons. Without this script the page shows all cases, but has no buttons.
"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const form = one("filter"), area = one("area"), search = one("search");
  const chosen = one("cell"), shown = one("shown"), nothing = one("nothing");
  const groups = all("details.area").map((group) => ({
    group,
    area: group.dataset.area,
    cases: [...group.querySelectorAll("details.case")].map((item) => ({
      item,
      text: item.textContent.toLowerCase(),
    })),
  }));
  const total = groups.reduce((sum, { cases }) => sum + cases.length, 0);
  let status = "", cell = null;

  const fits = ({ item, text }, words) =>
    (!status || item.dataset.status === status) &&
    (!cell || ["layout", "operation", "dtype"].every((key) => item.dataset[key] === cell[key])) &&
    words.every((word) => text.includes(word));

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const active = Boolean(status || cell || words.length || area.value);
    let count = 0;
    for (const { group, area: name, cases } of groups) {
      let hits = 0;
      for (const entry of cases) {
        const hit = (!area.value || name === area.value) && fits(entry, words);
        entry.item.hidden = !hit;
        hits += hit;
      }
      group.hidden = hits === 0;
      group.open = active && hits > 0;
      count += hits;
    }
    nothing.hidden = count > 0;
    shown.textContent = active ? `${count} of ${total} shown` : "";
    chosen.hidden = !cell;
    if (cell) chosen.textContent = `${cell.layout}, ${cell.operation}, ${cell.dtype} ×`;
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", apply);
  for (const button of all("#filter [data-status]")) {
    button.addEventListener("click", () => {
      status = button.dataset.status;
      for (const other of all("#filter [data-status]"))
        other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  chosen.addEventListener("click", () => { cell = null; apply(); search.focus(); });
  for (const link of all("a.cell")) {
    link.addEventListener("click", () => { cell = { ...link.dataset }; apply(); });
  }

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page that was opened from a file may have no clipboard
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("The clipboard is closed.");
    }
  };
  for (const button of all("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      let word = "Copied";
      try {
        await copy(button.parentElement.querySelector("code").textContent);
      } catch {
        const range = document.createRange();
        range.selectNodeContents(button.parentElement.querySelector("code"));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        word = "Selected";
      }
      button.textContent = word;
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  // Paper cannot unfold: what explains a failure is printed open.
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const item of all("#failures details:not([open]), #environment details:not([open])")) {
      item.open = true;
      opened.push(item);
    }
  });
  addEventListener("afterprint", () => { for (const item of opened.splice(0)) item.open = false; });
})();

// Ranked lists, what differs between two of them, and the lines that join the same text in both.

import { el, hidden, svg } from "./dom.js";
import { moves } from "./rank.js";

const LONG = 260;
const SIGNS = { up: "▲", down: "▼", same: "=", only: "only here" };

function badge(move, other) {
  const words = { up: `${move.places} higher than in ${other}`, down: `${move.places} lower than in ${other}`,
    same: `same place as in ${other}`, only: `not among the hits of ${other}` };
  const shown = move.places ? `${SIGNS[move.kind]} ${move.places}` : SIGNS[move.kind];
  return el("span", { class: `badge ${move.kind}`, title: words[move.kind] },
    el("span", { "aria-hidden": "true" }, shown), hidden(words[move.kind]));
}

function textOf(text) {
  const shown = el("p", { class: text.length > LONG ? "text cut" : "text", dir: "auto" }, text);
  if (text.length <= LONG) return [shown];
  const more = el("button", { type: "button", class: "more", "aria-expanded": "false", click: () => {
    const cut = shown.classList.toggle("cut");
    more.textContent = cut ? "Show all" : "Show less";
    more.setAttribute("aria-expanded", String(!cut));
  } }, "Show all");
  return [shown, more];
}

function item(hit, index, { rows, low, high, move, other, label }) {
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", String(high > low ? 0.04 + 0.96 * (hit.score - low) / (high - low) : 1));
  const before = hit.before === undefined ? null
    : el("span", { class: "quiet", title: `similarity ${hit.similarity.toFixed(4)}` },
      `${hit.before + 1 === index + 1 ? "also" : "was"} ${hit.before + 1} before reranking`);
  const [text, more = null] = textOf(rows[hit.row].text);
  return el("li", { class: `hit ${move?.kind ?? ""}`, "data-row": hit.row, tabindex: "-1" },
    el("span", { class: "rank", "aria-hidden": "true" }, String(index + 1)),
    el("div", { class: "content" }, text, more,
      el("div", { class: "facts" },
        el("span", { class: "score", title: label }, hidden(`${label} `), hit.score.toFixed(4)), bar,
        move ? badge(move, other) : null, before,
        el("span", { class: "id", title: rows[hit.row].id }, rows[hit.row].id))));
}

/** Show the hits of a side. `others`: the hits of the other side, or null; `label`: what the scores are. */
export function showHits(panel, hits, others, { rows, label, other }) {
  const scores = hits.map((hit) => hit.score);
  const low = Math.min(...scores);
  const high = Math.max(...scores);
  const changed = others === null ? null : moves(hits, others);
  const list = el("ol", { class: "hits", "aria-label": `Hits of ${panel.letter}` });
  hits.forEach((hit, index) => {
    list.append(item(hit, index, { rows, low, high, move: changed?.[index], other, label }));
  });
  panel.body.replaceChildren(list);
}

/** One sentence on how two rankings differ. */
export function difference(left, right) {
  const changed = moves(left, right);
  const shared = changed.filter((move) => move.kind !== "only");
  const same = changed.filter((move) => move.kind === "same").length;
  const first = left[0]?.row === right[0]?.row ? "the first hit is the same" : "the first hit differs";
  return `${shared.length} of ${left.length} hits are in both, ${same || "none"} of them in the same place; ${first}.`;
}

/** Join the same texts of two lists by lines in the gutter between them. */
export function drawLines(gutter, left, right) {
  gutter.replaceChildren();
  const box = gutter.getBoundingClientRect();
  if (box.width === 0 || box.height === 0) return;
  const canvas = svg("svg", { width: box.width, height: box.height });
  const middle = (hit) => {
    const { top, height } = hit.getBoundingClientRect();
    return top - box.top + height / 2;
  };
  for (const hit of left.querySelectorAll(".hit")) {
    const twin = right.querySelector(`.hit[data-row="${hit.dataset.row}"]`);
    if (twin === null) continue;
    const [from, to, bend] = [middle(hit), middle(twin), box.width / 2];
    const kind = ["up", "down", "same"].find((name) => twin.classList.contains(name)) ?? "";
    canvas.append(svg("path", { class: `line ${kind}`, "data-row": hit.dataset.row,
      d: `M0 ${from}C${bend} ${from} ${bend} ${to} ${box.width} ${to}` }));
  }
  gutter.append(canvas);
}

/** Mark a text on both sides while the pointer or the focus is on one of them. */
export function linkHits(container) {
  const mark = (target) => {
    const row = target?.closest?.(".hit")?.dataset.row;
    for (const node of container.querySelectorAll("[data-row]")) {
      node.classList.toggle("linked", node.dataset.row === row);
    }
  };
  for (const name of ["pointerover", "focusin"]) container.addEventListener(name, (event) => mark(event.target));
  for (const name of ["pointerleave", "focusout"]) container.addEventListener(name, () => mark(null));
}

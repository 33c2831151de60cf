// Heat maps of the similarities of all pairs of some texts.

import { el } from "./dom.js";

const MOST_TEXTS = 24;

export class PairsError extends Error {}

/** The lines of a text area. */
export function linesOf(text, what) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  if (lines.length > MOST_TEXTS) throw new PairsError(`${what}: ${lines.length} texts; a heat map takes ${MOST_TEXTS}`);
  return lines;
}

/** The ends of the color scale; a text's similarity with itself does not stretch it. */
function scale(values, diverging, same) {
  const all = values.flatMap((row, y) => row.filter((_, x) => !same || x !== y));
  if (diverging) {
    const most = Math.max(...all.map(Math.abs), 1e-9);
    return { low: -most, high: most };
  }
  return all.length > 0 ? { low: Math.min(...all), high: Math.max(...all) } : { low: 0, high: 1 };
}

function cell(value, { low, high }, diverging) {
  const part = high > low ? Math.min((value - low) / (high - low), 1) : 0.5;
  const strength = diverging ? Math.abs(part - 0.5) * 2 : part;
  const side = diverging ? (part < 0.5 ? "less" : "greater") : "";
  const shade = strength > 0.75 ? "strong" : strength > 0.58 ? "medium" : "";
  const data = el("td", { class: `${side} ${shade}` },
    value.toFixed(2).replace("-0.00", "0.00"));
  data.style.setProperty("--strength", `${Math.round(strength * 100)}%`);
  return data;
}

/** A table of values [rows][columns], colored from the lowest to the highest; `diverging`: by their sign. */
export function heatMap(title, values, rows, columns, { diverging = false } = {}) {
  const range = scale(values, diverging, rows === columns);
  const head = el("tr", {}, el("td"),
    ...columns.map((text, index) => el("th", { scope: "col", title: text }, String(index + 1))));
  const body = rows.map((text, row) => el("tr", {},
    el("th", { scope: "row", dir: "auto", title: text }, el("span", { class: "number" }, String(row + 1)), text),
    ...columns.map((_, column) => cell(values[row][column], range, diverging))));
  const format = (value) => (diverging && value > 0 ? "+" : "") + value.toFixed(3);
  return el("figure", { class: "heat" },
    el("figcaption", {}, title, el("span", { class: "legend" }, format(range.low),
      el("span", { class: diverging ? "ramp diverging" : "ramp", "aria-hidden": "true" }), format(range.high))),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title },
      el("table", {}, el("thead", {}, head), el("tbody", {}, ...body))));
}

/** The texts of the columns, which the table only numbers. */
export function columnTexts(columns) {
  return el("details", { class: "column-texts" }, el("summary", {}, "Texts of the columns"),
    el("ol", {}, ...columns.map((text) => el("li", { dir: "auto" }, text))));
}

// One side of the comparison: a model, the width of its vectors, and a reranker or none.

import { el } from "./dom.js";

const DEPTHS = [10, 20, 50, 100];

export class Panel {
  /** `onChange` is called for a choice, `onSlide` while the slider moves; `onClose`: null where it cannot be closed. */
  constructor(root, letter, models, { onChange, onSlide, onClose }) {
    this.root = root;
    this.letter = letter;
    this.embedders = models.filter((model) => model.kind === "embedding");
    this.rerankers = models.filter((model) => model.kind === "reranker");
    this.body = el("div", { class: "body" });
    this.modelSelect = this.select("Model", this.embedders.map((model) => [model.id, model.id]), () => {
      this.fitWidth();
      onChange();
    });
    this.rerankerSelect = this.select("Reranker", [["", "none"], ...this.rerankers.map(({ id }) => [id, id])], () => {
      this.fitReranker();
      onChange();
    });
    this.depthSelect = this.select("Reranked hits", DEPTHS.map((n) => [String(n), `the first ${n}`]), onChange);
    this.depthSelect.value = "20";
    this.slider = el("input", { type: "range", id: `width-${letter}`, list: `widths-${letter}`, input: () => {
      this.showWidth();
      onSlide();
    } });
    this.ticks = el("datalist", { id: `widths-${letter}` });
    this.output = el("output", { for: `width-${letter}` });
    root.replaceChildren(this.header(onClose), this.body);
    this.fitWidth();
    this.fitReranker();
  }

  select(label, options, change) {
    const select = el("select", { change, "aria-label": `${this.letter}: ${label}` });
    for (const [value, text] of options) select.append(el("option", { value }, text));
    return select;
  }

  header(onClose) {
    const field = (label, control) => el("label", {}, el("span", { class: "quiet" }, label), control);
    this.depthField = field("Reranked hits", this.depthSelect);
    this.depthField.classList.add("depth");
    const close = onClose === null ? null
      : el("button", { type: "button", class: "close", click: onClose, "aria-label": `Close ${this.letter}` }, "×");
    return el("div", { class: "settings" },
      el("div", { class: "row" }, el("span", { class: "letter", "aria-hidden": "true" }, this.letter),
        field("Model", this.modelSelect), this.rerankers.length === 0 ? null : field("Reranker", this.rerankerSelect),
        close),
      el("div", { class: "row" },
        el("label", {}, el("span", { class: "quiet" }, "Vector width (Matryoshka)"),
          el("span", { class: "slide" }, this.slider, this.output), this.ticks), this.depthField));
  }

  fitWidth() {
    const { dim } = this.model;
    const step = dim % 8 === 0 && dim > 8 ? 8 : 1;
    Object.assign(this.slider, { min: step, max: dim, step });
    this.slider.value = dim;
    const ticks = [];
    for (let width = 32; width < dim; width *= 2) ticks.push(width);
    this.ticks.replaceChildren(...[...ticks, dim].map((width) => el("option", { value: width })));
    this.showWidth();
  }

  fitReranker() {
    this.depthField.hidden = this.rerankerSelect.value === "";
  }

  showWidth() {
    this.output.textContent = `${this.width} of ${this.model.dim}`;
    this.slider.setAttribute("aria-valuetext", `${this.width} of ${this.model.dim} components`);
  }

  get model() { return this.embedders.find((model) => model.id === this.modelSelect.value); }

  get width() { return Number(this.slider.value); }

  get reranker() { return this.rerankerSelect.value || null; }

  get depth() { return Number(this.depthSelect.value); }

  choose({ model, reranker }) {
    if (model !== undefined) this.modelSelect.value = model;
    if (reranker !== undefined) this.rerankerSelect.value = reranker;
    this.fitWidth();
    this.fitReranker();
  }
}

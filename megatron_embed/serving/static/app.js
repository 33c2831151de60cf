// The page: what is asked, by which models, and what is shown.

import * as api from "./api.js";
import { corpusOf, filesOfDrop, readFiles, split } from "./corpus.js";
import { byId, debounced, el, plural } from "./dom.js";
import { PAIRS, QUERIES, TEXTS } from "./example.js";
import { PairsError, columnTexts, heatMap, linesOf } from "./pairs.js";
import { Panel } from "./panel.js";
import { best, similarities } from "./rank.js";
import { difference, drawLines, linkHits, showHits } from "./results.js";

const SHOWN = 10;

const state = { models: [], corpus: null, given: null, panels: [], view: "search", query: "", pairs: null };
let vectorsOf = new Map(); // of the corpus, by model
const queries = new Map(); // by model and text
const scores = new Map(); // of rerankers, by model, query and document
let turn = 0; // results of an earlier turn are not shown
let embedding = null; // AbortController of the corpus that is being embedded
let last = Promise.resolve(); // models embed one after the other

function showError(error) {
  const box = byId("error");
  if (error?.name === "AbortError") return;
  box.hidden = error === null;
  if (error === null) return;
  box.textContent = error.message;
  if (error.status === 401) {
    byId("key-form").hidden = false;
    box.hidden = !api.hasKey();
  }
}

const status = (text) => { byId("status").textContent = text; };

/** Run an action and show its error, if it has one. */
async function attempt(action) {
  try {
    showError(null);
    await action();
  } catch (error) {
    showError(error);
    if (error instanceof TypeError) throw error; // a mistake of this page: for the console, too
  }
}

function progress(done, total, model) {
  byId("progress").hidden = done === total;
  byId("progress-bar").max = total;
  byId("progress-bar").value = done;
  byId("progress-text").textContent = `${model}: ${done.toLocaleString("en")} of ${plural(total, "text")} embedded`;
}

/** The vectors of the corpus by a model; embedded at the first use, and once however often they are asked for. */
function corpusVectors(model) {
  const { corpus } = state;
  const known = vectorsOf;
  if (!known.has(model.id)) {
    embedding ??= new AbortController();
    const count = corpus.rows.length;
    const options = { signal: embedding.signal,
      onProgress: (done) => { if (state.corpus === corpus) progress(done, count, model.id); } };
    const promise = last.then(() => {
      options.onProgress(0);
      return corpus === state.given ? api.corpusVectors(model, count, options)
        : api.embed(model.id, corpus.rows.map((row) => row.text), "document", options);
    });
    last = promise.catch(() => {});
    known.set(model.id, promise);
    promise.catch(() => {
      known.delete(model.id);
      byId("progress").hidden = true;
    });
  }
  return known.get(model.id);
}

function queryVector(model, text) {
  const key = JSON.stringify([model, text]);
  if (!queries.has(key)) {
    if (queries.size > 200) queries.clear();
    const promise = api.embed(model, [text], "query");
    queries.set(key, promise);
    promise.catch(() => queries.delete(key));
  }
  return queries.get(key);
}

/** Scores of a reranker for one query; only pairs that it has not seen are asked for. */
async function rerankScores(model, query, texts) {
  const keys = texts.map((text) => JSON.stringify([model, query, text]));
  const missing = texts.filter((_, index) => !scores.has(keys[index]));
  if (missing.length > 0) {
    if (scores.size > 20_000) scores.clear();
    const answer = await api.rerank(model, query, missing);
    missing.forEach((text, index) => scores.set(JSON.stringify([model, query, text]), answer[index]));
  }
  return keys.map((key) => scores.get(key));
}

/** The hits of one side for a query, [{row, score, before?, similarity?}], best first. */
async function hitsOf(panel, query, rows) {
  const { model, width, reranker, depth } = panel;
  const vectors = await corpusVectors(model);
  const asked = await queryVector(model.id, query);
  const found = similarities(asked, 0, vectors, width, model.similarity);
  const hits = best(found, reranker === null ? SHOWN : depth);
  if (reranker === null) return hits;
  const values = await rerankScores(reranker, query, hits.map((hit) => rows[hit.row].text));
  return hits.map((hit, index) => ({ row: hit.row, score: values[index], before: index, similarity: hit.score }))
    .sort((a, b) => b.score - a.score || a.before - b.before).slice(0, SHOWN);
}

const labelOf = (panel) => panel.reranker ?? (panel.model.similarity === "cosine" ? "cosine" : "dot product");

async function search() {
  const { query, panels, corpus } = state;
  turn += 1;
  const mine = turn;
  if (query === "" || corpus === null) {
    panels.forEach((panel) => panel.body.replaceChildren());
    byId("gutter").replaceChildren();
    status("");
    return;
  }
  document.body.classList.add("busy");
  const slow = setTimeout(() => status("Searching …"), 400);
  let shown = "";
  try {
    const hits = await Promise.all(panels.map((panel) => hitsOf(panel, query, corpus.rows)));
    if (mine !== turn || state.corpus !== corpus) return;
    panels.forEach((panel, index) => showHits(panel, hits[index], hits[1 - index] ?? null,
      { rows: corpus.rows, label: labelOf(panel), other: index === 0 ? "B" : "A" }));
    shown = hits.length === 2 ? difference(...hits) : `${plural(hits[0].length, "hit")} for “${query}”.`;
    lines();
  } finally {
    clearTimeout(slow);
    if (mine === turn) {
      document.body.classList.remove("busy");
      status(shown);
    }
  }
}

function lines() {
  const [left, right] = state.panels;
  byId("gutter").replaceChildren();
  if (state.view === "search" && right !== undefined) drawLines(byId("gutter"), left.body, right.body);
}

async function valuesOf(panel, rows, columns, rowRole) {
  if (panel.reranker !== null) {
    return Promise.all(rows.map((row) => rerankScores(panel.reranker, row, columns)));
  }
  const { id, similarity } = panel.model;
  const left = await api.embed(id, rows, rowRole);
  const right = rows === columns ? left : await api.embed(id, columns, "document");
  return { left, right, similarity };
}

const tableOf = (found, width) => (Array.isArray(found) ? found
  : Array.from({ length: found.left.count }, (_, row) => Array.from(
    similarities(found.left, row, found.right, width, found.similarity))));

async function pairs() {
  if (state.pairs === null) return;
  const { rows, columns } = state.pairs;
  turn += 1;
  const mine = turn;
  const found = await Promise.all(state.panels.map((panel) => pairVectors(panel, rows, columns)));
  if (mine !== turn) return;
  const tables = found.map((values, index) => tableOf(values, state.panels[index].width));
  state.panels.forEach((panel, index) => panel.body.replaceChildren(
    heatMap(`${panel.letter}: ${labelOf(panel)}`, tables[index], rows, columns), columnTexts(columns)));
  const comparable = tables.length === 2 && labelOf(state.panels[0]) === labelOf(state.panels[1]);
  const change = comparable && tables[1].map((row, y) => row.map((value, x) => value - tables[0][y][x]));
  byId("difference").replaceChildren(
    ...(comparable ? [heatMap("B minus A", change, rows, columns, { diverging: true })] : []));
  status(`${plural(rows.length * columns.length, "pair")}.`);
}

/** What `valuesOf` gives, kept until the texts, the model or the reranker change: the slider needs no new vectors. */
function pairVectors(panel, rows, columns) {
  const key = JSON.stringify([panel.model.id, panel.reranker]);
  const known = state.pairs.found;
  if (!known.has(key)) {
    const promise = valuesOf(panel, rows, columns, rows === columns ? "document" : "query");
    known.set(key, promise);
    promise.catch(() => known.delete(key));
  }
  return known.get(key);
}

const show = () => attempt(state.view === "search" ? search : pairs);
const showSoon = debounced(show, 150);
const slide = () => (state.panels.some((panel) => panel.reranker !== null) ? showSoon() : show());

function setPanels(count) {
  const choices = { onChange: () => { show(); countTokens(); }, onSlide: slide };
  state.panels = [new Panel(byId("column-a"), "A", state.models, { ...choices, onClose: null })];
  const root = byId("column-b");
  if (count === 2) {
    const second = new Panel(root, "B", state.models, { ...choices, onClose: () => withFirst(1) });
    const [embedder, reranker] = [second.embedders[1], second.rerankers[0]];
    second.choose(embedder ? { model: embedder.id } : { reranker: reranker?.id ?? "" });
    state.panels.push(second);
  } else {
    root.replaceChildren(el("button", { type: "button", class: "add", click: () => withFirst(2) },
      "Compare with another model, width or reranker"));
  }
  document.body.classList.toggle("two", count === 2);
}

/** Open or close side B and keep what side A is set to. */
function withFirst(count) {
  const { model, width, reranker, depth } = state.panels[0];
  setPanels(count);
  const [first] = state.panels;
  first.choose({ model: model.id, reranker: reranker ?? "" });
  first.slider.value = width;
  first.depthSelect.value = depth;
  first.showWidth();
  byId("difference").replaceChildren();
  show();
  countTokens();
}

let counting = null;
const countTokens = debounced(async () => {
  counting?.abort();
  counting = new AbortController();
  const text = byId("query").value;
  const models = [...new Set(state.panels.map((panel) => panel.model.id))];
  try {
    const counts = await Promise.all(models.map((model) => api.tokens(model, text, "query", counting.signal)));
    byId("tokens").replaceChildren(...models.flatMap((model, index) => {
      const { tokens, max_length: most } = counts[index];
      const over = tokens > most ? el("strong", {}, `, the last ${tokens - most} are cut off`) : null;
      const name = models.length > 1 ? `${model}: ` : "";
      const count = `${index > 0 ? " · " : ""}${name}${tokens} of ${plural(most, "token")}`;
      return over === null ? [count] : [count, over];
    }));
  } catch (error) {
    if (error.name !== "AbortError") byId("tokens").textContent = "";
  }
}, 200);

function ask(query) {
  byId("query").value = query;
  state.query = query.trim();
  show();
  countTokens();
}

function setCorpus(corpus, suggestions = []) {
  embedding?.abort();
  embedding = null;
  vectorsOf = new Map();
  state.corpus = corpus;
  byId("progress").hidden = true;
  byId("corpus-name").replaceChildren("Searching ", el("strong", {}, corpus.name),
    ` (${plural(corpus.rows.length, "text")})`);
  byId("suggestions").replaceChildren(...suggestions.map((query) => el("button",
    { type: "button", class: "chip", dir: "auto", click: () => ask(query) }, query)));
  openCorpus(false);
  attempt(async () => {
    await Promise.all(state.panels.map((panel) => corpusVectors(panel.model)));
    await search();
  });
}

function openCorpus(open) {
  byId("corpus-panel").hidden = !open;
  byId("corpus-toggle").setAttribute("aria-expanded", String(open));
}

const useExample = () => setCorpus(
  corpusOf("example texts", TEXTS.map((text, index) => ({ id: `${index + 1}`, text }))), QUERIES);

const useFiles = (files) => attempt(async () => {
  setCorpus(await readFiles(files, byId("split").value));
});

function setView(view) {
  state.view = view;
  for (const name of ["search", "pairs"]) {
    const chosen = name === view;
    byId(`view-${name}`).hidden = !chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  byId("gutter").replaceChildren();
  byId("difference").replaceChildren();
  state.panels.forEach((panel) => panel.body.replaceChildren());
  status("");
  show();
}

function listen() {
  byId("search-form").addEventListener("submit", (event) => { event.preventDefault(); ask(byId("query").value); });
  byId("query").addEventListener("input", countTokens);
  byId("corpus-toggle").addEventListener("click", () => openCorpus(byId("corpus-panel").hidden));
  byId("files").addEventListener("change", (event) => useFiles(Array.from(event.target.files)));
  byId("folder").addEventListener("change", (event) => useFiles(Array.from(event.target.files)));
  byId("paste-use").addEventListener("click", () => attempt(async () => {
    setCorpus(corpusOf("pasted texts", split("line", byId("paste").value, "line")));
  }));
  byId("back").addEventListener("click", () => (state.given ? setCorpus(state.given) : useExample()));
  byId("progress-stop").addEventListener("click", () => {
    embedding?.abort();
    embedding = null;
    status("Stopped. A search begins again.");
  });
  byId("pairs-form").addEventListener("submit", (event) => { event.preventDefault(); attempt(readPairs); });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.setKey(byId("key").value);
    byId("key-form").hidden = true;
    start();
  });
  for (const name of ["search", "pairs"]) byId(`tab-${name}`).addEventListener("click", () => setView(name));
  byId("tab-search").parentElement.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    setView(state.view === "search" ? "pairs" : "search");
    byId(`tab-${state.view}`).focus();
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("drop");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("drop");
    attempt(async () => { await useFiles(await filesOfDrop(event.dataTransfer.items)); });
  });
  linkHits(byId("columns"));
  new ResizeObserver(lines).observe(byId("columns"));
}

async function readPairs() {
  const rows = linesOf(byId("pairs-rows").value, "Rows");
  const columns = linesOf(byId("pairs-columns").value, "Columns");
  if (rows.length === 0) throw new PairsError("Rows: write at least one text, one a line");
  state.pairs = { rows, columns: columns.length > 0 ? columns : rows, found: new Map() };
  await pairs();
}

async function start() {
  await attempt(async () => {
    const { models, corpus } = await api.info();
    state.models = models;
    if (!models.some((model) => model.kind === "embedding")) {
      byId("columns").hidden = true;
      throw new Error("This server runs no embedding model, so there is nothing to search with; start it with one.");
    }
    const compared = models.length > 1 ? 2 : 1;
    setPanels(compared);
    byId("pairs-rows").value ||= PAIRS.join("\n");
    state.pairs = { rows: PAIRS, found: new Map() };
    state.pairs.columns = state.pairs.rows;
    countTokens();
    if (corpus === null) {
      useExample();
    } else {
      state.given = corpusOf(corpus.name, (await api.corpus()).rows);
      byId("back").textContent = `Back to ${corpus.name}`;
      setCorpus(state.given);
    }
  });
}

listen();
start();

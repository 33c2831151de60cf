// One's own texts from files, folders and the clipboard: rows {id, text}.

export const MOST_TEXTS = 20_000;
const MOST_BYTES = 100 * 2 ** 20;
const MOST_CHARACTERS = 100_000;
const TEXT_KEYS = ["text", "contents", "content", "passage", "document"];
const ID_KEYS = ["_id", "docid", "id"];
const TEXT_FILE = /\.(txt|md|text|markdown)$/i;
const ROW_FILE = /\.(jsonl|ndjson|json)$/i;

class CorpusError extends Error {}

function rowOf(value, source) {
  const key = TEXT_KEYS.find((name) => typeof value?.[name] === "string");
  if (key === undefined) throw new CorpusError(`${source}: no text; a row is one line such as {"text": "..."}`);
  const title = typeof value.title === "string" && value.title.trim() ? `${value.title} ` : "";
  const id = value[ID_KEYS.find((name) => name in value)];
  return { id: id === undefined ? source : String(id), text: title + value[key] };
}

function parsed(text, source) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new CorpusError(`${source}: not JSON: ${error.message}`);
  }
}

function rowsOfJson(name, content) {
  if (content.trimStart().startsWith("[")) {
    return parsed(content, name).map((value, index) => rowOf(value, `${name}:${index + 1}`));
  }
  return content.split("\n").flatMap((line, index) => {
    const source = `${name}:${index + 1}`;
    return line.trim() ? [rowOf(parsed(line, source), source)] : [];
  });
}

/** The texts of plain text: one a line, one a paragraph (blank lines end it), or one. */
export function split(name, content, unit) {
  if (unit === "file") return [{ id: name, text: content.trim() }];
  const parts = content.split(unit === "line" ? "\n" : /\n[ \t]*\n/);
  return parts.map((part, index) => ({ id: `${name}:${index + 1}`, text: part.trim().replace(/\s+/g, " ") }));
}

/** A corpus {name, rows}, or an error that says what is wrong with which file. */
export function corpusOf(name, rows) {
  const texts = rows.filter((row) => row.text.trim())
    .map((row) => ({ id: row.id, text: row.text.slice(0, MOST_CHARACTERS) }));
  if (texts.length === 0) throw new CorpusError(`${name}: there is no text in it`);
  if (texts.length > MOST_TEXTS) {
    throw new CorpusError(`${name}: ${texts.length.toLocaleString("en")} texts; this page takes ` +
      `${MOST_TEXTS.toLocaleString("en")}. For more: megatron-embed encode, then megatron-embed search`);
  }
  return { name, rows: texts };
}

/** The corpus of chosen or dropped files; files of other kinds are left out. */
export async function readFiles(files, unit) {
  const wanted = files.filter((file) => ROW_FILE.test(file.name) || TEXT_FILE.test(file.name));
  if (wanted.length === 0) throw new CorpusError("There is no .jsonl, .json, .txt or .md file among these");
  const bytes = wanted.reduce((sum, file) => sum + file.size, 0);
  if (bytes > MOST_BYTES) {
    throw new CorpusError(`These files have ${Math.ceil(bytes / 2 ** 20)} MiB; this page takes ` +
      `${MOST_BYTES / 2 ** 20}. For more: megatron-embed encode, then megatron-embed search`);
  }
  const rows = [];
  for (const file of wanted) {
    const path = file.webkitRelativePath || file.name;
    const content = (await file.text()).replaceAll("\r\n", "\n").replace(/^\uFEFF/, "");
    const more = ROW_FILE.test(file.name) ? rowsOfJson(path, content) : split(path, content, unit);
    for (const row of more) rows.push(row);
  }
  const folder = wanted[0].webkitRelativePath?.split("/")[0];
  return corpusOf(folder || (wanted.length === 1 ? wanted[0].name : `${wanted.length} files`), rows);
}

/** All files of a drop, those in folders too. */
export async function filesOfDrop(items) {
  const entries = Array.from(items, (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = [];
  while (entries.length > 0) {
    const entry = entries.shift();
    if (entry.isFile) files.push(await new Promise((resolve, reject) => { entry.file(resolve, reject); }));
    else entries.push(...await entriesOf(entry.createReader()));
  }
  return files;
}

async function entriesOf(reader) {
  const all = [];
  for (;;) { // a call gives at most a hundred
    const some = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (some.length === 0) return all;
    all.push(...some);
  }
}

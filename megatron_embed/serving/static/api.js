// Requests to the server that this page came from. Paths are relative, so that the page also works behind a prefix.

const MOST_TRIES = 6;
const TEXTS_AT_ONCE = 64;
const CHARACTERS_AT_ONCE = 200_000;

let key = sessionStorage.getItem("megatron_embed.key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("megatron_embed.key", value);
}

export const hasKey = () => key !== "";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The JSON answer to a request; a busy server (429, 503) is asked again after a while. */
async function request(path, body, signal) {
  return (await answerTo(path, body, signal)).json();
}

async function answerTo(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  for (let tries = 1; ; tries += 1) {
    const response = await reached(path, options);
    if (response.ok) return response;
    if (![429, 503].includes(response.status) || tries === MOST_TRIES) throw await errorOf(response);
    const seconds = Number(response.headers.get("Retry-After")) || 0.25 * 2 ** tries;
    await new Promise((resolve) => { setTimeout(resolve, 1000 * Math.min(seconds, 10)); });
    signal?.throwIfAborted();
  }
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer; is it still running?");
  }
}

async function errorOf(response) {
  let message = "";
  try {
    const answer = await response.json();
    message = answer.error?.message ?? answer.message ?? answer.detail ?? "";
  } catch {
    // not JSON: the status has to do
  }
  if (typeof message !== "string") message = JSON.stringify(message);
  return new ServerError(response.status, message || `The server answers ${response.status} ${response.statusText}`);
}

/** The models, and the corpus that the server was started with. */
export const info = () => request("page/info");

/** The rows {id, text} of that corpus. */
export const corpus = () => request("page/corpus");

export const tokens = (model, text, role, signal) => request("page/tokens", { model, text, role }, signal);

function floats(base64) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  return new Float32Array(bytes.buffer);
}

/** The first text of every request of at most so many texts and characters. */
function starts(texts) {
  const all = [];
  let characters = 0;
  for (let index = 0; index < texts.length; index += 1) {
    characters += texts[index].length;
    if (index === 0 || index - all.at(-1) === TEXTS_AT_ONCE || characters > CHARACTERS_AT_ONCE) {
      all.push(index);
      characters = texts[index].length;
    }
  }
  return all;
}

/** Vectors of the texts, one after the other in one array. `onProgress` hears how many are done. */
export async function embed(model, texts, role, { signal, onProgress = () => {} } = {}) {
  let data = null;
  let dim = 0;
  const first = starts(texts);
  for (const [position, start] of first.entries()) {
    const input = texts.slice(start, first[position + 1] ?? texts.length);
    const answer = await request("v1/embeddings",
      { model, input, input_type: role, encoding_format: "base64" }, signal);
    for (const item of answer.data) {
      const vector = floats(item.embedding);
      if (data === null) {
        dim = vector.length;
        data = new Float32Array(texts.length * dim);
      }
      data.set(vector, (start + item.index) * dim);
    }
    onProgress(start + input.length);
  }
  return { data: data ?? new Float32Array(0), dim, count: texts.length };
}

/** Vectors of the corpus that the server was started with, which it keeps; as `embed` gives them. */
export async function corpusVectors({ id, dim }, count, { signal, onProgress }) {
  const data = new Float32Array(count * dim);
  for (let done = 0; done < count;) {
    const answer = await answerTo(`page/vectors?model=${encodeURIComponent(id)}&start=${done}`, undefined, signal);
    const part = new Float32Array(await answer.arrayBuffer());
    data.set(part, done * dim);
    done += part.length / dim;
    onProgress(done);
  }
  return { data, dim, count };
}

/** Scores of the documents, in their order. */
export async function rerank(model, query, documents, signal) {
  const scores = new Array(documents.length);
  const answer = await request("v1/rerank", { model, query, documents, return_documents: false }, signal);
  for (const result of answer.results) scores[result.index] = result.relevance_score;
  return scores;
}

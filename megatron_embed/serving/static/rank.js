// Exact search and the comparison of two rankings. Vectors are {data, dim, count}: rows one after the other.

const norms = new WeakMap();

/** Lengths of the first `width` components of every row. */
function lengths(vectors, width) {
  const known = norms.get(vectors) ?? new Map();
  norms.set(vectors, known);
  if (known.size > 64) known.clear();
  if (!known.has(width)) {
    const values = new Float64Array(vectors.count);
    for (let row = 0; row < vectors.count; row += 1) {
      values[row] = Math.sqrt(dot(vectors, row, vectors, row, width)) || 1;
    }
    known.set(width, values);
  }
  return known.get(width);
}

function dot(left, row, right, column, width) {
  const a = left.data;
  const b = right.data;
  let i = row * left.dim;
  let j = column * right.dim;
  let sum = 0;
  for (const end = i + width; i < end; i += 1, j += 1) sum += a[i] * b[j];
  return sum;
}

/** Similarities of one row with all rows of `documents`, by the first `width` components. */
export function similarities(queries, row, documents, width, similarity) {
  const scores = new Float64Array(documents.count);
  const scale = similarity === "cosine" ? lengths(documents, width) : null;
  const own = scale ? lengths(queries, width)[row] : 1;
  for (let column = 0; column < documents.count; column += 1) {
    scores[column] = dot(queries, row, documents, column, width) / (scale ? scale[column] * own : 1);
  }
  return scores;
}

/** The k best rows {row, score}, best first; of equal scores the later row first, as `megatron-embed search` has it. */
export function best(scores, k) {
  const rows = Uint32Array.from(scores.keys());
  rows.sort((a, b) => scores[b] - scores[a] || b - a);
  return Array.from(rows.subarray(0, k), (row) => ({ row, score: scores[row] }));
}

/** What became of each hit of a ranking in the other one: {kind: "up" | "down" | "same" | "only", places, other}. */
export function moves(hits, others) {
  const ranks = new Map(others.map((hit, index) => [hit.row, index]));
  return hits.map((hit, index) => {
    const other = ranks.get(hit.row);
    if (other === undefined) return { kind: "only", places: 0, other: -1 };
    const places = other - index;
    return { kind: places > 0 ? "up" : places < 0 ? "down" : "same", places: Math.abs(places), other };
  });
}

"""Draw bytes per document against nDCG@10, from the results of tools/precision_recipe.py, as an SVG file.

    python tools/precision_chart.py precision_results.jsonl docs/images/vector_precision.svg --set squad11_en
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 470, 64, 24, 56, 58
ARMS = {"before training": ("#8a8f98", "before training"), "float32": ("#c05621", "trained in float32"),
        "precisions": ("#1f5fbf", "trained at all precisions")}
SHAPES = {"": "float32", "int8/": "int8", "binary/": "binary", "rescore/": "binary, rescored"}
BITS = {"": 32, "int8/": 8, "binary/": 1, "rescore/": 1}


class Point(NamedTuple):
    """A mark of the chart."""

    arm: str
    precision: str
    """Prefix of its metrics."""
    width: int
    bytes: float
    ndcg: float
    """Mean over seeds and queries."""


def points_of(results: Iterable[dict], name: str, full: int) -> list[Point]:
    """The marks of a set."""
    values: dict[tuple[str, int, str], list[float]] = {}
    for result in results:
        if result["set"] == name:
            for prefix, queries in result["ndcg@10"].items():
                values.setdefault((result["arm"], result["width"] or full, prefix), []).append(float(np.mean(queries)))
    points = []
    for (arm, whole, prefix), means in values.items():
        cut, _, rest = prefix.partition("/") if prefix.startswith("dim_") else ("", "", prefix)
        width = int(cut.removeprefix("dim_")) if cut else whole
        points.append(Point(arm, rest, width, width * BITS[rest] / 8, float(np.mean(means))))
    return sorted(points, key=lambda point: (point.bytes, -point.ndcg))


def mark(x: float, y: float, precision: str, color: str) -> str:
    """The shape of a precision."""
    if precision == "":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{color}"/>'
    if precision == "int8/":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="{color}"/>'
    fill = color if precision == "rescore/" else "#ffffff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{color}" stroke-width="2"/>'


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13, color: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{words}</text>'


def draw(points: list[Point], title: str) -> str:
    """The chart: bytes on a logarithmic axis, the best of each kind of training joined by a line."""
    low = math.floor(min(point.ndcg for point in points) * 20 - 0.2) / 20
    high = math.ceil(max(point.ndcg for point in points) * 20 + 0.2) / 20
    least, most = (math.log2(edge(point.bytes for point in points)) for edge in (min, max))

    def place(size: float, ndcg: float) -> tuple[float, float]:
        across = (math.log2(size) - least + 0.3) / (most - least + 0.6)
        return (LEFT + across * (WIDTH - LEFT - RIGHT),
                TOP + (high - ndcg) / (high - low) * (HEIGHT - TOP - BOTTOM))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'role="img"><title>{title}</title>', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
             text(LEFT, 22, title, size=15, color="#111111")]
    for step in range(round((high - low) * 20) + 1):
        value = low + step / 20
        _, y = place(2 ** least, value)
        parts += [f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>', text(LEFT - 8, y + 4, f"{value:.2f}",
                                                                                         "end")]
    for size in sorted({point.bytes for point in points}):
        x, _ = place(size, low)
        parts += [f'<path d="M{x:.1f} {HEIGHT - BOTTOM}v5" stroke="#888888"/>',
                  text(x, HEIGHT - BOTTOM + 20, f"{size:g}", "middle")]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "bytes per document (logarithmic)", "middle"))
    parts.append(text(8, TOP - 10, "nDCG@10"))
    arms = [arm for arm in ARMS if any(point.arm == arm for point in points)]
    for arm in arms:
        color, best, line = ARMS[arm][0], -1.0, []
        for point in (point for point in points if point.arm == arm):
            if point.ndcg > best:
                best = point.ndcg
                line.append(place(point.bytes, point.ndcg))
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5" opacity="0.6"/>')
        parts += [mark(*place(point.bytes, point.ndcg), point.precision, color) for point in points if point.arm == arm]
    return "\n".join([*parts, *legend(arms), "</svg>\n"])


def legend(arms: list[str]) -> list[str]:
    """Colours and shapes."""
    parts = []
    for index, (color, words) in enumerate(ARMS[arm] for arm in arms):
        y = HEIGHT - BOTTOM - 24 - 18 * index
        parts += [f'<path d="M{WIDTH - 390} {y - 4}h22" stroke="{color}" stroke-width="3"/>',
                  text(WIDTH - 360, y, words)]
    for index, (precision, words) in enumerate(SHAPES.items()):
        y = HEIGHT - BOTTOM - 24 - 18 * index
        parts += [mark(WIDTH - 170, y - 4, precision, "#555555"), text(WIDTH - 156, y, words)]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="file that tools/precision_recipe.py has written")
    parser.add_argument("output", help="SVG file")
    parser.add_argument("--set", required=True, help="name of the set in the results")
    parser.add_argument("--full", type=int, default=384, help="components of the vector of a model without a new layer")
    arguments = parser.parse_args()
    results = [json.loads(line) for line in Path(arguments.results).read_text(encoding="utf-8").splitlines()]
    points = points_of(results, arguments.set, arguments.full)
    Path(arguments.output).write_text(draw(points, f"{arguments.set}: what a stored vector costs and finds"),
                                      encoding="utf-8")


if __name__ == "__main__":
    main()

"""Charts of nDCG@10 over seeds, for the pages of docs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Bars = Mapping[str, tuple[Sequence[float], str]]
"""By name, from the top: nDCG@10 of each seed, and the colour."""


def draw_bars(charts: Mapping[str, Bars], path: Path) -> None:
    """Write a PNG file of charts side by side, by title: means as bars, lines from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    height = 0.42 * max(map(len, charts.values())) + 1
    figure, axes = pyplot.subplots(1, len(charts), figsize=(max(6.4, 4.6 * len(charts)), height), squeeze=False)
    for axis, (title, bars) in zip(axes[0], charts.items(), strict=True):
        values = [seeds for seeds, _ in bars.values()]
        means = [sum(seeds) / len(seeds) for seeds in values]
        ends = [[abs(end(seeds) - mean) for mean, seeds in zip(means, values, strict=True)] for end in (min, max)]
        axis.barh(list(bars), means, color=[color for _, color in bars.values()], xerr=ends)
        lowest = min(map(min, values))
        axis.set_xlim(max(0.0, lowest - 0.3 * (max(means) - lowest) - 0.01), None)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"nDCG@10, {len(values[0])} seeds", fontsize=8)
        axis.tick_params(labelsize=8)
        for index, mean in enumerate(means):
            axis.text(mean, index, f"  {mean:.3f}", va="bottom", fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

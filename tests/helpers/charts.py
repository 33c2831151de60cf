"""The charts of a metric on TensorBoard's page."""

import re

from megatron_embed.training.dashboards import CUSTOM_SCALARS


def charts_of(tag):
    return [(group, chart) for group, charts in CUSTOM_SCALARS.items() for chart, (_, patterns) in charts.items()
            if any(re.match(pattern, tag) for pattern in patterns)]

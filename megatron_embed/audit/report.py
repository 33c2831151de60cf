"""An audit in words, and as JSON."""

from collections.abc import Mapping
from typing import Any

from megatron_embed.audit.audit import Audit
from megatron_embed.audit.causes import LEFT
from megatron_embed.platform.terminal_text import counted

_SHOWN_ROWS = 8


def as_values(audit: Audit) -> dict[str, Any]:
    """The audit as JSON values."""
    difference = audit.difference
    return {
        "step": audit.step, "equal": difference is None,
        "checkpoint": None if audit.checkpoint is None else str(audit.checkpoint), "replayed_steps": audit.replayed,
        "first_difference": None if difference is None else {
            "step": difference.step, "part": difference.part,
            "values": {name: {"logged": logged, "replayed": replayed}
                       for name, (logged, replayed) in difference.values.items()}},
        "causes": [vars(cause) for cause in audit.causes],
        "metrics": {name: {"logged": logged, "replayed": replayed}
                    for name, (logged, replayed) in audit.metrics.items()},
        "relative_tolerance": audit.tolerance.relative, "rows": list(audit.rows), "notes": list(audit.notes),
        "seconds": round(audit.seconds, 1)}


def as_text(audit: Audit) -> str:
    """The audit as lines for a reader."""
    return "\n".join([*_opening(audit), *_verdict(audit), *audit.notes, *_numbers(audit), *_rows(audit),
                      f"{audit.seconds / 60:.2f} minutes for {counted(audit.replayed, 'replayed step')}"])


def _opening(audit: Audit) -> list[str]:
    origin = "the model that the run began with" if audit.checkpoint is None else str(audit.checkpoint)
    return [f"step {audit.step}: {counted(audit.replayed, 'step')} replayed from {origin}"]


def _verdict(audit: Audit) -> list[str]:
    difference = audit.difference
    if difference is None:
        return [f"equal: rows, texts, labels, masks, loss, gradient and update are as logged (numbers within "
                f"{audit.tolerance.relative:.1e})"]
    values = "; ".join(f"{name}: logged {_shown(logged)}, replayed {_shown(replayed)}"
                       for name, (logged, replayed) in difference.values.items())
    lines = [f"different: first at step {difference.step}, in {difference.part}{': ' if values else ''}{values}"]
    lines += [f"likely cause: {cause.name}: {cause.text}" for cause in audit.causes]
    return lines if audit.causes else [*lines, f"none of the known causes gives the logged numbers; what is known: "
                                               f"{LEFT[difference.part]}"]


def _numbers(audit: Audit) -> list[str]:
    return [f"  {name:28} logged {_shown(logged):>22}  replayed {_shown(replayed):>22}"
            for name, (logged, replayed) in audit.metrics.items()]


def _rows(audit: Audit) -> list[str]:
    shown = [f"  rank {row['rank']}  row {row['row']}  {row['source']}{_masks(row)}"
             for row in audit.rows[:_SHOWN_ROWS]]
    rest = len(audit.rows) - len(shown)
    return [f"{len(audit.rows)} rows:", *shown, *([f"  ... and {rest} more (--json has all)"] if rest else [])]


def _masks(row: Mapping[str, Any]) -> str:
    """Negatives of a row, and the rows whose documents are masked for it."""
    if "negatives" not in row:
        return ""
    masked = row["masked_documents_of_rows"]
    return f"  {row['negatives']} negatives" + (f", masked: documents of rows {masked}" if masked else "")


def _shown(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)

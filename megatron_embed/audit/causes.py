"""Likely causes of a difference: each is tried on the replayed step, and named if it gives the logged numbers.

What no known cause explains is narrowed down to the part of the step that differs first; see LEFT.
"""

from megatron_embed.audit import causes_numbers, causes_rows, causes_texts, causes_update, causes_weights
from megatron_embed.audit.case import Case, Cause

LEFT = {
    "settings": "the run's configuration is not the one that it was started with",
    "files": "files of the checkpoint are not as they were written",
    "weights": "the checkpoint's weights are not those that the run had in memory when it was saved, or its first "
               "weights are not those of model.path",
    "optimizer state": "the moments in the checkpoint are not those that the run had in memory when it was saved",
    "log": "metrics.jsonl and audit.jsonl give other numbers for the same step: one of the files was changed",
    "rows": "the step was made of other rows of the data than sampler and seed give",
    "texts": "the rows are the right ones, their token ids are not: prompt, tokenizer, lengths, number of documents, "
             "or a text that was changed on the way to the model",
    "labels": "the texts are the right ones; which documents are positives, scores or equal texts are not",
    "masks": "the texts and labels are the right ones, the columns that count as negatives are not",
    "vectors": "the texts are the right ones, the vectors are not: the model's forward pass (attention mask, "
               "positions, pooling, normalization, dropout, precision, a layer), or the update before this step",
    "loss": "the vectors are the right ones, the loss of them is not: temperature, positives, negatives, weights of "
            "its terms",
    "gradient": "the loss is the right one, its gradient is not: a part of the graph without gradient, a factor, or a "
                "sum over ranks or micro-batches",
    "learning rate": "the schedule of the learning rate is not the configured one",
    "update": "the gradient is the right one, the parameters after the update are not: clipping, learning rate of a "
              "group, weight decay, moments, parameters that are not updated",
    "copies": "ranks that hold the same have different values"}
"""What is left where no cause is found, by the part that differs first."""


def explain(case: Case) -> list[Cause]:
    """The causes that fit a difference, the likeliest first; none where LEFT says all that is known. Called by all
    ranks."""
    part = case.difference.part
    if part == "log":
        return [Cause(name="changed log", text=LEFT["log"])]
    if part in ("weights", "settings", "files", "optimizer state"):
        return causes_weights.explain(case)
    explain_part = {"rows": causes_rows.explain, "texts": causes_texts.explain, "labels": causes_texts.explain,
                    "learning rate": causes_update.explain, "update": causes_update.explain,
                    "copies": causes_weights.differing_copies}.get(part, _explain_numbers)
    return [*explain_part(case), *causes_weights.noted_facts(case)]


def _explain_numbers(case: Case) -> list[Cause]:
    """Causes within the step; where there is none, in the updates before it."""
    return (causes_numbers.explain(case) or causes_update.explain_before(case) or causes_numbers.explain_noise(case)
            or causes_numbers.explain_ratio(case))

"""`doctor --run`: the likely mistake of a run, from its metrics and its configuration. Loads no library."""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from megatron_embed.platform.terminal_text import counted
from megatron_embed.run.logged_run import RunLog

LEAST_STEPS = 3
"""Logged steps below which nothing is said of a curve."""
WINDOW, SPIKE = 8, 4.0
"""Logged steps whose median a gradient norm is compared with, and how many times that is a jump."""


Rule = Callable[[RunLog], str | None]
"""What is wrong, why it is likely and what to do; None: nothing of this kind."""


def mistakes(log: RunLog) -> Iterator[tuple[str, str]]:
    """(name, text) of each likely mistake, the most telling first."""
    guesses = False
    for name, rule in RULES.items():
        if (guesses and name in GUESSING) or (len(log.steps) < LEAST_STEPS and name not in AT_ONCE):
            continue
        text = rule(log)
        if text is not None:
            guesses = guesses or name in GUESSING
            yield name, text


def _not_finite(log: RunLog) -> str | None:
    skipped = round(sum(log.values("skipped_steps")))
    if skipped < max(1, 0.01 * max(row["step"] for row in log.steps)):
        return None
    return (f"{counted(skipped, 'step')} had a loss or gradient that is not finite and "
            f"{'was' if skipped == 1 else 'were'} skipped: lower "
            f"training.learning_rate ({_number(log.setting('training.learning_rate'))}), raise training.warmup_steps, "
            "and look at the rows in suspicious_steps.jsonl")


def _temperature_too_small(log: RunLog) -> str | None:
    chance, first = log.chance_loss, log.early("loss")
    temperature = log.number("objective.temperature")
    if chance is None or first is None or temperature is None or temperature >= 0.01:
        return None
    if first < chance and temperature > 0.002:
        return None
    return (f"objective.temperature = {temperature:g} is too small: differences of similarities are divided by it, so "
            f"the first loss is {first:.3g} where guessing is {chance:.3g}; usual: 0.01 to 0.1")


def _temperature_too_large(log: RunLog) -> str | None:
    chance, last, margin = log.chance_loss, log.late("loss"), log.late("margin_to_mean_negative")
    temperature, accuracy = log.number("objective.temperature"), log.late("in_batch_accuracy")
    if chance is None or last is None or margin is None or accuracy is None or temperature is None:
        return None
    if temperature <= 0.1 or last < 0.6 * chance or margin / temperature > 2:
        return None
    if accuracy < 0.5 and temperature < 0.5:
        return None
    return (f"objective.temperature = {temperature:g} is too large: the loss stays at {last:.3g}, near the "
            f"{chance:.3g} of guessing, though the right document is nearest for {accuracy:.0%} of the queries, since "
            f"its lead of {margin:.2f} is divided by it; usual: 0.01 to 0.1")


def _collapsed(log: RunLog) -> str | None:
    positive, negative = log.late("positive_similarity"), log.late("negative_similarity")
    if positive is None or negative is None or min(positive, negative) < 0.98 or positive - negative > 0.005:
        return None
    return (f"all vectors became alike (similarity {positive:.3f} to positives, {negative:.3f} to negatives): "
            f"training.learning_rate = {_number(log.setting('training.learning_rate'))} is too high, or the warmup too "
            "short; start again with a tenth of it")


def _rate_too_high(log: RunLog) -> str | None:
    first, last, chance = log.early("loss"), log.late("loss"), log.chance_loss
    if first is None or last is None:
        return None
    rises = last >= 1.5 * first and last - first >= 0.5
    # AdamW at such a rate leaves nothing of a trained model.
    is_extreme = max(log.values("learning_rate")) >= 5e-3 and not log.setting("lora.rank", 0)
    unlearns = chance is not None and ((last >= 0.85 * chance and first < 0.9 * last) or
                                       (last >= 0.6 * chance and is_extreme))
    if not rises and not unlearns:
        return None
    return (f"the loss goes from {first:.3g} to {last:.3g}{f' (guessing: {chance:.3g})' if unlearns else ''}: "
            f"training.learning_rate = {_number(log.setting('training.learning_rate'))} is too high, or the warmup too "
            "short; start again with a tenth of it")


def _rate_too_small(log: RunLog) -> str | None:
    first, last, rate = log.early("loss"), log.late("loss"), max(log.values("learning_rate"))
    if first is None or last is None or rate > 1e-6 or last < (0.8 if rate <= 1e-7 else 0.95) * first:
        return None
    return (f"the loss does not move ({first:.3g}, then {last:.3g}) and the learning rate never exceeds {rate:.1e}: "
            "raise training.learning_rate (usual: 1e-5 to 1e-4, for adapters 1e-4 to 1e-3)")


def _endless_warmup(log: RunLog) -> str | None:
    rates = [(row["learning_rate"], row["step"]) for row in log.steps]
    peak, peak_step = max(rates)
    total = log.number("training.train_steps") or log.steps[-1]["step"]
    if len(rates) < LEAST_STEPS or peak_step <= rates[0][1] or peak_step < 0.5 * total or peak == rates[0][0]:
        return None
    return (f"the learning rate still rises in step {peak_step:.0f} of {total:.0f} ({peak:.2e}): the warmup is most of "
            "the run; set training.warmup_ratio to 0.05 or 0.1")


def _wrong_positives(log: RunLog) -> str | None:
    chance, last, accuracy = log.chance_loss, log.late("loss"), log.late("in_batch_accuracy")
    positive, negative = log.late("positive_similarity"), log.late("negative_similarity")
    if chance is None or last is None or accuracy is None or positive is None or negative is None:
        return None
    held_out = [row["eval/margin_to_mean_negative"] for row in log.evaluations if "eval/margin_to_mean_negative" in row]
    by_heart = bool(held_out) and held_out[-1] < 0.01  # some rows of a few epochs, but nothing of the others
    guesses = by_heart or accuracy <= 3 * math.exp(-chance)
    if last < 0.9 * chance or not guesses or positive - negative > 0.05:
        return None
    return (f"the loss stays at {last:.3g}, which is guessing (log of the candidates: {chance:.3g}), the accuracy at "
            f"{accuracy:.1%}, and positives are no nearer than negatives ({positive:.2f} and {negative:.2f}): the "
            "positives of the rows do not belong to their queries (shuffled or swapped columns, wrong ids), or "
            "training has only begun; look at some rows, then at embedding.pooling and the prompts of the model")


def _labels_inverted(log: RunLog) -> str | None:
    margin = log.early("margin_to_mean_negative")
    if margin is None or margin > -0.05 or not log.values("positive_similarity") or log.chance_loss is not None:
        return None
    return (f"in the first steps positives are less similar than negatives (by {-margin:.2f}): the labels are inverted "
            "(1 must mean similar), or positives and negatives are in each other's places")


def _entropy_of_labels(log: RunLog) -> str | None:
    positive, negative = log.late("positive_score"), log.late("negative_score")
    loss, accuracy = log.late("loss"), log.late("accuracy")
    if log.setting("objective.loss") != "pointwise" or positive is None or negative is None or loss is None:
        return None
    negatives = log.number("data.num_negatives")
    # One positive each; else the share that the scores have learned.
    share = 1 / (1 + negatives) if negatives is not None and negatives >= 1 else 1 / (1 + math.exp(
        -max(-30.0, min(30.0, (positive + negative) / 2))))
    entropy = -share * math.log(share) - (1 - share) * math.log1p(-share)
    if accuracy is None or accuracy > share + 0.2 or abs(positive - negative) > 0.1 or loss < 0.97 * entropy:
        return None
    return (f"the loss stays at {loss:.3g}, where the entropy of the labels is {entropy:.3g}, and positives and "
            f"negatives have the same score ({positive:.2f} and {negative:.2f}): the reranker learned the share of the "
            "positives, not which they are. objective.loss: listwise learns the order from fewer lists; pointwise "
            "needs thousands of them, or begins with a model that is a reranker")


def _similarities_sink(log: RunLog) -> str | None:
    first, last = log.early("positive_similarity"), log.late("positive_similarity")
    before, after = log.early("margin_to_mean_negative"), log.late("margin_to_mean_negative")
    if first is None or last is None or before is None or after is None or first - last < 0.3 or after > before + 0.02:
        return None
    return (f"the similarity of the positives sinks from {first:.2f} to {last:.2f} and that of the negatives with it "
            f"(lead {before:.2f}, then {after:.2f}): the negatives outweigh the positives: objective.bias of the "
            "sigmoid loss is too high for so many of them, many of them are false (`mine` with a margin), or "
            f"training.learning_rate = {_number(log.setting('training.learning_rate'))} is too high")


def _positive_repeats_query(log: RunLog) -> str | None:
    similarity, accuracy = log.early("positive_similarity"), log.early("in_batch_accuracy") or log.early("accuracy")
    if similarity is None or accuracy is None or similarity < 0.97 or accuracy < 0.99:
        return None
    return (f"accuracy {accuracy:.3f} and similarity {similarity:.4f} to the positives from the first step on: the "
            "positive repeats its query; look at the columns of data.train")


def _too_easy(log: RunLog) -> str | None:
    losses, accuracies = log.values("loss"), log.values("in_batch_accuracy") or log.values("accuracy")
    if not accuracies or statistics.fmean(accuracies) < 0.995 or statistics.fmean(losses) > 0.02:
        return None
    if log.steps[0].get("epoch", 0.0) > 1 or _positive_repeats_query(log):  # learned by heart
        return None
    return (f"accuracy {accuracies[0]:.3f} and loss {losses[0]:.3g} in the first step, and no more to learn in the "
            "others: these negatives are too easy; `mine` hard ones, or raise training.global_batch_size")


def _copies_in_batch(log: RunLog) -> str | None:
    accuracy, hardest = log.early("in_batch_accuracy"), log.late("margin_to_hardest_negative")
    mean, first = log.late("margin_to_mean_negative"), log.early("margin_to_hardest_negative")
    if accuracy is None or hardest is None or mean is None or first is None:
        return None
    if accuracy > 0.5 or mean < 0.05 or max(abs(hardest), abs(first)) > 0.02 * mean:
        return None
    return (f"the most similar negative is as near as the positive (difference {hardest:.3f}) though the mean one is "
            f"{mean:.2f} further: a batch holds copies of its positives as negatives; set data.shuffle: true and "
            "objective.mask_duplicates: true, and count copies with `data check`")


def _masked(log: RunLog) -> str | None:
    share = log.late("masked_fraction")
    if share is None or share < 0.3:
        return None
    return (f"{share:.0%} of the negatives are masked: many rows share documents (`data check` counts them), or "
            "objective.mask_margin is too low for this model")


def _few_negatives(log: RunLog) -> str | None:
    negatives = log.late("negatives_per_query")
    if negatives is None or negatives >= 4 or not log.values("in_batch_accuracy"):
        return None
    files = _list(log.setting("data.train"))
    if not all(file.get("in_batch_negatives", True) for file in files if isinstance(file, dict)):
        return None
    return (f"a query has {counted(round(negatives), 'negative')}: raise training.global_batch_size (memory is that "
            "of a micro-batch), or add hard negatives and set data.num_negatives")


def _gradient_spikes(log: RunLog) -> str | None:
    norms = [(row["step"], row["grad_norm"]) for row in log.steps if "grad_norm" in row]
    clip = log.number("training.clip_grad")
    spikes = [f"{norm:.3g} in step {step:.0f}, {usual:.3g} before" for index, (step, norm) in enumerate(norms)
              if index >= WINDOW
              and norm > SPIKE * (usual := statistics.median(before for _, before in norms[index - WINDOW:index]))
              and norm > (clip or 1.0)]
    jumps = [f"step {row.get('step')}: {row['what']}, rows {', '.join(map(str, _list(row.get('rows'))[:2]))}"
             for row in log.suspicious if "standard deviations" in str(row.get("what"))]
    if not spikes and not jumps:
        return None
    return (f"loss or gradient norm jumps ({jumps[0] if jumps else spikes[0]}; {len(jumps or spikes)} such steps): "
            "damaged or mislabelled rows, see suspicious_steps.jsonl; keep training.clip_grad at 1 (now "
            f"{_number(clip)}), lower training.learning_rate or raise the warmup")


def _padding(log: RunLog) -> str | None:
    share = log.late("padding_fraction")
    if share is None or share < 0.2:
        return None
    return (f"{share:.0%} of the computed tokens are padding: training.micro_batch_tokens is far above what a "
            "micro-batch holds (`plan` advises a value), or the micro-batches are too small for the layout")


def _truncated(log: RunLog) -> str | None:
    share = log.late("truncated_fraction")
    if share is None or share < 0.4:
        return None
    if log.config.get("task") == "reranker":
        length = _number(log.setting("reranker.max_length"))
        return (f"{share:.0%} of the pairs are cut at reranker.max_length = {length}: raise it, up to the model's "
                "positions; `data check` counts lengths")
    lengths = [_number(log.setting(f"data.{role}_max_length")) for role in ("query", "document")]
    return (f"{share:.0%} of the texts are cut: raise data.query_max_length and data.document_max_length (now "
            f"{' and '.join(lengths)}), up to the model's positions; `data check` counts by role")


def _labels_of_one_kind(log: RunLog) -> str | None:
    if not log.values("similarity") or log.setting("objective.loss") in ("cosent", "angle", None):
        return None
    both = [name for name in ("positive_similarity", "negative_similarity") if log.values(name)]
    if len(both) != 1:
        return None
    side = "above" if both == ["positive_similarity"] else "below"
    return (f"all scores of the pairs are {side} 0.5: this loss takes scores from 0 to 1 of both kinds; divide the "
            "scores by their largest value, or add pairs of the other kind")


def _evaluation_falls(log: RunLog) -> str | None:
    metric, sign, curve = _curve(log)
    if len(curve) < 3:
        return None
    values = [value for _, value in curve]
    best = max(range(len(values)), key=values.__getitem__)
    losses = {row["step"]: row["loss"] for row in log.steps if "loss" in row}
    after = [loss for step, loss in losses.items() if step >= curve[best][0]]
    drop = (values[best] - values[-1]) / max(abs(values[best]), 1e-9)
    if curve[best][0] == 0 or drop < 0.05 or len(after) < 2 or after[-1] > after[0]:
        return None
    way = "falls" if sign > 0 else "gets worse"
    return (f"the evaluation {way} ({metric}: {sign * values[best]:.4f} at step {curve[best][0]:.0f}, "
            f"{sign * values[-1]:.4f} at the end) while the loss falls: the run learns its rows by heart, or wrong "
            "negatives; fewer training.epochs, evaluation.patience, checkpoint.export: best, and a margin in `mine`")


def _worse_than_before(log: RunLog) -> str | None:
    metric, sign, curve = _curve(log)
    if len(curve) < 2 or curve[0][0] != 0:
        return None
    before, best = curve[0][1], max(value for _, value in curve[1:])
    if before - best < 0.05 * max(abs(before), 1e-9):
        return None
    return (f"no evaluation reaches the {metric} {sign * before:.4f} of before training (best {sign * best:.4f}): the "
            "rows teach something else (positives and negatives swapped, another language or direction), "
            f"training.learning_rate = {_number(log.setting('training.learning_rate'))} is too high, or pooling or "
            "prompts are not the model's own")


def _curve(log: RunLog) -> tuple[str, float, list[tuple[float, float]]]:
    """Name and sign of the metric that compares checkpoints, and (step, sign x value), larger is better; none without
    one.
    """
    wanted = str(log.setting("evaluation.best_metric") or "").removeprefix("eval/")
    names = [f"eval/{name}" for name in (wanted, "ndcg@10", "spearman", "rerank/ndcg@10", "loss") if name]
    for name in names:
        values = [(row["step"], row[name]) for row in log.evaluations if name in row]
        if values:
            sign = -1.0 if name.endswith(("loss", "negative_similarity")) else 1.0
            return name, sign, [(step, sign * value) for step, value in values]
    return "", 1.0, []


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "unknown" if value is None else str(value)


RULES: dict[str, Rule] = {
    "not finite": _not_finite, "temperature too small": _temperature_too_small,
    "vectors alike": _collapsed, "learning rate too small": _rate_too_small, "endless warmup": _endless_warmup,
    "temperature too large": _temperature_too_large, "positive repeats query": _positive_repeats_query,
    "negatives too easy": _too_easy, "copies in a batch": _copies_in_batch, "learning rate too high": _rate_too_high,
    "wrong positives": _wrong_positives, "entropy of the labels": _entropy_of_labels,
    "similarities sink": _similarities_sink, "labels inverted": _labels_inverted,
    "labels of one kind": _labels_of_one_kind, "masked negatives": _masked, "few negatives": _few_negatives,
    "evaluation below the start": _worse_than_before, "evaluation falls": _evaluation_falls,
    "gradient spikes": _gradient_spikes, "padding": _padding, "cut texts": _truncated}
"""By name, the most telling first."""
GUESSING = ("not finite", "temperature too small", "vectors alike", "learning rate too small", "endless warmup",
            "temperature too large", "copies in a batch", "learning rate too high", "wrong positives",
            "entropy of the labels", "similarities sink")
"""Rules that explain why a loss stays at guessing: the first one that applies is enough."""
AT_ONCE = ("not finite", "labels of one kind", "padding", "cut texts", "few negatives")
"""Rules that need no curve."""

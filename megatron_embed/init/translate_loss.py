"""The loss of another trainer in ours: its negatives, temperature and margins."""

from megatron_embed.config.foreign_values import our_value, plain, reason
from megatron_embed.config.objective import (
    CONTRASTIVE,
    EMBEDDING_LOSSES,
    LABELLED_PAIRS,
    RERANK_LOSSES,
    WITH_HARD_NEGATIVES,
)
from megatron_embed.init.draft import Draft
from megatron_embed.init.translate_steps import accumulation, data_parallel

_WHOLE_BATCH = ("online_contrastive", "cosent", "angle")
ALL_NEGATIVES_NOTE = "at most; all negatives of a row count there, and a row with fewer gives those it has"
_ALL_NEGATIVES = 8
"""Negatives per row in place of all that a row has, where the rows are not at hand."""


def translate_loss(draft: Draft) -> None:
    """Put the section `objective`, that of the reranker's head and the number of negatives into the draft."""
    loss, comment = _loss_of(draft)
    draft.set("objective.loss", loss, comment)
    _translate_temperature(draft, loss)
    margin = draft.number("margin", "objective.margin")
    if margin is not None and loss in ("contrastive", "online_contrastive", "triplet"):
        draft.set("objective.margin", margin[0], margin[1])
    elif margin is not None and loss == "margin_ranking":
        draft.set("reranker.margin", margin[0], margin[1])
    if draft.is_reranker:
        _translate_head(draft)
    elif loss in CONTRASTIVE:
        _translate_batch_negatives(draft)
        _translate_masks(draft)
    elif loss in _WHOLE_BATCH and (accumulation(draft) > 1 or data_parallel(draft)[0] > 1):
        draft.remark(f"objective.loss: {loss} compares the pairs of the whole global batch here, and those of one "
                     f"device's micro-batch there")
    _translate_num_negatives(draft, loss)


def _loss_of(draft: Draft) -> tuple[str, str]:
    """(objective.loss, comment)."""
    given = draft.settings.take("loss_type")
    distilled = draft.flag("knowledge_distillation")
    kind = draft.settings.take("kd_loss_type")
    if distilled is not None and distilled[0] and draft.value("embedding.head") == "joint":
        draft.remark(f"{distilled[1]}: joint heads learn from their own sum here, and not from a teacher")
        return "info_nce", distilled[1]
    if distilled is not None and distilled[0]:
        draft.set("objective.teacher_temperature" if not draft.is_reranker else "reranker.temperature", 1.0,
                  "a teacher's scores are not divided there")
        draft.remark("knowledge distillation is the whole loss here; FlagEmbedding adds the contrastive loss to it"
                     f"{f' ({kind.written})' if kind else ''}")
        return "kl_distillation", distilled[1]
    losses = RERANK_LOSSES if draft.is_reranker else EMBEDDING_LOSSES
    default = _default_loss(draft)
    if given is None:
        return default
    value = given.value[0] if isinstance(given.value, list) and given.value else given.value
    ours = our_value("objective.loss", value)
    if ours in losses:
        _remark_on_variants(draft, plain(value))
        return str(ours), given.written
    if plain(value) in ("crossentropy", "ce", "softmax"):
        if draft.is_reranker and draft.settings.peek("train_group_size") is None:
            return "pointwise", f"{given.written}, with one label: binary cross entropy of a document"
        return default[0], given.written
    why = reason("objective.loss", value) or "not a loss here; docs/objectives.md lists them"
    draft.remark(f"{given.written}: {why}; objective.loss is {default[0]} instead")
    return default[0], f"in place of {given.written}"


def _default_loss(draft: Draft) -> tuple[str, str]:
    """The loss of a run that names none."""
    if not draft.is_reranker:
        return "info_nce", "not given: the loss of embedding models"
    if draft.trainer in ("FlagEmbedding", "Tevatron"):
        return "listwise", f"{draft.trainer}'s: cross entropy over a query's documents"
    return "pointwise", "not given: the loss of rerankers"


def _remark_on_variants(draft: Draft, name: str) -> None:
    """Remark on what a loss of Sentence Transformers has besides ours of its kind."""
    if "symmetric" in name:
        draft.set("objective.directions", ["query_to_document", "document_to_query"], "symmetric")
        draft.set("objective.partition", "per_direction", "symmetric: the mean of both directions")
    if "gist" in name:
        guide = draft.given("guide")
        if guide is not None and isinstance(guide[0], str):
            draft.set("objective.guide_model", guide[0], guide[1])
        else:
            draft.remark("GISTEmbedLoss: name the guide's directory in objective.guide_model; without it mask_margin "
                         "excludes likely positives by the model's own similarity")
        draft.set("objective.mask_margin", 0.0, "GISTEmbedLoss: no candidate more similar than the positive")
    if name.startswith("cached") and draft.settings.peek("mini_batch_size") is None:
        draft.remark("the gradient cache is always on: lower training.micro_batch_size to the size of its chunks")
    if name in ("listmle", "plistmle"):
        draft.remark(f"{name}: listwise in its place, the softmax cross entropy of ListNet")


def _translate_temperature(draft: Draft, loss: str) -> None:
    scale, given = draft.given("scale"), draft.settings.peek("temperature")
    temperature = draft.number("temperature", "objective.temperature")
    distilled = draft.number("distil_temperature", "objective.teacher_temperature")
    key = "objective.temperature" if not draft.is_reranker else "reranker.temperature"
    if draft.is_reranker:
        listwise = draft.number("listwise_reranker_temperature", key)
        if listwise is not None and loss in ("listwise", "kl_distillation"):
            draft.set(key, listwise[0], listwise[1])
        return
    if loss not in ("info_nce", "sigmoid", "cosent", "angle", "kl_distillation"):
        return
    if temperature is not None and (given is not None or scale is None):
        draft.set(key, temperature[0], temperature[1])
    elif scale is not None and isinstance(scale[0], int | float) and scale[0] > 0:
        draft.set(key, 1 / scale[0], f"1 / scale {scale[0]:g}: {scale[1]}")
    else:
        draft.remark("no temperature is given: objective.temperature is 0.02 unless you set it")
    if distilled is not None and loss == "kl_distillation":
        draft.set("objective.teacher_temperature", distilled[0], distilled[1])


def _translate_head(draft: Draft) -> None:
    """The head, words and activation of a reranker."""
    task, labels = draft.settings.peek("task_type"), draft.settings.take("num_labels")
    program = draft.settings.launch.program
    if task is not None and "generative" in plain(task):
        draft.set("reranker.head", "yes_no", "a generative reranker: logit of yes minus logit of no")
    elif task is not None and draft.trainer == "ms-swift":
        draft.set("reranker.head", "score", "a classification reranker: a linear layer of one output")
    elif labels is not None:
        if labels.value == 1:
            draft.set("reranker.head", "score", labels.written)
        else:
            draft.remark(f"{labels.written}: not supported; a reranker has one score")
    elif draft.trainer == "Tevatron":
        draft.set("reranker.head", "score", "Tevatron's: a linear layer of one output")
    elif draft.trainer == "FlagEmbedding" and "decoder_only" in program:
        draft.set("reranker.head", "yes_no", "FlagEmbedding scores by the logit of Yes, not by its difference to No")
        draft.set("reranker.true_token", "Yes", "FlagEmbedding's")
        draft.set("reranker.false_token", "No", "FlagEmbedding has none")
    for name, key in (("generative_reranker_positive_token", "reranker.true_token"),
                      ("generative_reranker_negative_token", "reranker.false_token")):
        if (word := draft.settings.take(name)) is not None:
            draft.set(key, str(word.value), word.written)
    activation = draft.settings.take("use_sigmoid")
    if activation is not None and (ours := our_value("reranker.activation", activation.value)) is not None:
        draft.set("reranker.activation", ours, activation.written)


def _translate_batch_negatives(draft: Draft) -> None:
    """Translate which documents of the batch are negatives."""
    steps, (ranks, _) = accumulation(draft), data_parallel(draft)
    across = draft.flag("negatives_cross_device")
    if steps > 1:
        draft.set("objective.negatives", "micro_batch", f"as there: the {steps} accumulated micro-batches do not see "
                  "each other; global_batch would give every query the documents of the whole step")
    alone = draft.trainer in ("FlagEmbedding", "Sentence Transformers") and not (across is not None and across[0])
    if alone and ranks > 1:
        name = "negatives_cross_device" if draft.trainer == "FlagEmbedding" else "gather_across_devices"
        draft.remark(f"{name} is not set, so each query has the negatives of its device there; here it has those of "
                     f"all {ranks} data-parallel ranks, {ranks} times as many")
    elif across is not None and across[0]:
        draft.remark(f"{across[1]}: always on here")
    use_batch = draft.flag("infonce_use_batch")
    if use_batch is not None and not use_batch[0]:
        draft.remark(f"{use_batch[1]}: in_batch_negatives: false of the entries of data.train")


def _translate_masks(draft: Draft) -> None:
    """ms-swift's mask of likely positives, and its further columns."""
    mask, margin = draft.flag("infonce_mask_fake_negative"), draft.number("infonce_fake_neg_margin",
                                                                          "objective.mask_margin")
    if mask is not None and mask[0]:
        draft.set("objective.mask_margin", 0.1 if margin is None else margin[0],
                  f"{mask[1]}: ms-swift's margin" if margin is None else f"{mask[1]}, {margin[1]}")
    directions = ["query_to_document"]
    comments = []
    for name, direction in (("infonce_include_qq", "query_to_query"), ("infonce_include_dd", "document_to_document")):
        flag = draft.flag(name)
        if flag is not None and flag[0]:
            directions.append(direction)
            comments.append(flag[1])
    if comments:
        draft.set("objective.directions", directions, ", ".join(comments))
    if "document_to_document" in directions and mask is not None and mask[0]:
        draft.remark("the margin masks documents in document_to_document too; ms-swift masks none there")


def _translate_num_negatives(draft: Draft, loss: str) -> None:
    """data.num_negatives and the choice among a row's documents."""
    group, count = draft.given("train_group_size"), draft.whole("num_negatives", "data.num_negatives")
    positives = draft.settings.take("max_positive_samples")
    fixed = [flag for name in ("positive_passage_no_shuffle", "negative_passage_no_shuffle")
             if (flag := draft.flag(name)) is not None]
    if loss in LABELLED_PAIRS:
        return
    if count is not None:
        draft.set("data.num_negatives", count[0], count[1])
    elif group is not None and isinstance(group[0], int):
        draft.set("data.num_negatives", group[0] - 1, f"{group[1]}: a group of {group[0]} holds one positive")
        if not draft.is_reranker and group[0] > 1:
            written = ", ".join(flag[1] for flag in fixed)
            first = len(fixed) == 2 and all(flag[0] for flag in fixed)
            alone = f"; {written} alone has no key here" if fixed else ""
            draft.set("data.document_sampling", "first" if first else "random",
                      written if first else f"as there: others of a row in every epoch{alone}")
    elif not draft.is_reranker:
        needed = loss in WITH_HARD_NEGATIVES or draft.settings.peek("infonce_use_batch") is False
        draft.set("data.num_negatives", _ALL_NEGATIVES if loss in CONTRASTIVE or needed else 0,
                  ALL_NEGATIVES_NOTE)
    if draft.is_reranker and group is not None:
        draft.remark(f"a reranker takes all positives of a row; {draft.trainer or 'the other trainer'} takes one of "
                     "them each time")
    if positives is not None and draft.is_reranker:
        draft.remark(f"{positives.written}: a reranker takes all positives of a row")
    elif positives is not None and isinstance(positives.value, int):
        draft.set("data.num_positives", positives.value, positives.written)

"""Checkpoints, evaluation, logs and the division over devices of another trainer in ours."""

import re

from megatron_embed.config.foreign_values import plain
from megatron_embed.config.foreign_word import is_off
from megatron_embed.config.schema import MOST_TIMEOUT_SECONDS
from megatron_embed.init.draft import Draft

_METRIC = re.compile(r"(ndcg|mrr|map|recall|accuracy|precision)_?@?(\d+)")


def translate_outputs(draft: Draft) -> None:
    """Put the sections `checkpoint`, `evaluation` and `logging` into the draft."""
    output = draft.settings.take("output_dir")
    folder = str(output.value).rstrip("/") if output is not None else "runs/translated"
    draft.set("checkpoint.directory", f"{folder}/checkpoints", output.written if output is not None else
              "no directory is given")
    library = "CrossEncoder of Sentence Transformers" if draft.is_reranker else "Sentence Transformers"
    draft.set("checkpoint.export_at_end", f"{folder}/model", f"the trained model, for {library}")
    _translate_interval(draft, "save_steps", "save_strategy", "checkpoint.save_every_steps")
    keep = draft.whole("save_total_limit", "checkpoint.keep")
    if keep is not None and keep[0] > 0:
        draft.set("checkpoint.keep", keep[0], keep[1])
    _translate_evaluation(draft)
    steps = draft.number("logging_steps", "logging.every_steps")
    if steps is not None and steps[0] >= 1:
        draft.set("logging.every_steps", int(steps[0]), steps[1])
    elif steps is not None:
        draft.remark(f"{steps[1]}: a share of all steps; logging.every_steps counts steps")
    directory = draft.settings.take("logging_dir")
    if directory is not None:
        draft.set("logging.directory", str(directory.value), directory.written)
    _translate_reports(draft)


def _translate_interval(draft: Draft, steps_name: str, strategy_name: str, key: str) -> None:
    """Steps between saves, or between evaluations; an epoch of rows that are not here is told in words."""
    steps, strategy = draft.number(steps_name, key), draft.settings.take(strategy_name)
    kind = "steps" if strategy is None else plain(strategy.value)
    if kind == "epoch" and strategy is not None and "save" in key:
        draft.set("checkpoint.save_every_epochs", 1, strategy.written)
    elif kind == "epoch" and strategy is not None and draft.num_rows:
        trained = draft.num_rows * (1 - float(draft.value("data.validation_fraction", 0)))
        batch = int(draft.value("training.global_batch_size"))
        draft.set(key, max(round(trained / batch), 1), f"{strategy.written}: an epoch is {trained:,.0f} rows / {batch}")
    elif kind == "epoch" and strategy is not None:
        draft.remark(f"{strategy.written}: {key} counts steps; an epoch has the number of rows / "
                     f"{draft.value('training.global_batch_size', 'training.global_batch_size')} steps")
    elif kind in ("no", "false") and strategy is not None:
        draft.remark(f"{strategy.written}: the last step is always " + (
            "saved" if "save" in key else "evaluated, if there is something to evaluate"))
    elif steps is not None and steps[0] >= 1:
        draft.set(key, int(steps[0]), steps[1])
    elif steps is not None and steps[0] > 0:
        total = draft.value("training.train_steps")
        if total:
            draft.set(key, max(int(steps[0] * total), 1), f"{steps[1]}: of {total} steps")
        else:
            draft.remark(f"{steps[1]}: a share of all steps; {key} counts steps")


def _translate_evaluation(draft: Draft) -> None:
    validates = "data.validation" in draft.values or "data.validation_fraction" in draft.values
    _translate_interval(draft, "eval_steps", "eval_strategy", "evaluation.every_steps")
    interval = draft.values.pop("evaluation.every_steps", None) if not validates else None
    if interval is not None:
        draft.remark(f"{interval[1]}: there is nothing to evaluate; set data.validation_fraction or "
                     "evaluation.retrieval, then evaluation.every_steps")
    at_start = draft.flag("eval_on_start")
    if at_start is not None and validates:
        draft.set("evaluation.at_start", at_start[0], at_start[1])
    best, metric = draft.flag("load_best_model_at_end"), draft.settings.take("metric_for_best_model")
    patience = draft.whole("early_stopping_patience", "evaluation.patience")
    if not validates:
        for given in (best, patience):
            if given is not None and given[0]:
                draft.remark(f"{given[1]}: there is nothing to evaluate; set data.validation_fraction or "
                             "evaluation.retrieval first")
        return
    name = _metric(str(metric.value).lower()) if metric is not None else "loss"
    if name is None and metric is not None:
        draft.remark(f"{metric.written}: evaluation.best_metric is one of those that an evaluation logs; loss here")
    if best is not None and best[0]:
        draft.set("checkpoint.export", "best", best[1])
    if (best is not None and best[0]) or patience is not None:
        draft.set("evaluation.best_metric", "loss", "of the held-out rows" if metric is None else metric.written)
        if name not in (None, "loss"):
            draft.remark(f"evaluation.best_metric: {name} needs a set in evaluation.retrieval or evaluation.sts")
    if patience is not None:
        draft.set("evaluation.patience", patience[0], patience[1])


def _metric(name: str) -> str | None:
    """Our name of a metric such as eval_cosine_ndcg@10; None if there is none."""
    if "loss" in name:
        return "loss"
    if match := _METRIC.search(name):
        return f"{match[1]}@{match[2]}"
    return next((word for word in ("spearman", "pearson") if word in name), None)


def _translate_reports(draft: Draft) -> None:
    reports = draft.settings.take("report_to")
    if reports is None:
        return
    names = {plain(name) for name in (reports.value if isinstance(reports.value, list) else [reports.value])}
    flagged = "wandb" in reports.written.partition(" ")[0] and names & {"true"}
    if "wandb" in names or "all" in names or flagged:
        draft.set("logging.wandb", True, reports.written)
    if names & {"none", "wandb"} and not names & {"tensorboard", "all"}:
        draft.set("logging.tensorboard", False, reports.written)
    if other := names - {"none", "wandb", "all", "tensorboard", "true", "false"}:
        draft.remark(f"{reports.written}: {', '.join(sorted(other))} is not supported; TensorBoard and Weights & "
                     "Biases are")


def translate_devices(draft: Draft) -> None:
    """Put the sections `parallel` and `optimizer` into the draft."""
    for name, key in (("tensor_parallel_size", "parallel.tensor_model_parallel_size"),
                      ("pipeline_parallel_size", "parallel.pipeline_model_parallel_size"),
                      ("sequence_parallel_size", "parallel.context_parallel_size"),
                      ("expert_parallel_size", "parallel.expert_model_parallel_size"),
                      ("virtual_pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size")):
        size = draft.whole(name, key)
        if size is not None and size[0] > 1:
            draft.set(key, size[0], size[1])
    _translate_timeout(draft)
    for name, key in (("use_distributed_optimizer", "optimizer.distributed"), ("async_save", "checkpoint.async_save"),
                      ("use_precision_aware_optimizer", "optimizer.precision_aware"),
                      ("sequence_parallel", "parallel.sequence_parallel"),
                      ("overlap_grad_reduce", "optimizer.overlap_grad_reduce"),
                      ("overlap_param_gather", "optimizer.overlap_param_gather")):
        flag = draft.flag(name)
        if flag is not None:
            draft.set(key, flag[0], flag[1])
    draft.copy("exit_duration_in_mins", "training.exit_duration_minutes")
    _translate_sharding(draft)
    launch = draft.settings.launch
    if launch.devices is not None and launch.devices > 1:
        draft.remark(f"on {launch.devices} devices: torchrun --nproc-per-node N -m megatron_embed train FILE (N of one "
                     "node)")


def _translate_timeout(draft: Draft) -> None:
    """The wait of a collective; one beyond our limit, or none at all, is told in words."""
    given = draft.number("ddp_timeout", "parallel.timeout_seconds")
    if given is None:
        return
    timeout, written = given
    seconds = timeout * (60 if "minutes" in written else 1)
    if seconds > MOST_TIMEOUT_SECONDS:
        draft.set("parallel.timeout_seconds", MOST_TIMEOUT_SECONDS, f"{written}: the longest here is eleven days")
        draft.remark(f"{written}: longer than parallel.timeout_seconds can be, which is {MOST_TIMEOUT_SECONDS}, eleven "
                     "days, in its place")
    elif seconds >= 1:
        draft.set("parallel.timeout_seconds", int(seconds), written)
    else:
        draft.remark(f"{written}: parallel.timeout_seconds must be above 0; it keeps its default")


def _translate_sharding(draft: Draft) -> None:
    """DeepSpeed's stages and FSDP: optimizer.distributed, and what to do for the rest."""
    zero, stage = draft.settings.take("deepspeed"), draft.settings.take("zero_stage")
    fsdp, offload = draft.settings.take("fsdp"), draft.settings.take("offload_optimizer")
    zero = None if zero is not None and is_off("deepspeed", zero.value) else zero
    given = stage or zero
    level = None
    if given is not None:
        match = re.search(r"(?:zero|stage|z)[_-]?(\d)", str(given.value).lower())
        level = int(match[1]) if match else given.value if isinstance(given.value, int) else None
    if given is not None and level is None:
        draft.remark(f"{given.written}: its stage is not in the name; optimizer.distributed, on by default, is ZeRO-1")
    elif given is not None and level == 0:
        draft.set("optimizer.distributed", False, f"{given.written}: ZeRO-0 shards nothing")
    elif given is not None:
        draft.set("optimizer.distributed", True, f"{given.written}: optimizer state is sharded, as ZeRO-1 does")
        if level is not None and level >= 2:
            shared = "gradients" if level == 2 else "gradients and parameters"
            draft.remark(f"{given.written}: ZeRO-{level} shards {shared} too; if memory is short, "
                         "parallel.tensor_model_parallel_size divides the model (`megatron-embed plan` computes it)")
    elif fsdp is not None and not is_off("fsdp", fsdp.value):
        draft.set("optimizer.distributed", True, f"{fsdp.written}: optimizer state is sharded")
        draft.remark(f"{fsdp.written}: parameters are not sharded; parallel.tensor_model_parallel_size divides them")
    offloads = (offload is not None and plain(offload.value) in ("cpu", "true")) or (
        zero is not None and "offload" in str(zero.value))
    if offloads:
        given = offload or given
        draft.remark(f"{given.written if given else ''}: optimizer.cpu_offload: true keeps the "
                     "optimizer's state in host memory; it needs a GPU")

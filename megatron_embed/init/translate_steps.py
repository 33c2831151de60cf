"""Batch sizes, number of steps, learning rate and optimizer of another trainer in ours."""

import math

from megatron_embed.config.foreign_values import our_value, plain, reason
from megatron_embed.init.draft import Draft

_SWIFT_LEAST = 16
"""Queries of a step that ms-swift accumulates if it is not told how many."""


def translate_steps(draft: Draft) -> None:
    """Put the section `training` into the draft, except for recomputation."""
    _translate_batch(draft)
    _translate_length(draft)
    _translate_learning_rate(draft)
    for name, key in (("weight_decay", "training.weight_decay"), ("max_grad_norm", "training.clip_grad"),
                      ("adam_beta1", "training.adam_beta1"), ("adam_beta2", "training.adam_beta2"),
                      ("adam_epsilon", "training.adam_eps"), ("hidden_dropout", "training.hidden_dropout"),
                      ("attention_dropout", "training.attention_dropout"),
                      ("router_aux_loss_coef", "training.moe_aux_loss_coefficient")):
        draft.copy(name, key)
    betas = draft.settings.take("betas")
    if betas is not None and isinstance(betas.value, list) and len(betas.value) == 2:
        draft.set("training.adam_beta1", float(betas.value[0]), betas.written)
        draft.set("training.adam_beta2", float(betas.value[1]), betas.written)
    _translate_optimizer(draft)
    seed = draft.whole("seed", "training.seed")
    if seed is not None:
        draft.set("training.seed", seed[0], f"{seed[1]}; the order of the rows is another one all the same")
    deterministic = draft.flag("full_determinism")
    if deterministic is not None and deterministic[0]:
        draft.set("training.deterministic", True, deterministic[1])


def data_parallel(draft: Draft) -> tuple[int, str]:
    """(data-parallel ranks, words for them) of the other trainer's run."""
    devices = draft.settings.launch.devices
    shared = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "sequence_parallel_size"):
        value = draft.settings.peek(name)
        shared *= value if isinstance(value, int) and value > 0 else 1
    if devices is None:
        return 1, "1 device"
    ranks = max(devices // shared, 1)
    return ranks, f"{ranks} device{'s' if ranks > 1 else ''}{f' of {shared} ranks' if shared > 1 else ''}"


def accumulation(draft: Draft) -> int:
    """Micro-batches of a device in an optimizer step of the other trainer."""
    given, whole = draft.settings.peek("gradient_accumulation_steps"), draft.settings.peek("train_batch_size")
    per_device = draft.settings.peek("per_device_train_batch_size")
    counted = isinstance(given, int | float) and not isinstance(given, bool) and given >= 1
    of_known_devices = draft.settings.launch.devices is not None or not counted
    if isinstance(whole, int) and isinstance(per_device, int) and of_known_devices:
        return max(whole // (per_device * data_parallel(draft)[0]), 1)
    if isinstance(given, int | float) and counted:
        return int(given)
    if draft.trainer == "ms-swift":
        size = per_device if isinstance(per_device, int) else 1
        return math.ceil(_SWIFT_LEAST / (size * data_parallel(draft)[0]))
    return 1


def _translate_batch(draft: Draft) -> None:
    """micro_batch_size and global_batch_size: per device x devices x accumulation steps."""
    per_device = draft.whole("per_device_train_batch_size", "training.micro_batch_size")
    whole = draft.whole("train_batch_size", "training.global_batch_size")
    written = draft.settings.take("gradient_accumulation_steps")
    ranks, devices = data_parallel(draft)
    steps = accumulation(draft)
    given = draft.settings.peek("per_device_train_batch_size")
    if whole is not None and (isinstance(given, int) or "micro_batch_size" in draft.settings.given):
        draft.set("training.global_batch_size", whole[0], whole[1])
    elif whole is not None and draft.trainer == "DeepSpeed":
        draft.set("training.global_batch_size", whole[0], whole[1])
        return
    elif whole is not None:
        per_device = whole
    if per_device is None:
        draft.remark("no batch size is given: training.global_batch_size counts the queries of one optimizer step over "
                     "all devices; 32 is a cautious beginning")
        draft.set("training.global_batch_size", 32, "no batch size is given")
        return
    size, cache = _chunk(draft, per_device[0])
    draft.set("training.micro_batch_size", size, per_device[1] if size == per_device[0] else
              f"{per_device[1]}, computed in chunks of at most {size}: the gradient cache ({cache})")
    if "training.global_batch_size" in draft.values:
        return
    how = "" if written is None else f" ({written.written})"
    if written is None and draft.trainer == "ms-swift":
        how = f" (not given: ms-swift accumulates to {_SWIFT_LEAST} queries or more)"
    draft.set("training.global_batch_size", per_device[0] * ranks * steps,
              f"{per_device[0]} per device x {devices} x {steps} accumulation step{'s' if steps > 1 else ''}{how}")
    if draft.settings.launch.devices is None:
        draft.remark("the number of devices is not given: with N devices, training.global_batch_size is N times as "
                     "much")


def _chunk(draft: Draft, per_device: int) -> tuple[int, str]:
    """Queries that are computed at once, the batch per device or the chunk of a gradient cache, and who says so."""
    flag = draft.flag("grad_cache")
    queries, passages = draft.settings.take("gc_q_chunk_size"), draft.settings.take("gc_p_chunk_size")
    cached = draft.settings.take("mini_batch_size")
    limit = per_device
    if flag is not None and flag[0]:
        group = draft.given("train_group_size")
        group_size = int(group[0]) if group is not None else 8
        most = passages.value if passages is not None and isinstance(passages.value, int) else 32
        limit = min(queries.value if queries is not None and isinstance(queries.value, int) else 4,
                    max(most // group_size, 1))
    elif cached is not None and isinstance(cached.value, int):
        limit = cached.value
    written = [draft.settings.given[name].written for name in _GRADIENT_CACHE if name in draft.settings.given]
    return next(size for size in range(min(limit, per_device), 0, -1) if per_device % size == 0), ", ".join(written)


_GRADIENT_CACHE = ("grad_cache", "gc_q_chunk_size", "gc_p_chunk_size", "mini_batch_size")
"""Names of the settings of a gradient cache."""


def _translate_length(draft: Draft) -> None:
    """train_steps or epochs."""
    steps = draft.settings.take("max_steps")
    if steps is not None and isinstance(steps.value, int) and steps.value > 0:
        draft.set("training.train_steps", steps.value, steps.written)
        draft.settings.take("num_train_epochs")
        return
    epochs = draft.number("num_train_epochs", "training.epochs")
    if epochs is None:
        draft.remark("neither epochs nor steps are given: 1,000 steps unless you set training.epochs")
    else:
        value = int(epochs[0]) if epochs[0] == int(epochs[0]) else epochs[0]
        draft.set("training.epochs", value, epochs[1])


def _translate_learning_rate(draft: Draft) -> None:
    rate = draft.number("learning_rate", "training.learning_rate")
    if rate is None and draft.trainer == "ms-swift":
        default = "full" if draft.settings.launch.program.startswith("megatron") else "lora"
        full = plain(draft.settings.peek("train_type") or default) == "full"
        rate = (1e-5, "not given: the default of ms-swift for all parameters") if full else (
            1e-4, "not given: the default of ms-swift for LoRA")
    if rate is not None:
        draft.set("training.learning_rate", rate[0], rate[1])
    _translate_schedule(draft)
    least = draft.number("min_lr", "training.min_learning_rate")
    if least is not None:
        draft.set("training.min_learning_rate", least[0], least[1])
    steps = draft.number("warmup_steps", "training.warmup_steps")
    ratio = draft.number("warmup_ratio", "training.warmup_ratio")
    if steps is not None and 0 < steps[0] < 1:
        draft.set("training.warmup_ratio", steps[0], f"{steps[1]}: below 1 it is a share of all steps")
    elif steps is not None and steps[0] > 0:
        draft.set("training.warmup_steps", int(steps[0]), f"{steps[1]}{'; goes before warmup_ratio' if ratio else ''}")
    elif ratio is not None and ratio[0] > 0:
        draft.set("training.warmup_ratio", ratio[0], ratio[1])


def _translate_schedule(draft: Draft) -> None:
    """lr_decay_style and what belongs to it."""
    given, kwargs = draft.given("lr_scheduler_type"), draft.settings.take("lr_scheduler_kwargs")
    options = kwargs.value if kwargs is not None and isinstance(kwargs.value, dict) else {}
    if given is None:
        return
    ours = our_value("training.lr_decay_style", given[0])
    if ours is None:
        draft.remark(f"{given[1]}: {reason('training.lr_decay_style', given[0]) or 'not a schedule here'}")
        draft.set("training.lr_decay_style", "cosine", "in its place")
        return
    name = plain(given[0])
    draft.set("training.lr_decay_style", ours, given[1])
    rate = draft.value("training.learning_rate")
    if name == "polynomial":
        draft.set("training.min_learning_rate", float(options.get("lr_end", 1e-7)),
                  "where Transformers' polynomial ends")
    if name == "polynomial" and options.get("power", 1) != 1:
        draft.remark(f"{kwargs.written if kwargs else ''}: power is not supported; the decay is linear")
    if "min_lr" in options:
        draft.set("training.min_learning_rate", float(options["min_lr"]), kwargs.written if kwargs else "")
    elif "min_lr_rate" in options and rate is not None:
        draft.set("training.min_learning_rate", float(options["min_lr_rate"]) * rate,
                  f"{options['min_lr_rate']} x {rate}: {kwargs.written if kwargs else ''}")
    if ours == "wsd" and "num_decay_steps" in options:
        total = draft.value("training.train_steps")
        if total:
            draft.set("training.wsd_decay_ratio", min(float(options["num_decay_steps"]) / total, 1.0),
                      f"{options['num_decay_steps']} of {total} steps")
        else:
            draft.remark(f"num_decay_steps {options['num_decay_steps']}: training.wsd_decay_ratio is its share of all "
                         "steps; 0.1 unless you set it")


def _translate_optimizer(draft: Draft) -> None:
    optimizer = draft.settings.take("optim")
    if optimizer is None:
        return
    if "adamw" in plain(optimizer.value) and "8bit" in plain(optimizer.value):
        draft.set("optimizer.name", "adamw_8bit", optimizer.written)
    elif plain(optimizer.value) == "muon":
        draft.remark(f"{optimizer.written}: set optimizer.name: muon and optimizer.distributed: false, without "
                     "adapters; the learning rate is on AdamW's scale")
    elif "adamw" in plain(optimizer.value) or plain(optimizer.value) == "adam":
        decay = "" if "adamw" in plain(optimizer.value) else "; its weight decay is decoupled"
        draft.remark(f"{optimizer.written}: not needed, the optimizer is AdamW{decay}")
    else:
        draft.remark(f"{optimizer.written}: not supported; AdamW in its place, which may need another learning rate")

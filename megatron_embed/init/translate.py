"""Another trainer's settings as a configuration of a run, each line with the reason for its value."""

from megatron_embed.config.foreign_values import our_value, plain, reason
from megatron_embed.config.foreign_word import is_off
from megatron_embed.init.draft import Draft, unused_remarks
from megatron_embed.init.foreign_settings import ForeignSettings, read_foreign
from megatron_embed.init.translate_data import translate_data
from megatron_embed.init.translate_loss import translate_loss
from megatron_embed.init.translate_outputs import translate_devices, translate_outputs
from megatron_embed.init.translate_steps import translate_steps


def translated(text: str) -> Draft:
    """The translation of a file of settings or of a command line.

    Args:
        text: path of a YAML, JSON or shell file, or a command line.
    Raises:
        ConfigError: nothing to translate.
    """
    settings = read_foreign(text)
    task, comment = _task_of(settings)
    draft = Draft(settings, task)
    draft.set("task", task, comment)
    _translate_model(draft)
    translate_steps(draft)
    translate_loss(draft)
    translate_data(draft)
    _translate_lora(draft)
    translate_outputs(draft)
    translate_devices(draft)
    unused_remarks(draft)
    return draft


def _task_of(settings: ForeignSettings) -> tuple[str, str]:
    """(task, comment) by what is written, the program's name or the loss."""
    given = settings.take("task_type")
    if given is not None and (task := our_value("task", given.value)) is not None:
        return task, given.written
    program = settings.launch.program.lower()
    if any(word in program for word in ("rerank", "cross_encoder", "cross-encoder", "crossencoder")):
        return "reranker", f"a program for rerankers: {settings.launch.program}"
    loss = settings.peek("loss_type")
    if loss is not None and our_value("objective.loss", loss) in ("pointwise", "listwise", "ranknet", "lambda_loss",
                                                                   "margin_ranking"):
        return "reranker", f"a loss of rerankers: {settings.given['loss_type'].written}"
    if given is not None:
        return "embedding", f"{given.written}: only embedding and reranker are trained here"
    return "embedding", ""


def _translate_model(draft: Draft) -> None:
    settings = draft.settings
    model, adapter = settings.take("model_name_or_path"), settings.take("lora_name_or_path")
    if adapter is not None and adapter.value:
        path = adapter.value[0] if isinstance(adapter.value, list) else adapter.value
        draft.set("model.path", str(path), f"{adapter.written}: the PEFT directory, which names its base model")
    elif model is not None:
        draft.set("model.path", str(model.value), model.written)
    else:
        draft.set("model.path", "MODEL", "the command names no model: a directory or a hub name")
    _translate_dtype(draft)
    if not draft.is_reranker:
        _translate_embedding(draft)
    if (attention := settings.take("attn_implementation")) is not None:
        draft.remark(f"{attention.written}: model.attention is auto, which takes flash attention in half precision on "
                     "a GPU")
    if (checkpointing := settings.take("gradient_checkpointing")) is not None:
        recompute = our_value("training.recompute", checkpointing.value) or "none"
        draft.set("training.recompute", recompute, f"{checkpointing.written}; `plan` says whether it is needed")


def _translate_dtype(draft: Draft) -> None:
    given, bf16, fp16 = draft.settings.take("torch_dtype"), draft.flag("bf16"), draft.flag("fp16")
    if bf16 is not None and bf16[0]:
        draft.set("model.dtype", "bfloat16", f"{bf16[1]}; the optimizer keeps float32 parameters")
    elif fp16 is not None and fp16[0]:
        draft.set("model.dtype", "bfloat16", f"{fp16[1]}: float16 is not supported; bfloat16 needs no loss scaling")
    elif given is not None and (why := reason("model.dtype", given.value)) is not None:
        draft.set("model.dtype", "bfloat16", f"{given.written}: {why}")
    elif given is not None and (dtype := our_value("model.dtype", given.value)) is not None:
        draft.set("model.dtype", dtype, f"{given.written}; the optimizer keeps float32 parameters")
    elif given is not None:
        draft.remark(f"{given.written}: not a dtype here; model.dtype is auto unless you set it")


def _translate_embedding(draft: Draft) -> None:
    pooling = draft.given("pooling")
    if pooling is not None:
        ours = our_value("embedding.pooling", pooling[0])
        if ours is None:
            draft.remark(f"{pooling[1]}: not a pooling here; embedding.pooling is lasttoken, mean, cls or weightedmean")
        else:
            draft.set("embedding.pooling", ours, pooling[1])
    normalize = draft.flag("normalize")
    if normalize is not None:
        draft.set("embedding.normalize", normalize[0], normalize[1])
    dims = draft.settings.take("matryoshka_dims")
    if dims is not None and isinstance(dims.value, list):
        draft.set("embedding.matryoshka_dims", sorted(map(int, dims.value), reverse=True), dims.written)
    if (bidirectional := draft.flag("bidirectional")) is not None:
        draft.set("model.bidirectional", bidirectional[0], bidirectional[1])
    _translate_joint_heads(draft)


def _translate_joint_heads(draft: Draft) -> None:
    """FlagEmbedding's BGE-M3, whose trainer gives the sparse and multi-vector heads one device's negatives."""
    unified, distills = draft.flag("unified_finetuning"), draft.flag("use_self_distill")
    dim = draft.whole("colbert_dim", "embedding.embedding_dim")
    if unified is None or not unified[0]:
        return
    draft.set("embedding.head", "joint", f"{unified[1]}: negatives of each score are those of the global batch here")
    if distills is None or not distills[0]:
        comment = f"not given: the default of {draft.trainer}" if distills is None else distills[1]
        draft.set("objective.self_distillation", False, comment)
    if dim is not None and dim[0] > 0:
        draft.set("embedding.embedding_dim", *dim)


def _translate_lora(draft: Draft) -> None:
    if not _trains_adapters(draft):
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", *_QUANTIZATION):
            draft.settings.take(name)
        return
    _translate_quantization(draft)
    draft.copy("lora_rank", "lora.rank")
    draft.copy("lora_alpha", "lora.alpha")
    draft.copy("lora_dropout", "lora.dropout")
    for key in ("lora.rank", "lora.alpha"):
        if draft.value(key) is None:
            draft.set(key, 8, "not given: the default of PEFT")
    targets = draft.given("target_modules")
    if targets is not None:
        names = targets[0].replace(",", " ").split() if isinstance(targets[0], str) else list(targets[0])
        names = [name for part in names for name in str(part).split(",") if name]
        every = any(name in ("all-linear", "all_linear", "all", "ALL") for name in names)
        if not every:
            draft.set("lora.target_modules", names, targets[1])
    if (rslora := draft.flag("use_rslora")) is not None and rslora[0]:
        draft.set("lora.use_rslora", True, rslora[1])


_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "quant_bits", "bnb_4bit_quant_type", "quant_method",
                 "bnb_4bit_use_double_quant")
"""Names of bitsandbytes' settings."""


def _translate_quantization(draft: Draft) -> None:
    """The quantization of the weights under adapters; other methods than bitsandbytes' are told in words."""
    method, kind = draft.settings.take("quant_method"), draft.settings.take("bnb_4bit_quant_type")
    bits, double = draft.settings.take("quant_bits"), draft.flag("bnb_4bit_use_double_quant")
    four, eight = draft.flag("load_in_4bit"), draft.flag("load_in_8bit")
    if method is not None and not (
            is_off("quant_method", method.value) or plain(method.value) in ("bnb", "bitsandbytes")):
        draft.remark(f"{method.written}: not supported; model.quantization: nf4 or int8 in its place")
        return
    asked = "nf4" if four is not None and four[0] else "int8" if eight is not None and eight[0] else None
    written = four[1] if asked == "nf4" and four else eight[1] if eight else ""
    if bits is not None:
        asked, written = {"4": "nf4", "8": "int8"}.get(str(bits.value)), bits.written
    if asked is None:
        return
    draft.set("model.quantization", asked, written)
    if asked == "nf4" and double is not None and not double[0]:
        draft.set("model.double_quantization", False, double[1])
    if asked == "nf4" and kind is not None and plain(kind.value) != "nf4":
        draft.remark(f"{kind.written}: not supported; nf4 in its place")


def _trains_adapters(draft: Draft) -> bool:
    """Whether the other trainer trains adapters; remarks on other kinds than LoRA."""
    given = draft.settings.take("train_type")
    if given is None:
        if draft.settings.peek("lora_rank") is not None or draft.settings.peek("lora_alpha") is not None:
            return True
        if draft.trainer == "FlagEmbedding" and "decoder_only" in draft.settings.launch.program:
            draft.remark("adapters of LoRA: FlagEmbedding's default for decoders; lora.rank: 0 trains every parameter")
            return True
        if draft.trainer == "ms-swift" and not draft.settings.launch.program.startswith("megatron"):
            draft.remark("adapters of LoRA: ms-swift's default; lora.rank: 0 trains every parameter")
            return True
        return False
    kind = plain(given.value)
    if is_off("train_type", given.value) or kind in ("full", "0", "freeze"):
        return False
    if kind not in ("lora", "true", "1", "peft"):
        draft.remark(f"{given.written}: not supported; plain LoRA in its place")
    return True

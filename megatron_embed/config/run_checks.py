"""Checks between sections of a run's settings."""

from typing import TYPE_CHECKING

from megatron_embed.config.objective import CONTRASTIVE, MULTI_VECTOR_LOSSES, OF_JOINT, REGULARIZERS, ObjectiveConfig
from megatron_embed.config.require import require
from megatron_embed.names import JOINT_POOLINGS, PRECISIONS

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig


def check_first_pass(config: "RunConfig") -> None:
    """Refuse larger micro-batches of the first pass where a step has one pass only, or has dropout."""
    key, merged = "training.first_pass_micro_batches", config.training.first_pass_micro_batches
    if merged in ("auto", 1):
        return
    require(config.workload.couples_batch, key, merged, "has no effect where a loss stays within its micro-batch, "
            "which takes one pass; remove it")
    require(not config.has_dropout, key, merged, "with dropout (training.hidden_dropout, training.attention_dropout or "
            "lora.dropout) both passes need the same micro-batches, to drop the same; set it to 1, or dropout to 0")


def check_transformer_engine(config: "RunConfig") -> None:
    """Refuse what Transformer Engine's FP8 and its overlap of communication cannot do."""
    model, fp8, overlap = config.model, config.model.fp8, config.parallel.tp_comm_overlap
    require(fp8 == "none" or model.backend != "torch", "model.fp8", fp8, "it is Transformer Engine's; set "
            "model.backend to auto or te, or this to none")
    require(fp8 == "none" or model.dtype != "float32", "model.fp8", fp8, "FP8 layers take and give bfloat16; set "
            "model.dtype to bfloat16, or this to none")
    require(fp8 != "first_pass" or config.workload.couples_batch, "model.fp8", fp8, "a loss within micro-batches "
            "takes one pass, which has gradients; set this to both or none")
    require(fp8 != "none" or model.fp8_recipe == "blockwise", "model.fp8_recipe", model.fp8_recipe, "has no effect "
            "without model.fp8; set that, or remove this")
    merged = config.training.first_pass_micro_batches
    require(merged in ("auto", 1) or not model.scales_by_micro_batch, "training.first_pass_micro_batches", merged,
            "model.fp8_recipe = tensorwise scales by all tokens of a micro-batch, so both passes need the same ones; "
            "set it to 1, or fp8_recipe to blockwise")
    if overlap:
        _check_overlap(config)


def _check_overlap(config: "RunConfig") -> None:
    """Refuse parallel.tp_comm_overlap where there is nothing to overlap, or no buffer fits."""
    key, model, sizes = "parallel.tp_comm_overlap", config.model, config.parallel
    require(model.backend != "torch", key, True, "it is Transformer Engine's; set model.backend to auto or te, or this "
            "to false")
    require(sizes.tensor_model_parallel_size > 1 and bool(sizes.sequence_parallel), key, True, "it overlaps the "
            "communication of sequence parallelism; set tensor_model_parallel_size > 1 and sequence_parallel: auto, or "
            "this to false")
    require(config.training.micro_batch_tokens is not None, key, True, "its buffers have one size, to which "
            "micro-batches are padded; set training.micro_batch_tokens, or this to false")
    require(model.fp8 != "both" or model.fp8_recipe != "blockwise", key, True, "its buffers hold no blockwise FP8 "
            "numbers; set model.fp8_recipe: tensorwise, model.fp8: first_pass, or this to false")


def check_kept_activations(config: "RunConfig") -> None:
    """Refuse a number of kept micro-batches where a step has one pass only, or a pipeline."""
    key, kept = "training.keep_activations", config.training.keep_activations
    if kept in ("auto", 0):
        return
    require(config.workload.couples_batch, key, kept, "has no effect where a loss stays within its micro-batch, which "
            "takes one pass; remove it")
    stages = config.parallel.pipeline_model_parallel_size
    require(stages == 1, key, kept, f"a pipeline (parallel.pipeline_model_parallel_size = {stages}) computes every "
            "micro-batch again; set it to 0 or auto")


def why_encode_each(config: "RunConfig") -> str | None:
    """The reason why repeated texts cannot share one vector in any model; None: they can."""
    if not config.workload.couples_batch:
        return "with a loss within micro-batches each of them has its own texts"
    if config.has_dropout:
        return "dropout (training.hidden_dropout, training.attention_dropout or lora.dropout) differs between copies"
    if config.model.scales_by_micro_batch:
        return "model.fp8_recipe = tensorwise scales by all tokens of a micro-batch"
    return None


def check_repeated_texts(config: "RunConfig") -> None:
    """Refuse one encoding of repeated texts where it would change the result."""
    asked, reason = config.training.encode_repeated_texts, why_encode_each(config)
    require(asked != "once" or reason is None, "training.encode_repeated_texts", asked,
            f"is not the same here: {reason}; set it to auto or each")


def check_quantization(config: "RunConfig") -> None:
    """Refuse settings that do not go with `model.quantization`."""
    model, kind = config.model, config.model.quantization
    require(model.double_quantization or kind == "nf4", "model.double_quantization", False, "has no effect without "
            "model.quantization: nf4; set that, or remove this")
    if kind == "none":
        return
    require(model.backend != "te", "model.quantization", kind, "Transformer Engine's layers hold no quantized "
            "weights; set model.backend to auto or torch, or this to none")
    require(model.fp8 == "none", "model.quantization", kind, "the linears cannot multiply in FP8 too; set model.fp8 to "
            "none, or this to none")
    require(not config.parallel.tp_comm_overlap, "model.quantization", kind, "parallel.tp_comm_overlap is Transformer "
            "Engine's, whose layers hold no quantized weights; set that to false, or this to none")


def check_evaluated(config: "RunConfig") -> None:
    """Refuse settings of the best checkpoint of a run without evaluation or checkpoints, and unused instructions."""
    if config.data.query_prompt is not None:  # else it is the model directory's, and this is checked later
        _check_instructions(config, config.data.query_prompt)
    rule = ("there is nothing to evaluate, so no best checkpoint; name a set in evaluation.retrieval, sts or "
            "reranking, or set data.validation_fraction or data.validation")
    measured = config.evaluation.names_sets or config.data.validates
    require(measured or config.checkpoint.export == "last", "checkpoint.export", config.checkpoint.export, rule)
    require(measured or config.evaluation.patience is None, "evaluation.patience", config.evaluation.patience, rule)
    require(config.checkpoint.directory is not None or config.evaluation.patience is None, "evaluation.patience",
            config.evaluation.patience, "a run that ends early keeps its best checkpoint; set checkpoint.directory")


def _check_instructions(config: "RunConfig", query_prompt: str) -> None:
    """Refuse instructions if no prompt contains `{instruction}`."""
    prompts = [query_prompt, *(file.query_prompt or "" for file in config.data.files)]
    require(config.embedding.instruction is None or any("{instruction}" in prompt for prompt in prompts),
            "embedding.instruction", config.embedding.instruction,
            "no prompt contains {instruction}; add it to data.query_prompt, or remove this")
    for kind, sets in (("retrieval", config.evaluation.retrieval), ("sts", config.evaluation.sts)):
        for item in sets:
            require(item.instruction is None or "{instruction}" in query_prompt,
                    f"evaluation.{kind}.instruction", item.instruction,
                    "data.query_prompt does not contain {instruction}; add it there, or remove this")


def check_reranker_run(config: "RunConfig") -> None:
    """Refuse settings of embedding models that have no effect on a reranker."""
    require(config.data.token_cache is None, "data.token_cache", config.data.token_cache, "holds the ids of single "
            "texts, and a reranker reads pairs of them; remove it")
    for role, prompt in (("query", config.data.query_prompt), ("document", config.data.document_prompt)):
        require(not prompt, f"data.{role}_prompt", prompt, "a reranker's prompt is reranker.template; write it there")
    for file in config.data.files:
        given = file.query_prompt or file.document_prompt
        require(not given, "data.train.query_prompt", given, "a reranker's prompt is reranker.template, one for all "
                "files; give the file an instruction instead")
    require(config.data.num_positives == 1, "data.num_positives", config.data.num_positives,
            "a reranker takes all positives of a row; remove it")
    require(config.data.all_in_batch, "data.train.in_batch_negatives", False,
            "a reranker has no in-batch negatives; remove it")
    require(not config.embedding.matryoshka_dims, "embedding.matryoshka_dims", list(config.embedding.matryoshka_dims),
            "a reranker gives scores, which have no dimensions; remove it")
    require(config.embedding.embedding_dim is None, "embedding.embedding_dim", config.embedding.embedding_dim,
            "a reranker gives scores, which have no dimensions; remove it")
    require(not config.evaluation.retrieval, "evaluation.retrieval",
            [item.path for item in config.evaluation.retrieval],
            "a reranker searches no corpus; give evaluation.reranking files of lists")
    require(config.embedding.instruction is None, "embedding.instruction", config.embedding.instruction,
            "a reranker's instruction is reranker.instruction; write it there")
    require(not config.evaluation.sts, "evaluation.sts", [item.path for item in config.evaluation.sts],
            "a reranker gives no vectors to compare; give evaluation.reranking files of lists")
    gguf = [kind for kind in config.checkpoint.export_formats if kind.startswith("gguf")]
    require(not gguf, "checkpoint.export_formats", gguf, "a GGUF file holds an embedding model; export a reranker to "
            "onnx or openvino")
    require(not config.model.bidirectional, "model.bidirectional", config.model.bidirectional,
            "the stock classes run a reranker's decoder causally; set it to false")


_OF_VECTORS = ("skiplist_words", "query_expansion", "attend_to_expansion")
LEAST_TEMPERATURE = 0.1
"""MaxSim is a sum over a query's vectors, and a sparse dot product over tokens: divided by less, their softmax is a
step."""


def check_head(config: "RunConfig") -> None:
    """Refuse settings that do not go with `embedding.head`."""
    embedding, head = config.embedding, config.embedding.head
    if head is None:  # the model directory decides, and this is checked again then
        return
    defaults, given = vars(ObjectiveConfig()), vars(config.objective)
    for kind, keys in (("sparse", REGULARIZERS), ("joint", OF_JOINT)):
        for key in keys:
            require(head == kind or given[key] == defaults[key], f"objective.{key}", given[key], "has no effect "
                    f"without embedding.head: {kind}; set that, or remove it")
    if head != "multi_vector":
        for key in _OF_VECTORS:
            value = vars(embedding)[key]
            why = "takes every token but the first" if head == "joint" else "has one vector for a text"
            require(value is None, f"embedding.{key}", value, f"a {head} model {why}; set embedding.head: "
                    "multi_vector, or remove it")
    if head == "dense":
        return
    if config.task == "reranker":
        require(False, "embedding.head", head, "a reranker gives scores and no vectors; remove it")
    if head == "sparse":
        _check_sparse(config)
    objective, multi = config.objective, f"with embedding.head: {head}"
    if head == "joint":
        _check_joint(config)
    else:
        require(embedding.pooling is None, "embedding.pooling", embedding.pooling,
                f"{multi} nothing is pooled; remove it")
    require(not embedding.matryoshka_dims, "embedding.matryoshka_dims", list(embedding.matryoshka_dims),
            f"has no effect {multi}, whose vectors keep all their dimensions; remove it")
    require(embedding.attend_to_expansion is None or embedding.query_expansion != 0, "embedding.attend_to_expansion",
            embedding.attend_to_expansion, "no query is expanded; set embedding.query_expansion, or remove it")
    require(objective.loss in MULTI_VECTOR_LOSSES, "objective.loss", objective.loss,
            f"is not a loss {multi}; choose one of {', '.join(MULTI_VECTOR_LOSSES)}")
    require(objective.directions == ("query_to_document",), "objective.directions", list(objective.directions),
            f"a query is compared with documents alone ({multi}); remove it")
    require(not config.evaluation.sts, "evaluation.sts", [item.path for item in config.evaluation.sts],
            f"a query is compared with documents, not two texts alike ({multi}); remove it")
    formats = config.checkpoint.export_formats
    require(not formats, "checkpoint.export_formats", list(formats),
            f"none of these formats holds such a model ({multi}); remove it")


def _check_sparse(config: "RunConfig") -> None:
    """Refuse what a sparse model does not have."""
    sparse, embedding = "with embedding.head: sparse", config.embedding
    require(embedding.normalize is not True, "embedding.normalize", True, "sparse vectors keep their length, and are "
            f"compared by dot product ({sparse}); remove it")
    require(embedding.embedding_dim is None, "embedding.embedding_dim", embedding.embedding_dim, "a sparse vector has "
            f"as many numbers as the vocabulary has tokens ({sparse}); remove it")
    require(config.objective.negatives == "global_batch", "objective.negatives", config.objective.negatives,
            f"the regularizers are over the global batch ({sparse}); remove it")
    require(config.lora.rank == 0, "lora.rank", config.lora.rank, "adapters leave the vocabulary head as it is, and it "
            f"has to be trained ({sparse}); set it to 0")
    require(config.model.quantization == "none", "model.quantization", config.model.quantization, "quantized weights "
            f"are trained by adapters alone ({sparse}); set it to none")


def _check_joint(config: "RunConfig") -> None:
    """Refuse what a joint model does not have."""
    joint, embedding, objective = "with embedding.head: joint", config.embedding, config.objective
    require(embedding.pooling is None or embedding.pooling in JOINT_POOLINGS, "embedding.pooling", embedding.pooling,
            f"must be one of {', '.join(JOINT_POOLINGS)} {joint}")
    require(embedding.normalize is not False, "embedding.normalize", False, "the three scores are of unit vectors, or "
            f"they could not be added ({joint}); remove it")
    require(objective.loss == "info_nce", "objective.loss", objective.loss, f"must be info_nce {joint}")
    for key in ("mask_margin", "hardness"):
        value = vars(objective)[key]
        require(value is None, f"objective.{key}", value, f"each score would choose other negatives ({joint}); remove "
                "it")
    require(config.lora.rank == 0, "lora.rank", config.lora.rank, "a joint model's heads are not part of an adapter's "
            f"directory ({joint}); set it to 0")
    require(config.model.quantization == "none", "model.quantization", config.model.quantization, "quantized weights "
            f"are trained by adapters alone ({joint}); set it to none")


def check_dims_and_precisions(config: "RunConfig") -> None:
    """Refuse weights that do not match, and precisions that the run's vectors, or its loss, cannot have."""
    key, precision = "embedding.precision", config.embedding.precision
    require(bool(precision) and len(set(precision)) == len(precision), key, list(precision),
            f"must name at least one of {', '.join(PRECISIONS)}, and none twice")
    for name, of in (("matryoshka_weights", "matryoshka_dims"), ("precision_weights", "precision")):
        weights, entries = vars(config.objective)[name], vars(config.embedding)[of]
        require(not weights or len(weights) == len(entries), f"objective.{name}", list(weights),
                f"must have one weight per entry of embedding.{of} = {list(entries)}")
    if precision == ("float32",):
        return
    require(config.task == "embedding", key, list(precision), "a reranker gives scores and no vectors; remove it")
    require(config.embedding.head not in ("multi_vector", "sparse", "joint"), key, list(precision),
            f"such vectors are kept in float32 (embedding.head: {config.embedding.head}); remove it")
    require(config.objective.loss in CONTRASTIVE, key, list(precision), f"objective.loss = {config.objective.loss!r} "
            f"compares vectors as they are; choose one of {', '.join(CONTRASTIVE)}, or remove it")
    require(config.embedding.unit_length or not {"binary", "rescore"} & set(precision), key, list(precision), "signs "
            "have no length, and embedding.normalize = False compares lengths too; set that to true, or leave binary "
            "and rescore out")


def check_score_temperature(config: "RunConfig") -> None:
    """Refuse a temperature meant for cosines, such as the default, where similarities are sums over tokens."""
    objective, head = config.objective, config.embedding.head
    if head not in ("multi_vector", "sparse") or objective.loss == "margin_mse":
        return
    what = "dot products are sums over tokens" if head == "sparse" else "MaxSim is a sum over the vectors of a query"
    require(objective.temperature >= LEAST_TEMPERATURE, "objective.temperature", objective.temperature,
            f"must be >= {LEAST_TEMPERATURE} with embedding.head: {head}, whose {what}; usual: 1")


def check_other_models(config: "RunConfig") -> None:
    """Refuse settings that do not go with documents' vectors of another model."""
    objective, query_side = config.objective, config.training.query_side_only
    old = objective.compatible_with
    others = {"objective.compatible_with": old, "objective.guide_model": objective.guide_model,
              "training.query_side_only": query_side or None, "objective.teacher_model": objective.teacher_model}
    require(objective.vector_cache is None or any(others.values()), "objective.vector_cache", objective.vector_cache,
            f"no other model embeds texts ({', '.join(others)}); remove it")
    if config.embedding.head in ("multi_vector", "sparse", "joint"):
        rule = f"this needs one dense vector for each text (embedding.head: {config.embedding.head}); remove it"
        for name, value in others.items():
            require(value is None, name, value, rule)
    dims = config.embedding.matryoshka_dims
    require(not dims or objective.teacher_model is None, "embedding.matryoshka_dims", list(dims), "a teacher's vectors "
            "have all their dimensions; remove it, or train them with info_nce afterwards")
    if not query_side:
        return
    key = "training.query_side_only"
    require(objective.loss in CONTRASTIVE, key, True, f"objective.loss = {objective.loss!r} trains documents too; "
            f"choose one of {', '.join(CONTRASTIVE)}, or set this to false")
    require(objective.negatives == "global_batch", "objective.negatives", objective.negatives,
            "with training.query_side_only documents cost no computation; set it to global_batch")
    require(objective.compatible_weight == 1, "objective.compatible_weight", objective.compatible_weight,
            "has no effect with training.query_side_only, which has that loss alone; remove it")
    for name in ("sts", "reranking"):
        sets: tuple[object, ...] = vars(config.evaluation)[name]
        require(not sets, f"evaluation.{name}", [str(item) for item in sets], "with training.query_side_only documents "
                "come from the index, which has none of these texts; remove it, or evaluate the export")
    of_documents = [direction for direction in objective.directions if direction.startswith("document")]
    require(not of_documents, "objective.directions", list(objective.directions), "with training.query_side_only "
            "documents are not trained, so only query_to_document and query_to_query have an effect; remove the others")

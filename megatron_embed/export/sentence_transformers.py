"""A Hugging Face directory made into a Sentence Transformers one, in the legacy layout that every server reads.

The layout that Sentence Transformers 6 writes itself (new class paths, `pooling_mode` as one string, no
`max_seq_length`) stops Text Embeddings Inference 1.9 at start and is served with the wrong pooling by vLLM up to 0.23;
all of them, it included, read the legacy one. The explicit modules also keep it from wrapping plain texts in the
tokenizer's chat template.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_embed.config.json_file import LARGEST_TOKENIZER, read_json_object, read_optional_json_object
from megatron_embed.convert.checkpoint_directory import drop_standard_modules, write_json
from megatron_embed.convert.dense_tensors import take_dense, write_dense
from megatron_embed.data.token_vectors import keep_prompts_whole
from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.export import multi_vector, sparse
from megatron_embed.models.dense_settings import ACTIVATION_CLASSES, DenseSettings
from megatron_embed.models.file_checks import check_tokenizer_names
from megatron_embed.models.saved_settings import SPARSE_ENCODER, SavedSettings
from megatron_embed.names import Pooling, TruncationSide

POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken"}
"""Pooling by name -> the flag of 1_Pooling/config.json; exactly one is true."""
LEGACY_TYPES = {kind: f"sentence_transformers.models.{kind}"
                for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
_PROBE = "a text"


def export_sentence_transformers(directory: str | Path, *, pooling: Pooling, normalize: bool, query_prompt: str,
                                 document_prompt: str, max_seq_length: int, embedding_dimension: int,
                                 needs_eos: bool | None = None, saved: SavedSettings | None = None) -> None:
    """Add to a Hugging Face directory, in place, what Sentence Transformers needs to compute our embeddings.

    Args:
        directory: holds config.json, weights and tokenizer; module files from an earlier life are replaced.
        pooling: how token vectors become one.
        normalize: whether vectors get unit length.
        query_prompt: exact prefix of a query, applied by `encode_query`.
        document_prompt: exact prefix of a document, applied by `encode_document`.
        max_seq_length: tokens, special tokens included.
        embedding_dimension: width of the token vectors.
        needs_eos: whether the tokenizer has to put an EOS behind every text; None: with last-token pooling.
        saved: all else that the model's directory shall say: its Dense modules, whose weights lie in the folders that
            it names or are added later; its similarity, where texts are cut, their lowercasing,
            their chat template, other prompts, lengths by role. None: cosine of unit vectors, else dot products.
    Raises:
        CheckpointError: the tokenizer cannot be loaded, or cannot be made to add the EOS that last-token pooling needs.
    """
    directory = Path(directory)
    saved = saved or SavedSettings(similarity="cosine" if normalize else "dot", truncation_side="right")
    complete_tokenizer(directory, needs_eos=saved.vectors is None and (
        pooling == "lasttoken" if needs_eos is None else needs_eos))
    if saved.vectors is not None and saved.vectors.prefix_tokens:
        tokenizer = load_export_tokenizer(directory)
        if keep_prompts_whole(tokenizer, (query_prompt, document_prompt)):
            tokenizer.save_pretrained(directory)
    if saved.truncation_side is not None:
        _set_truncation_side(directory, saved.truncation_side)
    _name_positions(directory)
    _write_modules(directory, saved, normalize=normalize, pooling={
        "word_embedding_dimension": embedding_dimension,
        **{flag: name in pooling.split("+") for name, flag in POOLING_FLAGS.items()}, "include_prompt": True})
    write_json(directory / "sentence_bert_config.json", {
        "max_seq_length": max_seq_length, "do_lower_case": saved.lower_case,
        **({f"{role}_length": length for role, length in saved.role_lengths.items()}
           if saved.vectors is None else multi_vector.lengths(saved)), **_chat_settings(saved),
        **(sparse.transformer_settings(directory) if saved.sparse else {})})
    others = {name: text for name, text in saved.named_prompts.items() if name not in ("passage", "corpus")}
    default = saved.default_prompt_name
    write_json(directory / "config_sentence_transformers.json", {
        "__version__": library_versions(),
        "model_type": SPARSE_ENCODER if saved.sparse else
        "SentenceTransformer" if saved.vectors is None else multi_vector.MODEL_TYPE,
        "prompts": {**others, "query": query_prompt, "document": document_prompt},
        "default_prompt_name": "document" if default in ("passage", "corpus") else default,
        "similarity_fn_name": saved.similarity if saved.vectors is None else multi_vector.SIMILARITY})


def _write_modules(directory: Path, saved: SavedSettings, *, normalize: bool, pooling: dict[str, Any]) -> None:
    """modules.json and the modules' folders, in place of those of an earlier life; Dense modules keep their weights.

    Args:
        pooling: config.json of the module Pooling.
    """
    weights = take_dense(directory, saved.dense)
    drop_standard_modules(directory)
    steps: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [("Transformer", {}, {})]
    if saved.sparse:
        steps.append(("SpladePooling", sparse.pooling_config(directory), {}))
    elif saved.vectors is None:
        steps.append(("Pooling", pooling, {}))
    for settings, tensors in zip(saved.dense, weights, strict=True):
        steps += [("Normalize", {}, {})] if settings.normalize_input else []
        steps.append(("Dense", dense_config(settings), tensors))
    if saved.vectors is not None:
        steps.append(("MultiVectorMask", multi_vector.mask_config(saved.vectors), {}))
    steps += [("Normalize", {}, {})] if normalize else []
    paths = ["" if kind == "Transformer" else f"{index}_{kind}" for index, (kind, _, _) in enumerate(steps)]
    types = LEGACY_TYPES if saved.vectors is None else multi_vector.TYPES
    if saved.sparse:
        types = sparse.types(directory)
    if saved.vectors is not None:
        steps = [(kind, multi_vector.of_tokens(kind, config), tensors) for kind, config, tensors in steps]
    write_json(directory / "modules.json", [
        {"idx": index, "name": str(index), "path": path, "type": types[kind]}
        for index, (path, (kind, _, _)) in enumerate(zip(paths, steps, strict=True))])
    for path, (_, config, tensors) in zip(paths[1:], steps[1:], strict=True):
        (directory / path).mkdir()
        # Also without settings: an empty directory would be lost by git and the hub, and readers look for it.
        write_json(directory / path / "config.json", config)
        if tensors:
            write_dense(directory / path, tensors)


def dense_config(settings: DenseSettings) -> dict[str, Any]:
    """config.json of a Dense module, with the keys that every version of Sentence Transformers takes."""
    (activation,) = (name for name, ours in ACTIVATION_CLASSES.items() if ours == settings.activation)
    return {"in_features": settings.in_features, "out_features": settings.out_features, "bias": settings.bias,
            "activation_function": activation}


def _name_positions(directory: Path) -> None:
    """Write down that an XLM-RoBERTa has learned positions, where Transformers 5 no longer does: vLLM 0.32 reads
    the key without a default (model_executor/models/config.py, JinaRobertaModelConfig)."""
    file = directory / "config.json"
    values = read_json_object(file)
    if values.get("model_type") == "xlm-roberta" and "position_embedding_type" not in values:
        write_json(file, {**values, "position_embedding_type": "absolute"})


def _chat_settings(saved: SavedSettings) -> dict[str, Any]:
    """Settings with which Sentence Transformers puts every text into the chat template; without them, none."""
    if saved.chat is None:
        return {}
    kind = {"method": "forward", "method_output_name": "last_hidden_state"}
    variables = {"processing_kwargs": {"chat_template": dict(saved.chat.variables)}} if saved.chat.variables else {}
    return {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings", **variables,
            "modality_config": {"text": kind, "message": {**kind, "format": saved.chat.content}}}


def set_right_truncation(directory: Path) -> None:
    """Make the stored tokenizer take tokens from the end of what is too long, as training does.

    A tokenizer of another life may say `left`, which the stock libraries follow.
    """
    _set_truncation_side(directory, "right")


def _set_truncation_side(directory: Path, side: TruncationSide) -> None:
    """The end at which the directory's tokenizer cuts a text that is too long."""
    file = directory / "tokenizer_config.json"
    values = read_optional_json_object(file)
    if values.get("truncation_side") != side:
        write_json(file, {**values, "truncation_side": side})
    file = directory / "tokenizer.json"
    values = read_optional_json_object(file, LARGEST_TOKENIZER)
    truncation = values.get("truncation")
    # Without a direction the library cuts on the right.
    if isinstance(truncation, dict) and truncation.get("direction", "Right") != side.capitalize():
        values["truncation"] = {**truncation, "direction": side.capitalize()}
        file.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Versions that wrote the export, under the keys Sentence Transformers uses."""
    from importlib.metadata import version

    packages = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    return {key: version(package) for key, package in packages.items()}


def load_export_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer as Transformers loads it. Raises CheckpointError if it cannot."""
    from megatron_embed.data.load_tokenizer import open_tokenizer

    check_tokenizer_names(directory)
    try:
        return open_tokenizer(directory)
    except Exception as error:  # all of them: the tokenizers library raises bare Exception for a damaged file
        raise CheckpointError(f"{directory}: tokenizer cannot be loaded ({first_line(error)}); "
                              "put the tokenizer files of the model there") from error


def complete_tokenizer(directory: Path, *, needs_eos: bool) -> None:
    """Make the stored tokenizer give the ids of training: an EOS if pooling needs one, and a token to pad with."""
    tokenizer = load_export_tokenizer(directory)
    with_special, plain = tokenizer(_PROBE).input_ids, tokenizer(_PROBE, add_special_tokens=False).input_ids
    if not plain:
        # Without tokenizer files Transformers 5 builds an empty tokenizer from config.json's model_type, silently.
        raise CheckpointError(f"{directory}: the tokenizer makes no token of {_PROBE!r}; "
                              "put the model's tokenizer files there")
    ends_itself = with_special[-1] != plain[-1]
    if tokenizer.pad_token is None:
        # Attention and pooling skip padding, so any token may fill it; without one a batch cannot be formed.
        _set_pad_token(directory, tokenizer.eos_token)
    if not needs_eos or ends_itself:
        return
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{directory}: the tokenizer names no eos_token, which last-token pooling needs; "
                              "set eos_token in tokenizer_config.json")
    file = directory / "tokenizer.json"
    if not file.is_file():
        tokenizer.backend_tokenizer.save(str(file))
    values = read_json_object(file, LARGEST_TOKENIZER)
    values["post_processor"] = _with_eos(values.get("post_processor"), tokenizer.eos_token, tokenizer.eos_token_id)
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    exported_ids = load_export_tokenizer(directory)(_PROBE).input_ids
    if exported_ids != [*with_special, tokenizer.eos_token_id]:
        raise CheckpointError(f"{file}: {_PROBE!r} becomes {exported_ids}, but training saw "
                              f"{[*with_special, tokenizer.eos_token_id]}; the tokenizer class ignores post_processor: "
                              "train with a tokenizer that adds its EOS")


def _set_pad_token(directory: Path, token: str | None) -> None:
    if token is None:
        raise CheckpointError(f"{directory}: the tokenizer names neither pad_token nor eos_token, so no batch can be "
                              "padded; set pad_token in tokenizer_config.json")
    file = directory / "tokenizer_config.json"
    write_json(file, {**read_optional_json_object(file), "pad_token": token})


def _with_eos(post_processor: dict[str, Any] | None, eos: str, eos_id: int) -> dict[str, Any]:
    """The `post_processor` of a tokenizer.json that also puts `eos` after a text (and after a pair of texts)."""
    if post_processor is None:
        return _append_eos({"type": "TemplateProcessing", "single": [_sequence("A", 0)],
                            "pair": [_sequence("A", 0), _sequence("B", 1)], "special_tokens": {}}, eos, eos_id)
    if post_processor["type"] == "TemplateProcessing":
        return _append_eos(post_processor, eos, eos_id)
    steps = post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]
    for index, step in enumerate(steps):
        if step["type"] == "TemplateProcessing":
            steps = [*steps[:index], _append_eos(step, eos, eos_id), *steps[index + 1:]]
            return {"type": "Sequence", "processors": steps}
    return {"type": "Sequence", "processors": [*steps, _with_eos(None, eos, eos_id)]}


def _append_eos(template: dict[str, Any], eos: str, eos_id: int) -> dict[str, Any]:
    """A template with `eos` at the end of both its forms."""
    last_type = template["pair"][-1].get("Sequence", template["pair"][-1].get("SpecialToken"))["type_id"]
    return {**template,
            "single": [*template["single"], {"SpecialToken": {"id": eos, "type_id": 0}}],
            "pair": [*template["pair"], {"SpecialToken": {"id": eos, "type_id": last_type}}],
            "special_tokens": {**template["special_tokens"], eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}

"""Keys of other trainers in a configuration: each is answered with what it is here."""

import dataclasses
import re
from typing import get_args, get_type_hints

import pytest

from megatron_embed.config.foreign_table import FOREIGN_WORDS, foreign_word
from megatron_embed.config.foreign_values import REASONS, VALUES, plain
from megatron_embed.config.load import config_of_values, load_config
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError

WORDS = [word for words in FOREIGN_WORDS.values() for word in words]

ANSWERS = {
    # Transformers
    "per_device_train_batch_size": "training.micro_batch_size", "gradient_accumulation_steps":
    "training.global_batch_size", "num_train_epochs": "training.epochs", "max_steps": "training.train_steps",
    "lr_scheduler_type": "training.lr_decay_style", "max_grad_norm": "training.clip_grad", "optim": "optimizer.name",
    "save_steps": "checkpoint.save_every_steps", "save_total_limit": "checkpoint.keep", "logging_steps":
    "logging.every_steps", "eval_steps": "evaluation.every_steps", "evaluation_strategy": "evaluation.every_steps",
    "output_dir": "checkpoint.directory", "fp16": "bfloat16", "bf16": "model.dtype", "report_to": "logging.wandb",
    "load_best_model_at_end": "checkpoint.export", "metric_for_best_model": "evaluation.best_metric",
    "dataloader_num_workers": "not needed", "gradient_checkpointing": "training.recompute",
    "ddp_find_unused_parameters": "not needed", "push_to_hub": "upload", "resume_from_checkpoint": "resumes",
    "adam_epsilon": "training.adam_eps", "tf32": "not needed", "group_by_length": "packed",
    # ms-swift
    "model_id_or_path": "model.path", "dataset": "data.train", "val_dataset": "data.validation",
    "split_dataset_ratio": "data.validation_fraction", "train_type": "lora.rank", "tuner_type": "lora.rank",
    "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules", "loss_type":
    "objective.loss", "task_type": "task", "torch_dtype": "model.dtype", "attn_impl": "model.attention",
    "padding_free": "packed", "quant_bits": "model.quantization", "use_dora": "plain LoRA", "truncation_strategy":
    "not needed", "deepspeed": "optimizer.distributed", "sequence_parallel_size": "parallel.context_parallel_size",
    # FlagEmbedding and Tevatron
    "train_data": "data.train", "train_group_size": "data.num_negatives", "query_max_len": "data.query_max_length",
    "passage_max_len": "data.document_max_length", "query_instruction_for_retrieval": "data.query_prompt",
    "negatives_cross_device": "objective.negatives", "sentence_pooling_method": "embedding.pooling",
    "normalize_embeddings": "embedding.normalize", "sub_batch_size": "not needed", "passage_prefix":
    "data.document_prompt", "corpus_name": "data.train.corpus", "grad_cache": "gradient cache",
    "lora_target_modules": "lora.target_modules", "append_eos_token": "EOS",
    # Sentence Transformers and DeepSpeed
    "batch_sampler": "no text occurs twice", "multi_dataset_batch_sampler": "data.mixed_batches",
    "max_seq_length": "data.query_max_length", "mini_batch_size": "training.micro_batch_size", "zero_optimization":
    "unknown key", "train_micro_batch_size_per_gpu": "training.micro_batch_size", "prompts": "data.query_prompt",
    "use_liger_kernel": "not needed", "early_stopping_patience": "evaluation.patience",
}
"""Key -> words of the answer to it, in the section `training` of a configuration."""


def refusal(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), [])
    return str(caught.value).replace(str(path), "run.yaml")


def test_sixty_keys_of_other_trainers_have_useful_answers(tmp_path):
    assert len(ANSWERS) >= 60
    text = "model: {path: m}\ntraining:\n" + "".join(f"  {key}: 1\n" for key in ANSWERS)
    answers = refusal(tmp_path, text).split(" | ")
    assert answers.pop() == ("`megatron-embed init --from run.yaml` translates a configuration of another trainer")
    assert len(answers) == len(ANSWERS)
    for line, ((key, words), answer) in enumerate(zip(ANSWERS.items(), answers, strict=True), start=3):
        assert answer.startswith(f"run.yaml:{line}: unknown key 'training.{key}'; "), answer
        assert words in answer, answer
        assert key == "zero_optimization" or "known here:" not in answer, answer


@pytest.mark.parametrize("section, key, words", [
    ("objective", "name", "objective.loss here"), ("objective", "type", "objective.loss here"),
    ("data", "hard_negatives", "data.num_negatives here"), ("data", "train_test_split", "data.validation_fraction"),
    ("embedding", "dimension", "embedding.embedding_dim"), ("checkpoint", "save_best", "checkpoint.export here"),
    ("training", "ema_decay", "merge --method linear"), ("training", "iterations", "training.train_steps here"),
    ("optimizer", "type", "adamw_8bit (of bitsandbytes)"), ("objective", "symmetric", "objective.directions"),
])
def test_key_of_a_section_is_not_answered_by_one_that_looks_like_it(tmp_path, section, key, words):
    answer = refusal(tmp_path, f"model: {{path: m}}\n{section}: {{{key}: 1}}\n")
    assert words in answer and "did you mean" not in answer, answer


@pytest.mark.parametrize("section, key, words", [
    ("training", "save_total_limits", "did you mean 'save_total_limit'? save_total_limit is checkpoint.keep here"),
    ("data", "max_seq_lenght", "did you mean 'max_seq_length'? max_seq_length is data.query_max_length and"),
    ("training", "weight_decays", "did you mean 'weight_decay'?"),
    ("training", "learning_rates", "did you mean 'learning_rate'?"),
])
def test_slip_in_another_trainers_name_is_answered_as_the_name(tmp_path, section, key, words):
    assert words in refusal(tmp_path, f"model: {{path: m}}\n{section}: {{{key}: 1}}\n")


def test_names_are_unique_and_answers_name_keys_that_exist():
    names = [name for word in WORDS for name in word.names]
    assert len(names) == len(set(names)) and len(WORDS) >= 80
    for word in WORDS:
        assert word.note or word.keys
        for key in word.keys:
            assert exists(key), (word.name, key)


def test_settings_of_the_same_name_here_are_not_called_missing():
    here = {field.name for kind in get_type_hints(RunConfig).values() if dataclasses.is_dataclass(kind)
            for field in dataclasses.fields(kind)}
    others = {"template", "train", "quantization"}  # the name of a chat template; what a program does; a format
    assert here & {name for word in WORDS if not word.keys for name in word.names} == others


def exists(key, kind=RunConfig):
    first, _, rest = key.partition(".")
    types = get_type_hints(kind)
    if first not in types:
        return False
    inner = types[first]
    entry = get_args(inner)[0] if get_args(inner) and isinstance(get_args(inner)[0], type) else inner
    return not rest or exists(rest, entry)


def test_keys_that_a_note_names_exist_too():
    for word in WORDS:
        for key in re.findall(r"\b((?:model|embedding|reranker|objective|data|parallel|training|lora|checkpoint|"
                              r"evaluation|optimizer|logging)\.[a-z_]+(?:\.[a-z_]+)?)", word.note):
            assert exists(key), (word.name, key)


def test_every_unknown_key_of_a_file_is_in_one_refusal(tmp_path):
    text = refusal(tmp_path, "model: {path: m, typo: 1}\ndataset: [a]\nobjective:\n  temprature: 1\n"
                             "train_args: {num_train_epochs: 3, mystery: 1}\ndata: {train: [{pth: b}]}\n")
    assert [part.partition(";")[0] for part in text.split(" | ")[:-1]] == [
        "run.yaml:1: unknown key 'model.typo'", "run.yaml:2: unknown key 'dataset'",
        "run.yaml:4: unknown key 'objective.temprature'", "run.yaml:5: unknown key 'train_args.num_train_epochs'",
        "run.yaml:6: unknown key 'data.train.pth'"]


def test_section_that_is_a_name_is_told_how_to_write_it(tmp_path):
    assert refusal(tmp_path, "model: Qwen/Qwen3-0.6B\n") == (
        "run.yaml:1: model = 'Qwen/Qwen3-0.6B' is a name in place of a section; write `model: {path: Qwen/Qwen3-0.6B}`")


def test_one_foreign_key_gets_no_advice_to_translate(tmp_path):
    assert refusal(tmp_path, "model: {path: m}\ntraining: {num_train_epochs: 3}\n") == (
        "run.yaml:2: unknown key 'training.num_train_epochs'; num_train_epochs is training.epochs here: not together "
        "with train_steps")


@pytest.mark.parametrize("key, value, answer", [
    ("training.push_to_hub", "false", "push_to_hub is not needed: off, as it always is here; remove it"),
    ("training.hub.push_to_hub", "null", "push_to_hub is not needed: off, as it always is here; remove it"),
    ("training.push_to_hub", "true", "push_to_hub is not supported: upload the export"),
    ("lora.init_lora_weights", "false", "init_lora_weights is not supported: adapters are plain LoRA")])
def test_a_key_that_leaves_a_feature_off_is_not_needed(tmp_path, key, value, answer):
    section, _, rest = key.partition(".")
    name, _, inner = rest.partition(".")
    text = f"{name}: {{{inner}: {value}}}" if inner else f"{name}: {value}"
    assert answer in refusal(tmp_path, f"model: {{path: m}}\n{section}: {{{text}}}\n")


@pytest.mark.parametrize("section, words", [
    ("objective: {loss: infonce}", "infonce is info_nce here"),
    ("objective: {loss: cross_entropy}", "pointwise for a reranker"),
    ("embedding: {pooling: eos}", "eos is lasttoken here"),
    ("model: {path: m, dtype: fp16}", "float16 is not supported; write bfloat16"),
    ("model: {path: m, attention: flash_attention_2}", "flash_attention_2 is flash here"),
    ("training: {lr_decay_style: constant_with_warmup}", "constant_with_warmup is constant here"),
    ("training: {recompute: true}", "True is full here"),
    ("task: generative_reranker", "generative_reranker is reranker here"),
])
def test_values_of_other_trainers_are_answered(tmp_path, section, words):
    model = "" if section.startswith("model") else "model: {path: m}\n"
    assert words in refusal(tmp_path, f"{model}{section}\n")


def test_tables_of_values_name_values_that_exist():
    for key, table in VALUES.items():
        kind = RunConfig
        for part in key.split("."):
            kind = get_type_hints(kind)[part]
        choices = str(kind)
        for written, ours in table.items():
            assert written == plain(written), written
            assert f"'{ours}'" in choices, (key, ours)
        assert not set(table) & set(REASONS.get(key, {}))


def test_options_are_found_in_every_spelling():
    for name in ("--learning-rate", "Learning_Rate", "optimizer.params.lr", "lr"):
        word = foreign_word(name)
        assert word is not None and word.keys == ("training.learning_rate",)
    assert foreign_word("mystery") is None


def test_unknown_keys_of_a_mapping_in_python_are_refused_too():
    with pytest.raises(ConfigError, match=r"^config: unknown key 'training.num_train_epochs'; num_train_epochs is"):
        config_of_values({"model": {"path": "m"}, "training": {"num_train_epochs": 3}})

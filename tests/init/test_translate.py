"""Settings of other trainers become settings of ours with the same numbers; what has no counterpart is named."""

import shlex
from pathlib import Path

import pytest

from megatron_embed.__main__ import main
from megatron_embed.config.data import TrainFile
from megatron_embed.config.load import load_text
from megatron_embed.errors import ConfigError
from megatron_embed.init.translate import translated
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables
from tests.helpers.toys import save_model

CASES = Path(__file__).with_name("cases")
SWIFT = {"training.weight_decay": 0.1, "training.adam_beta2": 0.95, "training.lr_decay_style": "cosine"}
LINEAR = {"training.weight_decay": 0.0, "training.lr_decay_style": "linear"}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

EXPECTED = {
    "swift_infonce_lora.sh": {
        **SWIFT, "task": "embedding", "model.path": "Qwen/Qwen3-Embedding-0.6B", "objective.loss": "info_nce",
        "objective.temperature": 0.01, "objective.mask_margin": 0.1, "objective.negatives": "micro_batch",
        "training.global_batch_size": 4 * 1 * 4, "training.micro_batch_size": 4, "training.epochs": 1,
        "training.learning_rate": 6e-6, "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.1,
        "lora.target_modules": ("all-linear",), "data.validation_fraction": 0.05, "evaluation.every_steps": 100,
        "checkpoint.save_every_steps": 100, "checkpoint.directory": "output/checkpoints"},
    "swift_cosine_full.sh": {
        **SWIFT, "objective.loss": "cosine_similarity", "training.global_batch_size": 8 * 1 * 2, "lora.rank": 0,
        "data.num_negatives": 0, "objective.negatives": "global_batch", "training.epochs": 5},
    "plain_script.sh": {
        "training.global_batch_size": 16, "training.micro_batch_size": 16, "training.epochs": 5,
        "training.learning_rate": 1e-5, "data.query_max_length": 64, "data.document_max_length": 256,
        "training.weight_decay": 0.01, "checkpoint.export_at_end": "models/custom/model"},
    "flag_cls.sh": {
        **LINEAR, "embedding.pooling": "cls", "embedding.normalize": True, "objective.temperature": 0.02,
        "data.num_negatives": 8 - 1, "data.document_sampling": "random", "training.global_batch_size": 32 * 8,
        "objective.negatives": "global_batch", "training.epochs": 2},
    "tevatron_lora.sh": {
        **LINEAR, "embedding.pooling": "lasttoken", "data.num_negatives": 16 - 1, "lora.rank": 16, "lora.alpha": 64,
        "lora.dropout": 0.1, "lora.target_modules": ADAPTED, "training.warmup_ratio": 0.1, "training.epochs": 3,
        "training.global_batch_size": 8 * 4, "objective.negatives": "micro_batch"},
    "swift_embedding.yaml": {
        **SWIFT, "model.path": "qwen/Qwen2-7B", "objective.temperature": 0.05, "embedding.pooling": "mean",
        "data.query_max_length": 8192, "data.document_max_length": 8192, "lora.rank": 64, "lora.alpha": 16,
        "lora.dropout": 0.1, "lora.target_modules": ("q_proj", "v_proj"), "training.global_batch_size": 8 * 4,
        "training.learning_rate": 2e-5, "training.epochs": 3, "logging.every_steps": 10},
    "swift_reranker.yaml": {
        **SWIFT, "task": "reranker", "objective.loss": "pointwise", "reranker.head": "score",
        "reranker.activation": "sigmoid", "reranker.max_length": 4096, "training.global_batch_size": 4 * 8,
        "checkpoint.keep": 2, "lora.rank": 128, "lora.dropout": 0.05, "data.num_negatives": 7},
    "swift_two_gpus.sh": {
        **SWIFT, "objective.temperature": 0.1, "data.num_negatives": 5, "training.global_batch_size": 8 * 2,
        "objective.directions": ("query_to_document", "query_to_query", "document_to_document"),
        "training.min_learning_rate": 1e-6, "training.warmup_ratio": 0.05, "training.epochs": 0.5,
        "model.dtype": "bfloat16", "optimizer.distributed": True, "data.mixed_batches": True, "lora.dropout": 0.05,
        "objective.negatives": "global_batch"},
    "swift_generative_reranker.sh": {
        **SWIFT, "task": "reranker", "objective.loss": "listwise", "reranker.head": "yes_no",
        "reranker.temperature": 0.5, "data.num_negatives": 15, "training.global_batch_size": 2 * 4 * 2 * 8,
        "reranker.max_length": 1024, "training.epochs": 3},
    "swift_flat.yaml": {
        "training.global_batch_size": 16, "training.lr_decay_style": "constant", "training.warmup_steps": 50,
        "training.clip_grad": 0.5, "training.recompute": "full", "training.seed": 42, "logging.wandb": True,
        "logging.tensorboard": False, "lora.rank": 0, "training.learning_rate": 1e-5},
    "flag_script.sh": {
        **LINEAR, "training.global_batch_size": 256 * 2, "data.query_prompt": "{instruction}", "training.epochs": 4,
        "embedding.instruction": "Represent this sentence for searching relevant passages: ",
        "optimizer.distributed": False, "model.dtype": "bfloat16", "data.mixed_batches": False},
    "flag_decoder.sh": {
        **LINEAR, "objective.loss": "kl_distillation", "objective.teacher_temperature": 1.0, "lora.rank": 32,
        "data.query_prompt": "<instruct>{instruction}\n<query>", "training.global_batch_size": 2 * 4 * 2,
        "lora.alpha": 64, "lora.dropout": 0.1, "optimizer.distributed": True, "embedding.pooling": "lasttoken"},
    "flag_reranker.sh": {
        "task": "reranker", "objective.loss": "listwise", "reranker.max_length": 384, "data.num_negatives": 7,
        "training.weight_decay": 0.01, "training.global_batch_size": 2 * 2, "reranker.head": None},
    "tevatron_deepspeed.sh": {
        **LINEAR, "data.query_prompt": "Query: ", "data.document_prompt": "Passage: ", "lora.rank": 16,
        "training.global_batch_size": 8 * 4 * 4, "training.recompute": "full", "data.document_max_length": 156},
    "tevatron_grad_cache.sh": {
        "training.global_batch_size": 128, "training.micro_batch_size": min(8, 32 // 4), "training.train_steps": 4000,
        "training.epochs": None, "data.document_sampling": "first", "embedding.pooling": "cls",
        "embedding.normalize": False, "objective.temperature": 1.0, "objective.negatives": "global_batch",
        "data.train": (TrainFile(path="train.jsonl", corpus="corpus.jsonl"),)},
    "sentence_transformers.yaml": {
        **LINEAR, "objective.temperature": 1 / 20, "objective.partition": "per_direction",
        "data.query_prompt": "query: ", "data.document_prompt": "passage: ", "checkpoint.export": "best",
        "evaluation.best_metric": "loss", "training.learning_rate": 5e-5, "model.dtype": "bfloat16"},
    "accelerate_csv.sh": {
        "training.global_batch_size": 32 * 4 * 2, "objective.loss": "cosent", "objective.temperature": 1 / 20,
        "training.learning_rate": 3e-5, "data.shuffle": False, "training.epochs": 3, "training.weight_decay": 0.0},
    "deepspeed_config.json": {
        "training.global_batch_size": 4 * 8, "training.adam_beta2": 0.95, "training.learning_rate": 2e-5,
        "training.warmup_steps": 100, "training.train_steps": 2000, "training.lr_decay_style": "linear",
        "optimizer.distributed": True, "training.clip_grad": 1.0},
    "megatron_swift.sh": {
        **SWIFT, "training.global_batch_size": 64, "training.micro_batch_size": 2, "training.warmup_ratio": 0.05,
        "parallel.tensor_model_parallel_size": 2, "training.min_learning_rate": 1e-6, "training.recompute": "full",
        "checkpoint.save_every_steps": 200, "objective.negatives": "micro_batch"},
}
"""File in cases/ -> settings of the translation, with the arithmetic of the batch written out."""


def config_of(text):
    draft = translated(text)
    return load_text(draft.text(), "translation"), draft


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_every_case_is_expected():
    assert {path.name for path in CASES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_translation_has_the_numbers_of_the_other_trainer(name):
    config, draft = config_of(str(CASES / name))
    values = {key: value_of(config, key) for key in EXPECTED[name]}
    assert values == {key: pytest.approx(value) if isinstance(value, float) else value
                      for key, value in EXPECTED[name].items()}
    assert all(len(line) <= 120 for line in draft.text().splitlines())


SILENT = {
    "accelerate_csv.sh": (), "flag_decoder.sh": ("--use_lora",), "tevatron_grad_cache.sh": (),
    "tevatron_deepspeed.sh": ("--lora", "--dataset_split"), "flag_reranker.sh": ("--knowledge_distillation",),
    "swift_generative_reranker.sh": ("--train_type", "--eval_strategy")}
"""Options that set what ours is without them: the last remark lists these, and these alone."""


@pytest.mark.parametrize("name", SILENT)
def test_every_setting_has_a_line_or_a_remark(name):
    """Nothing that is written gets lost: each option is in a comment, for the setting that it gives if there is one."""
    draft = translated(str(CASES / name))
    text = " ".join(line.lstrip("# ") for line in draft.text().split("\n"))
    command = (CASES / name).read_text().replace("\\\n", " ")
    launcher = ("--nproc_per_node", "--nnodes", "--num_processes", "--multi_gpu", "--include", "--module",
                "--master_port", "--push_to_hub")  # the last is one of another command in the file
    for word in shlex.split(command):
        if word.startswith("--") and word.partition("=")[0] not in launcher:
            assert word.partition("=")[0] in text, word
    listed = [remark.partition(": ")[2] for remark in draft.remarks if remark.startswith("without a line")]
    names = tuple(part.split()[0] for part in listed[0].split("; ")) if listed else ()
    assert names == SILENT[name]


def test_options_of_a_reranker_without_a_key_are_remarks():
    program = "torchrun -m FlagEmbedding.finetune.reranker.encoder_only.base --model_name_or_path m --train_data a "
    remarks = translated(program + "--query_max_len 48 --passage_max_len 300").remarks
    assert any(remark.startswith("--query_max_len 48, --passage_max_len 300: not supported") for remark in remarks)
    remarks = translated("swift sft --model m --task_type reranker --eval_strategy steps --eval_steps 100").remarks
    assert any(remark.startswith("--eval_steps 100: there is nothing to evaluate") for remark in remarks)


COMMAND = ("torchrun --nproc_per_node 1 -m tevatron.retriever.driver.train --model_name_or_path m "
           "--dataset_path a.jsonl ")


@pytest.mark.parametrize("options, expected", [
    ("--learning_rate=1e-4", {"training.learning_rate": 1e-4}),
    ("--learning-rate 1E-4", {"training.learning_rate": 1e-4}),
    ("--learning_rate '3e-5'", {"training.learning_rate": 3e-5}),
    ("--learning_rate 1e-4 --learning_rate 2e-4", {"training.learning_rate": 2e-4}),
    ("--num_train_epochs 2.0 --max_steps -1", {"training.epochs": 2, "training.train_steps": None}),
    ("--max_steps 100 --num_train_epochs 2", {"training.epochs": None, "training.train_steps": 100}),
    ("--warmup_steps 20 --warmup_ratio 0.3", {"training.warmup_steps": 20, "training.warmup_ratio": 0}),
    ("--warmup_steps 0.2", {"training.warmup_ratio": 0.2, "training.warmup_steps": 0}),
    ("--lr_scheduler_type inverse_sqrt", {"training.lr_decay_style": "inverse-square-root"}),
    ("--lr_scheduler_type polynomial", {"training.lr_decay_style": "linear", "training.min_learning_rate": 1e-7}),
    ("--lr_scheduler_type warmup_stable_decay --max_steps 200 --lr_scheduler_kwargs '{\"num_decay_steps\": 50}'",
     {"training.lr_decay_style": "wsd", "training.wsd_decay_ratio": 0.25}),
    ("--lr_scheduler_type cosine_with_min_lr --learning_rate 1e-4 --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'",
     {"training.min_learning_rate": 1e-5}),
    ("--bf16 --fp16 False", {"model.dtype": "bfloat16"}),
    ("--bf16 False", {"model.dtype": "auto"}), ("--precision 16-mixed", {"model.dtype": "bfloat16"}),
    ("--precision bf16-mixed", {"model.dtype": "bfloat16"}), ("--torch_dtype float32", {"model.dtype": "float32"}),
    ("--per_device_train_batch_size auto --learning_rate auto", {"training.global_batch_size": 8}),
    ("--normalize False --pooling avg", {"embedding.normalize": False, "embedding.pooling": "mean"}),
    ("--lora_target_modules q_proj v_proj --lora", {"lora.target_modules": ("q_proj", "v_proj")}),
    ("--lora_name_or_path my/adapter --lora", {"model.path": "my/adapter"}),
    ("--per_device_train_batch_size 6 --grad_cache --gc_q_chunk_size 4", {"training.micro_batch_size": 3}),
    ("--save_steps 0.25 --max_steps 400", {"checkpoint.save_every_steps": 100}),
    ("--save_strategy epoch", {"checkpoint.save_every_epochs": 1, "checkpoint.save_every_steps": 500}),
    ("--deepspeed '{\"zero_optimization\": {\"stage\": 1}}'", {"optimizer.distributed": True}),
])
def test_spellings_of_options(options, expected):
    config, _ = config_of(COMMAND + options)
    for key, value in expected.items():
        assert value_of(config, key) == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("option, seconds, words", [
    ("--ddp_timeout 1800", 1800, None), ("--ddp_timeout 1.8e3", 1800, None),
    ("--distributed_timeout_minutes 30", 1800, None),
    ("--ddp_timeout 180000000", 1_000_000,
     "longer than parallel.timeout_seconds can be, which is 1000000, eleven days"),
    ("--distributed_timeout_minutes 60000", 1_000_000, "longer than parallel.timeout_seconds can be"),
    ("--ddp_timeout 1e999", 1_000_000, "longer than parallel.timeout_seconds can be"),
    ("--ddp_timeout 0", 600, "parallel.timeout_seconds must be above 0; it keeps its default"),
    ("--ddp_timeout 30m", 600, "not a number; set parallel.timeout_seconds to its value")])
def test_a_timeout_that_is_not_taken_as_it_is_has_a_remark(option, seconds, words):
    config, draft = config_of(COMMAND + option)
    assert config.parallel.timeout_seconds == seconds
    assert [remark.startswith(f"{option}: {words}") for remark in draft.remarks if "timeout" in remark] == (
        [True] if words else [])


def test_file_as_name_of_a_data_set_has_no_configuration_or_split():
    command = ("python -m tevatron.retriever.driver.train --model_name_or_path m --dataset_config default "
               "--dataset_split dev --train_group_size 2 --dataset_name ")
    config, draft = config_of(command + "rows.jsonl")
    assert config.data.train == (TrainFile(path="rows.jsonl"),)
    assert "# --dataset_name rows.jsonl, --dataset_config default, --dataset_split dev" in draft.text()
    config, _ = config_of(command + "org/name")
    assert config.data.train == (TrainFile(path="org/name:default/dev"),)


@pytest.mark.parametrize("arguments", ['"$@"', "$@", "$*", '"${@:2}"'])
def test_arguments_of_a_script_are_no_value_of_its_last_option(arguments):
    draft = translated(f"swift sft --model m --task_type embedding --deepspeed zero3 {arguments}")
    assert draft.values["optimizer.distributed"][1] == "--deepspeed zero3: optimizer state is sharded, as ZeRO-1 does"


def test_evaluation_in_every_epoch_becomes_steps_where_the_rows_are_here(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("query,positive\n" + "".join(f"q{number},p{number}\n" for number in range(1210)))
    options = " --split_dataset_ratio 0.1 --eval_strategy epoch --per_device_train_batch_size 10"
    command = "NPROC_PER_NODE=2 swift sft --model m --task_type embedding --gradient_accumulation_steps 1 --dataset "
    config, draft = config_of(command + str(rows) + options)
    assert config.evaluation.every_steps == round(1210 * 0.9 / 20)
    assert draft.values["evaluation.every_steps"][1] == "--eval_strategy epoch: an epoch is 1,089 rows / 20"
    config, draft = config_of(command + "elsewhere.csv" + options)
    assert config.evaluation.every_steps == 500
    assert any(remark.startswith("--eval_strategy epoch: evaluation.every_steps counts steps") for remark in
               draft.remarks)


def test_settings_that_are_null_change_nothing(tmp_path):
    path = tmp_path / "arguments.json"
    path.write_text('{"model_name_or_path": "m", "num_train_epochs": 1, "run_name": null, "push_to_hub": null}')
    draft = translated(str(path))
    assert draft.remarks[-1] == "without a line, since they change nothing here: run_name: null; push_to_hub: null"
    assert not any(remark.startswith("push_to_hub") for remark in draft.remarks)


def test_features_that_are_left_off_are_not_needed(tmp_path):
    """A value that leaves off what is not supported asks for nothing; one that turns it on, or means more, does."""
    path = tmp_path / "arguments.yaml"
    off = {"push_to_hub": "false", "hub_model_id": '""', "label_smoothing_factor": "0.0", "use_dora": "False",
           "lora_bias": "none", "additional_special_tokens": "[]", "trust_remote_code": "no"}
    on = {"save_only_model": "true", "neftune_noise_alpha": "5", "init_lora_weights": "false", "start_layer": "0"}
    path.write_text("".join(f"{name}: {value}\n" for name, value in (
        {"model_name_or_path": "m", "quant_method": "none", "deepspeed": "null", "fsdp": "no", "use_lora": "off"}
        | off | on).items()))
    config, draft = config_of(str(path))
    for name in (*off, *on):
        (remark,) = [remark for remark in draft.remarks if remark.startswith(f"{name}: ")]
        assert (": not needed: off, as it always is here" in remark, ": not supported: " in remark) == (
            name in off, name in on), remark
    assert config.lora.rank == 0 and config.model.quantization == "none"
    assert not [remark for remark in draft.remarks if remark.startswith(("quant_method", "deepspeed", "fsdp", "use_l"))]


def test_accumulation_of_a_batch_over_all_devices_is_the_one_that_is_written(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "train_batch_size": 256}')
    config, draft = config_of(str(path))
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (4, 256)
    assert "the 8 accumulated micro-batches do not see each other" in draft.values["objective.negatives"][1]


def test_lists_as_hydra_spells_them():
    config, _ = config_of("python train_dense_encoder.py encoder.pretrained_model_cfg=m train.batch_size=16 "
                          "train_datasets=[a.jsonl,b.jsonl] dev_datasets=[dev.jsonl]")
    assert [entry.path for entry in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert [entry.path for entry in config.data.validation] == ["dev.jsonl"] and config.model.path == "m"


@pytest.mark.parametrize("command, expected", [
    ("torchrun --nproc_per_node 8 -m FlagEmbedding.baai_general_embedding.finetune.run --model_name_or_path m "
     "--train_data toy.jsonl --learning_rate 1e-5 --fp16 --per_device_train_batch_size 4 --normlized True "
     "--train_group_size 2 --query_instruction_for_retrieval ''",
     {"training.global_batch_size": 32, "data.num_negatives": 1, "embedding.normalize": True,
      "data.query_prompt": None}),
    ("torchrun -m FlagEmbedding.finetune.embedder.encoder_only.m3 --model_name_or_path m --train_data a.jsonl "
     "--unified_finetuning True --use_self_distill True --colbert_dim -1 --knowledge_distillation True",
     {"embedding.head": "joint", "objective.self_distillation": True, "embedding.embedding_dim": None,
      "objective.loss": "info_nce"}),
    ("torchrun -m FlagEmbedding.finetune.embedder.encoder_only.m3 --model_name_or_path m --train_data a.jsonl "
     "--unified_finetuning True --colbert_dim 64",
     {"objective.self_distillation": False, "embedding.embedding_dim": 64}),
    ("torchrun -m FlagEmbedding.finetune.embedder.encoder_only.m3 --model_name_or_path m --train_data a.jsonl "
     "--unified_finetuning False --use_self_distill False", {"embedding.head": None}),
    ("python -m tevatron.driver.train --dataset_name Tevatron/wikipedia-nq --model_name_or_path m --do_train "
     "--train_n_passages 2 --q_max_len 32 --p_max_len 156 --negatives_x_device --untie_encoder",
     {"data.num_negatives": 1, "data.query_max_length": 32, "data.document_max_length": 156}),
    ("python train.py model.name=m +data.train=a.jsonl training.lr=3e-5 training.batch_size=8 trainer.max_epochs=2",
     {"training.learning_rate": 3e-5, "model.path": "m", "training.epochs": 2, "training.global_batch_size": 8}),
    ("python fit.py --model.name m --trainer.max_epochs 3 --optimizer.lr 1e-3 --data.train a.jsonl --data.batch_size 4",
     {"training.learning_rate": 1e-3, "model.path": "m", "training.epochs": 3, "training.micro_batch_size": 4}),
])
def test_older_and_other_command_lines(command, expected):
    config, _ = config_of(command)
    assert {key: value_of(config, key) for key in expected} == expected


@pytest.mark.parametrize("launcher, devices", [
    ("torchrun --nproc_per_node=4 --nnodes 2 -m", 8), ("torchrun --standalone --nproc-per-node 2 -m", 2),
    ("accelerate launch --num_processes 6 -m", 6), ("deepspeed --num_gpus=3 --module", 3),
    ("deepspeed --include localhost:0,2,4 --master_port 1 --module", 3), ("python -m", 1), ("python3 -u -m", 1),
    ("CUDA_VISIBLE_DEVICES=0,1 accelerate launch --config_file a.yaml -m", 2),
    ("CUDA_VISIBLE_DEVICES=0 python -m torch.distributed.launch --nproc_per_node 5 -m", 5),
    ("mpirun -np 4 python -m", 4), ("nohup env A=b torchrun --nproc_per_node 7 -m", 7),
])
def test_devices_of_every_launcher(launcher, devices):
    config, _ = config_of(f"{launcher} tevatron.retriever.driver.train --model_name_or_path m "
                          "--per_device_train_batch_size 2 --dataset_path a.jsonl")
    assert config.training.global_batch_size == 2 * devices


@pytest.mark.parametrize("task, loss, ours", [
    ("embedding", "MultipleNegativesRankingLoss", "info_nce"), ("embedding", "CoSENTLoss", "cosent"),
    ("embedding", "online_contrastive", "online_contrastive"), ("embedding", "TripletLoss", "triplet"),
    ("embedding", "CachedMultipleNegativesRankingLoss", "info_nce"), ("embedding", "cross_entropy", "info_nce"),
    ("reranker", "BinaryCrossEntropyLoss", "pointwise"), ("reranker", "listwise_reranker", "listwise"),
    ("reranker", "LambdaLoss", "lambda_loss"), ("reranker", "RankNetLoss", "ranknet"),
    ("embedding", "DistillKLDivLoss", "kl_distillation"), ("embedding", "MarginMSELoss", "margin_mse"),
    ("embedding", "SomeOwnLoss", "info_nce"),
])
def test_losses(task, loss, ours):
    config, draft = config_of(f"python train.py --model m --task_type {task} --loss_type {loss} --dataset a.jsonl "
                              "--num_negatives 1 --batch_size 2")
    assert config.objective.loss == ours
    assert ("SomeOwnLoss" in " ".join(draft.remarks)) == (loss == "SomeOwnLoss")


def test_rows_at_hand_decide_the_number_of_negatives(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "response": "b", "rejected_response": ["c", "d", "e"]}\n')
    config, _ = config_of(f"swift sft --model m --task_type embedding --loss_type infonce --dataset {rows}")
    assert config.data.num_negatives == 3
    _, draft = config_of(f"swift sft --model m --task_type embedding --loss_type cosine_similarity --dataset {rows}")
    assert any("THE ROWS DO NOT FIT" in remark and "rows.jsonl:1" in remark for remark in draft.remarks)


@pytest.mark.parametrize("source, message", [
    ("nowhere.yaml", "no such file"), ("echo hello", "holds no command with options"),
    ("python a.py --lr 1\npython b.py --lr 2", "holds 2 commands (a.py, b.py"), ("python a.py --x 'y", "quote"),
    ("python a.py --model m --lr -1 --dataset x.jsonl", "training.learning_rate = -1.0: must be > 0"),
])
def test_what_cannot_be_translated_is_one_line(source, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--from", source]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_settings_file_behind_the_program_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("args.yaml").write_text("model_name_or_path: m\ntrain_file: a.jsonl\nlearning_rate: '3e-5'\n")
    for command in ("torchrun --nproc_per_node 2 train.py args.yaml --batch_size 4", "python train.py args.yaml",
                    "swift sft --config args.yaml --learning_rate 3e-5"):
        config, _ = config_of(command)
        assert (config.training.learning_rate, config.data.train[0].path) == (3e-5, "a.jsonl")
    with pytest.raises(ConfigError, match="reads its settings from 'none.yaml', which is not here"):
        config_of("python train.py none.yaml")


def test_settings_file_behind_a_subcommand_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model_name_or_path: m\nlearning_rate: 3e-5\nper_device_train_batch_size: 4\n")
    config, _ = config_of("llamafactory-cli train run.yaml")
    assert (config.model.path, config.training.learning_rate) == ("m", 3e-5)
    with pytest.raises(ConfigError, match="missing.yaml"):
        translated("llamafactory-cli train missing.yaml")


@pytest.mark.parametrize("command", [
    "docker run --gpus all -v /d:/d image {}", "srun --nodes=1 --ntasks-per-node=1 bash -c '{}'", "bash -c '{}'",
    "sbatch --wrap '{}'", "singularity exec --nv a.sif {}", "cd x && mkdir -p out && {}", "ARGS='--lr 2e-5'\n{} $ARGS",
])
def test_commands_inside_others(command):
    inner = "torchrun --nproc_per_node 4 train.py --model m --train_file a.jsonl --batch_size 2"
    config, _ = config_of(command.format(inner))
    assert (config.model.path, config.training.global_batch_size) == ("m", 8)
    assert config.training.learning_rate == (2e-5 if "ARGS" in command else 1e-5)


def test_python_program_and_existing_output_are_refused(tmp_path, capsys):
    program, output = tmp_path / "train.py", tmp_path / "run.yaml"
    program.write_text("")
    assert main(["init", "--from", str(program)]) == 2
    assert "a Python program, which is not read" in capsys.readouterr().err
    command = "python a.py --model m --lr 1e-5 --dataset x.jsonl"
    assert main(["init", "--from", command, "--output", str(output)]) == 0
    assert "learning_rate: 1.0e-05  # --lr 1e-5" in output.read_text()
    assert main(["init", "--from", command, "--output", str(output)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_files_of_ms_swift_are_read_alike_whatever_their_name(tmp_path):
    """Adapters are its default, an option may be JSON in a text, and use_hf says which hub it takes."""
    text = ("model: m\ntask_type: embedding\ndataset: org/rows\nuse_hf: true\nlr_scheduler_type: cosine_with_min_lr\n"
            "lr_scheduler_kwargs: '{\"min_lr\": 1e-6}'\n")
    for name in ("swift.yaml", "run.yaml"):
        (tmp_path / name).write_text(text)
        config, draft = config_of(str(tmp_path / name))
        assert (config.lora.rank, config.training.learning_rate) == (8, 1e-4)
        assert config.training.min_learning_rate == 1e-6
        assert not any("ModelScope" in remark for remark in draft.remarks)


def test_value_that_the_text_does_not_hold_is_a_remark():
    config, draft = config_of("python a.py --model m --learning_rate $LR --batch_size 4 --dataset $DATA/a.jsonl "
                              "--mystery 1")
    assert config.training.learning_rate == 1e-5
    assert "--learning_rate $LR: not a number; set training.learning_rate to its value" in draft.remarks
    assert "--mystery 1: not known; docs/settings.md lists the keys here" in draft.remarks


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_translation_trains(name, tmp_path, monkeypatch):
    """Two steps of every translation with a small model of its kind and rows of ours."""
    monkeypatch.chdir(tmp_path)
    config, draft = config_of(str(CASES / name))
    Path("run.yaml").write_text(draft.text())
    family = "qwen3" if config.lora.rank or config.reranker.head else "bert"
    model = save_model(tmp_path / "model", family, tokenizer=True)
    rows = {"pairs": '{{"text_a": "a {0}", "text_b": "b {0}", "score": 0.{0}}}',
            "contrastive": '{{"query": "a {0}", "positive": "b {0}", "negatives": ["c {0}", "d"], '
                           '"teacher_scores": [1, 0.5, 0], "instruction": "find"}}'}[config.objective.rows]
    Path("rows.jsonl").write_text("\n".join(rows.format(index) for index in range(1, 10)) + "\n")
    overrides = [f"model.path={model}", "data.train=[rows.jsonl]", "data.validation=[]", "data.mixed_batches=false",
                 "model.dtype=float32", "training.train_steps=2", "training.epochs=null", "training.warmup_steps=0",
                 "training.global_batch_size=4", "training.micro_batch_size=2", "logging.wandb=false",
                 "parallel.tensor_model_parallel_size=1", "logging.tensorboard=false", "data.validation_fraction=0",
                 "optimizer.distributed=true", "checkpoint.export=last", "evaluation.best_metric=null",
                 "data.query_max_length=48", "data.document_max_length=16", "training.wsd_decay_ratio=0.1"]
    if config.task == "reranker" and family == "qwen3":
        overrides += ["reranker.max_length=120", "reranker.head=score", 'reranker.template="{query} {document}"']
    elif config.task == "reranker":
        overrides.append("reranker.max_length=32")
    assert main(["train", "run.yaml", *overrides]) == 0
    assert list(Path(config.checkpoint.export_at_end).iterdir())

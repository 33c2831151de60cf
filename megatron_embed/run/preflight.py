"""What a run reads and checks before its first collective, on every rank alike."""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_embed.config.evaluation import EvaluationSet
from megatron_embed.config.schema import RunConfig, TrainingConfig
from megatron_embed.data.dataset import RecordSet, hold_out, open_records, validation_shares
from megatron_embed.data.empty_texts import refuse_empty_rows
from megatron_embed.data.mixture import build_sampler
from megatron_embed.data.number_checks import WITH_BOUNDS
from megatron_embed.data.pair_batches import check_rerank_records
from megatron_embed.data.pair_tokenizer import PairTokenizer
from megatron_embed.data.records import ANY_NUMBER, require_fields
from megatron_embed.data.sampler import Sampler
from megatron_embed.data.tokenizer import Role, RoleTokenizer, TextFormat
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.beir import BeirData, load_beir, refuse_empty_texts
from megatron_embed.evaluation.reranking import load_rerank_file
from megatron_embed.evaluation.sts import StsData, load_sts, refuse_tokenless_pairs
from megatron_embed.evaluation.suite import EvaluationSuite
from megatron_embed.export.embedding import stock_runs_causally
from megatron_embed.loading.model_directory import ModelDirectory, adapters_of, error_context, find_model
from megatron_embed.loading.reranker import check_last_token, head_spec, open_pair_tokenizer, reranker_settings
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.models.heads import HeadSpec
from megatron_embed.models.reranker_settings import RerankerSettings, read_reranker_settings
from megatron_embed.objectives.build import metric_names
from megatron_embed.parallel.topology import (
    check_batch_sizes,
    check_token_budget,
    check_world_size,
    token_alignment,
)
from megatron_embed.platform.launcher import launched_rank
from megatron_embed.run.inherit import inherited
from megatron_embed.run.resume import Standing, check_resumable, is_exported, standing
from megatron_embed.training.optimizer import check_optimizer

Set = TypeVar("Set", BeirData, StsData)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read and checked before the first collective, on every rank alike."""

    config: RunConfig
    """With the model directory's own settings where it had null for them."""
    model: ModelDirectory
    records: RecordSet
    """To train on."""
    validation: RecordSet | None
    """Held out; null without `data.validation_fraction`."""
    tokenizer: RoleTokenizer | PairTokenizer
    """Of texts, or of a reranker's pairs."""
    sampler: Sampler
    suite: EvaluationSuite
    """All that the run is evaluated on."""
    settings: RerankerSettings | None
    """How a reranker is asked; null for an embedding model."""
    head: HeadSpec | None
    """Of a reranker."""
    train_steps: int
    standing: Standing

    @property
    def last_step(self) -> int:
        """The optimizer step after which the run ends, unless it ends early."""
        return self.standing.steps if self.standing.ended_early else self.train_steps

    def is_complete(self, config: RunConfig) -> bool:
        """Whether every step is done, evaluated where that is due, and the export made if one is wanted."""
        exported = config.checkpoint.export_at_end is None or is_exported(config, self.standing.steps)
        return self.standing.steps >= self.last_step and exported and not self.standing.evaluation_owed


def read_inputs(config: RunConfig) -> Inputs:
    """Checks all that can be wrong with a run. No communication.

    Raises:
        UserError: with file, key, value and remedy.
    """
    if not config.data.train:
        raise ConfigError("data.train = []: training needs at least one file of rows; add `train: [FILE.jsonl]` under "
                          "data")
    model = find_model(config.model.path)
    found, asked = standing(config), config.data
    config = inherited(config, model, found.checkpoint)
    _, world_size, _ = launched_rank()
    dp_size = check_world_size(config.parallel, world_size)
    check_batch_sizes(config, dp_size)
    check_divisible(model.shape, config.parallel)
    adapters = adapters_of(config.lora, model)
    check_token_budget(config, documents=1)  # that much it must hold whatever the rows are
    attention_kernel(config)
    if config.task == "embedding":
        check_lengths(config, model)
        check_widths(config, model)
    check_outputs(config)
    settings = head = None
    tokenizer: RoleTokenizer | PairTokenizer
    if config.task == "reranker":
        settings, tokenizer, head = open_reranker(
            config, model, found.checkpoint,
            lengths_are_set=asked.query_max_length is not None or asked.document_max_length is not None)
        everything = open_rerank_records(config, tokenizer)
    else:
        tokenizer = open_tokenizer(config, model)
        everything = open_records(config.data.files, config.objective.rows)
        require_fields(everything, config.objective.loss, teacher_scores=config.objective.needs_teacher_scores,
                       negatives=config.objective.needs_own_negatives, labels=config.objective.loss in WITH_BOUNDS,
                       teacher_temperature=config.objective.teacher_temperature or config.objective.temperature)
        check_token_budget(config, everything.most_in_use(config.data.num_positives, config.data.num_negatives))
        taken = config.data.num_negatives, config.data.num_positives
        refuse_empty_rows(everything, tokenizer, *((ANY_NUMBER, ANY_NUMBER) if config.data.samples_documents
                                                       else taken))
    check_optimizer(config, has_adapters=adapters is not None,
                    has_tied_head=head is not None and head.is_tied(model.shape))
    records, validation = divided(config, everything, dp_size)
    sampler = build_sampler(records, config.data, global_batch_size=config.training.global_batch_size,
                            seed=config.training.seed)
    steps = number_of_steps(config, sampler)
    check_schedule(config.training, steps)
    suite = open_suite(config, tokenizer)
    if found.checkpoint is not None:
        check_resumable(config, found.checkpoint, model, tokenizer, records)
    inputs = Inputs(config=config, model=model, records=records, validation=validation, tokenizer=tokenizer,
                    sampler=sampler, suite=suite, settings=settings, head=head, train_steps=steps, standing=found)
    if config.checkpoint.export_at_end is not None and not inputs.is_complete(config):
        check_export(config, model)
    return inputs


def check_schedule(training: TrainingConfig, train_steps: int) -> None:
    """Raises ConfigError if the learning rate's phases have no room in so many steps."""
    warmup, decay = training.warmup(train_steps), training.final_decay(train_steps)
    if warmup >= train_steps:
        key, value = ("warmup_ratio", training.warmup_ratio) if training.warmup_ratio else ("warmup_steps", warmup)
        raise ConfigError(f"training.{key} = {value}: the {warmup} steps of warmup must be fewer than the "
                          f"{train_steps} training steps")
    if warmup + decay > train_steps:
        raise ConfigError(f"training.wsd_decay_ratio = {training.wsd_decay_ratio}: {decay} steps of decay and {warmup} "
                          f"of warmup are more than the {train_steps} training steps; lower one of them")


def divided(config: RunConfig, records: RecordSet, dp_size: int) -> tuple[RecordSet, RecordSet | None]:
    """The rows of all files: those to train on, and those held out, if any, which the ranks can share."""
    if config.data.validation:
        count = len(config.data.train)
        kept, held = RecordSet(records.files[:count]), RecordSet(records.files[count:])
    else:
        kept, held = hold_out(records, config.data.validation_fraction, config.training.seed)
    if held is not None:
        validation_shares(held, global_batch_size=config.training.global_batch_size, dp_rank=0, dp_size=dp_size)
    return kept, held


def open_suite(config: RunConfig, tokenizer: RoleTokenizer | PairTokenizer) -> EvaluationSuite:
    """The evaluation sets, every text of which the tokenizer can take, and a metric to compare checkpoints by."""
    suite = EvaluationSuite(retrieval=[named(load_beir(item.path, config.evaluation.split,
                                             drop_own_id=config.evaluation.drop_own_id), item)
                             for item in config.evaluation.retrieval],
                  sts=[named(load_sts(item.path), item) for item in config.evaluation.sts],
                  reranking=[load_rerank_file(file, "evaluation.reranking") for file in config.evaluation.reranking],
                  dims=config.embedding.matryoshka_dims)
    for key, sets in (("retrieval", config.evaluation.retrieval), ("sts", config.evaluation.sts)):
        check_instructions(f"evaluation.{key}", sets, config, tokenizer)
    for data in suite.retrieval:
        assert isinstance(tokenizer, RoleTokenizer), "a reranker searches nothing"
        refuse_empty_texts(data, tokenizer)
    for pairs in suite.sts:
        assert isinstance(tokenizer, RoleTokenizer), "a reranker compares no vectors"
        refuse_tokenless_pairs(pairs, tokenizer)
    refuse_equal_names("evaluation.retrieval", suite.retrieval)
    refuse_equal_names("evaluation.sts", suite.sts)
    suite.require_metric(config.evaluation.best_metric,
                         metric_names(config) if config.data.validates else ())
    return suite


def named(data: Set, item: EvaluationSet) -> Set:
    """The set with what its entry in the configuration says of it."""
    return dataclasses.replace(data, instruction=item.instruction, name=item.name or data.name)


def refuse_equal_names(key: str, sets: Sequence[BeirData | StsData]) -> None:
    """Raises ConfigError where one set's metrics would hide another's."""
    names = [data.name for data in sets]
    for name in (name for name in names if names.count(name) > 1):
        raise ConfigError(f"{key} = {names}: two sets are called {name!r}; give one another name: "
                          "{path: ..., name: ...}")


def check_instructions(key: str, sets: Sequence[EvaluationSet], config: RunConfig,
                       tokenizer: RoleTokenizer | PairTokenizer) -> None:
    """Every set has an instruction if the prompt has a place for one, and it leaves room for text."""
    for item in sets:
        assert isinstance(tokenizer, RoleTokenizer), "a reranker compares no vectors"
        if tokenizer.needs_instructions and item.instruction is None:
            raise ConfigError(f"{key} = {item.path!r}: data.query_prompt = {config.data.query_prompt!r} needs an "
                              "instruction and the set has none; write {path: ..., instruction: ...}, or set "
                              "embedding.instruction for all")
        tokenizer.check_prompts({item.instruction: f"{key} = {item.path!r}"})


def open_reranker(config: RunConfig, model: ModelDirectory, checkpoint: Path | None, *,
                  lengths_are_set: bool) -> tuple[RerankerSettings, PairTokenizer, HeadSpec]:
    """How the run's reranker is asked, its tokenizer and its head.

    Args:
        checkpoint: the newest one of a run that goes on, which is asked as it was.
        lengths_are_set: the configuration has a length for queries or documents.
    """
    begun = None if checkpoint is None else read_reranker_settings(checkpoint / "hf")
    asked = model if begun is None or checkpoint is None else dataclasses.replace(
        model, reranker=begun, path=checkpoint, peft=None)
    settings = reranker_settings(
        config.reranker, asked, longest=config.data.max_length("query") + config.data.max_length("document"),
        lengths_are_set=lengths_are_set)
    with error_context("model.path", config.model.path):
        tokenizer = open_pair_tokenizer(settings, model)
    if config.reranker.template is None:
        check_last_token(settings, tokenizer, f"model.path = {config.model.path!r}: its template")
    else:
        check_last_token(settings, tokenizer, "reranker.template")
    if config.checkpoint.export_at_end is not None and not tokenizer.can_pad:
        raise ConfigError(f"checkpoint.export_at_end = {config.checkpoint.export_at_end!r}: the tokenizer of "
                          f"{config.model.path} names neither pad_token nor eos_token, without which the stock "
                          "libraries form no batch; set pad_token in its tokenizer_config.json")
    return settings, tokenizer, head_spec(settings, tokenizer)


def open_rerank_records(config: RunConfig, tokenizer: PairTokenizer) -> RecordSet:
    """The rows of all files as lists of labelled documents, each one that the loss can take."""
    records = open_records(config.data.files, "rerank")
    check_rerank_records(records, tokenizer, loss=config.objective.loss, temperature=config.objective.temperature,
                         num_negatives=config.data.num_negatives,
                         micro_batch_tokens=config.training.micro_batch_tokens,
                         alignment=token_alignment(config.parallel))
    return records


def require_writable(key: str, directory: str) -> None:
    """Makes the directory and tries a file in it. Raises ConfigError naming the key."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError(f"{key} = {directory!r}: cannot be written ({error.strerror}); choose a directory that "
                          "can") from error


def check_lengths(config: RunConfig, model: ModelDirectory) -> None:
    """No role is longer than the model's positions."""
    roles: tuple[Role, ...] = ("query", "document")
    for role, length in ((role, config.data.max_length(role)) for role in roles):
        if length > model.shape.longest_text:
            raise ConfigError(f"data.{role}_max_length = {length} is longer than the model's "
                              f"{model.shape.longest_text} positions; lower it to that or less")


def check_widths(config: RunConfig, model: ModelDirectory) -> None:
    """No matryoshka width is larger than the model's."""
    dims, width = config.embedding.matryoshka_dims, model.shape.hidden_size
    if dims and dims[0] > width:
        raise ConfigError(f"embedding.matryoshka_dims = {list(dims)}: the model's vectors have {width} dimensions; "
                          "leave out what is wider")


def check_outputs(config: RunConfig) -> None:
    """Checkpoints and metrics can be written, and there are checkpoints where the run must leave one."""
    minutes = config.training.exit_duration_minutes
    if minutes is not None and config.checkpoint.directory is None:
        raise ConfigError(f"training.exit_duration_minutes = {minutes:g}: there would be nothing to go on from; set "
                          "checkpoint.directory")
    if config.logging.wandb and log_directory(config) is None:
        raise ConfigError("logging.wandb = True: the run has no directory; set logging.directory")
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb = True: the package wandb is not installed; pip install wandb, or set it to "
                          "false")
    for key, directory in output_directories(config).items():
        require_writable(key, directory)


def check_export(config: RunConfig, model: ModelDirectory) -> None:
    """`checkpoint.export_at_end` can be made: its place is free, and the stock library runs such a model."""
    target, directory = Path(config.checkpoint.export_at_end or ""), Path(config.checkpoint.directory or ".")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: exists already, and not as the export of this "
                          f"run's {config.checkpoint.export} step; remove it or choose another name")
    if target.resolve() == directory.resolve() or directory.resolve() in target.resolve().parents:
        raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: lies in checkpoint.directory, whose "
                          "folders come and go; choose a directory beside it")
    require_writable("checkpoint.export_at_end", str(target.parent))
    if stock_runs_causally(model.shape, config.model.bidirectional):
        raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: Sentence Transformers runs "
                          f"{model.shape.family} models causally on transformers before 5.2, so a bidirectional one "
                          "differs there; upgrade it, or set it to null")


def open_tokenizer(config: RunConfig, model: ModelDirectory) -> RoleTokenizer:
    """The model's tokenizer with this run's prompts and lengths."""
    with error_context("model.path", config.model.path):
        tokenizer = RoleTokenizer(
            str(model.hf), add_eos=model.pooling(config.embedding.pooling) == "lasttoken",
            text_format=training_format(model), query_prompt=config.data.prompt("query"),
            document_prompt=config.data.prompt("document"), query_max_length=config.data.max_length("query"),
            document_max_length=config.data.max_length("document"),
            vocab_size=model.shape.vocab_size, instruction=config.embedding.instruction)
    asked = {"evaluation.reranking": config.evaluation.reranking,
             "checkpoint.export_at_end": config.checkpoint.export_at_end}
    if tokenizer.needs_instructions and any(asked.values()):
        key, value = next((key, value) for key, value in asked.items() if value)
        raise ConfigError(f"{key} = {value!r}: data.query_prompt = {config.data.query_prompt!r} needs an instruction; "
                          "set embedding.instruction")
    return tokenizer


def training_format(model: ModelDirectory) -> TextFormat:
    """How texts become ids in training: as the directory says, but cut at the end, so that no prompt is lost."""
    return dataclasses.replace(model.text_format, truncation_side="right")


def number_of_steps(config: RunConfig, sampler: Sampler) -> int:
    """`train_steps`, or the steps of `epochs` passes over the rows, or 1000."""
    if config.training.epochs is not None:
        return sampler.steps_of_epochs(config.training.epochs)
    return config.training.train_steps or 1000


def output_directories(config: RunConfig) -> dict[str, str]:
    """The directories that the run writes, each once, by the key that names it."""
    directories = {"checkpoint.directory": config.checkpoint.directory, "logging.directory": config.logging.directory}
    found: dict[str, str] = {}
    for key, directory in directories.items():
        others = [Path(other).resolve() for other in found.values()]
        if directory is not None and Path(directory).resolve() not in others:
            found[key] = directory
    return found


def log_directory(config: RunConfig) -> str | None:
    """Where metrics go."""
    return config.logging.directory or config.checkpoint.directory

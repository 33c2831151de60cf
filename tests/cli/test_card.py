"""README.md of an export: a hub's head, a use that runs, the run's settings and its last evaluation."""

import dataclasses
import json
from pathlib import Path

import yaml

from megatron_embed import __version__
from megatron_embed.config.schema import CheckpointConfig, LoraConfig, RerankerConfig, TrainFile
from megatron_embed.export.model_card import write_card
from tests.helpers.toys import MINI_EN, run_config


def written(folder, config, **options):
    """(the head, the text below it)."""
    write_card(folder, config, **options)
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def config_of(folder, model, **sections):
    (folder / "run").mkdir(exist_ok=True)
    lines = [{"step": 4, "loss": 1.0}, {"step": 4, "eval/ndcg@10": 0.25, "eval/loss": None},
             {"step": 6, "eval/ndcg@10": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "ev'
    (folder / "run" / "metrics.jsonl").write_text(text, encoding="utf-8")
    config = run_config(model, data={"train": (TrainFile(path=str(MINI_EN)), TrainFile(path="org/name")),
                                     "query_prompt": "query: ", "num_negatives": 2}, **sections)
    return dataclasses.replace(config, checkpoint=CheckpointConfig(
        directory=str(folder / "run"), export_at_end=str(folder / "my-model")))


def test_an_embedding_models_card(tmp_path):
    config = config_of(tmp_path, "org/base", matryoshka_dims=(32, 16), lora={"rank": 8}, parallel={
        "tensor_model_parallel_size": 2})
    (tmp_path / "README.md").write_text("of the base model")
    head, text = written(tmp_path, config, step=6, dim=48)
    assert head == {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "tags": [
        "sentence-transformers", "feature-extraction", "megatron-embed"], "base_model": "org/base"}
    for words in ("# my-model", f"fine-tuned from org/base by megatron_embed {__version__}", "48 numbers", "32, 16",
                  "| data | train.jsonl, org/name |", "| loss | info_nce |", "| optimizer steps | 6 |",
                  "| hard negatives per query | 2 |", "rank 8, alpha 32", "| model-parallel layout | tensor 2 |",
                  "## Evaluation after step 6", "| ndcg@10 | 0.5000 |", "- query: `'query: '`"):
        assert words in text, words
    for words in ("of the base model", "0.2500", str(tmp_path), str(Path(MINI_EN).parent)):
        assert words not in text, words


def test_a_card_names_the_other_models_of_a_run_and_the_settings_that_its_loss_takes(tmp_path):
    (tmp_path / "large").mkdir()
    config = config_of(tmp_path, "org/base", objective={
        "loss": "embedding_distillation", "teacher_model": str(tmp_path / "large")})
    _, text = written(tmp_path, config, step=6, dim=48)
    assert "| teacher | large |" in text
    assert "temperature" not in text
    assert "| negatives |" not in text
    config = config_of(tmp_path, "org/base", objective={"guide_model": "org/guide", "compatible_with": "org/old"})
    _, text = written(tmp_path, config, step=6, dim=48)
    for words in ("| temperature | 0.02 |", "| negatives | global_batch |", "| guide | org/guide |",
                  "| vectors of documents that were kept | org/old |"):
        assert words in text, words


def test_a_rerankers_card_names_no_directory_of_this_machine(tmp_path):
    (tmp_path / "base").mkdir()
    config = dataclasses.replace(config_of(tmp_path, str(tmp_path / "base")), task="reranker", lora=LoraConfig(),
                                 reranker=RerankerConfig(head="score"), objective=dataclasses.replace(
                                     run_config("m").objective, loss="listwise"), data=dataclasses.replace(
                                         run_config("m").data, train=(TrainFile(path=str(MINI_EN)),)))
    head, text = written(tmp_path, config, step=5, dim=None)
    assert "base_model" not in head
    assert head["pipeline_tag"] == "text-ranking"
    assert "CrossEncoder(" in text
    assert "fine-tuned from base by" in text
    assert "Evaluation" not in text  # there was none after this step
    assert str(tmp_path) not in text

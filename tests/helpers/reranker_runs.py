"""Rows and configurations of reranker runs, and calls of commands."""

import json

import yaml

from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_TEMPLATE, Pair, PairTemplate
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINI_EN


def lists(path, count=16):
    """Rows of 1 to 4 documents with labels 0 to 2, in both spellings."""
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:count]]
    written = []
    for index, row in enumerate(rows):
        documents = [rows[(index + step) % count]["positive"][0][:120] for step in range(1 + index % 4)]
        labels = [2, 0, 1, 0][:len(documents)]
        docs = [{"text": text, "label": label} for text, label in zip(documents, labels, strict=True)]
        written.append({"query": row["query"], "docs": docs} if path.name.startswith("docs")
                       else {"query": row["query"], "documents": documents, "labels": labels})
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return str(path)


def run_settings(directory, folder, head="yes_no", **sections):
    values = {
        "task": "reranker", "model": {"path": directory, "dtype": "float32"}, "reranker": {"head": head},
        "objective": {"loss": "lambda_loss"},
        "data": {"train": [lists(folder / "lists.jsonl")], "num_negatives": 1, "query_max_length": 200,
                 "document_max_length": 250},  # no probe is cut
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "train_steps": 2, "learning_rate": 1e-3},
        "checkpoint": {"directory": str(folder / "run")}, "logging": {"every_steps": 1, "tensorboard": False}}
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def run(arguments, ranks=1):
    """Output of a command that ends well."""
    (code, out, err, _), *_ = run_on_ranks(command, ranks, arguments)
    assert code == 0, err
    return out


def prompt(pair):
    return PairTemplate(text=QWEN3_RERANKER_TEMPLATE).fill(Pair(query=pair[0], document=pair[1]))[0]

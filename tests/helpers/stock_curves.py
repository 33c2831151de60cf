"""Losses of a stock model on the rows of a training run's steps: plain autograd in one process."""

import json

import numpy as np
import torch
import transformers

from tests.helpers.toys import MAX_LENGTH, MINI_EN

ROWS = 8
"""Rows of a step, in the order of the file, each with one negative."""


def stock_curve(model, base, optimizers, steps):
    """[steps] losses of a Transformers model, or PEFT's around one, with the settings of `runs.configuration`.

    `base`: the directory of its tokenizer. `optimizers` update what the gradient's norm, 1 at most, is of.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def embed(texts):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    lines = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    result = []
    for step in range(steps):
        rows = lines[step * ROWS:(step + 1) * ROWS]
        documents = [row["positive"][0] for row in rows] + [row["negatives"][0] for row in rows]
        scores = embed([row["query"] for row in rows]) @ embed(documents).T / 0.3
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(ROWS))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        result.append(loss.item())
    return np.array(result)

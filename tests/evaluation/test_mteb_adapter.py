"""mteb's own tasks, run on our adapter and on Sentence Transformers over the same vectors, give the same scores."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.helpers.toys import MINI_EN, MINILM

mteb = pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def stock():
    return SentenceTransformer(str(MINILM), device="cpu")


def local_sts():
    """An STS task whose pairs lie in memory."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:20]]

    class LocalSTS(AbsTaskSTS):
        metadata = TaskMetadata(
            name="LocalSTS", description="A few pairs.", reference=None, type="STS", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
            dataset={"path": "local/sts", "revision": "1"}, date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None)

        def load_data(self, **_):
            self.dataset = DatasetDict({"test": Dataset.from_dict({
                "sentence1": [row["query"] for row in rows],
                "sentence2": [rows[index * (index % 3) % 20]["positive"][0] for index in range(20)],
                "score": [float(index % 5) for index in range(20)]})})
            self.data_loaded = True

    return LocalSTS()


def test_a_task_of_mteb_gives_the_same_scores(stock):
    from megatron_embed.evaluation.mteb_adapter import MtebEncoder

    roles = []

    def encode(texts, role):
        roles.append(role)
        return stock.encode(texts)

    def scores(model):
        result = mteb.evaluate(model, local_sts(), cache=None, show_progress_bar=False)
        return result.task_results[0].scores["test"][0]

    adapter = MtebEncoder(encode, name="local/ours")
    ours, expected = scores(adapter), scores(stock)
    assert roles == ["query", "query"]
    for name in ("pearson", "spearman", "cosine_spearman", "euclidean_pearson"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-6)
    assert abs(ours["main_score"]) > 0.01


def test_follows_the_protocol():
    from mteb.models import EncoderProtocol
    from mteb.types import PromptType

    from megatron_embed.evaluation.mteb_adapter import MtebEncoder

    encoded = []

    def encode(texts, role):
        encoded.append((texts, role))
        return torch.ones(len(texts), 2)

    adapter = MtebEncoder(encode, name="local/ours", revision="3", similarity="dot")
    assert isinstance(adapter, EncoderProtocol)
    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
    for prompt_type, role in ((PromptType.document, "document"), (PromptType.query, "query"), (None, "query")):
        vectors = adapter.encode(batches, task_metadata=None, hf_split="test", hf_subset="default",
                                 prompt_type=prompt_type, batch_size=8)
        assert vectors.shape == (3, 2) and vectors.dtype == "float32"
        assert encoded.pop() == (["a", "b", "c"], role)
    meta = adapter.mteb_model_meta
    assert (meta.name, meta.revision, meta.similarity_fn_name) == ("local/ours", "3", "dot")
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert adapter.similarity(first, second).tolist() == [[3.0, 8.0]]
    cosine = MtebEncoder(encode, name="a/b")
    torch.testing.assert_close(cosine.similarity(first, second), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(cosine.similarity_pairwise(second, second[[1, 1]]), torch.tensor([0.0, 1.0]))

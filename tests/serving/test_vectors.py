"""What a server answers is what `encode` and `rerank` give, whatever the client."""

import base64
import json
import shutil

import httpx
import numpy as np
import openai
import pytest

import megatron_embed
from megatron_embed.export.formats import EXPORTERS
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.serving.models import Limits
from megatron_embed.serving.opening import Opening, open_models
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  fixture
from tests.helpers.served import SECONDS, served
from tests.helpers.toys import MINI_EN, MINILM, save_model

PROMPTS = {"prompts": {"query": "ask: ", "document": "say: "}, "default_prompt_name": None}
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """all-MiniLM-L6-v2 with prompts."""
    folder = tmp_path_factory.mktemp("models") / "minilm"
    shutil.copytree(MINILM, folder)
    settings = folder / "config_sentence_transformers.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(known | PROMPTS))
    return str(folder)


@pytest.fixture(scope="module")
def address(embedder, cross_encoder):
    with served(open_models([embedder, str(cross_encoder)], Opening(), Limits())) as at:
        yield at


@pytest.fixture(scope="module")
def texts():
    """Short and long ones, one beyond the maximum length, and other scripts."""
    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:4]]
    queries = [row["query"] for row in rows]
    return [*queries, " ".join(row["positive"][0] for row in rows), "什么是向量检索?", "x", ""]


@pytest.fixture(scope="module")
def wanted(embedder, texts):
    model = megatron_embed.load(embedder)
    return {role: model.encode(texts, role) for role in ("query", "document")}


def post(address, path, body):
    answer = httpx.post(address + path, json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return answer.json()


def close(given, wanted):
    np.testing.assert_allclose(np.array(given, dtype=np.float64), wanted, rtol=0, atol=TOLERANCE)


def test_openai_client(address, texts, wanted):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert np.abs(wanted["query"] - wanted["document"]).max() > 0.01
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(input=texts, model="any-name", encoding_format=encoding)
        rows = [row.embedding for row in answer.data]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
        close(rows, wanted["document"])
        assert [row.index for row in answer.data] == list(range(len(texts)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts)
    asked = client.embeddings.create(input=texts[0], model="m", dimensions=64, extra_body={"input_type": "query"})
    cut = wanted["query"][0][:64]
    close(asked.data[0].embedding, cut / np.linalg.norm(cut))
    assert [model.id for model in client.models.list().data] == ["minilm", "cross-encoder"]
    with pytest.raises(openai.UnprocessableEntityError, match="token ids are not accepted"):
        client.embeddings.create(input=[1, 2, 3], model="m")


def test_tei_embed(address, texts, wanted):
    close(post(address, "/embed", {"inputs": texts}), wanted["document"])
    close(post(address, "/embed", {"inputs": texts[0], "prompt_name": "query"}), wanted["query"][:1])
    raw = np.array(post(address, "/embed", {"inputs": texts, "normalize": False}))
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    close(raw / lengths, wanted["document"])
    answer = httpx.post(address + "/embed", json={"inputs": texts, "truncate": False}, timeout=SECONDS)
    assert answer.status_code == 413 and "text number 5 has" in answer.json()["error"]


def test_rerankers(address, cross_encoder, texts):
    scores = megatron_embed.load(str(cross_encoder)).rerank(texts[0], texts)
    order = np.argsort(-scores, kind="stable")
    assert scores[order[0]] - scores[order[1]] > 10 * TOLERANCE  # else the order would say nothing
    # Cohere's request, with documents as objects, and Jina's.
    documents = [{"text": text, "title": "ignored"} for text in texts]
    cohere = post(address, "/v1/rerank", {"model": "rerank-v3.5", "query": texts[0], "documents": documents, "top_n": 3,
                                          "return_documents": True})
    assert len(cohere["results"]) == 3 and {"id", "meta"} < set(cohere)
    for result in cohere["results"]:
        assert result["document"]["text"] == texts[result["index"]]
    jina = post(address, "/v1/rerank", {"model": "jina-reranker", "query": texts[0], "documents": texts})
    assert jina["usage"]["total_tokens"] > 0 and jina["model"] == "cross-encoder"
    assert jina["results"][:3] == [{key: row[key] for key in ("index", "relevance_score")} for row in cohere["results"]]
    tei = post(address, "/rerank", {"query": texts[0], "texts": texts, "return_text": True})
    assert all(rank["text"] == texts[rank["index"]] for rank in tei)
    raw = post(address, "/rerank", {"query": texts[0], "texts": texts, "raw_scores": True})
    for rows, name in ((jina["results"], "relevance_score"), (tei, "score")):
        given = [row[name] for row in rows]
        close(given, scores[[row["index"] for row in rows]])
        assert given == sorted(given, reverse=True) and len({row["index"] for row in rows}) == len(texts)
    close(1 / (1 + np.exp(-np.array([row["score"] for row in raw]))), scores[[row["index"] for row in raw]])


@pytest.mark.slow
def test_bfloat16(embedder, texts, wanted):
    """The vectors of `encode` in bfloat16; those in float32 differ by bfloat16's own rounding, most for one token."""
    with served(open_models([embedder], Opening(dtype="bfloat16"), Limits())) as at:
        given = np.array([post(at, "/v1/embeddings", {"input": text})["data"][0]["embedding"] for text in texts])
    vectors = megatron_embed.load(embedder, dtype="bfloat16").encode(texts)
    assert (given * vectors).sum(axis=1).min() >= 0.99999
    assert 0.9998 <= (given * wanted["document"]).sum(axis=1).min() < 0.99999


@pytest.mark.slow
def test_2048_texts_in_a_request(address, embedder):
    texts = [f"number {index}" for index in range(2048)]
    answer = post(address, "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    rows = np.array([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]])
    close(rows[::100], megatron_embed.load(embedder).encode(texts[::100]))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_graph_engines(engine, tmp_path, cross_encoder, texts):
    """The graph's rows, in padded batches of several lengths, are those of the model that it was written from."""
    save_model(tmp_path / "bert", "bert", tokenizer=True)
    for source, target in ((tmp_path / "bert", "vectors"), (cross_encoder, "scores")):
        EXPORTERS[engine](str(source), str(tmp_path / target), ExportOptions())
    models = open_models([str(tmp_path / "vectors"), str(tmp_path / "scores")], Opening(engine=engine), Limits())
    wanted = megatron_embed.load(str(tmp_path / "vectors")).encode(texts)
    scores = megatron_embed.load(str(cross_encoder)).rerank(texts[0], texts)
    with served(models) as at:
        given = post(at, "/v1/embeddings", {"input": texts, "encoding_format": "float"})
        np.testing.assert_allclose([row["embedding"] for row in given["data"]], wanted, rtol=0, atol=5 * TOLERANCE)
        ranks = post(at, "/rerank", {"query": texts[0], "texts": texts})
        np.testing.assert_allclose([rank["score"] for rank in ranks], scores[[rank["index"] for rank in ranks]], rtol=0,
                                   atol=5 * TOLERANCE)
        answer = httpx.post(f"{at}/embed", json={"inputs": "a", "normalize": False}, timeout=SECONDS)
        assert answer.status_code == 422 and "--engine torch" in answer.json()["error"]

"""The page at `/`: its files, its policy, and what a browser shows of a search."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

import megatron_embed.serving
from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation.search import search
from megatron_embed.serving.app import create_app
from megatron_embed.serving.models import Limits, ServedModels
from megatron_embed.serving.page_corpus import PageCorpus, read_page_corpus
from tests.helpers.browser import needs_chromium, opened_browser
from tests.helpers.served import served
from tests.helpers.served_trigrams import TrigramEmbedder, TrigramReranker, trigram_vectors

STATIC = Path(megatron_embed.serving.__file__).parent / "static"
HOSTILE = '<img src=x onerror="document.title = 1"><script>document.title = 2</script> bread & butter'
TEXTS = [*(f"A {colour} {thing} of the {place}." for colour in ("red", "green", "blue") for thing in (
    "bicycle", "loaf of bread", "leaf", "lamp") for place in ("baker", "garden", "harbour")), HOSTILE]
EMBEDDERS = [TrigramEmbedder("base", 48, 1), TrigramEmbedder("runs/tuned", 32, 2)]


def models():
    return ServedModels([*EMBEDDERS, TrigramReranker("judge")], Limits())


def client(**options):
    return TestClient(create_app(models(), **options))


def test_every_file_of_the_page_is_served_with_the_policy():
    app = client()
    answers = {"index.html": app.get("/")}
    names = re.findall(r'(?:href|src)="page/([^"]+)"', answers["index.html"].text)
    assert {"page.css", "app.js", "icon.svg"} <= set(names)
    answers |= {path.name: app.get(f"/page/{path.name}") for path in STATIC.iterdir() if path.suffix != ".html"}
    assert set(names) < set(answers)
    for name, answer in answers.items():
        assert answer.status_code == 200 and answer.content == (STATIC / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and answer.headers[
            "x-content-type-options"] == "nosniff"
    assert answers["app.js"].headers["content-type"].startswith("text/javascript")
    assert app.get("/page/../page.py").status_code == app.get("/page/app.py").status_code == 404


def test_no_file_names_another_host_or_reads_texts_as_html():
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc|\son\w+=",
                             text), path


def test_what_the_page_is_told():
    app = client(corpus=None)
    assert app.get("/page/info").json() == {"corpus": None, "models": [
        {"id": "base", "kind": "embedding", "dim": 48, "similarity": "cosine"},
        {"id": "runs/tuned", "kind": "embedding", "dim": 32, "similarity": "cosine"},
        {"id": "judge", "kind": "reranker"}]}
    ask = {"model": "base", "text": "three words here", "role": "query"}
    assert app.post("/page/tokens", json=ask).json() == {"tokens": 5, "max_length": 16}
    assert app.post("/page/tokens", json=ask | {"model": "judge"}).status_code == 404
    assert app.post("/page/tokens", json=ask | {"role": "passage"}).status_code == 422


def test_the_key_guards_texts_and_models_but_not_the_files(tmp_path):
    app = client(api_keys=("secret",))
    assert app.get("/").status_code == app.get("/page/app.js").status_code == 200
    for path in ("/page/info", "/page/corpus", "/page/vectors?model=base&start=0", "/page/app.py"):
        assert app.get(path).status_code == 401
    assert app.get("/page/info", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_corpus_of_the_server(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.txt").write_text("one\nline\n\n\nsecond  part\n", encoding="utf-8")
    (tmp_path / "notes" / "a.md").write_text("# A title\n", encoding="utf-8")
    (tmp_path / "notes" / "left.out").write_bytes(b"\xff")
    corpus = read_page_corpus(str(tmp_path / "notes"))
    assert (corpus.name, corpus.ids, corpus.texts) == ("notes", ["a.md:1", "b.txt:1", "b.txt:2"], [
        "# A title", "one line", "second part"])
    rows = [{"_id": 7, "title": "T", "text": "x"}, {"text": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = read_page_corpus(str(tmp_path / "rows.jsonl"))
    assert (corpus.ids, corpus.texts) == (["7", "2"], ["T x", "y"])
    app = client(corpus=corpus)
    assert app.get("/page/info").json()["corpus"] == {"name": "rows.jsonl", "count": 2}
    assert app.get("/page/corpus").json() == {"rows": [{"id": "7", "text": "T x"}, {"id": "2", "text": "y"}]}
    for _ in range(2):  # computed, then kept
        answer = app.get("/page/vectors?model=base&start=0")
        vectors = np.frombuffer(answer.content, dtype="<f4").reshape(2, 48)
        np.testing.assert_array_equal(vectors, trigram_vectors(corpus.texts, 48, 1))
    assert app.get("/page/vectors?model=base&start=2").status_code == 422


@pytest.mark.parametrize("content, error, words", [
    ("", DataError, "no rows"), ('{"text": 1}', DataError, "rows.jsonl:1: text"), (None, ConfigError, "no such file")])
def test_corpus_that_cannot_be_used(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(error, match=words):
        read_page_corpus(str(tmp_path / "rows.jsonl"))


def shown_rows(side):
    return f"Array.from(document.querySelectorAll('#column-{side} .hit'), (hit) => Number(hit.dataset.row))"


def expected(query, model, width, depth=10):
    asked, documents = (torch.from_numpy(trigram_vectors(texts, model.dim, model._seed)[:, :width])
                        for texts in ([query], TEXTS))
    return search(torch.nn.functional.normalize(asked), torch.nn.functional.normalize(documents), depth)[1][0].tolist()


@needs_chromium
def test_search_in_a_browser(tmp_path):
    """One's own file is searched as `search` does, by both models and at another width; its texts stay text."""
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS), encoding="utf-8")
    query = "green bread in a garden"
    with served(models()) as address, opened_browser() as page:
        page.open(address)
        page.wait_for("document.querySelector('#corpus-name').innerText.includes('example')")
        page.choose_files("#files", tmp_path / "own.jsonl")
        page.wait_for(f"document.querySelector('#corpus-name').innerText.includes('own.jsonl ({len(TEXTS)} texts)')")
        page.type("#query", query)
        page.press_enter()
        page.wait_for(f"{shown_rows('a')}.length && {shown_rows('b')}.length")
        for side, model in zip("ab", EMBEDDERS, strict=True):
            assert page.evaluate(shown_rows(side)) == expected(query, model, model.dim)
        assert page.evaluate("document.querySelector('#column-a .text').innerText") == TEXTS[
            expected(query, EMBEDDERS[0], 48)[0]]
        page.wait_for("document.querySelector('#tokens').innerText.includes('base: 7 of 16 tokens')")
        page.evaluate("{const slider = document.querySelector('#width-A'); slider.value = 8;"
                      "slider.dispatchEvent(new Event('input'));}")
        page.wait_for(f"String({shown_rows('a')}) === {','.join(map(str, expected(query, EMBEDDERS[0], 8)))!r}")
        page.type("#query", "butter &")
        page.press_enter()
        page.wait_for(f"{shown_rows('b')}[0] === {len(TEXTS) - 1}")
        assert page.evaluate("document.querySelector('#column-b .text').innerText") == HOSTILE
        assert page.evaluate("document.title").startswith("Try a model")
        assert page.problems == []


@pytest.mark.slow
@needs_chromium
def test_the_rest_of_the_page_in_a_browser():
    """The API key, a corpus of the server, a reranker, what is cut off, one side alone, and the heat map."""
    corpus = PageCorpus(name="mine", ids=[f"t{row}" for row in range(len(TEXTS))], texts=TEXTS)
    with served(models(), api_keys=("secret",), corpus=corpus) as address, opened_browser() as page:
        page.open(address)
        for key in ("wrong", "secret"):
            page.wait_for("!document.querySelector('#key-form').hidden")
            page.type("#key", key)
            page.press_enter()
            page.wait_for("document.querySelector('#key-form').hidden || !document.querySelector('#error').hidden")
        page.wait_for("document.querySelector('#corpus-name').innerText.includes('mine')")
        assert all("401" in problem for problem in page.problems)
        page.problems.clear()
        page.type("#query", "blue lamp " * 9)
        page.wait_for("document.querySelector('#tokens').innerText.includes('20 of 16 tokens, the last 4 are cut off')")
        page.type("#query", "blue lamp")
        page.press_enter()
        page.wait_for(f"{shown_rows('b')}.length")
        assert page.evaluate("document.querySelector('.id').innerText").startswith("t")
        choose = "((n, value) => {const s = document.querySelectorAll('#column-b select')[n]; s.value = value;"
        page.evaluate(f"{choose} s.dispatchEvent(new Event('change'));}})(1, 'judge')")
        page.wait_for("document.querySelector('#column-b').innerText.includes('before reranking')")
        first = expected("blue lamp", EMBEDDERS[1], 32, 20)
        scores = trigram_vectors([TEXTS[row] for row in first], 512, 99) @ trigram_vectors(["blue lamp"], 512, 99)[0]
        assert page.evaluate(shown_rows("b")) == [first[place] for place in np.argsort(-scores, kind="stable")[:10]]
        page.evaluate("document.querySelector('.close').click()")
        page.wait_for("document.querySelector('#status').innerText.includes('10 hits')")
        page.evaluate("document.querySelector('#tab-pairs').click()")
        page.type("#pairs-rows", "blue lamp\nred leaf")
        page.evaluate("document.querySelector('#pairs-form').requestSubmit()")
        page.wait_for("document.querySelectorAll('.heat td').length === 5")  # and the corner
        vectors = trigram_vectors(["blue lamp", "red leaf"], 48, 1)
        assert page.evaluate("Array.from(document.querySelectorAll('.heat tbody td'), (cell) => cell.innerText)") == [
            f"{value:.2f}".replace("-0.00", "0.00") for value in (vectors @ vectors.T).flatten()]
        assert page.problems == []

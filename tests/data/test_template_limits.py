"""Chat templates and normalizers that are small on the disk and large, or endless, in use."""

import json
import time

import pytest

from megatron_embed.data import template_limits
from megatron_embed.data.chat import ChatTemplate
from megatron_embed.data.normalizer_growth import refuse_growth, refuse_growth_in_file
from megatron_embed.errors import CheckpointError
from tests.helpers.foreign_directories_helpers import FLAT


class Tokenizer:
    """A tokenizer with nothing but a chat template, which it renders as Transformers does."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, *, tokenize, **variables):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=self.chat_template, **variables)[0][0]


def opened(template):
    return ChatTemplate(Tokenizer(template), "DIR", content="flat", variables={}, tell_role=True)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("template, words", [
    ("{{ 'x ' * 2000000000 }}", "takes more than 1 GiB"), ("{{ messages[0].content * 9999 }}", "a text far too long"),
    ("{% if task == 'document' %}{{ 'x' * 2000000 }}{% endif %}", "a text far too long"),
    pytest.param("{% set ns = namespace(a='x') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
                 "takes more than 1 GiB|does not end within 1 s", marks=SLOW),
    pytest.param("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
                 "does not end within 1 s", marks=SLOW),
    pytest.param("{{ 10 ** (10 ** 9) }}", "does not end within 1 s|takes more", marks=SLOW),
    pytest.param("{% if messages[0].role == 'system' %}{{ 'x' * 2000000 }}{% endif %}", "a text far too long",
                 marks=SLOW)])
def test_templates_that_take_too_much_are_refused(monkeypatch, template, words):
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    with pytest.raises(CheckpointError, match=f"DIR: its chat template .*({words})"):
        opened(template)


def test_a_template_that_takes_too_much_for_some_texts_is_refused_by_its_length():
    chat = opened(FLAT + "{% if 'bomb' in messages[-1].content %}{{ 'x' * 2000000 }}{% endif %}")
    assert chat.fill("", "one text", "query") == "user: one text end\n"
    with pytest.raises(CheckpointError, match="makes 2,0.* characters of 4"):
        chat.fill("", "bomb", "query")


def test_what_a_template_raises_is_left_to_its_use():
    chat = opened("{{ raise_exception('only the assistant') }}")
    with pytest.raises(CheckpointError, match="does not take a user's message .only the assistant"):
        chat.fill("", "a", "query")


@pytest.mark.slow
def test_a_trial_takes_no_time():
    started = time.monotonic()
    for _ in range(20):
        opened(FLAT)
    assert time.monotonic() - started < 20


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.mark.parametrize("normalizer, is_fine", [
    (None, True), ({"type": "Lowercase"}, True), ("x", True), ([], True),
    (chain(replace({"String": " "}, "\u2581"), {"type": "Prepend", "prepend": "\u2581"}), True),
    (chain(replace({"Regex": " {2,}"}, "\u2581"), replace({"String": "<br>"}, "\n")), True),
    (chain(replace({"String": "a"}, "b" * 1000), replace({"String": "b"}, "c" * 1000)), False),
    (chain(chain(replace({"Regex": ""}, "b" * 200)), replace({"String": "bb"}, "c" * 200)), False),
    (replace({"String": ""}, "b" * 20000), False), ({"type": "Prepend", "prepend": "x" * 20000}, False)])
def test_normalizers_that_multiply_texts_are_refused(tmp_path, normalizer, is_fine):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}, "normalizer": normalizer}))
    for check in (lambda: refuse_growth(normalizer, "DIR"), lambda: refuse_growth_in_file(tmp_path)):
        if is_fine:
            check()
        else:
            with pytest.raises(CheckpointError, match="its normalizer may make .* characters of one"):
                check()


def test_maps_of_sentencepiece_are_read(tmp_path):
    import base64

    def charsmap(*texts):
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
            (8).to_bytes(4, "little") + bytes(8) + b"".join(text + b"\0" for text in texts)).decode()}

    refuse_growth(charsmap(b"ab", "\ufdfa".encode()), "DIR")
    with pytest.raises(CheckpointError, match="may make 30,000 characters"):
        refuse_growth(charsmap(b"ab", b"x" * 30000), "DIR")

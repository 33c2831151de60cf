"""Requests that schemathesis makes of the OpenAPI description: none is answered with a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from megatron_embed.serving.app import create_app
from megatron_embed.serving.models import Limits
from megatron_embed.serving.opening import Opening, open_models
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  fixture
from tests.helpers.served import CountingEngine, counting_models
from tests.helpers.toys import MINILM

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


def call_all(app, examples):
    """The number of requests of each path."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    counts = {}
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        def call(case):
            counts[case.operation.label] = counts.get(case.operation.label, 0) + 1
            case.call_and_validate(checks=CHECKS)

        call()
    return counts


def test_no_server_error():
    counts = call_all(create_app(counting_models(CountingEngine())), 2)
    assert len(counts) == 9


@pytest.mark.slow
def test_no_server_error_of_real_models(cross_encoder):
    app = create_app(open_models([str(MINILM), str(cross_encoder)], Opening(), Limits()))
    counts = call_all(app, 300)
    assert counts["POST /v1/embeddings"] >= 300

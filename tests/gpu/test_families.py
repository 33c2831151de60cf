"""Every family on a GPU, in float32: the curves of the same runs on one CPU rank.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.device_runs import train
from tests.helpers.families import FAMILIES, save_family

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
EXACT = 1e-4
"""Relative; sums in another order."""
RUN = {"embedding": {"pooling": "lasttoken"}, "training": {"moe_aux_loss_coefficient": 0.0, "learning_rate": 1e-4}}


# Transformers refuses the configuration of an InternLM3 whose qkv_bias is not its bias, and `train` with it.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "InternLM3, qkv_bias"])
def test_a_family_trains_as_on_the_cpu(models, cpu_pool, name, tmp_path):
    directory = save_family(tmp_path / "model", name, vocab_size=AutoConfig.from_pretrained(models["bert"]).vocab_size)
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(directory)
    expected = train(directory, tmp_path / "cpu", pool=cpu_pool, **RUN)
    assert train(directory, tmp_path / "gpu", **RUN) == pytest.approx(expected, rel=EXACT)

"""Precisions of vectors that do not go with other settings, and weights that do not match them."""

import pytest

from megatron_embed.config.load import config_of_overrides
from megatron_embed.errors import ConfigError

REFUSED = {
    "twice": (["embedding.precision=[int8, int8]"], r"precision = \['int8', 'int8'\]: must name .* none twice"),
    "none": (["embedding.precision=[]"], r"precision = \[\]: must name at least one of float32, int8, binary"),
    "unknown": (["embedding.precision=[int4]"], "embedding.precision.*int4"),
    "weights": (["embedding.precision=[float32, binary]", "objective.precision_weights=[1.0]"],
                r"precision_weights = \[1.0\]: must have one weight per entry of embedding.precision = \['float32'"),
    "no weight": (["embedding.precision=[binary]", "objective.precision_weights=[0.0]"],
                  "precision_weights = .*must be > 0 each"),
    "loss": (["embedding.precision=[int8]", "objective.loss=cosent"],
             "precision = .*'cosent'.* one of info_nce, sigmoid"),
    "lengths": (["embedding.precision=[float32, binary]", "embedding.normalize=false"],
                "precision = .*signs have no length.*leave binary and rescore out"),
    "lengths of documents": (["embedding.precision=[float32, rescore]", "embedding.normalize=false"],
                             "precision = .*signs have no length.*leave binary and rescore out"),
    "tokens": (["embedding.precision=[int8]", "embedding.head=multi_vector", "objective.temperature=1"],
               "precision = .*such vectors are kept in float32"),
    "reranker": (["embedding.precision=[int8]", "task=reranker", "objective.loss=pointwise"],
                 "precision = .*scores and no vectors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        config_of_overrides(["model.path=m", *overrides])


def test_taken():
    config = config_of_overrides(["model.path=m", "embedding.precision=[float32, int8, binary, rescore]",
                                  "embedding.matryoshka_dims=[64, 32]",
                                  "objective.precision_weights=[1, 0.5, 0.5, 0.3]"])
    assert config.embedding.precision == ("float32", "int8", "binary", "rescore")
    config_of_overrides(["model.path=m", "embedding.precision=[int8]", "embedding.normalize=false"])
    config_of_overrides(["model.path=m", "embedding.precision=[binary]", "objective.loss=sigmoid"])

"""Heads, objectives, quantized weights and optimizers on GPUs: the curves of the same runs on one CPU rank.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

import json

import pytest

from tests.helpers.device_runs import call, train
from tests.helpers.sparse_reference import save_sparse_model
from tests.helpers.toys import BERT, MINI_EN, save_model

pytestmark = pytest.mark.slow
EXACT = 1e-4
"""Relative; sums in another order."""
NEAR = {"nf4_of_scales_too": 1e-2}
"""Of bitsandbytes' kernels, those of CPUs round some scales to the next code: one of thousands."""
ADAPTERS = {"lora": {"rank": 4, "alpha": 16}, "training": {"learning_rate": 1e-2}}
RUNS = {
    "bidirectional": ("qwen3", {"model": {"bidirectional": True}}),
    "late_interaction": ("bert", {"embedding": {"head": "multi_vector", "embedding_dim": 16, "query_expansion": 24,
                                                "pooling": None},
                                  "objective": {"temperature": 1.0}}),
    "sparse": ("sparse", {"embedding": {"head": "sparse", "pooling": None}, "objective": {
        "temperature": 2.0, "query_regularizer_weight": 0.01, "document_regularizer_weight": 0.01}}),
    "joint": ("bert", {"embedding": {"head": "joint", "pooling": "cls", "embedding_dim": 10}, "objective": {
        "temperature": 0.2, "score_weights": [1.0, 0.5, 0.8], "self_distillation": True}}),
    "rounded": ("qwen3", {"embedding": {"precision": ["float32", "int8", "rescore"], "matryoshka_dims": [32, 16]},
                          "objective": {"temperature": 0.1}}),
    "guided": ("bert", {"objective": {"guide_model": "bert", "mask_margin": -0.02}}),
    "compatible": ("bert", {"objective": {"compatible_with": "bert"}}),
    "query_side": ("bert", {"training": {"query_side_only": True}}),
    "teacher": ("bert", {"objective": {"loss": "embedding_distillation", "teacher_model": "bert", "temperature": 0.02,
                                       "teacher_distance": "mse", "teacher_projection": True}}),
    "nf4": ("wide", {"model": {"quantization": "nf4", "double_quantization": False}, **ADAPTERS}),
    "nf4_of_scales_too": ("wide", {"model": {"quantization": "nf4"}, **ADAPTERS}),
    "int8": ("wide", {"model": {"quantization": "int8"}, **ADAPTERS}),
    "adamw_8bit": ("qwen3", {"optimizer": {"name": "adamw_8bit"}}),
    "muon": ("qwen3", {"optimizer": {"name": "muon", "distributed": False}}),
    "three_layers": ("three_layers", {}),
    "workers": ("qwen3", {"data": {"workers": 2}}),
}
"""Name -> model and sections; the name of a model in `objective` stands for its directory."""
LAYOUTS = {
    "dp2": {}, "tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2}}
ON_TWO = [("bidirectional", "tp2"), ("bidirectional", "cp2"), ("late_interaction", "dp2"), ("late_interaction", "tp2"),
          ("sparse", "tp2"), ("sparse", "pp2"), ("joint", "dp2"), ("joint", "cp2"), ("rounded", "dp2"),
          ("guided", "dp2"), ("compatible", "pp2"), ("query_side", "tp2"), ("teacher", "dp2"), ("nf4", "tp2"),
          ("int8", "pp2"), ("adamw_8bit", "dp2"), ("muon", "tp2"), ("three_layers", "pp2"),
          ("workers", "tp2")]


@pytest.fixture(scope="module")
def directories(models, tmp_path_factory):
    """Models by name: those of all tests for GPUs, one with an output layer, one whose layers two do not divide, one as
    wide as nf4 needs."""
    folder = tmp_path_factory.mktemp("kinds")
    wide = save_model(folder / "wide", "qwen3", tokenizer=True, head_dim=32, hidden_size=64, intermediate_size=128)
    three = save_model(folder / "three", "qwen3", tokenizer=True, num_hidden_layers=3, head_dim=32)
    return models | {"sparse": str(save_sparse_model(folder / "sparse", "BertConfig", BERT)), "three_layers": three,
                     "wide": wide}


def sections_of(name, directories, rows):
    """The sections of one of RUNS, on rows with a negative each."""
    kind, sections = RUNS[name]
    objective = {key: directories.get(value, value) if isinstance(value, str) else value
                 for key, value in sections.get("objective", {}).items()}
    data = {"train": [rows], "num_negatives": 1, "shuffle": False, **sections.get("data", {})}
    return directories[kind], {**sections, "objective": objective, "data": data}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:48]]
    for row, other in zip(found, found[5:] + found[:5], strict=True):
        row["negatives"] = other["positive"][:1]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture(scope="module")
def expected(directories, rows, cpu_pool, tmp_path_factory):
    """The curve of one of RUNS on one CPU rank."""
    folder = tmp_path_factory.mktemp("expected")

    def run(name):
        if name not in known:
            model, sections = sections_of(name, directories, rows)
            known[name] = train(model, folder / name, pool=cpu_pool, **sections)
        return known[name]

    known: dict[str, list[float]] = {}
    return run


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_one_gpu_is_the_cpu(directories, rows, expected, name, tmp_path):
    model, sections = sections_of(name, directories, rows)
    assert train(model, tmp_path / "run", **sections) == pytest.approx(
        expected(name), rel=NEAR.get(name, EXACT))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name, layout", ON_TWO)
def test_two_gpus_are_the_cpu(directories, rows, expected, name, layout, tmp_path):
    model, sections = sections_of(name, directories, rows)
    curve = train(model, tmp_path / "run", ranks=2, **sections, parallel=LAYOUTS[layout])
    assert curve == pytest.approx(expected(name), rel=EXACT)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_audited(directories, rows, ranks, tmp_path):
    """Of two data-parallel GPUs, by as many and by one."""
    train(directories["qwen3"], tmp_path / "run", ranks=2, data={"train": [rows]},
          checkpoint={"save_every_steps": 2, "keep": 0})
    result = json.loads(call(["audit", tmp_path / "run", "--step", "3", "--json"], ranks).splitlines()[-1])
    assert result["equal"] and result["first_difference"] is None, result

"""8-bit integers in the ONNX graph: ONNX Runtime's quantizers, on real texts of the training data.

Products of activations with weights are computed in 8 bits; tables, norms, attention and pooling stay float32. Two
recipes, the first one that keeps the results:

1. static: activations have one range, that of the calibration texts, weights a scale for every output. Written as pairs
   of QuantizeLinear and DequantizeLinear, standard operators that OpenVINO computes in 8 bits too.
2. blocks: activations and weights have a scale for every 128 numbers, that of activations taken from the text itself
   (MatMulNBits, an operator of ONNX Runtime). Large components of activations, as many models have, spoil the numbers
   of one block only.
"""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.calibration import CalibrationRows
from megatron_embed.export.embedding import PROBE_TEXTS
from megatron_embed.export.engines.base import require, stock_features, stock_pair_features
from megatron_embed.export.engines.files import ENGINE_FILES, EngineFiles
from megatron_embed.export.engines.graph import GRAPH_FILE, LARGEST_FILE, write_graph
from megatron_embed.export.engines.onnx_runtime import OPENVINO_FILE, GraphEngine, OpenVino, write_openvino
from megatron_embed.export.verified_write import ExportOptions, why_no_memory
from megatron_embed.export.verify import library_errors, weight_bytes
from megatron_embed.loading.model_directory import find_model
from megatron_embed.loading.reranker import is_reranker
from megatron_embed.names import ROLES, ExportFormat

logger = logging.getLogger(__name__)

INT8_COSINE = 0.99
"""Smallest, of every text, between the engine's vector and the model's in memory."""
INT8_SCORE_ERROR = 0.3
"""Largest difference of a reranker's score, relative to max(1, |score|): as far as bfloat16 weights may move it."""
INT8_RANK_CORRELATION = 0.99
"""Smallest Spearman correlation of a reranker's scores of training pairs with those of the float32 graph."""
_HELD_OUT = 4
"""Every so many batches of the rows are compared, not calibrated on."""
_BLOCK = 128
_INT8_COMPUTATION = 4
"""MatMulNBits' accuracy_level: activations are rounded to 8 bits too, and products of integers are summed."""
_OPERATORS = {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "MatMulNBits"}
"""Any of them in a graph: it computes in integers."""

Feed = dict[str, NDArray[np.int64]]
"""Inputs of the graph, [texts, tokens] each."""


def int8_files(kind: ExportFormat, options: ExportOptions, rows: CalibrationRows) -> EngineFiles:
    """The files of format `kind`, onnx or openvino, with 8-bit products; see `quantize_graph`."""

    def write(directory: Path) -> None:
        if reason := why_no_memory(directory):
            raise CheckpointError(f"{directory}: not quantized, since the result could not be compared: {reason}")
        write_graph(directory, options.dim)
        quantize_graph(directory, rows)
        if kind == "openvino":
            write_openvino(directory)

    return _bounded(dataclasses.replace(ENGINE_FILES[kind](options), write=write))


def at_its_bound(files: EngineFiles, directory: Path) -> EngineFiles:
    """The same, with the bounds of 8-bit integers where the engine computes in them in this directory."""
    return _bounded(files) if isinstance(files.engine, GraphEngine) and _is_quantized(files, directory) else files


def _bounded(files: EngineFiles) -> EngineFiles:
    return dataclasses.replace(files, minimum_cosine=INT8_COSINE, score_tolerance=INT8_SCORE_ERROR)


def _is_quantized(files: EngineFiles, directory: Path) -> bool:
    if isinstance(files.engine, OpenVino):
        file = directory / OPENVINO_FILE
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return any(f'element_type="{kind}"' in text for kind in ("u8", "i8"))  # of weights
    file = directory / GRAPH_FILE
    if not file.is_file():
        return False
    onnx = require("onnx", "--verify-with onnxruntime")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception:  # noqa: BLE001  # protobuf's own; the engine, which is asked next, says that it is damaged
        return False
    return any(node.op_type in _OPERATORS for node in model.graph.node)


def quantize_graph(directory: Path, rows: CalibrationRows) -> None:
    """Replace the directory's ONNX graph by one of 8-bit products, by the first recipe with which the vector of every
    held-out row and of every probe text stays within INT8_COSINE, or the score within the bounds of a reranker.

    Raises:
        ConfigError: a package is missing, or there are too few rows.
        CheckpointError: no recipe keeps the results.
    """
    require("onnx", "--quantize int8")
    require("onnxruntime.quantization", "--quantize int8")
    file, large = directory / GRAPH_FILE, weight_bytes(directory) > LARGEST_FILE
    calibration, held = _batches(directory, rows)
    with (tempfile.TemporaryDirectory(prefix=".int8-", dir=file.parent) as folder,
          library_errors(directory, "ONNX Runtime"), _quiet()):
        prepared, result = Path(folder) / "prepared.onnx", Path(folder) / file.name
        _prepare(file, prepared, large=large)
        exact, reports = _results(prepared, held), []
        for name, quantize in RECIPES.items():
            quantize(prepared, result, calibration, large)
            passes, report = _compare(exact, _results(result, held))
            logger.info("int8, %s: %s on texts that were not calibrated on", name, report)
            reports.append(f"{name} {report}")
            if passes:
                break
        else:
            raise CheckpointError(f"{directory}: in 8 bits it gives other results than in float32 "
                                  f"({'; '.join(reports)}); export it in float32: without --quantize int8, or "
                                  "without -int8 in checkpoint.export_formats")
        for name in (file.name, f"{file.name}.data"):
            (file.parent / name).unlink(missing_ok=True)
            if (result.parent / name).is_file():
                shutil.move(result.parent / name, file.parent / name)


def _prepare(file: Path, target: Path, *, large: bool) -> None:
    """The graph with transposed weights as constants, by which the quantizers know the products to take."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(file), str(target), skip_symbolic_shape=True, save_as_external_data=large,
                      all_tensors_to_one_file=True)


def _static(prepared: Path, result: Path, calibration: Sequence[Feed], large: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    # Weights of 7 bits: processors without VNNI add two products in 16 bits, which larger ones would overflow. Inputs
    # alone are rounded: the outputs go into norms and sums, where it costs a cosine of 0.05.
    quantize_static(
        str(prepared), str(result), _Reader(calibration), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
        per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax, use_external_data_format=large,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]})


def _blocks(prepared: Path, result: Path, calibration: Sequence[Feed], large: bool) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, accuracy_level=_INT8_COMPUTATION,
                                          bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(prepared)), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(result), use_external_data_format=large)


Quantize = Callable[[Path, Path, Sequence[Feed], bool], None]
"""(prepared graph, result, batches to calibrate on, whether the weights go into a file of their own)"""
RECIPES: dict[str, Quantize] = {"static": _static, "blocks": _blocks}


class _Reader:
    """Batches in the interface of ONNX Runtime's CalibrationDataReader."""

    def __init__(self, batches: Iterable[Feed]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Feed | None:
        """The next batch; None: there is no more."""
        return next(self._batches, None)

    def __iter__(self) -> Iterator[Feed]:
        return self._batches


def _batches(directory: Path, rows: CalibrationRows) -> tuple[list[Feed], list[Feed]]:
    """Batches to calibrate on, and others to compare on, probe texts included; of both roles, or of pairs."""
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))  # equal lengths need no padding
    if is_reranker(find_model(str(directory))):
        batches = [_feed(batch) for batch in stock_pair_features(directory, rows)]
        probes: list[Feed] = []
    else:
        texts = {role: [row[index] for row in rows] for index, role in enumerate(ROLES)}
        batches = [_feed(batch) for role in ROLES for batch in stock_features(directory, texts[role], role)]
        probes = [_feed(batch) for role in ROLES for batch in stock_features(directory, PROBE_TEXTS, role)]
    if len(batches) < _HELD_OUT:
        raise ConfigError(f"--quantize: {len(rows)} rows to calibrate on are too few; give a file of more")
    return ([batch for index, batch in enumerate(batches) if index % _HELD_OUT],
            [*batches[::_HELD_OUT], *probes])


def _feed(batch: dict[str, Tensor]) -> Feed:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def _results(file: Path, batches: Sequence[Feed]) -> Tensor:
    """[texts, dim] vectors or [pairs, 1] scores before the activation, in float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = {node.name for node in session.get_inputs()}
    output = "sentence_embedding" if "sentence_embedding" in {node.name for node in session.get_outputs()} else "logits"
    rows: list[Any] = [session.run([output], {name: values for name, values in batch.items() if name in inputs})[0]
                       for batch in batches]
    return torch.from_numpy(np.concatenate(rows)).double()


def _compare(exact: Tensor, ours: Tensor) -> tuple[bool, str]:
    """Whether the results of the quantized graph are close enough, and how close they are."""
    if exact.shape[1] > 1:
        cosine = torch.nn.functional.cosine_similarity(exact, ours, dim=1)
        return bool(cosine.min() >= INT8_COSINE), f"cosine >= {cosine.min():.4f} (mean {cosine.mean():.4f})"
    exact, ours = exact[:, 0], ours[:, 0]
    error = ((exact - ours).abs() / exact.abs().clamp(min=1)).max()
    ranks = torch.stack([values.argsort().argsort().double() for values in (exact, ours)])
    correlation = torch.corrcoef(ranks)[0, 1]
    return (bool(error <= INT8_SCORE_ERROR and correlation >= INT8_RANK_CORRELATION),
            f"rank correlation {correlation:.4f}, largest difference of a score {error:.3f}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's warnings, which go to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)

"""8-bit integers in the ONNX graph: ONNX Runtime's quantizer, calibrated on real texts.

A product of activations with weights becomes one of unsigned 8-bit activations, whose range is that of the calibration
texts, with signed 8-bit weights, which have a scale for every output. It is written as pairs of QuantizeLinear and
DequantizeLinear, standard operators that OpenVINO reads too. Everything else stays float32, and so do the products
whose inputs lose most by it, as many as the bound asks for.
"""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
from megatron_embed.export.engines.base import is_reranker, require, stock_features, stock_pair_features
from megatron_embed.export.engines.files import ENGINE_FILES, EngineFiles
from megatron_embed.export.engines.graph import GRAPH_FILE, LARGEST_FILE, write_graph
from megatron_embed.export.engines.onnx_runtime import OPENVINO_FILE, GraphEngine, OpenVino, write_openvino
from megatron_embed.export.verified_write import ExportOptions, why_no_memory
from megatron_embed.export.verify import library_errors, weight_bytes
from megatron_embed.names import ROLES, ExportFormat

logger = logging.getLogger(__name__)

INT8_COSINE = 0.99
"""Smallest, of every text, between the engine's vector and the model's in memory."""
INT8_SCORE_ERROR = 0.3
"""Largest difference of a reranker's score, relative to max(1, |score|): as far as bfloat16 weights may move it."""
INT8_RANK_CORRELATION = 0.99
"""Smallest Spearman correlation of a reranker's scores of training pairs with those of the float32 graph."""
FLOAT_SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the products that stay float32, tried in this order."""
_HELD_OUT = 4
"""Every so many batches of the rows are compared, not calibrated on."""
_RANKED_ON = 4
"""Batches on which each product's share in the loss is measured."""

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
        return file.is_file() and '"FakeQuantize"' in file.read_text(encoding="utf-8")
    file = directory / GRAPH_FILE
    if not file.is_file():
        return False
    model = require("onnx", "--verify-with onnxruntime").load(str(file), load_external_data=False)
    return any(node.op_type in ("DequantizeLinear", "MatMulInteger", "QLinearMatMul") for node in model.graph.node)


def quantize_graph(directory: Path, rows: CalibrationRows) -> None:
    """Replace the directory's ONNX graph by one of 8-bit products.

    As few products as possible stay float32, those whose inputs lose most: so many that every held-out batch of rows
    and every probe text keeps its vector within INT8_COSINE, or its score within the bounds of a reranker.

    Raises:
        ConfigError: a package is missing, or there are too few rows.
        CheckpointError: half of the products in float32 are not enough.
    """
    require("onnx", "--quantize int8")
    require("onnxruntime.quantization", "--quantize int8")
    file, large = directory / GRAPH_FILE, weight_bytes(directory) > LARGEST_FILE
    calibration, held = _batches(directory, rows)
    with (tempfile.TemporaryDirectory(prefix=".int8-", dir=file.parent) as folder,
          library_errors(directory, "ONNX Runtime"), _quiet()):
        work = _Quantizer(file, Path(folder), calibration, large=large)
        exact, report = _results(_session(work.prepared), held), ""
        for share in FLOAT_SHARES:
            kept = work.most_sensitive(round(share * len(work.products)))
            work.quantize(kept)
            passes, report = _compare(exact, _results(_session(work.result), held))
            logger.info("int8: %d of %d products in float32: %s on held-out texts", len(kept), len(work.products),
                        report)
            if passes:
                break
        else:
            raise CheckpointError(f"{directory}: with half of its products in float32 the quantized graph still gives "
                                  f"{report}; use float32, or --calibration with rows of more kinds of texts")
        for name in (GRAPH_FILE.name, f"{GRAPH_FILE.name}.data"):
            (file.parent / name).unlink(missing_ok=True)
            if (work.result.parent / name).is_file():
                shutil.move(work.result.parent / name, file.parent / name)


class _Quantizer:
    """One graph, prepared for quantization, and the result of the last attempt."""

    def __init__(self, file: Path, folder: Path, calibration: Sequence[Feed], *, large: bool) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.prepared, self.result = folder / "prepared.onnx", folder / GRAPH_FILE.name
        self._folder, self._calibration, self._large = folder, calibration, large
        # Transposed weights become constants, by which the quantizer knows the products to take.
        quant_pre_process(str(file), str(self.prepared), skip_symbolic_shape=True, save_as_external_data=large,
                          all_tensors_to_one_file=True)
        self.products = _products(self.prepared)
        self._ranked: list[str] | None = None

    def quantize(self, kept: Sequence[str]) -> None:
        """Write `result`, with the named products in float32."""
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        quantize_static(
            str(self.prepared), str(self.result), _Reader(self._calibration), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"], per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_exclude=list(kept), calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=self._large, calibration_cache_path=self._folder / "ranges.json",
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]})

    def most_sensitive(self, count: int) -> list[str]:
        """The products that move the results most when their inputs are in 8 bits, the worst first."""
        if not count:
            return []
        self._ranked = self._ranked or self._rank()
        return self._ranked[:count]

    def _rank(self) -> list[str]:
        """Every product in turn is the only one that takes its input in 8 bits."""
        file, batches = self._folder / "switched.onnx", self._calibration[:: len(self._calibration) // _RANKED_ON or 1]
        _write_with_switches(self.result, file, list(self.products), large=self._large)
        session, every = _session(file), np.eye(len(self.products), dtype=bool)
        plain, *moved = (_results(session, batches, switches=row) for row in [np.zeros_like(every[0]), *every])
        errors = {name: float((result - plain).norm()) for name, result in zip(self.products, moved, strict=True)}
        return sorted(errors, key=lambda name: errors[name], reverse=True)


class _Reader:
    """Batches in the interface of ONNX Runtime's CalibrationDataReader."""

    def __init__(self, batches: Iterable[Feed]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Feed | None:
        """The next batch; None: there is no more."""
        return next(self._batches, None)

    def __iter__(self) -> Iterator[Feed]:
        return self._batches


def _write_with_switches(file: Path, target: Path, products: Sequence[str], *, large: bool) -> None:
    """A quantized graph with one input more, `switches`, [products] bool: which products take their input in 8 bits."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(file))
    graph, nodes = model.graph, []
    producer = {output: node for node in graph.node for output in node.output}
    graph.input.append(helper.make_tensor_value_info("switches", onnx.TensorProto.BOOL, [len(products)]))
    for node in graph.node:
        if node.name in products:
            index, rounded = f"switch_{products.index(node.name)}", node.input[0]
            exact = producer[producer[rounded].input[0]].input[0]  # before QuantizeLinear and DequantizeLinear
            graph.initializer.append(numpy_helper.from_array(np.int64(products.index(node.name)), index))
            nodes += [helper.make_node("Gather", ["switches", index], [f"{index}_on"]),
                      helper.make_node("Where", [f"{index}_on", rounded, exact], [f"{index}_input"])]
            node.input[0] = f"{index}_input"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(target), save_as_external_data=large)


def _products(file: Path) -> dict[str, str]:
    """Products with constant weights of a graph: name -> its input."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return {node.name: node.input[0] for node in graph.node
            if node.op_type == "MatMul" and node.input[1] in constants}


def _batches(directory: Path, rows: CalibrationRows) -> tuple[list[Feed], list[Feed]]:
    """Batches to calibrate on, and others to compare on, probe texts included; of both roles, or of pairs."""
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))  # equal lengths need no padding
    if is_reranker(directory):
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


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _results(session: Any, batches: Sequence[Feed], **more: NDArray[np.bool_]) -> Tensor:
    """[texts, dim] vectors or [pairs, 1] scores before the activation, in float64; `more`: inputs of every batch."""
    inputs = {node.name for node in session.get_inputs()}
    output = "sentence_embedding" if "sentence_embedding" in {node.name for node in session.get_outputs()} else "logits"
    rows = [session.run([output], {name: values for name, values in {**batch, **more}.items() if name in inputs})[0]
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

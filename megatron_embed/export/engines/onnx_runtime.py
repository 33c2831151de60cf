"""ONNX Runtime and OpenVINO: engines that compute the ONNX graph of export/engines/graph.py."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.export.engines.base import Engine, PairScores, require, stock_features, stock_pair_features
from megatron_embed.export.engines.graph import GRAPH_FILE
from megatron_embed.export.verify import library_errors
from megatron_embed.names import Role

OPENVINO_FILE = Path("openvino") / "openvino_model.xml"
"""In the directory, where Sentence Transformers looks for it; the weights are beside it, in openvino_model.bin."""

Graph = Callable[[dict[str, Any]], dict[str, Any]]
"""Named inputs to named outputs, numpy arrays."""


class GraphEngine(Engine):
    """An engine that computes the graph on the token ids that Sentence Transformers makes."""

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        features = stock_features(directory, texts, role)
        return _results(directory, self.open_graph(directory), features, ("sentence_embedding",))[0]

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        features = stock_pair_features(directory, pairs)
        raw, final = _results(directory, self.open_graph(directory), features, ("logits", "score"))
        return PairScores(raw=raw.flatten(), final=final)

    @abstractmethod
    def open_graph(self, directory: Path) -> Graph:
        """The directory's graph, loaded. Raises ConfigError or CheckpointError if it cannot be."""


class OnnxRuntime(GraphEngine):
    """Inference sessions of ONNX Runtime on the CPU."""

    name = "ONNX Runtime"

    def check_installed(self) -> None:
        require("onnxruntime", self.name)

    def open_graph(self, directory: Path) -> Graph:
        runtime = require("onnxruntime", self.name)
        file = _existing(directory / GRAPH_FILE, "onnx")
        with _errors_of(file, self.name):
            session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs = [node.name for node in session.get_inputs()]
        outputs = [node.name for node in session.get_outputs()]

        def run(features: dict[str, Any]) -> dict[str, Any]:
            with _errors_of(file, self.name):
                return dict(zip(outputs, session.run(outputs, _taken(file, features, inputs)), strict=True))

        return run


class OpenVino(GraphEngine):
    """OpenVINO's CPU plugin, asked for float32."""

    name = "OpenVINO"

    def check_installed(self) -> None:
        require("openvino", self.name)

    def open_graph(self, directory: Path) -> Graph:
        openvino = require("openvino", self.name)
        file = _existing(directory / OPENVINO_FILE, "openvino")
        with _errors_of(file, self.name):
            # On processors with bfloat16 instructions the plugin would compute in bfloat16 by default.
            model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        inputs = [port.get_any_name() for port in model.inputs]

        def run(features: dict[str, Any]) -> dict[str, Any]:
            with _errors_of(file, self.name):
                results = model(_taken(file, features, inputs))
            return {name: results[port] for port in model.outputs for name in port.get_names()}

        return run


def write_openvino(directory: Path) -> None:
    """Add openvino/openvino_model.xml and .bin, float32, converted from the directory's ONNX graph."""
    openvino = require("openvino", "--format openvino")
    with library_errors(directory, "OpenVINO"):
        model = openvino.convert_model(str(directory / GRAPH_FILE))
        (directory / OPENVINO_FILE).parent.mkdir(exist_ok=True)
        openvino.save_model(model, str(directory / OPENVINO_FILE), compress_to_fp16=False)


def _existing(file: Path, kind: str) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; write it with `megatron-embed convert megatron-to-hf SRC DST "
                              f"--format {kind}`")
    return file


@contextmanager
def _errors_of(file: Path, engine: str) -> Iterator[None]:
    """Whatever an engine raises about a graph is a CheckpointError: ONNX Runtime's errors share no class."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file}: {engine} cannot use it ({first_line(error)}); the export must not be used"
                              ) from error


def _taken(file: Path, features: dict[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    """The graph's inputs. Raises CheckpointError for one that the tokenizer does not give."""
    unknown = [name for name in inputs if name not in features]
    if unknown:
        raise CheckpointError(f"{file}: needs the input {unknown[0]}, which the tokenizer does not give; write the "
                              "graph with --format onnx")
    return {name: features[name] for name in inputs}


def _results(directory: Path, graph: Graph, batches: Iterable[dict[str, Tensor]],
             outputs: Sequence[str]) -> list[Tensor]:
    """Each output's rows of all batches, one under the other, in float32. Raises CheckpointError without such an
    output."""
    answers = [graph({name: tensor.numpy() for name, tensor in batch.items()}) for batch in batches]
    for name in outputs:
        if name not in answers[0]:
            raise CheckpointError(f"{directory}: its graph has the outputs {', '.join(answers[0])}, and not {name}; "
                                  "write it with --format onnx, which puts pooling and activation inside")
        if len({answer[name].shape[1:] for answer in answers}) > 1:
            raise CheckpointError(f"{directory}: the output {name} of its graph is as wide as the texts are long; "
                                  "write it with --format onnx, which puts pooling inside")
    return [torch.cat([torch.from_numpy(answer[name]) for answer in answers]).float() for name in outputs]

"""Compare every family's token states under several layouts with Transformers; write the table of docs/families.md.

Runs on two CPU ranks of this machine. Exit code 1 if an error exceeds the bound or a round trip is not bit-equal.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from tests.helpers.families import (  # noqa: E402
    BOUND,
    CAUSAL_LM,
    DECODERS,
    FAMILIES,
    LAYOUTS,
    WITH_EXPERTS,
    errors,
    expected_states,
    save_family,
    texts,
)
from tests.helpers.ranks import shutdown_ranks  # noqa: E402
from tests.helpers.tensor_files import tensors_of  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=\n<!-- end of table -->)", re.DOTALL)


def is_bit_equal(source: Path, folder: Path) -> bool:
    """Whether Hugging Face -> Megatron -> Hugging Face reproduces the names, dtypes and bytes of `source`."""
    hf_to_megatron(source, folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    before, after = tensors_of(source), tensors_of(folder / "back")
    return before.keys() == after.keys() and all(
        after[name].dtype == tensor.dtype and torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in before.items())


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {family: save_family(folder / family, family) for family in FAMILIES}
        heads = {family: save_family(folder / f"{family} with a head", family,
                                     "ForCausalLM" if family in CAUSAL_LM else "ForMaskedLM", torch.bfloat16, "30KB")
                 for family in FAMILIES}
        states = {family: expected_states(directory, texts()) for family, directory in models.items()}
        whole = {family: expected_states(models[family], texts(), is_causal=False) for family in DECODERS}
        largest: dict[tuple[str, str], float] = {}
        for layout in LAYOUTS:
            names = WITH_EXPERTS if layout == "EP2" else tuple(FAMILIES)
            values = errors([models[family] for family in names], layout, [states[family] for family in names], texts())
            largest |= {(family, layout): value for family, value in zip(names, values, strict=True)}
        values = errors([models[family] for family in DECODERS], "1 rank", [whole[family] for family in DECODERS],
                        texts(), bidirectional=True)
        largest |= {(family, "bidirectional"): value for family, value in zip(DECODERS, values, strict=True)}
        equal = {family: all(is_bit_equal(Path(directory), folder / f"trip {index} {family}")
                             for index, directory in enumerate((models[family], heads[family])))
                 for family in FAMILIES}
    columns = [*LAYOUTS, "bidirectional"]
    lines = ["| family | " + " | ".join(columns) + " | round trip bit-equal |", "|---" * (len(columns) + 2) + "|"]
    for family in FAMILIES:
        cells = [f"{largest[family, column]:.1e}" if (family, column) in largest else "-" for column in columns]
        lines.append(f"| {family} | " + " | ".join(cells) + f" | {'yes' if equal[family] else '**no**'} |")
    PAGE.write_text(TABLE.sub("\n".join(lines), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(max(largest.values()) > BOUND or not all(equal.values()))


if __name__ == "__main__":
    try:
        code = main()
    finally:
        shutdown_ranks()
    sys.exit(code)

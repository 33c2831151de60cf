"""Count what makes the code hard to read: size, small files, wide signatures, private words, branches on the task.

    python tools/code_counts.py                    # one line per count
    python tools/code_counts.py --words            # also list each private word with its file and line
    python tools/code_counts.py --trace            # also list the files of the package that a training run executes
    python tools/code_counts.py --tree OTHER_CLONE # the same counts for another checkout

A private word is listed in VOCABULARY: papers and other trainers use another word for the same thing.
"""

import argparse
import ast
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from small_models import save_random_model

REPOSITORY = Path(__file__).resolve().parents[1]

# Regular expression of a private word -> the usual term. Searched in the package, tools, tests and docs.
VOCABULARY = {
    r"\bkept_rows\b": "valid_rows",
    r"\b_told\b": "_broadcast_from_last_stage",
    r"\btwins?\b": "tensor- and context-parallel ranks of a replica", r"\bTwins\b": "ModelParallelRanks",
    r"\beveryone\b": "tp_dp_cp_group",
    r"\bclass Shared\b|\btraining[./]sharing\b": "ReplicaSplit, objectives/replica_split.py",
    r"\bgather_pool\b|(?<!/lib\.rs, )\bPool\b": "gather_ids, GlobalBatchIds",
    r"\basking\b": "query", r"\banswering\b": "positive", r"\bof_scale\b": "for_scale",
    r"\bOwners\b": "own_negatives_only", r"\bleft_out\b(?= *[:=,)\[.&|])": "ignored",
    r"\bneither\b(?= *[:=)\[&|]|\.sum)": "masked",
    r"\bown_documents\b": "hard-negative (triplet) and distillation objective",
    r"\bclass Width\b|\bWidth\(": "MatryoshkaDim", r"\bshorten\b": "truncate",
    r"\bdraws_documents\b": "sample_documents", r"\bof_kind\b": "as_kind", r"\brecognise\(": "detect_format",
    r"\bdata[./](peers|raw_rows|record|fields|tokenless|prompts|rerank)\b": "see data/ in the layout",
    r"\bfill_bins\b": "pack_to_budget", r"\bdivide_bins\b": "split_to_count", r"\bwhole_groups\b": "keep_groups",
    r"\bconstant_tokens\b": "uniform_size",
    r"\bcarried\b(?!\.safetensors)": "passthrough", r"\bcompanions\b": "sidecar files", r"\bannounced\b": "declared",
    r"\bpour\(": "write_at", r"\bhead_of_runs\b": "take",
    r"\bmoved_on\b": "changed_since_check", r"\bnothing_left\b": "is_complete", r"\bstanding\(": "resume_state",
    r"\bcarry_out\b": "run_training", r"\bblaming\b": "error_context", r"\bjudged\b": "reranked",
    r"\bsecond_stage\b": "reranking", r"\bby_words\b|\b[Bb]y words\b": "bm25",
    r"\bwrite_whole\b": "write_atomic", r"\bsole_writer\b": "directory_lock", r"\bleave_at_once\b": "abort",
    r"\bMeeting\b|\bopen_meeting\b": "rendezvous barrier", r"\bLifeWatch\b": "HeartbeatMonitor",
    r"\bspeaker\b": "reporting rank",
    r"\braise_first\b": "raise_on_all_ranks", r"\bshare_from_first\b": "broadcast_from_rank0",
    r"\bHeldBack\b": "NoSync", r"\bclass Move\b|\bMove\(": "PermuteIndex",
    r"\bFinding\b": "Check", r"\bexamine\(": "run_checks",
    r"(?<!there )\bis no (?!longer\b|more\b|way\b)\w+": "is not a ...", r"\bhalf a surrogate\b": "unpaired surrogate",
    r"\b(going|goes|go) on (from|with|at|to)\b": "resume", r"\banew\b": "again",
    r"\bwhat the directory says\b": "the model's own setting", r"\bkill[ _]storm\b": "crash-restart test",
    r"\bthe house\b": "the layout", r"\brooms?\b(?! for)": "package", r"\bcure\b": "fix",
}
BOUND_NAMES = {"found": "the thing's own name: loss_gradient, record, error", "place": "index, position, path, slot",
               "number": "index, row_id, step"}
"""Names of variables and parameters, counted at each binding."""
NULL_IN_PYTHON = re.compile(r"\b[Nn]ull\b(?= *[:;,.)]|$| where| means| for| is\b)")


def package_files(tree: Path) -> list[Path]:
    return sorted((tree / "megatron_embed").rglob("*.py"))


def searched_files(tree: Path) -> list[Path]:
    """Files to search for private words: all tracked text files except this program."""
    listed = subprocess.run(["git", "-C", str(tree), "ls-files"], capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.splitlines()
             if name.endswith((".py", ".md", ".sh", ".sbatch", ".yaml", ".toml")) and name != "tools/code_counts.py"]
    return [tree / name for name in names]


def module_name(tree: Path, path: Path) -> str:
    return ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")


def importers(tree: Path) -> dict[str, set[str]]:
    """Module of the package -> modules of the package that import it."""
    modules = {module_name(tree, path): ast.parse(path.read_text(encoding="utf-8")) for path in package_files(tree)}
    users: dict[str, set[str]] = {name: set() for name in modules if name not in ("megatron_embed",)}
    for name, parsed in modules.items():
        for node in ast.walk(parsed):
            names = ([f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
                     if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            for imported in names:
                if imported in users and imported != name:
                    users[imported].add(name)
    return users


def functions(tree: Path) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in package_files(tree):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [argument.arg for argument in
             (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def docstrings(tree: Path, without: str = "") -> list[str]:
    """Docstrings of modules, classes, functions and fields of the package, except one folder."""
    texts = []
    for path in package_files(tree):
        if path.parent.name == without:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)):
                texts.append(node.value.value.strip())
    return texts


def python_words(tree: Path) -> int:
    """Number of docstring lines outside config/ that write null for None."""
    lines = [line for text in docstrings(tree, without="config") for line in text.splitlines()]
    return sum(bool(NULL_IN_PYTHON.search(line)) for line in lines)


def private_words(tree: Path) -> dict[str, list[str]]:
    """FILE:LINE of each private word, by pattern."""
    occurrences: dict[str, list[str]] = collections.defaultdict(list)
    for path in searched_files(tree):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = (node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else
                        node.arg if isinstance(node, ast.arg) else None)
                if name in BOUND_NAMES:
                    occurrences[name].append(f"{path.relative_to(tree)}:{node.lineno}: {name}")
        for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern in VOCABULARY:
                occurrences[pattern] += [f"{path.relative_to(tree)}:{line_number}: {line.strip()[:100]}"
                                         for _ in re.finditer(pattern, line)]
    return occurrences


TRACER = """
import json, sys, threading
from pathlib import Path
package, out = Path(sys.argv[1]).resolve() / "megatron_embed", sys.argv[2]
sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[3:]
phases = {"set-up": set(), "load": set(), "step": set()}
inside = threading.local()
def profile(frame, event, argument):
    if event != "call":
        if event == "return" and frame.f_code.co_name == "train_step": inside.step = False
        return
    name = frame.f_code.co_filename
    if frame.f_code.co_name == "train_step": inside.step = profile.stepped = True
    if not name.startswith(str(package)) or frame.f_code.co_name == "<module>": return
    phase = ("step" if getattr(inside, "step", False) else
             "load" if threading.current_thread() is not threading.main_thread() else
             None if profile.stepped else "set-up")
    if phase: phases[phase].add(str(Path(name).relative_to(package)))
profile.stepped = False
threading.setprofile(profile); sys.setprofile(profile)
import runpy
try: runpy.run_module("megatron_embed", run_name="__main__")
except SystemExit as end: code = end.code
sys.setprofile(None)
Path(out).write_text(json.dumps({name: sorted(files) for name, files in phases.items()}))
sys.exit(code)
"""


def trace(tree: Path) -> dict[str, list[str]]:
    """Files of the package with executed functions: before the first step, in the loader's threads, in the step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_random_model(folder / "model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=48)
        values = {
            "model": {"path": str(folder / "model"), "dtype": "float32"}, "embedding": {"pooling": "mean"},
            "data": {"train": [str(tree / "examples" / "data" / "mini_en" / "train.jsonl")], "num_negatives": 1,
                     "query_max_length": 32, "document_max_length": 64},
            "training": {"global_batch_size": 16, "micro_batch_size": 4, "train_steps": 2},
            "checkpoint": {"directory": str(folder / "run")}}
        (folder / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
        (folder / "tracer.py").write_text(TRACER, encoding="utf-8")
        subprocess.run([sys.executable, str(folder / "tracer.py"), str(tree), str(folder / "files.json"),
                        "megatron-embed", "train", str(folder / "run.yaml")],
                       check=True, cwd=folder, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        files: dict[str, list[str]] = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        return files


def counts(tree: Path) -> dict[str, int]:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package_files(tree)}
    with_code = {path: count for path, count in lines.items() if count}
    first_words = [text.split(None, 1)[0] for text in docstrings(tree) if text]
    sources = [path.read_text(encoding="utf-8") for path in package_files(tree)]
    return {
        "lines of the package": sum(lines.values()),
        "modules": len(with_code),
        "files under 60 lines": sum(count < 60 for count in with_code.values()),
        "files over 400 lines": sum(count > 400 for count in with_code.values()),
        "modules with one importer": sum(len(users) == 1 for users in importers(tree).values()),
        "functions with 8 or more parameters": sum(num_parameters(node) >= 8 for _, node in functions(tree)),
        "functions over 50 lines": sum(
            (node.end_lineno or 0) - node.lineno + 1 > 50 for _, node in functions(tree)),
        'docstrings that begin with "Of" or "Where"': sum(word in ("Of", "Where") for word in first_words),
        "docstring lines that say null for None": python_words(tree),
        "branches on config.task": sum(len(re.findall(r"\btask\s*(?:==|!=)\s*[\"']", source)) for source in sources),
        "private words left": sum(map(len, private_words(tree).values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the checkout to count (default: this one)")
    parser.add_argument("--words", action="store_true", help="print file and line of every private word")
    parser.add_argument("--trace", action="store_true", help="run two training steps and count the files they execute")
    args = parser.parse_args()
    tree = args.tree.resolve()
    if args.words:
        for pattern, occurrences in private_words(tree).items():
            for occurrence in occurrences:
                print(f"{(VOCABULARY | BOUND_NAMES)[pattern]}  <-  {occurrence}")
    for name, count in counts(tree).items():
        print(f"{count:>7}  {name}")
    if args.trace:
        for phase, files in trace(tree).items():
            print(f"{len(files):>7}  files of the package executed: {phase}")


if __name__ == "__main__":
    main()

"""Rules that an import can break: which package may import which, and which open without Megatron-Core."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_embed"

# `platform` stands where the package may use Megatron-Core: platform/compat.py is the one door to it.
MAY_IMPORT = {
    "config": set(),
    "platform": set(),
    "kernels": set(),
    "losses": set(),
    "parallel": {"config", "platform"},
    "data": {"config"},
    "models": {"config", "kernels", "parallel", "platform"},
    "objectives": {"config", "losses", "parallel"},
    "checkpoint": {"config", "parallel", "models", "objectives", "platform"},
    "convert": {"config", "parallel", "models", "checkpoint"},
    "evaluation": {"config", "losses", "parallel", "platform", "data", "models"},
    "mining": {"config", "parallel", "platform", "data", "evaluation", "loading"},
    "planning": {"config", "parallel", "data", "models", "checkpoint", "convert"},
    "init": {"config", "data", "models", "planning"},
    "training": {"config", "parallel", "platform", "data", "models", "objectives", "checkpoint", "planning"},
    "loading": {"config", "parallel", "platform", "data", "models", "checkpoint", "convert", "evaluation"},
    "export": {"config", "parallel", "platform", "data", "models", "checkpoint", "convert", "evaluation", "loading"},
    "run": {"config", "parallel", "platform", "data", "models", "objectives", "checkpoint", "convert", "evaluation",
            "planning", "training", "loading", "export"},
    "audit": {"config", "parallel", "platform", "data", "models", "objectives", "checkpoint", "training", "loading",
              "run"},
    "serving": {"config", "parallel", "platform", "data", "models", "evaluation", "loading", "export"},
    "cli": {"config", "parallel", "platform", "data", "models", "checkpoint", "convert", "evaluation", "mining",
            "planning", "loading", "export", "run", "init", "serving", "audit"},
}
EVERYONE = {"errors", "batch", "names", "rounding", "__version__"}

THIRD_PARTY = {
    "config": {"yaml"},
    "platform": {"torch", "megatron", "packaging", "bitsandbytes"},
    "kernels": {"torch", "triton"},
    "losses": {"torch"},
    "parallel": {"torch"},
    "data": {"torch", "numpy", "datasets", "pyarrow", "tokenizers", "transformers", "tqdm"},
    "models": {"torch", "transformer_engine", "bitsandbytes"},
    "checkpoint": {"torch", "numpy"},
    "convert": {"torch", "numpy", "safetensors", "transformers", "tqdm", "psutil", "xxhash", "regex"},
    "objectives": {"torch"},
    "evaluation": {"torch", "numpy", "pytrec_eval", "scipy", "safetensors", "tqdm", "mteb", "faiss"},
    "mining": {"torch", "numpy", "bm25s", "tqdm"},
    "planning": set(),
    "init": {"yaml"},
    "training": {"torch", "numpy", "tensorboard", "tqdm", "wandb"},
    "loading": {"torch", "huggingface_hub"},
    "export": {"torch", "numpy", "transformers", "sentence_transformers", "peft", "psutil", "tqdm", "onnx",
               "onnxruntime"},
    "run": {"torch", "numpy"},
    "audit": {"torch", "numpy"},
    "serving": {"torch", "numpy", "tqdm", "fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn",
                "prometheus_client"},
    "cli": {"torch", "numpy", "tqdm"},
}

OPEN_WITHOUT_MEGATRON = ("errors", "batch", "names", "rounding", "config", "data", "kernels", "losses",
                         "convert.tables", "models.families", "models.known_keys", "models.saved_settings", "planning")

GETATTR_CEILING = 13
"""Calls of getattr and hasattr in the package. Lower it when one goes; raising it needs a reason in the commit."""


def imported_by(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a syntax tree imports, wherever it does: `megatron_embed.config.schema`, `torch`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_packages_imported_by(source: str) -> set[str]:
    names = (name.split(".") for name in imported_by(ast.parse(source)))
    return {name[1] for name in names if name[0] == "megatron_embed" and len(name) > 1}


def packages_imported_by(source: str) -> set[str]:
    names = {name.split(".")[0] for name in imported_by(ast.parse(source))}
    return names - set(sys.stdlib_module_names) - {"megatron_embed"}


def files_of(module: str) -> list[Path]:
    """The files of a module, or of a folder with everything below it."""
    path = PACKAGE.joinpath(*module.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_every_package_is_in_the_table():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(MAY_IMPORT) == set(THIRD_PARTY)
    assert all("cli" not in allowed for allowed in MAY_IMPORT.values())
    assert "evaluation" not in MAY_IMPORT["training"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_downwards_only(package):
    allowed = MAY_IMPORT[package] | EVERYONE | {package}
    for path in files_of(package):
        source = path.read_text(encoding="utf-8")
        extra = own_packages_imported_by(source) - allowed
        assert not extra, f"{path} imports {sorted(extra)}; {package} may import only {sorted(allowed)}"
        extra = packages_imported_by(source) - THIRD_PARTY[package]
        assert not extra, f"{path} imports {sorted(extra)}; {package} may import only {sorted(THIRD_PARTY[package])}"


def test_table_has_no_circle():
    reached: set[str] = set()
    while ready := {package for package, allowed in MAY_IMPORT.items()
                    if package not in reached and allowed <= reached}:
        reached |= ready
    assert reached == set(MAY_IMPORT)


def test_top_level_modules_import_no_room():
    for name in ("errors", "batch", "names", "rounding"):
        assert not own_packages_imported_by((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def test_package_itself_imports_nothing_until_it_is_asked():
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert own_packages_imported_by(source) == {"api", "config", "platform"}
    tree = ast.parse(source)
    for_checkers = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(for_checkers.test) == "TYPE_CHECKING"
    types = set(imported_by(for_checkers))
    assert {"megatron_embed.api.Embedder", "megatron_embed.config.schema.RunConfig"} < types
    assert top_level_imports(PACKAGE / "__init__.py") == {"typing.TYPE_CHECKING"} | types


def top_level_imports(path: Path) -> set[str]:
    """What importing this file imports: what stands outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return set(imported_by(tree))


def files_behind(name: str) -> list[Path]:
    """The file of our module that an imported name is, or is in."""
    parts = name.split(".")[1:]
    for length in (len(parts), len(parts) - 1):
        path = PACKAGE.joinpath(*parts[:length]).with_suffix(".py")
        if length and path.is_file():
            return [path]
    return []


@pytest.mark.parametrize("module", OPEN_WITHOUT_MEGATRON)
def test_opens_without_megatron(module):
    pending = [(path, ()) for path in files_of(module)]
    seen: set[Path] = set()
    while pending:
        path, way = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        way = (*way, path.relative_to(PACKAGE).as_posix())
        for name in top_level_imports(path):
            assert name.split(".")[0] != "megatron", f"{' -> '.join(way)} imports {name}"
            if name.startswith("megatron_embed."):
                pending += [(behind, way) for behind in files_behind(name)]
    assert seen


def test_the_walk_finds_megatron_where_it_is():
    assert any(name.startswith("megatron.") for name in top_level_imports(PACKAGE / "platform" / "compat.py"))
    assert files_behind("megatron_embed.platform.compat.parallel_state") == [PACKAGE / "platform" / "compat.py"]
    assert own_packages_imported_by("def f():\n    from megatron_embed.cli.train import run") == {"cli"}
    assert own_packages_imported_by("from megatron_embed import cli") == {"cli"}


def test_package_never_imports_tools_or_tests():
    for path in PACKAGE.rglob("*.py"):
        assert not {"tools", "tests"} & packages_imported_by(path.read_text(encoding="utf-8")), path


def test_getattr_and_hasattr_stay_rare():
    calls = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]
    assert len(calls) <= GETATTR_CEILING, f"ask the type, not the object: {calls}"

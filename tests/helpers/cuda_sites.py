"""Finds, in Python source, what needs CUDA: calls, devices, tensor types and imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

METHODS = ("cuda", "pin_memory", "record_stream")
_NAMES_ONLY = ("getattr", "hasattr", "delattr", "setattr")
"""Built-in functions whose string arguments are attributes' names."""


@dataclass(frozen=True, order=True, kw_only=True)
class Site:
    """One place. `what`: `torch.cuda.NAME`, `.METHOD()`, `CALLEE(device=)`, `CALLEE(pin_memory=)`, `CALLEE(cuda)`,
    `torch.cuda.KIND string` or `import NAME`."""

    module: str
    line: int
    function: str
    """Innermost enclosing function or method, with its classes; empty at module level."""
    what: str


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; `.c` where it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def find_sites(module: str, source: str) -> list[Site]:
    """All sites of one module, in order."""
    sites: set[Site] = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # Decorators, defaults and annotations belong to the place around, but nothing needs that precision.
            function = f"{function}.{node.name}".lstrip(".")
        for what in _needs(node):
            sites.add(Site(module=module, line=node.lineno, function=function, what=what))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return sorted(sites)


def _needs(node: ast.AST) -> Iterator[str]:
    """Uses of CUDA by one node, without its children."""
    if isinstance(node, ast.Attribute):
        name = dotted(node)
        if name.startswith("torch.cuda.") and name.count(".") == 2:
            yield name
    elif isinstance(node, ast.Constant) and _text(node).startswith("torch.cuda."):
        yield f"{node.value} string"
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
        yield from (f"import {node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module == "torch" and not node.level:
        yield from ("import torch.cuda" for alias in node.names if alias.name == "cuda")
    elif isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if alias.name.startswith("torch.cuda"))
    elif isinstance(node, ast.Call):
        yield from _call_needs(node)


def _call_needs(node: ast.Call) -> Iterator[str]:
    callee = dotted(node.func)
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield f".{node.func.attr}()"
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if "pin_memory" in keywords:
        yield f"{callee}(pin_memory=)"
    if _text(keywords.get("device")).startswith("cuda"):
        yield f"{callee}(device=)"
    if callee not in _NAMES_ONLY and any(_text(argument).partition(":")[0] == "cuda" for argument in node.args):
        yield f"{callee}(cuda)"

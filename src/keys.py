"""Content keys: the name of a stage is a hash of everything it depends on."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ONLY_SHOWN = "samples_to_show"  # a method that pictures are made of, and no figure: it is no part of a stage


def content_key(**parts: Any) -> str:
    """Sixteen hex digits over JSON of ``parts``; the order of keys does not matter."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def source_digest(*objects: object, within: str | None = None) -> str:
    """Digest of our own source behind classes (bases included), functions and modules.

    Comments, docstrings and formatting do not count, nor a method ``samples_to_show``: they change no result and should
    not train anything again.

    Args:
        within: a package, such as ``src.attacks``, in which imports are followed as well.
    """
    return _sources_digest(objects, within)


@functools.cache
def _sources_digest(objects: tuple[object, ...], within: str | None) -> str:
    files: set[str] = set()
    for item in objects:
        members = item.__mro__ if inspect.isclass(item) else (item,)
        for member in members:
            module = inspect.getmodule(member)
            if module is not None and module.__name__.startswith("src.") and module.__file__:
                files.add(module.__file__)
    if within is not None:
        waiting = list(files)
        while waiting:
            found = _imported(waiting.pop(), within) - files
            files |= found
            waiting += found
    return content_key(source=sorted(_code_digest(file) for file in files))


@functools.cache
def _imported(file: str, package: str) -> frozenset[str]:
    """Files of ``package`` that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    root = Path(__file__).parent.parent
    paths = (root / f"{name.replace('.', '/')}.py" for name in names if name.startswith(package))
    return frozenset(str(path) for path in paths if path.exists())


@functools.cache
def _code_digest(file: str) -> str:
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", None) != ONLY_SHOWN]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def seed_of(*parts: int) -> int:
    """A seed that depends on all parts and mixes them well; the same on every machine."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def networks_of(module: nn.Module) -> list[type]:
    """Our own classes inside a module: their source is part of its key."""
    classes = {type(child) for child in module.modules()}
    return sorted((cls for cls in classes if cls.__module__.startswith("src.")), key=lambda cls: cls.__qualname__)

"""The code folder of a batch: what its entrypoint must be, and how it travels.

It never imports that code: an entrypoint is judged by its syntax tree, and where that cannot
decide, it is accepted and the worker reports. `inside` unpacks what is packed here. The batch file
that names the folder is read next door, by `inputs`.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import hashlib
import inspect
import io
import os
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_envs.disk.files import (
    check_folder,
    entries_of,
    has_vanished,
    is_file,
    kind_of,
    read_bytes,
    unreadable,
)
from ray_envs.errors import InvalidInput
from ray_envs.models import BatchSpec, is_name, split_entrypoint

#: What a code folder may weigh. A guess: code is kilobytes, and every worker receives all of it.
CODE_LIMIT_BYTES = 100 * 1024 * 1024

#: Never part of the code: version control, environments, caches, results.
_SKIPPED_NAMES = frozenset({".git", ".hg"})
_SKIPPED_FOLDERS = frozenset(
    {".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
_SKIPPED_FILES = ("*.pyc", "*.results.jsonl*")

#: The earliest moment that a zip archive can hold.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

#: Statements whose bodies bind names of their own.
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
#: Calls that can bind a name where no syntax tree shows it.
_HIDDEN_BINDERS = frozenset({"exec", "globals", "locals", "setattr", "vars"})


# -- entrypoints -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Binding:
    """One statement at a module's top level, which may bind names."""

    node: ast.stmt
    #: Whether it stands in an `if`, `try`, … and may therefore not run.
    is_conditional: bool


def source_sha256(folder: Path) -> str:
    """A hash of the Python files of a code folder: what a result depends on.

    Other files do not count: a batch file in the folder changes with every new case.
    """
    digest = hashlib.sha256()
    _, archive = pack_code(folder)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name in files.namelist():
            if name.endswith(".py"):
                digest.update(f"{name}\0{files.getinfo(name).CRC}\0".encode())
    return digest.hexdigest()


def check_entrypoint(batch: BatchSpec, code: Path | None) -> None:
    """Nothing, if `batch.entrypoint` can be called with every case, as far as its source tells.

    The module is not imported. What only an import would tell is accepted: a module of an installed
    package, a decorated function, a class, an imported name.

    Args:
        batch: what `read_batch` returned.
        code: the folder that is put on sys.path in the workers, if one is.

    Raises:
        InvalidInput: a syntax error, no such module or function, arguments that do not fit it.
    """
    module, function = split_entrypoint(batch.entrypoint, where="entrypoint")
    path = _module_file(code, module) if code is not None else None
    if path is None:
        return
    tree = _parsed(path)
    bindings = [
        binding
        for binding in _bindings(tree.body)
        if function in _bound_names(binding.node) or _is_star(binding.node)
    ]
    if not bindings:
        if not _binds_in_hiding(tree, function):
            _refuse_missing(tree, path, function)
        return
    if all(
        isinstance(b.node, ast.AsyncFunctionDef) and not b.node.decorator_list for b in bindings
    ):
        raise InvalidInput(
            f"{function} is a coroutine function",
            where=f"{path}, line {getattr(bindings[-1].node, 'lineno', 0)}",
            hint=f"write def {function}(…) and call asyncio.run inside",
        )
    last = bindings[-1]
    # of several alternatives, only an import tells which one holds
    is_certain = len(bindings) == 1 or not last.is_conditional
    if is_certain and isinstance(last.node, ast.FunctionDef) and not last.node.decorator_list:
        _check_calls(batch, last.node)


def _module_file(code: Path, module: str) -> Path | None:
    """The source file of `module` below `code`; None, if only a worker can find it.

    Raises:
        InvalidInput: it is not there, and a nearly equal name or its package is.
    """
    folder = code
    parts = module.split(".")
    source: Path | None = None
    for depth, name in enumerate(parts):
        package, plain = folder / name, folder / f"{name}.py"
        if is_file(package / "__init__.py"):
            source, folder = package / "__init__.py", package
        elif is_file(plain):
            if depth < len(parts) - 1:
                raise InvalidInput(
                    f"no module {module!r}: {'.'.join(parts[: depth + 1])} is not a package",
                    where=str(plain),
                    hint=f"write {'.'.join(parts[: depth + 1])}:<function>",
                )
            source = plain
        elif kind_of(package) == "folder":
            source, folder = None, package  # an installed package of that name would go first
        else:
            _refuse_near_module(code, folder, parts, depth)
            return None
    return source


def _refuse_near_module(code: Path, folder: Path, parts: list[str], depth: int) -> None:
    """Raise, unless the part at `depth`, not found in `folder`, may well be importable."""
    name = parts[depth]
    siblings = _modules_in(folder)
    is_known = name in siblings or (depth == 0 and name in sys.stdlib_module_names)
    near = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.75)
    is_ours = depth > 0 and is_file(folder / "__init__.py")
    if is_known or not (near or is_ours):
        return
    if near:
        meant = ".".join([*parts[:depth], *near, *parts[depth + 1 :]])
        hint = f"did you mean {meant!r}?"
    else:
        hint = f"its modules: {', '.join(sorted(siblings)) or 'none'}"
    raise InvalidInput(f"no module {'.'.join(parts)!r} in {code}", where="entrypoint", hint=hint)


def _modules_in(folder: Path) -> set[str]:
    """The names that could be imported from `folder`: sources, extension modules, packages."""
    found: set[str] = set()
    for entry in entries_of(folder):
        stem, _, suffix = entry.name.partition(".")
        is_module = suffix == "py" or suffix.endswith(("so", "pyd"))
        if is_name(stem) and (is_module or is_file(Path(entry.path, "__init__.py"))):
            found.add(stem)
    return found - {"__init__", "__main__"}


def _parsed(path: Path) -> ast.Module:
    source = read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about their code is for the worker to give
            tree = ast.parse(source, str(path))
            # the tree alone lets pass what only compiling refuses, as a return outside a function
            compile(tree, str(path), "exec", dont_inherit=True)
    except SyntaxError as err:
        line = f", line {err.lineno}" if err.lineno else ""
        raise InvalidInput(
            f"a syntax error: {err.msg}",
            where=f"{path}{line}",
            detail=(err.text or "").strip(),
            hint="mend it: no worker could import the module",
        ) from None
    except (ValueError, RecursionError, MemoryError) as err:
        raise InvalidInput(f"cannot be read as Python: {err}", where=str(path)) from None
    return tree


def _bindings(body: Iterable[ast.stmt], *, is_conditional: bool = False) -> Iterator[_Binding]:
    """Every statement that runs at the module's top level, blocks included, in order."""
    for node in body:
        yield _Binding(node, is_conditional)
        if isinstance(node, _SCOPES):
            continue
        for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            for field in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(part, field, ()), is_conditional=True)


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that `node` binds; too many rather than too few."""
    if isinstance(node, _SCOPES):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    names = (child for child in ast.walk(node) if isinstance(child, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def _is_star(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)


def _binds_in_hiding(tree: ast.Module, function: str) -> bool:
    """Whether the module may bind `function` although its top level does not show it."""
    return any(
        (isinstance(node, ast.Name) and node.id in _HIDDEN_BINDERS)
        or (isinstance(node, ast.Global) and function in node.names)
        or (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        for node in ast.walk(tree)
    )


def _refuse_missing(tree: ast.Module, path: Path, function: str) -> None:
    functions = [
        binding.node.name
        for binding in _bindings(tree.body)
        if isinstance(binding.node, ast.FunctionDef)
    ]
    near = difflib.get_close_matches(function, functions, n=1)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "its functions: " + ", ".join(functions) if functions else "it defines no function"
    raise InvalidInput(f"the module has no {function!r}", where=str(path), hint=hint)


def _check_calls(batch: BatchSpec, function: ast.FunctionDef) -> None:
    signature = _signature(function.args)
    for index, case in enumerate(batch.cases):
        try:
            signature.bind(*case.args, **case.kwargs)
        except TypeError as err:
            raise InvalidInput(
                f"cases[{index}] ({case.id!r}): {err}",
                where=f"entrypoint {batch.entrypoint}",
                hint=f"it is defined as {function.name}({ast.unparse(function.args)})",
            ) from None


def _signature(args: ast.arguments) -> inspect.Signature:
    """The signature that a `def` with `args` has; only whether a default is there counts."""
    kind = inspect.Parameter
    positional = [
        *((arg, kind.POSITIONAL_ONLY) for arg in args.posonlyargs),
        *((arg, kind.POSITIONAL_OR_KEYWORD) for arg in args.args),
    ]
    first_default = len(positional) - len(args.defaults)
    parameters = [
        kind(arg.arg, how, default=kind.empty if index < first_default else None)
        for index, (arg, how) in enumerate(positional)
    ]
    if args.vararg:
        parameters.append(kind(args.vararg.arg, kind.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        empty = kind.empty if default is None else None
        parameters.append(kind(arg.arg, kind.KEYWORD_ONLY, default=empty))
    if args.kwarg:
        parameters.append(kind(args.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


# -- code folders ----------------------------------------------------------------------------------


def pack_code(folder: Path, *, limit_bytes: int = CODE_LIMIT_BYTES) -> tuple[str, bytes]:
    """The archive of a code folder as (sha256 in hex, zip bytes), equal for equal content.

    Equal on every machine: sorted names, one time stamp, one mode, and no compression, whose result
    depends on the zlib that is installed. Left out: version control, caches, environments, result
    files, links that lead outside or to folders, and whatever vanishes meanwhile.

    Raises:
        InvalidInput: no such folder, too large, or a file in it cannot be read.
    """
    check_folder(folder, f"the code folder {str(folder)!r}", where="code")
    root = folder.resolve()
    sizes: Counter[str] = Counter()
    files = sorted(_code_files(root, root))
    for name, path in files:
        try:
            sizes[name] = path.stat().st_size
        except OSError:
            sizes[name] = 0  # reading it tells why
    _check_size(sizes, folder, limit_bytes)

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, path in files:
            try:
                content = path.read_bytes()
            except OSError as err:
                if has_vanished(err):
                    continue
                raise unreadable(path, err) from None
            sizes[name] = len(content)  # it may have grown since it was measured
            _check_size(sizes, folder, limit_bytes)
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.create_system = 3  # Unix, whatever this machine is
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content)
    content = packed.getvalue()
    return hashlib.sha256(content).hexdigest(), content


def _code_files(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """The (archive name, path) of every regular file below `folder` that belongs to the code."""
    for entry in entries_of(folder):
        path = Path(entry.path)
        if entry.name in _SKIPPED_NAMES:
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS and not is_file(path / "pyvenv.cfg"):
                yield from _code_files(path, root)
            continue
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _SKIPPED_FILES):
            continue
        if entry.is_symlink() and not _leads_inside(path, root):
            continue
        if is_file(path):  # no pipe or device: reading one may wait for ever
            yield _archive_name(path, root), path


def _archive_name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(
            f"the file name {os.fsencode(name)!r} is not UTF-8",
            where=str(root),
            hint="rename the file or keep it outside the code folder",
        ) from None
    return name


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # broken; RuntimeError: a loop, before Python 3.13
        return False


def _check_size(sizes: Counter[str], folder: Path, limit_bytes: int) -> None:
    total = sum(sizes.values())
    if total <= limit_bytes:
        return
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        first, slash, _ = name.partition("/")
        entries[first + slash] += size
    biggest = ", ".join(f"{name} ({_mib(size)})" for name, size in entries.most_common(3))
    raise InvalidInput(
        f"the code folder holds {_mib(total)}, more than {_mib(limit_bytes)}; biggest: {biggest}",
        where=str(folder),
        hint="keep data outside the code folder, or point code at a folder with the module alone",
    )


def _mib(size: int) -> str:
    return f"{size / 1024 / 1024:.1f} MiB"

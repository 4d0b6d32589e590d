"""What people write, read and checked: specs, batch files, code folders, earlier results.

The only module that reads files that people name. It never imports their code: an entrypoint is
judged by its syntax tree, and where that cannot decide, it is accepted and the worker reports.
Requirement strings are judged next door, by `resolving`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import errno
import fnmatch
import hashlib
import inspect
import io
import json
import keyword
import math
import os
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray_envs.errors import InvalidId, InvalidInput
from ray_envs.models import (
    BatchSpec,
    CaseSpec,
    Definition,
    EnvId,
    EnvSpec,
    ItemResult,
    checked_id,
    nearest_hint,
    validated,
)
from ray_envs.resolving import requirement_lines

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same code under its name before 3.11; not there when checked on a newer Python
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

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


# -- specs -----------------------------------------------------------------------------------------


def read_definition(spec: EnvSpec, base: Path, *, where: str = "") -> Definition:
    """`spec` with the texts of the files that it names in it.

    Args:
        spec: what was asked.
        base: the folder that `spec.project` and `spec.requirements` are relative to.
        where: the table that holds the spec, as in "variants[1]", for what is said of its packages.

    Raises:
        InvalidInput: a file or folder is missing, unreadable, not UTF-8, or not TOML.
        InvalidPackages: a requirement cannot be accepted.
    """
    packages = requirement_lines(spec.packages, where=f"{where}.packages" if where else "packages")
    pyproject: str | None = None
    uv_lock: str | None = None
    if spec.requirements is not None:
        file = base / spec.requirements
        if _kind(file) == "folder":
            raise InvalidInput(
                "the requirements file is a folder",
                where=str(file),
                hint="for a folder with a pyproject.toml write project = … instead",
            )
        packages += requirement_lines(_read_text(file), where=str(file))
    if spec.project is not None:
        folder = base / spec.project
        names_its_file = folder.name in ("pyproject.toml", "uv.lock")
        _check_folder(
            folder,
            "the project folder",
            where=str(folder),
            if_file="name the folder that holds it"
            if names_its_file
            else "for a requirements file write requirements = … instead",
        )
        pyproject = _read_text(folder / "pyproject.toml")
        _toml(pyproject, where=str(folder / "pyproject.toml"))
        if _kind(folder / "uv.lock") != "missing":
            uv_lock = _read_text(folder / "uv.lock")
    shared = {name: getattr(spec, name) for name in Definition.model_fields if hasattr(spec, name)}
    return Definition(
        **{**shared, "packages": packages, "pyproject": pyproject, "uv_lock": uv_lock}
    )


# -- batch files -----------------------------------------------------------------------------------


def read_batch(path: Path) -> BatchSpec:
    """The batch that the file `path` describes; its `code` is still relative to that file.

    The files that its variants name are not read here: see `read_definition`.

    Raises:
        InvalidInput: no such file, not TOML, an unknown key, a wrong type, an empty matrix,
            a duplicate id, a malformed entrypoint, an argument that is not JSON, no code folder.
        InvalidId: the name, a variant id or a case id is not allowed.
    """
    where = str(path)
    data = _toml(_read_text(path), where=where)
    for table in ("variants", "cases"):
        _check_table(data, table, where=where)
    batch = validated(BatchSpec, data, where=where)
    _check_ids(batch, where=where)
    _split_entrypoint(batch.entrypoint, where=where)
    for index, case in enumerate(batch.cases):
        _check_arguments(case, f"cases[{index}]", where=where)
    if batch.code is not None:
        _check_folder(
            path.parent / batch.code,
            f"code: the folder {batch.code!r}",
            where=where,
            if_file="name the folder that holds the module",
        )
    return batch


def _check_table(data: dict[str, Any], table: str, *, where: str) -> None:
    rows = data.get(table)
    if isinstance(rows, dict):
        raise InvalidInput(
            f"{table}: one table where a list of tables is needed",
            where=where,
            hint=f"write [[{table}]] with two brackets",
        )
    if rows is None:
        unknown = [key for key in data if key not in BatchSpec.model_fields]
        for key in difflib.get_close_matches(table, unknown, n=1):
            raise InvalidInput(
                f"unknown key {key!r}", where=where, hint=nearest_hint(key, BatchSpec.model_fields)
            )
    if rows is None or rows == []:
        example = 'id = "old" and packages = ["…"]' if table == "variants" else 'id = "first"'
        raise InvalidInput(
            f"an empty matrix: there are no {table}",
            where=where,
            hint=f"add a [[{table}]] table with {example}",
        )


def _check_ids(batch: BatchSpec, *, where: str) -> None:
    _check_id(batch.name, "batch", where=f"{where}: name")
    for table, kind, ids in (
        ("variants", "variant", [variant.id for variant in batch.variants]),
        ("cases", "case", [case.id for case in batch.cases]),
    ):
        for index, value in enumerate(ids):
            _check_id(value, kind, where=f"{where}: {table}[{index}].id")
            if value in ids[:index]:
                raise InvalidInput(
                    f"{table}[{index}]: the {kind} id {value!r} is that of "
                    f"{table}[{ids.index(value)}] too",
                    where=where,
                    hint=f"give every {kind} an id of its own",
                )
    for index, variant in enumerate(batch.variants):
        try:  # the two ids are one folder name together
            EnvId(workflow_id=batch.name, node_id=variant.id)
        except InvalidId as err:
            raise err.about(where=f"{where}: variants[{index}].id") from None


def _check_id(value: str, kind: str, *, where: str) -> None:
    try:
        checked_id(value, kind=kind)
    except InvalidId as err:
        raise err.about(where=where) from None


def _split_entrypoint(text: str, *, where: str) -> tuple[str, str]:
    """The module and the function that `module:function` names."""
    module, colon, function = text.partition(":")
    if colon and _is_name(function) and all(_is_name(part) for part in module.split(".")):
        return module, function
    raise InvalidInput(
        f"entrypoint: {text!r} is not of the form module:function",
        where=where,
        hint=_entrypoint_hint(text),
    )


def _entrypoint_hint(text: str) -> str:
    """The entrypoint that was probably meant: a file's path or a dot for the colon are likely."""
    module, colon, function = text.partition(":")
    module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    if not colon:
        module, _, function = module.rpartition(".")
    if _is_name(function) and all(_is_name(part) for part in module.split(".")):
        return f"write {module}:{function}"
    return 'as in "accuracy:evaluate" for the function evaluate in accuracy.py'


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _check_arguments(case: CaseSpec, at: str, *, where: str) -> None:
    for index, value in enumerate(case.args):
        _check_json(value, f"{at}.args[{index}]", where=where)
    for name, value in case.kwargs.items():
        if not name.isidentifier():
            raise InvalidInput(
                f"{at}.kwargs: {name!r} cannot be the name of an argument",
                where=where,
                hint="use letters, digits and _",
            )
        _check_json(value, f"{at}.kwargs.{name}", where=where)


def _check_json(value: Any, at: str, *, where: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_json(inner, f"{at}.{name}", where=where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{at}[{index}]", where=where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(
            f"{at}: {value} is not a JSON value",
            where=where,
            hint="give a finite number or a string",
        )
    elif not isinstance(value, str | int | float):
        raise InvalidInput(
            f"{at}: {value} is a TOML {type(value).__name__}, not a JSON value",
            where=where,
            hint=f'write it as a string: "{value}"',
        )


# -- entrypoints -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Binding:
    """One statement at a module's top level, which may bind names."""

    node: ast.stmt
    #: Whether it stands in an `if`, `try`, … and may therefore not run.
    is_conditional: bool


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
    module, function = _split_entrypoint(batch.entrypoint, where="entrypoint")
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
        if _is_file(package / "__init__.py"):
            source, folder = package / "__init__.py", package
        elif _is_file(plain):
            if depth < len(parts) - 1:
                raise InvalidInput(
                    f"no module {module!r}: {'.'.join(parts[: depth + 1])} is not a package",
                    where=str(plain),
                    hint=f"write {'.'.join(parts[: depth + 1])}:<function>",
                )
            source = plain
        elif _kind(package) == "folder":
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
    is_ours = depth > 0 and _is_file(folder / "__init__.py")
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
    for entry in _entries(folder):
        stem, _, suffix = entry.name.partition(".")
        is_module = suffix == "py" or suffix.endswith(("so", "pyd"))
        if _is_name(stem) and (is_module or _is_file(Path(entry.path, "__init__.py"))):
            found.add(stem)
    return found - {"__init__", "__main__"}


def _parsed(path: Path) -> ast.Module:
    source = _read_bytes(path)
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
    _check_folder(folder, f"the code folder {str(folder)!r}", where="code")
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
                if _has_vanished(err):
                    continue
                raise _unreadable(path, err) from None
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
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.name in _SKIPPED_NAMES:
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS and not _is_file(path / "pyvenv.cfg"):
                yield from _code_files(path, root)
            continue
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _SKIPPED_FILES):
            continue
        if entry.is_symlink() and not _leads_inside(path, root):
            continue
        if _is_file(path):  # no pipe or device: reading one may wait for ever
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


# -- results of an earlier run ---------------------------------------------------------------------


def read_results(path: Path) -> list[ItemResult]:
    """The items that an earlier run wrote to `path`, in order; none, if there is no such file.

    A last line without its newline that cannot be read was torn by a kill, and is ignored.

    Raises:
        InvalidInput: any other line is damaged, or the file cannot be read.
    """
    if _kind(path) == "missing":
        return []
    *lines, last = _read_bytes(path).split(b"\n")
    found = [
        _result(line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if last.strip():
        with contextlib.suppress(InvalidInput):
            found.append(_result(last, where=str(path)))
    return found


def _result(line: bytes, *, where: str) -> ItemResult:
    hint = "remove the line, or run without resuming"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInput(
            "a damaged result: the line is not JSON", where=where, hint=hint
        ) from None
    try:
        return validated(ItemResult, data, where=where)
    except InvalidInput as err:
        raise InvalidInput(
            f"not the result of an item: {err.message}", where=where, hint=hint
        ) from None


# -- files -----------------------------------------------------------------------------------------


def _kind(path: Path) -> Literal["file", "folder", "other", "missing"]:
    """What `path` leads to; "missing" also where it cannot be a path at all."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as err:
        if isinstance(err, PermissionError):
            raise _unreadable(path, err) from None
        return "missing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def _is_file(path: Path) -> bool:
    return _kind(path) == "file"


def _check_folder(folder: Path, what: str, *, where: str, if_file: str = "name a folder") -> None:
    kind = _kind(folder)
    if kind == "missing":
        raise InvalidInput(f"{what} does not exist", where=where, hint=_near_entry(folder))
    if kind != "folder":
        raise InvalidInput(f"{what} is not a folder", where=where, hint=if_file)


def _near_entry(path: Path) -> str:
    """A hint that names the entry nearest to a missing `path`, or the place where it was sought."""
    kind = _kind(path.parent)
    names = [entry.name for entry in _entries(path.parent)] if kind == "folder" else []
    near = difflib.get_close_matches(path.name, names, n=1)
    place = os.path.abspath(path.parent)
    return f"did you mean {near[0]!r}?" if near else f"it was looked for in {place}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as err:
        if _has_vanished(err):
            return []
        raise _unreadable(folder, err) from None


def _read_bytes(path: Path) -> bytes:
    kind = _kind(path)
    if kind == "missing":
        raise InvalidInput("the file does not exist", where=str(path), hint=_near_entry(path))
    if kind != "file":
        what = "is a folder" if kind == "folder" else "is a pipe or a device"
        raise InvalidInput(f"{what}, not a file", where=str(path), hint="name a regular file")
    try:
        return path.read_bytes()
    except OSError as err:
        raise _unreadable(path, err) from None


def _read_text(path: Path) -> str:
    """The text of `path`, its line ends as `\\n` and without a byte order mark."""
    content = _read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        raise InvalidInput(
            f"line {line} is not UTF-8", where=str(path), hint="save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


def _toml(text: str, *, where: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise InvalidInput(
            f"not valid TOML: {err}", where=where, hint="mend that line; strings need quotes"
        ) from None
    except RecursionError:
        raise InvalidInput("not valid TOML: nested too deeply", where=where) from None
    return data


def _has_vanished(err: OSError) -> bool:
    return err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def _unreadable(path: Path, err: OSError) -> InvalidInput:
    return InvalidInput(
        "cannot be read",
        where=str(path),
        detail=err.strerror or str(err),
        hint="give yourself the permission to read it",
    )

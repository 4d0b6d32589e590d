"""Checks that the entrypoint of a batch can be called with every case, from its source alone.

It reads the syntax tree and never imports the user's code. If the tree cannot tell, the entrypoint
is accepted, and the worker reports the error.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ray_envs.batch_models import BatchSpec, is_name, split_entrypoint
from ray_envs.disk.files import entries_of, is_file, kind_of, read_bytes
from ray_envs.errors import InvalidInput

#: Statements that open a scope: names bound in their bodies are not the module's.
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
#: Functions that can bind a name without showing it in the syntax tree.
_HIDDEN_BINDERS = frozenset({"exec", "globals", "locals", "setattr", "vars"})


def check_entrypoint(batch: BatchSpec, code: Path | None) -> None:
    """Check that `batch.entrypoint` can be called with every case, as far as its source shows.

    Accepted without a check: a module of an installed package, a decorated function, a class, an
    imported name.

    Raises:
        InvalidInput: the source has a syntax error, there is no such module or function, or the
            arguments of a case do not fit.
    """
    module, function = split_entrypoint(batch.entrypoint, where="entrypoint")
    path = _module_file(code, module) if code is not None else None
    if path is None:
        return
    tree = _parsed(path)
    bindings = [
        (node, is_conditional)
        for node, is_conditional in _statements(tree.body)
        if {function, "*"} & _bound_names(node)
    ]
    if not bindings:
        if not _may_bind_unseen(tree, function):
            _refuse_missing(tree, path, function)
        return
    last, is_conditional = bindings[-1]
    if all(isinstance(n, ast.AsyncFunctionDef) and not n.decorator_list for n, _ in bindings):
        raise InvalidInput(
            f"{function} is a coroutine function",
            where=f"{path}, line {last.lineno}",
            hint=f"write def {function}(…) and call asyncio.run inside",
        )
    # if it is defined in several branches, only an import shows which one runs
    is_certain = len(bindings) == 1 or not is_conditional
    if is_certain and isinstance(last, ast.FunctionDef) and not last.decorator_list:
        _check_calls(batch, last)


def _module_file(code: Path, module: str) -> Path | None:
    """Return the source file of `module` below `code`; None if only a worker can find it.

    Raises `InvalidInput`: there is none, but a module of a similar name or its package is there.
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
            source, folder = None, package  # Python prefers an installed package of that name
        else:
            _refuse_near_module(code, folder, parts, depth)
            return None
    return source


def _refuse_near_module(code: Path, folder: Path, parts: list[str], depth: int) -> None:
    """Raise if the part at `depth`, which is not in `folder`, is probably a mistyped name."""
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
    """Return the importable names in `folder`: sources, extension modules, packages."""
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
            warnings.simplefilter("ignore")  # the worker shows warnings about the user's code
            tree = ast.parse(source, str(path))
            # some errors show only when compiling, such as a return outside a function
            compile(tree, str(path), "exec", dont_inherit=True)
    except SyntaxError as err:
        line = f", line {err.lineno}" if err.lineno else ""
        raise InvalidInput(
            f"a syntax error: {err.msg}",
            where=f"{path}{line}",
            detail=(err.text or "").strip(),
            hint="correct it: no worker can import the module",
        ) from None
    except (ValueError, RecursionError, MemoryError) as err:
        raise InvalidInput(f"cannot be read as Python: {err}", where=str(path)) from None
    return tree


def _statements(
    body: Iterable[ast.stmt], *, is_conditional: bool = False
) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield every statement at the module's top level, in order, also those inside blocks.

    The bool is True inside an `if`, `try`, …: such a statement may not run.
    """
    for node in body:
        yield node, is_conditional
        if isinstance(node, _SCOPES):
            continue
        for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(part, field, ()), is_conditional=True)


def _bound_names(node: ast.stmt) -> set[str]:
    """Return the names that `node` binds, rather too many than too few; "*" for all of a module."""
    if isinstance(node, _SCOPES):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    names = (child for child in ast.walk(node) if isinstance(child, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def _may_bind_unseen(tree: ast.Module, function: str) -> bool:
    """Whether the module may bind `function` in a way that its top level does not show."""
    return any(
        (isinstance(node, ast.Name) and node.id in _HIDDEN_BINDERS)
        or (isinstance(node, ast.Global) and function in node.names)
        or (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        for node in ast.walk(tree)
    )


def _refuse_missing(tree: ast.Module, path: Path, function: str) -> None:
    functions = [n.name for n, _ in _statements(tree.body) if isinstance(n, ast.FunctionDef)]
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
    """Return the signature of a `def` with `args`; a default is None, whatever its value."""
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

"""The house: sizes of files and functions, the map of the folders, and each verb declared once."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import click
import pytest

import ray_envs
from ray_envs import verbs
from ray_envs.cli import main
from ray_envs.client.lifecycle import Lifecycle
from ray_envs.client.variants import Variants
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.manager.manager import EnvManager

ROOT = Path(ray_envs.__file__).parent
README = (ROOT.parent / "README.md").read_text(encoding="utf-8")
MODULES = sorted(ROOT.rglob("*.py"))
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def doc_of(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""


def layers() -> list[Path]:
    """The folders in the order of the import contract, from the shell down."""
    data = parsed_toml((ROOT.parent / "pyproject.toml").read_text(), where="pyproject.toml")
    rows = data["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [name.strip().removeprefix("ray_envs.") for row in rows for name in row.split("|")]
    return [ROOT / name for name in names if (ROOT / name).is_dir()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_over_400_lines_and_no_function_over_60(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert [name for name, size in sizes.items() if size > 60] == []


def test_the_readme_has_the_folders_in_the_order_of_the_import_contract() -> None:
    assert sorted(layers()) == FOLDERS
    rows = [f"{folder.name + '/':12}{doc_of(folder).splitlines()[0]}" for folder in layers()]
    assert "```\n" + "\n".join(rows) + "\n```" in README


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_where_it_runs_and_which_module_to_change(folder: Path) -> None:
    doc = doc_of(folder)
    assert doc.startswith(("Runs in ", "Runs wherever "))
    assert "In: " in doc
    assert " Out: " in doc
    assert re.search(r"\bnever\b|\bno\b|\bmust not\b", doc, re.IGNORECASE)
    named = {line.split()[-1] for line in doc.partition("To change")[2].splitlines() if line}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules - named == set()


def test_the_readme_is_short_and_names_every_verb() -> None:
    assert len(README.splitlines()) <= 220
    listed = re.search(r"describes its verbs:(.*?)\.\s", README, re.DOTALL)
    assert listed is not None
    assert re.findall(r"`(\w+)`", listed.group(1)) == list(verbs.VERBS)


def test_the_manager_has_exactly_the_verbs_of_the_table() -> None:
    methods = {
        name
        for name, _ in inspect.getmembers(EnvManager, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    assert methods == {*verbs.VERBS, "stop"}


@pytest.mark.parametrize("verb", verbs.VERBS.values(), ids=lambda verb: verb.name)
def test_a_verb_is_documented_and_has_a_schema(verb: verbs.Verb) -> None:
    assert verb.request.__doc__
    assert verb.request.model_json_schema()["additionalProperties"] is False


def test_the_provider_holds_no_second_list_of_defaults() -> None:
    """Only what is not an argument of the verb: how a provider differs from the handle."""
    own = {("create", "replace"), ("create", "base")}
    waits = {(name, option) for name in ("prepare", "environment", "runtime_env") for option in
             inspect.signature(getattr(Variants, name)).parameters}  # fmt: skip
    held: set[tuple[str, str]] = set()
    for cls in (Lifecycle, Variants):
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if name.startswith("_"):
                continue
            for option in inspect.signature(method).parameters.values():
                default: Any = option.default
                if default not in (inspect.Parameter.empty, verbs.DEFAULT, None):
                    held.add((name, option.name))
    assert held - own - waits == {("subscribe", "kinds")}


def test_the_table_of_commands_names_every_command_of_its_modules() -> None:
    found = {}
    for path in sorted((ROOT / "cli").glob("*.py")):
        module = importlib.import_module(f"ray_envs.cli.{path.stem}")
        commands = [c.name for c in vars(module).values() if isinstance(c, click.Command)]
        if commands and path.stem != "main":
            found[path.stem] = tuple(commands)
    assert found == main._MODULES

"""Entrypoints: judged without being imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_envs.batch_models import BatchSpec, CaseSpec, VariantSpec
from ray_envs.client.entrypoints import check_entrypoint
from ray_envs.errors import InvalidInput


def written(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def batch(entrypoint: str = "digits:evaluate", *cases: CaseSpec) -> BatchSpec:
    return BatchSpec(
        name="b",
        entrypoint=entrypoint,
        variants=(VariantSpec(id="v"),),
        cases=cases or (CaseSpec(id="wine", kwargs={"dataset": "wine"}),),
    )


@pytest.mark.parametrize(
    "source",
    [
        "def evaluate(dataset): ...",
        "def evaluate(dataset, *, n=1, **more): ...",
        "def evaluate(*, dataset): ...",
        "def evaluate(**anything): ...",
        "def evaluate(a): ...\ndef evaluate(dataset): ...",
        "@decorated\ndef evaluate(): ...",
        "@decorated\nasync def evaluate(): ...",
        "class evaluate: ...",
        "evaluate = print",
        "evaluate: object = print",
        "evaluate, other = print, 1",
        "(evaluate := print)",
        "from elsewhere import evaluate",
        "from elsewhere import run as evaluate",
        "import evaluate.deep",
        "from elsewhere import *",
        "def evaluate(): ...\nfrom elsewhere import *",
        "if True:\n    def evaluate(dataset): ...",
        "try:\n    from a import evaluate\nexcept ImportError:\n    def evaluate(): ...",
        "try:\n    pass\nfinally:\n    def evaluate(dataset): ...",
        "for evaluate in [print]: ...",
        "with open('x') as evaluate: ...",
        "match 1:\n    case 1:\n        def evaluate(dataset): ...",
        "def __getattr__(name): ...",
        "globals()['evaluate'] = print",
        "def f():\n    global evaluate\n    evaluate = print\nf()",
        "raise SystemExit('never imported here')\ndef evaluate(dataset): ...",
        "# coding: latin-1\n# caf\xe9\ndef evaluate(dataset): '\\d'",
        "x = " + "+".join(["1"] * 900) + "\ndef evaluate(dataset): ...",
    ],
)
def test_an_entrypoint_that_may_be_callable_is_accepted_without_importing(
    tmp_path: Path, source: str
) -> None:
    written(tmp_path / "digits.py", source.encode("latin-1"))
    check_entrypoint(batch(), tmp_path)


@pytest.mark.parametrize(
    ("source", "where", "says", "hint"),
    [
        ("def evaluate(:\n", ", line 1", "a syntax error", "correct it"),
        (
            "x = 1\nreturn 5\n",
            ", line 2",
            "a syntax error: 'return' outside function",
            "correct it",
        ),
        ("def evalute(d): ...", "", "the module has no 'evaluate'", "did you mean 'evalute'?"),
        ("def run(): ...\ndef go(): ...", "", "no 'evaluate'", "its functions: run, go"),
        ("x = 1", "", "no 'evaluate'", "it defines no function"),
        ("def f():\n    def evaluate(): ...", "", "no 'evaluate'", "its functions: f"),
        ("class A:\n    def evaluate(self): ...", "", "no 'evaluate'", "it defines no function"),
        ("print(evaluate)", "", "no 'evaluate'", "it defines no function"),
        ("async def evaluate(dataset): ...", ", line 1", "is a coroutine function", "asyncio.run"),
        ("if True:\n    async def evaluate(d): ...", ", line 2", "is a coroutine function", "def"),
    ],
)
def test_a_module_without_a_usable_function_is_refused_by_its_file(
    tmp_path: Path, source: str, where: str, says: str, hint: str
) -> None:
    path = written(tmp_path / "digits.py", source)
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(batch(), tmp_path)
    assert caught.value.where == f"{path}{where}"
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_a_module_that_is_no_python_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "digits.py", b"x = '\0'")
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(batch(), tmp_path)
    assert caught.value.where.startswith(str(path))


@pytest.mark.parametrize(
    ("parameters", "case", "says"),
    [
        ("dataset", CaseSpec(id="wine"), "missing a required argument: 'dataset'"),
        ("*, dataset", CaseSpec(id="wine", args=("x",)), "too many positional arguments"),
        ("", CaseSpec(id="wine", args=(1,)), "too many positional arguments"),
        (
            "dataset, /, n=1",
            CaseSpec(id="wine", args=("x",), kwargs={"m": 2}),
            "got an unexpected keyword argument 'm'",
        ),
        (
            "dataset, *rest",
            CaseSpec(id="wine", args=("x",), kwargs={"dataset": 2}),
            "multiple values for argument 'dataset'",
        ),
    ],
)
def test_arguments_that_do_not_fit_name_the_case_and_show_the_function(
    tmp_path: Path, parameters: str, case: CaseSpec, says: str
) -> None:
    written(tmp_path / "digits.py", f"def evaluate({parameters}): ...")
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(batch("digits:evaluate", case), tmp_path)
    assert caught.value.message == f"cases[0] ('wine'): {says}"
    assert caught.value.where == "entrypoint digits:evaluate"
    assert caught.value.hint == f"it is defined as evaluate({parameters})"


def test_the_first_case_that_does_not_fit_is_named_by_its_place(tmp_path: Path) -> None:
    written(tmp_path / "digits.py", "def evaluate(dataset): ...")
    good = CaseSpec(id="digits", args=("digits",))
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(batch("digits:evaluate", good, CaseSpec(id="wine")), tmp_path)
    assert caught.value.message == "cases[1] ('wine'): missing a required argument: 'dataset'"


@pytest.mark.parametrize(
    ("entrypoint", "file"),
    [
        ("pkg.deep.mod:run", "pkg/deep/mod.py"),
        ("pkg.deep:run", "pkg/deep/__init__.py"),
        ("pkg:run", "pkg/__init__.py"),
    ],
)
def test_a_dotted_module_is_found_in_its_folders(
    tmp_path: Path, entrypoint: str, file: str
) -> None:
    path = written(tmp_path / file, "def run(dataset): ...")
    check_entrypoint(batch(entrypoint), tmp_path)
    written(path, "def ran(dataset): ...")
    with pytest.raises(InvalidInput, match="no 'run'") as caught:
        check_entrypoint(batch(entrypoint), tmp_path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("entrypoint", "says", "hint"),
    [
        ("digts:evaluate", "no module 'digts' in {code}", "did you mean 'digits'?"),
        ("Digits:evaluate", "no module 'Digits' in {code}", "did you mean 'digits'?"),
        ("modles.linear:run", "no module 'modles.linear'", "did you mean 'models.linear'?"),
        ("models.liner:run", "no module 'models.liner'", "did you mean 'models.linear'?"),
        ("models.zzzz:run", "no module 'models.zzzz'", "its modules: linear"),
        ("bare.liner:run", "no module 'bare.liner'", "did you mean 'bare.linear'?"),
        ("digits.evaluate:run", "digits is not a package", "write digits:<function>"),
    ],
)
def test_a_mistyped_module_of_the_code_folder_is_refused(
    tmp_path: Path, entrypoint: str, says: str, hint: str
) -> None:
    written(tmp_path / "digits.py", "def evaluate(dataset): ...")
    written(tmp_path / "models" / "__init__.py")
    written(tmp_path / "models" / "linear.py")
    written(tmp_path / "bare" / "linear.py")
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(batch(entrypoint), tmp_path)
    assert says.format(code=tmp_path) in caught.value.message
    assert caught.value.where
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "entrypoint",
    [
        "sklearn.metrics:accuracy_score",
        "statistics:mean",
        "fast:run",
        "folder:run",
        "bare.zzzz:run",
    ],
)
def test_a_module_that_may_be_installed_is_left_to_the_worker(
    tmp_path: Path, entrypoint: str
) -> None:
    written(tmp_path / "statistic.py")
    written(tmp_path / "fast.cpython-311-x86_64-linux-gnu.so")
    written(tmp_path / "bare" / "mod.py")
    (tmp_path / "folder").mkdir()
    check_entrypoint(batch(entrypoint), tmp_path)
    check_entrypoint(batch(entrypoint), None)

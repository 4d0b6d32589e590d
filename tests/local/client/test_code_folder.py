"""The code of a batch: judged without being imported, and packed the same everywhere."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest

from ray_envs.client.code_folder import check_entrypoint, pack_code
from ray_envs.errors import InvalidInput
from ray_envs.models import BatchSpec, CaseSpec, VariantSpec


def written(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def closed(path: Path) -> Path:
    """`path`, written by its owner and readable for nobody."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    written(path, "x").chmod(0)
    os.seteuid(user)
    return path


# -- entrypoints -----------------------------------------------------------------------------------


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
        ("def evaluate(:\n", ", line 1", "a syntax error", "mend it"),
        ("x = 1\nreturn 5\n", ", line 2", "a syntax error: 'return' outside function", "mend it"),
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


# -- code folders ----------------------------------------------------------------------------------


def names_in(content: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_equal_folders_give_equal_archives_whatever_their_times_and_modes(tmp_path: Path) -> None:
    for name, order in (("a", ("x.py", "sub/y.txt")), ("b", ("sub/y.txt", "x.py"))):
        for file in order:
            written(tmp_path / name / file, file)
    os.utime(tmp_path / "b" / "x.py", (1, 1))
    (tmp_path / "b" / "x.py").chmod(0o700)
    (tmp_path / "b" / "empty").mkdir()
    digest, content = pack_code(tmp_path / "a")
    assert pack_code(tmp_path / "b") == (digest, content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert names_in(content) == ["sub/y.txt", "x.py"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("x.py") == b"x.py"

    written(tmp_path / "b" / "x.py", "other")
    assert pack_code(tmp_path / "b")[0] != digest


def test_caches_environments_results_and_version_control_are_left_out(tmp_path: Path) -> None:
    kept = ["digits.py", "pkg/__init__.py", "pkg/data.json", "venv.py", "results.jsonl"]
    left_out = [
        ".git/config",
        "pkg/.git",
        ".hg/x",
        ".venv/a.py",
        "pkg/venv/a.py",
        "node_modules/a.js",
        "pkg/__pycache__/a.py",
        "old.pyc",
        ".mypy_cache/a",
        ".pytest_cache/a",
        ".ruff_cache/a",
        "myenv/pyvenv.cfg",
        "myenv/lib/a.py",
        "batch.results.jsonl",
        "batch.results.jsonl.previous",
    ]
    for name in kept + left_out:
        written(tmp_path / name, name)
    assert names_in(pack_code(tmp_path)[1]) == sorted(kept)


def test_only_links_to_files_inside_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    written(folder / "sub" / "real.py", "1")
    secret = written(tmp_path / "secret.txt", "2")
    (folder / "alias.py").symlink_to("sub/real.py")
    (folder / "outside.txt").symlink_to(secret)
    (folder / "up").symlink_to("..")
    (folder / "again").symlink_to("sub")
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (tmp_path / "entry").symlink_to("code")
    assert names_in(pack_code(folder)[1]) == ["alias.py", "sub/real.py"]
    assert pack_code(tmp_path / "entry") == pack_code(folder)


def test_too_much_code_is_refused_and_the_biggest_entries_are_named(tmp_path: Path) -> None:
    written(tmp_path / "data" / "a.bin", b"0" * 3000)
    written(tmp_path / "data" / "b.bin", b"0" * 3000)
    written(tmp_path / "model.bin", b"0" * 2000)
    written(tmp_path / "digits.py", b"0" * 10)
    with pytest.raises(InvalidInput, match=r"biggest: data/ \(.*\), model\.bin") as caught:
        pack_code(tmp_path, limit_bytes=8009)
    assert caught.value.where == str(tmp_path)
    assert "keep data outside the code folder" in caught.value.hint
    assert len(names_in(pack_code(tmp_path, limit_bytes=8010)[1])) == 4


def test_a_file_that_vanishes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.py", "1")
    written(tmp_path / "b.py", "2")
    read = Path.read_bytes

    def read_after_another_process_removed_it(path: Path) -> bytes:
        if path.name == "a.py":
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_after_another_process_removed_it)
    assert names_in(pack_code(tmp_path)[1]) == ["b.py"]


def test_a_file_that_grows_meanwhile_cannot_pass_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.py", "1")
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"0" * 100)
    with pytest.raises(InvalidInput, match=r"biggest: a\.py"):
        pack_code(tmp_path, limit_bytes=50)


def test_a_code_file_that_may_not_be_read_is_named(unprivileged: Path) -> None:
    file = closed(unprivileged / "pkg" / "secret.py")
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        pack_code(unprivileged)
    assert caught.value.where == str(file)
    assert caught.value.detail == "Permission denied"


def test_a_code_folder_that_may_not_be_read_is_named(unprivileged: Path) -> None:
    folder = closed(unprivileged / "pkg" / "a.py").parent
    user = os.geteuid()
    os.seteuid(os.getuid())
    folder.chmod(0)
    os.seteuid(user)
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        pack_code(unprivileged)
    assert str(folder) in caught.value.where
    os.seteuid(os.getuid())
    folder.chmod(0o755)
    os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX only")
def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    written(tmp_path / os.fsdecode(b"caf\xe9.txt"), "1")
    with pytest.raises(InvalidInput, match="is not UTF-8") as caught:
        pack_code(tmp_path)
    assert "rename" in caught.value.hint
    assert str(caught.value).encode()


@pytest.mark.parametrize("name", ["gone", "file.py"])
def test_a_code_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "file.py")
    with pytest.raises(InvalidInput, match=name) as caught:
        pack_code(tmp_path / name)
    assert caught.value.where == "code"
    assert caught.value.hint

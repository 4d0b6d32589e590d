"""What people write: read, checked, refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_envs.batch_models import CaseSpec, VariantSpec
from ray_envs.client.inputs import read_batch, read_definition
from ray_envs.errors import InvalidId, InvalidInput, InvalidPackages
from ray_envs.specs import EnvSpec

GOOD = """
name = "upgrade"
entrypoint = "digits:evaluate"
code = "."
[[variants]]
id = "old"
packages = ["scikit-learn==1.5.*"]
[[variants]]
id = "new"
project = "new"
[[cases]]
id = "digits"
kwargs = { dataset = "digits" }
[[cases]]
id = "wine"
args = ["wine", 1, 0.5, true, ["a"], { deep = [1] }]
"""


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


# -- specs -----------------------------------------------------------------------------------------


def test_a_list_of_packages_becomes_a_definition_with_its_options(tmp_path: Path) -> None:
    spec = EnvSpec(
        packages=["numpy<2"], python="3.11", env_vars={"A": "b"}, exclude_newer="2025-01-01"
    )
    definition = read_definition(spec, tmp_path)
    assert definition.model_dump(exclude_defaults=True) == {
        "packages": ("numpy<2",),
        "python": "3.11",
        "env_vars": {"A": "b"},
        "exclude_newer": "2025-01-01",
    }


def test_the_lines_of_a_requirements_file_are_appended_to_the_packages(tmp_path: Path) -> None:
    text = "\ufeff# pins\r\n\r\nnumpy==2.2.6  # the last for 3.10\r\nscipy>=1.13, \\\r\n  <1.16\r\n"
    written(tmp_path / "reqs" / "pins.txt", text)
    spec = EnvSpec(packages=["joblib"], requirements="reqs/pins.txt")
    definition = read_definition(spec, tmp_path)
    assert definition.packages == ("joblib", "numpy==2.2.6", "scipy<1.16,>=1.13")
    assert definition.pyproject is None


def test_the_texts_of_a_project_are_taken_as_they_are(tmp_path: Path) -> None:
    written(tmp_path / "new" / "pyproject.toml", '[project]\nname = "né"  # kept\n')
    spec = VariantSpec(id="new", project="new", extras=("a",), groups=("g",), num_cpus=2)
    definition = read_definition(spec, tmp_path)
    assert definition.pyproject == '[project]\nname = "né"  # kept\n'
    assert definition.uv_lock is None
    assert (definition.extras, definition.groups) == (("a",), ("g",))

    written(tmp_path / "new" / "uv.lock", "version = 1\n")
    assert read_definition(spec, tmp_path).uv_lock == "version = 1\n"


def test_an_empty_requirements_file_asks_for_nothing(tmp_path: Path) -> None:
    written(tmp_path / "none.txt", "\n# nothing\n")
    assert read_definition(EnvSpec(requirements="none.txt"), tmp_path).packages == ()


@pytest.mark.parametrize(
    ("spec", "where", "says", "hint"),
    [
        ({"requirements": "pinz.txt"}, "pinz.txt", "does not exist", "did you mean 'pins.txt'?"),
        ({"requirements": "gone/a.txt"}, "gone/a.txt", "does not exist", "it was looked for in "),
        ({"requirements": "new"}, "new", "is a folder", "write project = "),
        (
            {"requirements": "latin.txt"},
            "latin.txt",
            "line 2 is not UTF-8",
            "save the file as UTF-8",
        ),
        ({"requirements": "pipe"}, "pipe", "is a pipe or a device", "regular file"),
        ({"requirements": "nul\0"}, "nul\0", "does not exist", "it was looked for in"),
        ({"requirements": "x" * 300}, "x" * 300, "does not exist", "it was looked for in"),
        ({"project": "nwe"}, "nwe", "the project folder does not exist", "did you mean 'new'?"),
        ({"project": "pins.txt"}, "pins.txt", "is not a folder", "write requirements = "),
        ({"project": "new/pyproject.toml"}, "new/pyproject.toml", "not a folder", "holds it"),
        ({"project": "empty"}, "empty/pyproject.toml", "does not exist", "it was looked for in"),
        ({"project": "torn"}, "torn/pyproject.toml", "at line 1, column", "correct that line"),
        ({"project": "odd"}, "odd/uv.lock", "is a folder, not a file", "regular file"),
    ],
)
def test_a_file_of_a_spec_that_cannot_be_used_is_named(
    tmp_path: Path, spec: dict[str, str], where: str, says: str, hint: str
) -> None:
    written(tmp_path / "pins.txt", "numpy")
    written(tmp_path / "latin.txt", b"numpy\n# caf\xe9\n")
    written(tmp_path / "new" / "pyproject.toml")
    written(tmp_path / "torn" / "pyproject.toml", "[project\n")
    written(tmp_path / "odd" / "pyproject.toml")
    (tmp_path / "odd" / "uv.lock").mkdir()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput) as caught:
        read_definition(EnvSpec.model_validate(spec), tmp_path)
    assert caught.value.where == str(tmp_path / where)
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_a_refused_requirement_says_which_table_or_file_it_is_in(tmp_path: Path) -> None:
    written(tmp_path / "pins.txt", "numpy\nscipy=>1\n")
    with pytest.raises(InvalidPackages, match="scipy=>1") as caught:
        read_definition(EnvSpec(requirements="pins.txt"), tmp_path)
    assert caught.value.where == f"{tmp_path / 'pins.txt'}: line 2"
    with pytest.raises(InvalidPackages, match="index-url") as caught:
        read_definition(EnvSpec(packages=["--index-url=x"]), tmp_path, where="variants[1]")
    assert caught.value.where == "variants[1].packages"
    with pytest.raises(InvalidPackages) as caught:
        read_definition(EnvSpec(packages=["-e ."]), tmp_path)
    assert caught.value.where == "packages"


def test_a_file_that_may_not_be_read_is_named_with_the_reason(unprivileged: Path) -> None:
    file = closed(unprivileged / "pins.txt")
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        read_definition(EnvSpec(requirements="pins.txt"), unprivileged)
    assert caught.value.where == str(file)
    assert caught.value.detail == "Permission denied"
    assert "permission" in caught.value.hint


# -- batch files -----------------------------------------------------------------------------------


def test_a_batch_file_becomes_a_batch(tmp_path: Path) -> None:
    batch = read_batch(written(tmp_path / "batch.toml", GOOD))
    assert (batch.name, batch.entrypoint, batch.code) == ("upgrade", "digits:evaluate", ".")
    assert [variant.id for variant in batch.variants] == ["old", "new"]
    assert batch.cases == (
        CaseSpec(id="digits", kwargs={"dataset": "digits"}),
        CaseSpec(id="wine", args=("wine", 1, 0.5, True, ["a"], {"deep": [1]})),
    )


@pytest.mark.parametrize(
    ("old", "new", "says", "hint"),
    [
        ('name = "upgrade"', "name = upgrade", "not valid TOML: ", "strings need quotes"),
        ('name = "upgrade"', 'nam = "upgrade"', "unknown key 'nam'", "did you mean 'name'?"),
        ('name = "upgrade"', "", "name is missing", ""),
        ('id = "old"', 'id = "old"\nnum_cpus = inf', "variants[0].num_cpus: ", ""),
        ('id = "old"', 'id = "old"\nnum_cpus = 1e-5', "Ray's smallest amount, 0.0001", ""),
        ('id = "old"', 'id = "old"\nnum_gpus = 1.5', "a part of one GPU, or whole ones", ""),
        ('code = "."', 'kode = "."', "unknown key 'kode'", "did you mean 'code'?"),
        ('project = "new"', 'projet = "new"', "unknown key 'variants[1].projet'", "'project'?"),
        ('id = "old"', "id = 5", "variants[0].id: ", ""),
        (
            'id = "wine"',
            'id = "digits"',
            "cases[1] and cases[0] have the same case id 'digits'",
            "own",
        ),
        (
            'id = "new"',
            'id = "old"',
            "variants[1] and variants[0] have the same variant id 'old'",
            "give every variant",
        ),
        (
            'code = "."',
            'code = "srv"',
            "code: the folder 'srv' does not exist",
            "did you mean 'src'",
        ),
        ('code = "."', 'code = "batch.toml"', "'batch.toml' is not a folder", "holds the module"),
        (
            '"digits:evaluate"',
            '"digits"',
            "'digits' is not of the form",
            'write "accuracy:evaluate"',
        ),
        ('"digits:evaluate"', '"digits.evaluate"', "entrypoint: ", "write digits:evaluate"),
        ('"digits:evaluate"', '"./digits.py:evaluate"', "entrypoint: ", "write digits:evaluate"),
        ('"digits:evaluate"', '"a/digits.py:run"', "entrypoint: ", "write a.digits:run"),
        ('"digits:evaluate"', '"digits:a.b"', "'digits:a.b' is not", "accuracy:evaluate"),
        ('"digits:evaluate"', '"digits:evaluate()"', "entrypoint: ", "accuracy:evaluate"),
        ('"digits:evaluate"', '"digits:"', "entrypoint: ", "accuracy:evaluate"),
        ('"digits:evaluate"', '":evaluate"', "entrypoint: ", "accuracy:evaluate"),
        ('"digits:evaluate"', '"a..b:evaluate"', "entrypoint: ", "accuracy:evaluate"),
        ('"digits:evaluate"', '"class:evaluate"', "entrypoint: ", "accuracy:evaluate"),
        ('"digits:evaluate"', '""', "entrypoint: ", "accuracy:evaluate"),
        (
            '{ dataset = "digits" }',
            "{ when = 2025-01-31 }",
            "cases[0].kwargs.when: 2025-01-31 is a TOML date",
            'write it as a string: "2025-01-31"',
        ),
        (
            '{ dataset = "digits" }',
            "{ when = 2025-01-31T10:00:00Z }",
            "cases[0].kwargs.when: 2025-01-31 10:00:00+00:00 is a TOML datetime",
            "write it as a string",
        ),
        (
            '{ dataset = "digits" }',
            "{ a = 10:00:00 }",
            "cases[0].kwargs.a: 10:00:00 is a",
            "string",
        ),
        ("0.5", "nan", "cases[1].args[2]: nan is not a JSON value", "a finite number"),
        ("0.5", "-inf", "cases[1].args[2]: -inf is not a JSON value", "a finite number"),
        ("deep = [1]", "deep = [1, inf]", "cases[1].args[5].deep[1]: inf", "a finite number"),
        ("{ dataset =", '{ "data set" =', "cases[0].kwargs: 'data set' cannot be", "letters"),
        ('args = ["wine",', 'args = "x" #', "cases[1].args: ", ""),
    ],
)
def test_a_wrong_line_of_a_batch_file_is_named(
    tmp_path: Path, old: str, new: str, says: str, hint: str
) -> None:
    assert GOOD.count(old) >= 1
    (tmp_path / "src").mkdir()
    path = written(tmp_path / "batch.toml", GOOD.replace(old, new, 1))
    with pytest.raises(InvalidInput) as caught:
        read_batch(path)
    assert caught.value.where == str(path)
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_a_toml_error_tells_its_line_and_column(tmp_path: Path) -> None:
    path = written(tmp_path / "batch.toml", 'name = "a"\nentrypoint = oops\n')
    with pytest.raises(InvalidInput, match="line 2, column 14") as caught:
        read_batch(path)
    assert caught.value.where == str(path)


HEAD = 'name = "a"\nentrypoint = "m:f"\n'
VARIANTS = '[[variants]]\nid = "v"\n'
CASES = '[[cases]]\nid = "c"\n'


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (HEAD + CASES, "an empty matrix: there are no variants", "add a [[variants]] table"),
        (HEAD + VARIANTS, "an empty matrix: there are no cases", "add a [[cases]] table"),
        (
            HEAD + "variants = []\n" + CASES,
            "an empty matrix: there are no variants",
            "[[variants]]",
        ),
        (HEAD + "cases = []\n" + VARIANTS, "an empty matrix: there are no cases", "[[cases]]"),
        (HEAD + VARIANTS + '[cases]\nid = "c"\n', "cases: one table", "with two brackets"),
        (
            HEAD + '[[variant]]\nid = "v"\n' + CASES,
            "unknown key 'variant'",
            "did you mean 'variants'",
        ),
        ("", "an empty matrix: there are no variants", "[[variants]]"),
    ],
)
def test_an_empty_matrix_is_refused_and_names_the_missing_table(
    tmp_path: Path, text: str, says: str, hint: str
) -> None:
    path = written(tmp_path / "batch.toml", text)
    with pytest.raises(InvalidInput) as caught:
        read_batch(path)
    assert caught.value.where == str(path)
    assert says in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("bad", ["a/b", "..", "a b", "x" * 300, "-v", "", "ä", ".hidden", "a\\nb"])
@pytest.mark.parametrize(
    ("old", "field", "kind"),
    [
        ('name = "upgrade"', "name", "batch"),
        ('id = "new"', "variants[1].id", "variant"),
        ('id = "wine"', "cases[1].id", "case"),
    ],
)
def test_an_id_that_is_not_allowed_is_refused_where_it_stands(
    tmp_path: Path, old: str, field: str, kind: str, bad: str
) -> None:
    key = old.partition(" = ")[0]
    path = written(tmp_path / "batch.toml", GOOD.replace(old, f'{key} = "{bad}"'))
    with pytest.raises(InvalidId, match=f"the {kind} id") as caught:
        read_batch(path)
    assert caught.value.where == f"{path}: {field}"
    assert caught.value.hint


def test_two_ids_that_make_no_folder_name_together_are_refused(tmp_path: Path) -> None:
    long = "a" + "_" * 63
    text = GOOD.replace('"upgrade"', f'"{long}"').replace('"old"', f'"{long}"')
    with pytest.raises(InvalidId, match="too long") as caught:
        read_batch(written(tmp_path / "batch.toml", text))
    assert caught.value.where == f"{tmp_path / 'batch.toml'}: variants[0].id"


def test_a_batch_file_that_is_none_is_named(tmp_path: Path) -> None:
    written(tmp_path / "batch.toml", GOOD)
    with pytest.raises(InvalidInput, match="does not exist") as caught:
        read_batch(tmp_path / "bacth.toml")
    assert caught.value.where == str(tmp_path / "bacth.toml")
    assert caught.value.hint == "did you mean 'batch.toml'?"
    with pytest.raises(InvalidInput, match="is a folder, not a file") as caught:
        read_batch(tmp_path)
    assert caught.value.where == str(tmp_path)
    with pytest.raises(InvalidInput, match="is not UTF-8") as caught:
        read_batch(written(tmp_path / "latin.toml", b'name = "caf\xe9"'))
    assert caught.value.hint == "save the file as UTF-8"
    with pytest.raises(InvalidInput, match="nested too deeply"):
        read_batch(written(tmp_path / "deep.toml", "a = " + "[" * 100_000))

"""The lines of a requirements file: each is an entry, or one error with its line."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions.entries import Entry, Include, Local, Setting, Wanted
from ray_envs.decisions.requirements_file import entries_of
from ray_envs.errors import InvalidPackages

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO = "1" * 64, "2" * 64
LONG = "3" * 128
WHERE = "r.txt: line 1"


def read(text: str) -> tuple[Entry, ...]:
    return entries_of(text, file="r.txt")


def lines(text: str) -> list[tuple[int, str]]:
    """The number and the text of each requirement."""
    found = [entry for entry in read(text) if isinstance(entry, Wanted)]
    return [(int(entry.where.rpartition(" ")[2]), entry.line) for entry in found]


def local(path: str, *, name: str | None = None, marker: str = "", extras: str = "") -> Local:
    return Local(path, tuple(extras.split()), marker, name, WHERE)


# -- lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("\n  \n# a\n", []),
        ("six", [(1, "six")]),
        ("\ufeffsix\n\nZipp # why\n", [(1, "six"), (3, "zipp")]),
        ("a \\\n>=1\nb", [(1, "a>=1"), (3, "b")]),
        ("a>=1,\\\n\\\n<2\nb", [(1, "a<2,>=1"), (4, "b")]),
        ("# a \\\nb", [(2, "b")]),
        ("  # a \\\nb", [(2, "b")]),
        ("a \\\n# b\nc", [(1, "a"), (3, "c")]),
        ("a \\\n# b \\\nc", [(1, "a"), (3, "c")]),
        ("a\\", [(1, "a")]),
        ("\\\na", [(1, "a")]),
        ("a \\\n   ", [(1, "a")]),
        ("a\r\nb\r\n", [(1, "a"), (2, "b")]),
        ("a\rb", [(1, "a"), (2, "b")]),
        ("a,b", [(1, "a"), (1, "b")]),
        ("a[x,y],b>=1", [(1, "a[x,y]"), (1, "b>=1")]),
        ('a[Y_y] >= 1 ; python_version<"3.12"', [(1, 'a[y-y]>=1; python_version < "3.12"')]),
        ("# ${HOME}\na", [(2, "a")]),
        ("a#b", []),
    ],
)  # fmt: skip
def test_each_requirement_has_the_line_in_which_it_begins(
    text: str, expected: list[tuple[int, str]]
) -> None:
    if text == "a#b":  # as in pip, a comment needs a blank before it
        with pytest.raises(InvalidPackages):
            read(text)
    else:
        assert lines(text) == expected


# -- options


@pytest.mark.parametrize(
    "spelling", ["-{s} V", "-{s}V", "--{l} V", "--{l}=V", "  --{l}   V", "--{l}='V'"]
)
@pytest.mark.parametrize(
    ("short", "long", "value", "expected"),
    [
        ("r", "requirement", "a/b.txt", Include("a/b.txt", False, WHERE)),
        ("r", "requirement", "file:///a/b%20c.txt", Include("/a/b c.txt", False, WHERE)),
        ("c", "constraint", "../c.txt", Include("../c.txt", True, WHERE)),
        ("i", "index-url", "https://h/s", Setting("--index-url", "https://h/s", WHERE)),
        ("f", "find-links", "http://h/l", Setting("--find-links", "http://h/l", WHERE)),
        ("e", "editable", "./lib", local("./lib")),
    ],
)  # fmt: skip
def test_an_option_has_the_spellings_of_pip(
    spelling: str, short: str, long: str, value: str, expected: Entry
) -> None:
    text = spelling.format(s=short, l=long).replace("V", value)
    assert read(text) == (expected,)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--pypi-url https://h/s", "--index-url", "https://h/s"),
        ("--extra-index-url=https://h/x", "--extra-index-url", "https://h/x"),
        ("--no-binary :all:", "--no-binary", ":all:"),
        ("--no-binary=:none:", "--no-binary", ":none:"),
        ("--only-binary a,b", "--only-binary", "a,b"),
        ("--no-index", "--no-index", ""),
        ("--pre", "--pre", ""),
        ("--prefer-binary # why", "--prefer-binary", ""),
        ("--require-hashes", "--require-hashes", ""),
    ],
)
def test_settings_are_kept_as_they_are(text: str, name: str, value: str) -> None:
    assert read(text) == (Setting(name, value, WHERE),)


def test_one_line_may_have_several_options_and_an_option_several_lines() -> None:
    found = read("--pre -i https://h/s --extra-index-url=https://h/x\n--no-binary \\\n  a")
    assert found == (
        Setting("--pre", "", WHERE),
        Setting("--index-url", "https://h/s", WHERE),
        Setting("--extra-index-url", "https://h/x", WHERE),
        Setting("--no-binary", "a", "r.txt: line 2"),
    )


@pytest.mark.parametrize(
    ("line", "says", "hint"),
    [
        ("--trusted-host h", "--trusted-host", "UV_INSECURE_HOST"),
        ("--trusted-host=h", "--trusted-host", "UV_INSECURE_HOST"),
        ("--config-settings a=b", "--config-settings", "config-settings-package"),
        ("--global-option x", "--global-option", "publish a wheel"),
        ("--use-feature=fast-deps", "--use-feature", "leave it out"),
        ("six --config-settings=a=b", "--config-settings", "config-settings-package"),
        ("six -C a=b", "-C", "config-settings-package"),
        ("six --global-option=x", "--global-option", "publish a wheel"),
        ("--extra-index-urls=https://h", "--extra-index-urls", "'--extra-index-url'"),
        ("--what", "--what", "leave it out"),
        ("-x", "-x", "leave it out"),
        ("-", "'-'", "line of its own"),
        ("--pre=1", "--pre takes no value", "write --pre alone"),
        ("-r", "-r has no value", "write -r VALUE"),
        ("--index-url=", "--index-url has no value", "VALUE"),
        ("--pre six", "'six' stands behind an option", "line of its own"),
        ("-r 'a", "cannot be split", "close the quote"),
        ("-r https://h/r.txt", "is an address, not a file", "download it"),
        ("-chttps://h/c.txt", "is an address, not a file", "download it"),
        ("-f ./wheels", "--find-links ./wheels is a local path", "by http"),
        ("-f file:///srv/w", "is a local path", "by http"),
        ("-i /srv/simple", "--index-url /srv/simple is a local path", "by http"),
        ("--hash=sha256:00", "--hash belongs to no requirement", "behind one"),
        ("-i https://${USER}@h/s", "${USER} is not replaced", "UV_INDEX_<NAME>_PASSWORD"),
        ("-r ${HOME}/a.txt", "${HOME} is not replaced", "write the value out"),
        ("-i https://me:s3cret@h/s", "credentials in a URL", "netrc"),
        ("six --hash=sha256:00", "this is not a sha256", "all 64"),
        (f"six --hash=md5:{ONE}", "the algorithm is not one of", "sha256:"),
        ("six --hash", "the algorithm is not one of", "sha256:"),
        ("six --hash=abc", "the algorithm is not one of", "sha256:"),
        ("six --no-binary six", "--no-binary", ""),
        ("git+https://h/x@main#egg=x", "names no commit", "all 40 characters"),
        (f"git+https://h/x@{COMMIT}", "does not say what it is", 'write "name @ URL"'),
        ("https://h/x", "does not say what it is", 'write "name @ URL"'),
        ("https://[h/x-1.zip", "is not an address", "correct it"),
        ("-i https://[h/s", "is not an address", "correct it"),
        ("-i https://h:port/s", "credentials", "netrc"),
        ("-r file://[h/s", "is not an address", "correct it"),
        ("-e file://[h/s", "is not an address", "correct it"),
        ("https://h/x.whl", "does not say what it is", 'write "name @ URL"'),
        (f"hg+https://h/x@{COMMIT}#egg=x", "uses hg+https", "git+https"),
        ("-e git+https://h/x#egg=x", "names no commit", "all 40"),
        ("six=>1", "'six=>1' is not a requirement", "numpy>=1.26"),
        ("six seven", "is not a requirement", "numpy>=1.26"),
        ("six ; python_vers < '3'", "is not a requirement", "numpy>=1.26"),
        ("./x ; python_vers < '3'", "is not a marker", "python_version"),
        (f"./x --hash=sha256:{ONE}", "is a local path with a hash", "publish a wheel"),
        ("a,<2", "'<2' is not a requirement", "numpy>=1.26"),
    ],
)
def test_what_cannot_be_accepted_is_refused_with_its_line(line: str, says: str, hint: str) -> None:
    with pytest.raises(InvalidPackages) as caught:
        read(f"six\n\n{line}\n")
    assert caught.value.where == "r.txt: line 3"
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert "s3cret" not in str(caught.value)


# -- hashes, addresses, local entries


@pytest.mark.parametrize(
    "text",
    [
        f"six==1 --hash=sha256:{ONE} --hash=sha512:{LONG}",
        f"six==1 --hash sha256:{ONE} --hash sha512:{LONG}",
        f"six==1 \\\n    --hash=sha256:{ONE} \\\n    --hash=sha512:{LONG}\n    # via x",
        f"six==1 --hash=SHA256:{ONE} --hash=sha512:{LONG}  # why",
    ],
)
def test_a_requirement_has_the_hashes_behind_it(text: str) -> None:
    assert read(text) == (Wanted("six==1", (f"sha256:{ONE}", f"sha512:{LONG}"), WHERE),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x @ https://h/x-1.zip", "x @ https://h/x-1.zip"),
        ("X[B, a]@https://h/x-1.zip", "x[a,b] @ https://h/x-1.zip"),
        ("https://h/x_y-1.0-py3-none-any.whl", "x-y @ https://h/x_y-1.0-py3-none-any.whl"),
        ("https://h/a-b-1.0.tar.gz", "a-b @ https://h/a-b-1.0.tar.gz"),
        ("https://h/x-1.zip#egg=Y_z", "y-z @ https://h/x-1.zip"),
        (f"https://h/x-1.zip#sha256={ONE}", f"x @ https://h/x-1.zip#sha256={ONE}"),
        (
            'https://h/x-1-py3-none-any.whl ; python_version<"3.12"',
            'x @ https://h/x-1-py3-none-any.whl ; python_version < "3.12"',
        ),
        (f"git+https://h/x.git@{COMMIT}#egg=x", f"x @ git+https://h/x.git@{COMMIT}"),
        (f"-e git+https://h/x.git@{COMMIT}#egg=x", f"x @ git+https://h/x.git@{COMMIT}"),
        (f"-e x @ git+https://h/x.git@{COMMIT}", f"x @ git+https://h/x.git@{COMMIT}"),
        (
            f"git+ssh://git@h/x@{COMMIT}#egg=x[b]&subdirectory=d/e",
            f"x[b] @ git+ssh://git@h/x@{COMMIT}#subdirectory=d/e",
        ),
        (
            f"x @ git+https://h/x@{COMMIT}#subdirectory=d&egg=x",
            f"x @ git+https://h/x@{COMMIT}#subdirectory=d",
        ),
    ],
)
def test_an_address_becomes_a_requirement_with_a_name(text: str, expected: str) -> None:
    assert read(text) == (Wanted(expected, (), WHERE),)
    assert read(expected) == read(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-e .", local(".")),
        ("-e.", local(".")),
        ("-e .[a,B]", local(".", extras="a b")),
        ("-e ./lib[extra]", local("./lib", extras="extra")),
        ("-e lib", local("./lib")),
        ("-e lib[x]", local("./lib", extras="x")),
        ("-e ./lib#egg=Lib[x]", local("./lib", name="lib", extras="x")),
        ("-e file:///srv/a%20b", local("/srv/a b")),
        ("./lib", local("./lib")),
        (".", local(".")),
        ("/srv/lib", local("/srv/lib")),
        ("libs/x", local("libs/x")),
        ("libs/x[y]", local("libs/x", extras="y")),
        ("~/lib", local("~/lib")),
        ("C:\\x", local("C:\\x")),
        ("../x-1-py3-none-any.whl", local("../x-1-py3-none-any.whl")),
        ("x-1-py3-none-any.whl", local("x-1-py3-none-any.whl")),
        ("x-1.tar.gz", local("x-1.tar.gz")),
        ("x @ file:///srv/x", local("/srv/x", name="x")),
        ("X_y[a] @ file:///srv/x.whl", local("/srv/x.whl", name="x-y", extras="a")),
        ("x @ file:./x", local("./x", name="x")),
        ("x @ ./x", local("./x", name="x")),
        ("x @ x.whl", local("x.whl", name="x")),
        ("file://localhost/srv/x", local("/srv/x")),
        ('./lib ; os_name == "posix"', local("./lib", marker='os_name == "posix"')),
        ('x @ file:///x ; os_name == "a"', local("/x", name="x", marker='os_name == "a"')),
    ],
)
def test_a_local_entry_is_of_its_own_kind(text: str, expected: Local) -> None:
    assert read(text) == (expected,)


@given(
    st.lists(
        st.sampled_from([*"a-=[]@:/.#;\\ \n\"'$\u00e4,<1", "https://", "-r ", "-i ", " --hash="])
    )
)
def test_any_text_is_entries_or_one_clear_error(parts: list[str]) -> None:
    with contextlib.suppress(InvalidPackages):
        assert all(entry.where.startswith("r.txt: line ") for entry in read("".join(parts)))

"""Policy: what may stand in a definition and in a lock."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions.policy import check_definition, check_lock, normalised
from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError
from ray_envs.settings import Settings
from ray_envs.specs import Definition

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "https://packages.example/simple"

paths = st.from_regex(r"(/[a-z]{1,5}){0,3}", fullmatch=True)
hosts = st.from_regex(r"[a-z]{1,8}(\.[a-z]{2,5})?(:[0-9]{2,4})?", fullmatch=True)


def settings(**changes: Any) -> Settings:
    return Settings.from_environment({}, **changes)


def project(body: str = "", dependencies: str = '["six"]') -> str:
    return f'[project]\nname = "x"\nversion = "1"\ndependencies = {dependencies}\n{body}'


def checked(pyproject: str | None = None, *, allow: Settings, **options: Any) -> Definition:
    return check_definition(Definition(pyproject=pyproject, **options), allow, where="a.toml")


# -- definitions


def test_without_a_policy_a_definition_stays_as_it_is() -> None:
    given_one = Definition(
        pyproject=project(f"[[tool.uv.index]]\nurl = '{INDEX}'\n"),
        packages=("six", "not a requirement"),
        exclude_newer="2026-03-01",
        only_binary=True,
        env_vars={"A": "1"},
    )
    assert check_definition(given_one, settings(), where="x") == given_one


GIT = f"x @ git+https://h.example/x@{COMMIT}"
URL = "x @ https://h.example/x-1-py3-none-any.whl"


@pytest.mark.parametrize(("requirement", "kind"), [(GIT, "git"), (URL, "url")])
@pytest.mark.parametrize(
    "body",
    [
        None,
        "[project.optional-dependencies]\na = [{!r}]\n",
        "[dependency-groups]\na = ['six', {{include-group = 'b'}}, {!r}]\n",
        "[tool.uv]\noverride-dependencies = [{!r}]\n",
        "[tool.uv]\nconstraint-dependencies = [{!r}]\n",
        "[tool.uv]\nextra-build-dependencies = {{ six = [{!r}] }}\n",
        "[tool.uv.extra-build-dependencies]\nsix = [{{ requirement = {!r} }}]\n",
    ],
)
def test_a_requirement_from_a_source_that_is_not_allowed_is_refused_wherever_it_stands(
    body: str | None, requirement: str, kind: str
) -> None:
    def check(**allowed: Any) -> None:
        allow = settings(**allowed)
        if body is None:
            checked(packages=("six", requirement), allow=allow)
            checked(project(dependencies=f'["{requirement}"]'), allow=allow)
        else:
            checked(project(body.format(requirement)), allow=allow)

    for allowed in ("", {"git": "url", "url": "git"}[kind]):
        with pytest.raises(InvalidPackages) as caught:
            check(allowed_sources=allowed)
        assert requirement in caught.value.message
        assert f"add {kind} to RAY_ENVS_ALLOWED_SOURCES" in caught.value.hint
        assert caught.value.where.startswith("a.toml: ")
    check(allowed_sources=kind)
    check(allowed_sources="git,url")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (f'{{ git = "https://h.example/x", rev = "{COMMIT}" }}', "git"),
        ('[{ index = "mine" }, { url = "https://h.example/x.whl" }]', "url"),
    ],
)
def test_a_source_of_a_project_is_refused_unless_it_is_allowed(source: str, kind: str) -> None:
    text = project(f"[tool.uv.sources]\nsix = {source}\n")
    with pytest.raises(InvalidInput, match=f"six comes from {kind} https://h.example/x") as caught:
        checked(text, allow=settings())
    assert caught.value.where == "a.toml: pyproject.toml: tool.uv.sources.six"
    checked(text, allow=settings(allowed_sources=kind))


@pytest.mark.parametrize("source", ['{ path = "../x" }', "{ workspace = true }"])
def test_a_local_source_is_refused_whatever_is_allowed(source: str) -> None:
    with pytest.raises(InvalidInput, match="other nodes do not have it"):
        checked(
            project(f"[tool.uv.sources]\nx = {source}\n"), allow=settings(allowed_sources="git,url")
        )


@pytest.mark.parametrize(
    "body",
    [
        "[[tool.uv.index]]\nurl = '{}'\n",
        "[tool.uv]\nindex-url = '{}'\n",
        "[tool.uv]\nextra-index-url = ['https://packages.example/simple/', '{}']\n",
        "[tool.uv]\nfind-links = ['{}']\n",
    ],
)
def test_an_index_that_is_not_allowed_is_refused_in_a_project(body: str) -> None:
    allow = settings(allowed_indexes=f"{INDEX},https://other.example")
    checked(project(body.format(INDEX)), allow=allow)
    for url in ("https://h.example/s", "./wheels", "https://packages.example/simple/../s"):
        with pytest.raises(InvalidInput, match="which is not allowed") as caught:
            checked(project(body.format(url)), allow=allow)
        assert url in caught.value.message
        assert f"use {INDEX} or https://other.example" in caught.value.hint
        assert "RAY_ENVS_ALLOWED_INDEXES" in caught.value.hint


@given(hosts, paths, st.randoms(use_true_random=False))
def test_equal_indexes_are_equal_however_they_are_written(host: str, path: str, dice: Any) -> None:
    odd = "".join(dice.choice([c, c.upper()]) for c in host)
    scheme, port = dice.choice([("http", ":80"), ("https", ":443"), ("HTTPS", "")])
    if ":" in host:
        port = ""
    user = dice.choice(["", "me@", "me:pw@"])
    written = f"{scheme}://{user}{odd}{port}{path}{'/' * dice.randrange(2)}"
    assert normalised(written) == normalised(f"{scheme.lower()}://{host}{path}")
    for other in (f"{scheme}://{host}{path}/more", f"ftp://{host}{path}", f"https://x{host}{path}"):
        assert normalised(other) != normalised(written)


@pytest.mark.parametrize("url", ["https://evil.example\\@packages.example/simple", "https://[x/s"])
def test_a_url_that_uv_could_read_otherwise_is_no_index_that_is_allowed(url: str) -> None:
    allow = settings(allowed_indexes=INDEX)
    with pytest.raises(InvalidInput, match="not allowed"):
        checked(project(f"[tool.uv]\nindex-url = '{url}'\n"), allow=allow)


def test_an_ipv6_index_keeps_its_brackets() -> None:
    assert normalised("http://[::1]:80/s/") == "http://[::1]/s"


# -- wheels only and cut-offs


@pytest.mark.parametrize("of_spec", [False, True])
@pytest.mark.parametrize("of_operator", [False, True])
def test_wheels_only_is_what_either_asks_for(of_spec: bool, of_operator: bool) -> None:
    made = checked(only_binary=of_spec, allow=settings(only_binary=of_operator))
    assert made.only_binary == (of_spec or of_operator)


LIMIT = settings(exclude_newer="2026-03-01")


def test_the_cut_off_is_the_operators_where_a_spec_gives_none_and_its_own_where_earlier() -> None:
    assert checked(allow=LIMIT).exclude_newer == "2026-03-01"
    for own in ("2026-03-01", "2026-02-28", "2026-03-01T23:59:59Z", "2026-03-02T01:00:00+01:00"):
        assert checked(exclude_newer=own, allow=LIMIT).exclude_newer == own


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("2026-03-02", "2026-03-02 is later than 2026-03-01"),
        ("2026-03-02T00:00:00.000001Z", "is later than"),
        ("2026-03-01T23:59:59-01:00", "is later than"),
    ],
)
def test_a_later_cut_off_is_refused(own: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        checked(exclude_newer=own, allow=LIMIT)
    assert caught.value.where == "a.toml: exclude_newer"
    assert "RAY_ENVS_EXCLUDE_NEWER" in caught.value.hint


def test_a_cut_off_of_the_projects_own_is_kept_where_it_is_early_enough() -> None:
    text = project("[tool.uv]\nexclude-newer = 2026-01-01T00:00:00Z\n")
    assert checked(text, allow=LIMIT).exclude_newer is None
    assert checked(project("[tool.uv]\n"), allow=LIMIT).exclude_newer == "2026-03-01"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ('[tool.uv]\nexclude-newer = "2026-04-01"\n', "exclude-newer"),
        ("[tool.uv]\nexclude-newer = 2026-04-01\n", "exclude-newer"),
        ("[tool.uv]\nexclude-newer = 2026-04-01T00:00:00Z\n", "exclude-newer"),
        ("[tool.uv]\nexclude-newer-package = { six = false }\n", "exclude-newer-package.six"),
        ('[tool.uv.exclude-newer-package]\nsix = "2027-01-01"\n', "exclude-newer-package.six"),
        (f"[[tool.uv.index]]\nurl = '{INDEX}'\nexclude-newer = false\n", "index.exclude-newer"),
    ],
)
def test_a_project_cannot_lift_the_cut_off_for_all_a_package_or_an_index(
    body: str, where: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        checked(project(body), allow=LIMIT)
    assert caught.value.where == f"a.toml: pyproject.toml: tool.uv.{where}"
    checked(project(body), allow=settings())


def test_a_project_that_is_no_toml_is_one_clear_error() -> None:
    with pytest.raises(InvalidInput, match="not valid TOML") as caught:
        checked("[", allow=settings())
    assert caught.value.where == "a.toml: pyproject.toml"


values: Any = st.recursive(
    st.sampled_from(["'six'", f"'{URL}'", "1", "true", "2026-01-01", "''", f"'{INDEX}'"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(lambda v: f"[{', '.join(v)}]"),
        st.dictionaries(st.sampled_from(["git", "url", "six"]), inner, max_size=2).map(
            lambda d: "{" + ", ".join(f"{k} = {v}" for k, v in d.items()) + "}"
        ),
    ),
    max_leaves=4,
)
keys = st.sampled_from(
    [
        "project", "project.dependencies", "dependency-groups", "tool", "tool.uv",
        "tool.uv.sources", "tool.uv.index", "tool.uv.index-url", "tool.uv.exclude-newer",
        "tool.uv.exclude-newer-package", "tool.uv.override-dependencies",
    ]
)  # fmt: skip


@given(keys, values, st.sampled_from([settings(), settings(allowed_indexes=INDEX), LIMIT]))
def test_any_project_is_accepted_or_one_clear_error(key: str, value: str, allow: Settings) -> None:
    with contextlib.suppress(RayEnvsError):
        made = checked(f"{key} = {value}\n", allow=allow)
        assert checked(made.pyproject, exclude_newer=made.exclude_newer, allow=allow) == made


# -- locks


def lock_of(*sources: str, files: str = "wheels = [{ url = 'u', hash = 'h' }]") -> str:
    packages = (
        f"[[package]]\nname = 'p{number}'\nversion = '1'\nsource = {{ {source} }}\n{files}\n"
        for number, source in enumerate(sources)
    )
    own = "[[package]]\nname = 'x'\nversion = '0'\nsource = { virtual = '.' }\n"
    return "version = 1\n" + own + "".join(packages)


@pytest.mark.parametrize(
    ("registry", "url", "is_safe"),
    [
        ("https://packages.example/simple", "https://files.example/p0-1-py3-none-any.whl", True),
        ("https://packages.example/simple", "../files/p0-1-py3-none-any.whl", True),
        ("http://packages.example/simple", "http://files.example/p0-1-py3-none-any.whl", True),
        ("https://packages.example/simple", "http://evil.example/p0-1-py3-none-any.whl", False),
        ("https://packages.example/simple", "file:///etc/passwd", False),
        ("https://packages.example/simple", "FILE:/etc/passwd", False),
        ("http://packages.example/simple", "ftp://evil.example/p0-1-py3-none-any.whl", False),
    ],
)
@pytest.mark.parametrize("form", ["wheels = [{{ url = '{}' }}]", "sdist = {{ url = '{}' }}"])
def test_a_file_is_fetched_as_safely_as_its_index_is_read(
    registry: str, url: str, is_safe: bool, form: str
) -> None:
    lock = lock_of(f"registry = '{registry}'", files=form.format(url))
    if is_safe:
        check_lock(lock, settings())
    else:
        with pytest.raises(InvalidPackages, match="a file of p0 1 is fetched by"):
            check_lock(lock, settings())


@pytest.mark.parametrize(
    "line",
    [
        "# see https://user:s3cret@h.example/x",
        "x = [{ url = 'https://user:s3cret@h.example/p.whl' }]",
        "sdist = { url = 'https://h.example/p.tar.gz?token=s3cret' }",
    ],
)
def test_a_lock_with_a_credential_is_refused_whoever_made_it(line: str) -> None:
    lock = lock_of("registry = 'https://h.example/simple'") + line + "\n"
    with pytest.raises(InvalidInput, match="credentials in a URL") as caught:
        check_lock(lock, settings())
    assert "s3cret" not in str(caught.value)
    given = Definition(packages=(), pyproject="[project]\n", uv_lock=lock)
    with pytest.raises(InvalidInput, match="credentials in a URL"):
        check_definition(given, settings(), where="variants[0]")


def test_a_lock_from_an_index_is_admitted_and_so_is_its_own_project() -> None:
    text = lock_of("registry = 'https://PACKAGES.example/simple/'")
    for allow in (settings(), settings(allowed_indexes=INDEX), settings(only_binary=True)):
        check_lock(text, allow)
    check_lock("", settings(allowed_indexes=INDEX, only_binary=True))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("registry = 'https://h.example/s'", "p0 1 comes from registry https://h.example/s, which"),
        ("registry = '../wheels'", "p0 1 comes from registry ../wheels, and other nodes"),
        ("git = 'https://h.example/x?rev=a#a'", "p0 1 comes from git https://h.example/x?rev=a#a"),
        ("url = 'https://h.example/x?token=s3cret'", "from url https://h.example/x?token=***, wh"),
        ("path = 'x.whl'", "from path x.whl, and other nodes"),
        ("directory = '../x'", "from directory ../x, and other nodes"),
        ("editable = '.'", "from editable ., and other nodes"),
        ("virtual = 'member'", "from virtual member, and other nodes"),
        ("from-the-future = 'x'", "from from-the-future x, which is not allowed"),
    ],
)
def test_a_lock_with_something_from_elsewhere_is_refused_by_name(source: str, said: str) -> None:
    with pytest.raises(InvalidPackages) as caught:
        check_lock(lock_of(source), settings(allowed_indexes=INDEX))
    assert said in caught.value.message
    assert caught.value.where == "uv.lock"
    assert "s3cret" not in str(caught.value)
    assert caught.value.hint


@given(
    st.lists(st.sampled_from(["git", "url", "registry", "path"]), max_size=5),
    st.sets(st.sampled_from(["git", "url"])),
    st.booleans(),
)
def test_a_lock_is_admitted_only_if_every_source_is(
    kinds: list[str], allowed: set[str], is_own_index: bool
) -> None:
    text = lock_of(*(f"{kind} = 'https://h.example/{kind}'" for kind in kinds))
    index = "https://h.example/registry" if is_own_index else INDEX
    allow = settings(allowed_sources=",".join(sorted(allowed)), allowed_indexes=index)
    admitted = allowed | ({"registry"} if is_own_index else set())
    if set(kinds) <= admitted:
        check_lock(text, allow)
    else:
        with pytest.raises(InvalidPackages, match="comes from"):
            check_lock(text, allow)


@pytest.mark.parametrize("files", ["sdist = { url = 'u', hash = 'h' }", "wheels = []"])
def test_a_package_without_a_wheel_is_refused_where_only_wheels_are_allowed(files: str) -> None:
    text = lock_of(f"registry = '{INDEX}'", files=files)
    check_lock(text, settings())
    for allow, only_binary in ((settings(), True), (settings(only_binary=True), False)):
        with pytest.raises(InvalidPackages, match="p0 1 has no wheel") as caught:
            check_lock(text, allow, only_binary=only_binary)
        assert "RAY_ENVS_ONLY_BINARY" in caught.value.hint


def test_a_lock_that_is_no_toml_is_one_clear_error() -> None:
    with pytest.raises(InvalidInput, match="not valid TOML") as caught:
        check_lock("[", settings())
    assert caught.value.where == "uv.lock"


@pytest.mark.parametrize("own", ["3 days", "2026-02-30", "", "May"])
@pytest.mark.parametrize("allow", [settings(), settings(exclude_newer="2026-03-01")])
def test_a_cut_off_that_is_another_moment_each_day_is_refused(own: str, allow: Settings) -> None:
    with pytest.raises(InvalidInput) as caught:
        checked(exclude_newer=own, allow=allow)
    assert caught.value.where == "a.toml: exclude_newer"
    assert "2026-01-31" in caught.value.hint

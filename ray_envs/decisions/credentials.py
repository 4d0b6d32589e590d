"""Finds secrets in texts: hides them before a text is shown, and refuses them in a definition.

What is known to be secret is hidden by its value (`secrets_in`, `secrets_of`). What only looks like
a secret is hidden by its form, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from urllib.parse import quote, unquote

from ray_envs.errors import InvalidInput, InvalidPackages

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)")
#: The user and password of a URL. The second form is a password with a slash: uv reads the part
#: before the slash as a port, and repeats the whole URL in its error.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|(?!\[)[^/\s:@]*:(?!\d*(?:[/?#\s,'\"`()<>]|$))\S*)@")
#: Parameters of a URL that hold a secret. uv hides only some of them, and not everywhere.
_SECRET_PARAMETER = re.compile(
    r"([?&](?:[\w.-]*(?:token|passw(?:or)?d|secret|signature|credential|api[_-]?key)|sig|key)=)"
    r"[^\s&#'\"`()<>]+",
    re.IGNORECASE,
)
#: uv itself prints no headers, but it repeats the output of build backends.
_HEADER = re.compile(r"(\bauthorization:\s*(?:(?:basic|bearer|token)\s+)?)[^\s'\"]+", re.IGNORECASE)

#: Names of variables that surely hold secrets. `_KEY` alone does not count: CACHE_KEY is harmless.
_SECRET_NAME = re.compile(
    r".*PASSWORD|.*PASSWD|(.*_)?(TOKEN|SECRET|API_?KEY|(ACCESS|SECRET|PRIVATE)_KEY)"
    r"|UV_INDEX_.*_USERNAME|UV_PUBLISH_USERNAME",
    re.IGNORECASE,
)
#: Values that are never secrets: switches, numbers, paths of files that hold the secret.
_PLAIN_VALUE = re.compile(
    r"|\d+|true|false|yes|no|on|off|none|null|enabled|disabled|[~./].*|[a-z]:\\.*|file:.*",
    re.IGNORECASE,
)
#: The form of a secret token; tokens of language models ("[PAD]", "<eos>") do not match.
_TOKEN_VALUE = re.compile(r"[\w.~+/=:-]{8,}")

_CREDENTIALS_HINT = (
    "put them into a netrc file or a keyring on the nodes, or set "
    "UV_INDEX_<NAME>_USERNAME and UV_INDEX_<NAME>_PASSWORD there"
)
_ENV_VARS_HINT = (
    "Ray logs env_vars in plain text: set it in the environment of the cluster's nodes, "
    "where workers inherit it, or give the path of a file that holds it"
)

_Error = Callable[..., InvalidInput | InvalidPackages]


#: Variables whose URLs may have a token as a part of their path.
_INDEX_NAME = re.compile(r"(UV|PIP)_.*(INDEX|FIND_LINKS|MIRROR|PROXY).*", re.IGNORECASE)
#: The user and password at the start of an authority; the second form as in `_CREDENTIALS`.
_USER_INFO = re.compile(r"(?:([^/?#]*)|((?!\[)[^/:@]*:(?!\d*(?:[/?#\s]|$)).*))@")
#: The same without a scheme: `user:password@host`, never a mail address or `git@host:path`.
_BARE_USER_INFO = re.compile(r"(?:^|(?<=\s))([^/\s@:]+:[^\s@/]+)@\S")
_PARAMETER = re.compile(r"[?&;]([^=&\s]*)=([^&#\s]*)")
#: A part of a path that nobody would write by hand.
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w~+=-]{10,}")
_QUOTED = re.compile(r"""\"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'""")
#: Shorter ones would hide parts of ordinary words.
_SHORTEST = 4


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """Return `text` with `***` for its credentials: those in `secrets`, and all that look so."""
    if secrets:
        text = _any_of(frozenset(secrets)).sub("***", text)
    text = _CREDENTIALS.sub("***@", text)
    return _HEADER.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", text))


@lru_cache(maxsize=64)
def _any_of(secrets: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(each) for each in sorted(secrets, key=len, reverse=True)))


def secrets_of(environ: Mapping[str, str], netrc: str = "") -> frozenset[str]:
    """Return the secrets in environment variables and in the text of a netrc file."""
    found: set[str] = set()
    for name, value in environ.items():
        if _SECRET_NAME.fullmatch(name) and not _PLAIN_VALUE.fullmatch(value):
            found |= _spellings(value)
        if "://" in value or "@" in value or "=" in value:
            found |= secrets_in(value, has_paths=_INDEX_NAME.fullmatch(name) is not None)
    for password in re.findall(r"\bpassword\s+(\S+)", netrc):
        found |= _spellings(password.strip("\"'"))
    return frozenset(found)


def secrets_in_toml(text: str) -> frozenset[str]:
    """Return the secrets in the strings of a TOML text, whether it can be parsed or not."""
    found: set[str] = set()
    for double, single in _QUOTED.findall(text):
        found |= secrets_in(double or single)
    return frozenset(found)


def secrets_in(setting: str, *, has_paths: bool = False) -> set[str]:
    """Return the secrets in a setting that is a URL, several URLs, or nearly a URL.

    A password, a user name without one, the value of a parameter that is named or looks like a
    secret and, with `has_paths`, parts of the path that look like one.
    """
    found: set[str] = set()
    for text in {setting, *setting.split()}:  # several URLs; and a password may have a space
        scheme, has_scheme, rest = text.partition("://")
        if has_scheme:
            info = _USER_INFO.match(rest)
            is_login = scheme.lower().endswith("ssh")
            if info is not None:
                found |= _in_user_info(info[1] or info[2] or "", is_login=is_login)
            path = (rest[info.end() :] if info else rest).partition("#")[0].partition("?")[0]
            if has_paths:
                found.update(part for part in path.split("/")[1:] if _RANDOM.fullmatch(part))
        elif (bare := _BARE_USER_INFO.search(text)) is not None:
            found |= _in_user_info(bare[1], is_login=False)
        for name, value in _PARAMETER.findall(text):
            if _SECRET_PARAMETER.match(f"?{name}={value}") or _RANDOM.fullmatch(value):
                found |= _spellings(value)
    return found


def _in_user_info(info: str, *, is_login: bool) -> set[str]:
    user, has_password, password = info.partition(":")
    found = _spellings(password)
    if (not has_password and not is_login) or _RANDOM.fullmatch(user):
        found |= _spellings(user)
    return found


def _spellings(secret: str) -> set[str]:
    """Return the forms in which programs repeat a secret: escaped, not escaped, in pieces."""
    escaped = secret.replace("\\", "\\\\").replace('"', '\\"')
    forms = {secret, unquote(secret), quote(secret), quote(secret, safe=""), escaped}
    forms |= set(re.split(r"[\s'\"]+", secret))
    return {form for form in forms if len(form) >= _SHORTEST}


def check_credentials(text: str, error: _Error, *, where: str) -> None:
    """Raise `error` if a URL in `text` has a user name, password or token; do not repeat it."""
    is_secret = "://" in text and _SECRET_PARAMETER.search(text) is not None
    for scheme, authority in _URL.findall(text):
        user, has_user, host = authority.rpartition("@")
        # A password with a slash ends the authority early; the rest is not a port number.
        is_cut_short = re.search(r":(?!\d*$)[^\]]*$", host)
        # ssh://git@host is the usual login without a secret: the key is in a file.
        is_login = scheme.lower().endswith("ssh") and ":" not in user
        is_secret = is_secret or bool(is_cut_short) or bool(has_user and not is_login)
    if is_secret or _BARE_USER_INFO.search(text):
        raise _secret_url(text, error, where=where)


def check_file(text: str, *, where: str) -> None:
    """Raise `InvalidInput` if a whole file has credentials in a URL, also in a comment."""
    for number, line in enumerate(text.splitlines(), start=1):
        if "://" in line and any(_has_credentials(url) for url in _urls_in(line)):
            raise _secret_url(line.lstrip("# "), InvalidInput, where=f"{where}, line {number}")


def _urls_in(line: str) -> Iterator[str]:
    yield from re.findall(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>(){},`]*", line)


def _has_credentials(url: str) -> bool:
    try:
        check_credentials(url, InvalidInput, where="")
    except InvalidInput:
        return True
    return False


def check_env_vars(env_vars: Mapping[str, str], *, where: str) -> None:
    """Refuse secrets in the variables of a spec. Only sure cases are refused.

    A URL with a password or token; an http URL with a user name, which may be a token (in other
    URLs it is a login or, as in abfss://, a folder); and a variable whose name says secret and
    whose value is not a switch, a number or the path of a file.

    Raises `InvalidInput`: names the variable, never its value.
    """
    for name, value in env_vars.items():
        place = f"{where}: env_vars.{name}" if where else f"env_vars.{name}"
        for scheme, authority in _URL.findall(value):
            user = authority.rpartition("@")[0]
            if user.partition(":")[2] or (user and scheme.lower().startswith("http")):
                raise _secret_url(value, InvalidInput, where=place)
        if "://" in value and _SECRET_PARAMETER.search(value):
            raise _secret_url(value, InvalidInput, where=place)
        is_plain = _PLAIN_VALUE.fullmatch(value) or (
            name.upper().endswith("TOKEN") and not _TOKEN_VALUE.fullmatch(value)
        )
        if _SECRET_NAME.fullmatch(name) and not is_plain:
            raise InvalidInput(f"{name} looks like a secret", where=place, hint=_ENV_VARS_HINT)


def _secret_url(text: str, error: _Error, *, where: str) -> InvalidInput | InvalidPackages:
    scheme = re.search(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    return error(
        f"credentials in a URL ({scheme[0][:80]}…)" if scheme else "credentials before a host name",
        where=where,
        hint=_CREDENTIALS_HINT,
    )

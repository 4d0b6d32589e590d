"""Finds secrets in texts: hides them before a text is shown, and refuses them in a definition."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ray_envs.errors import InvalidInput, InvalidPackages

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)")
#: The user and password of a URL. The second form is a password with a slash: uv reads the part
#: before the slash as a port, and repeats the whole URL in its error.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|(?!\[)[^/\s:@]*:(?!\d*(?:[/?#\s,'\"`()<>]|$))\S*)@")
#: Parameters of a URL that hold a secret. uv hides only some of them, and not everywhere.
_SECRET_PARAMETER = re.compile(
    r"([?&](?:[\w.-]*(?:token|passw(?:or)?d|secret|signature|credential|api[_-]?key)|sig)=)"
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


def redacted(text: str) -> str:
    """Return `text` with `***` for the credentials in its URLs and headers."""
    text = _CREDENTIALS.sub("***@", text)
    return _HEADER.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", text))


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
    if is_secret:
        raise _secret_url(text, error, where=where)


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
    return error(
        f"credentials in a URL ({text.partition('://')[0][:80]}://…)",
        where=where,
        hint=_CREDENTIALS_HINT,
    )

"""What is secret on this machine: the credentials in its environment and in its netrc file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ray_envs.decisions.credentials import secrets_of

#: More than any netrc file has.
_MOST_BYTES = 2**20


def known_secrets(environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """Return the secrets that a child with `environ` (by default that of this process) can repeat.

    uv reads the netrc file that NETRC names, or the one in the home folder.
    """
    environ = os.environ if environ is None else environ
    text = ""
    with suppress(OSError, RuntimeError):  # there is none, or no home folder
        file = Path(environ.get("NETRC") or Path.home() / ".netrc")
        if file.is_file():
            with file.open("rb") as opened:
                text = opened.read(_MOST_BYTES).decode("utf-8", "replace")
    return secrets_of(environ, text)

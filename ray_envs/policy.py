"""What may stand in a definition or a lock, and what may be shown. Pure: texts in, errors out."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")


def redacted(text: str) -> str:
    """`text` without the credentials of its URLs."""
    return _CREDENTIALS.sub("***@", text)

"""Stands in for `rsync` where none is installed: what Ray's launcher asks of it, and nothing else.

`rsync --rsh SSH -avz [--exclude NAME]… SOURCE USER@HOST:TARGET`, as in
`ray.autoscaler._private.command_runner`; a tar goes through the same ssh. It leaves out what would
spare work, the comparison with what is there: all is sent each time. Any other use is an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import posixpath
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rsync", allow_abbrev=False, add_help=False)
    parser.add_argument("--rsh", required=True)
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("source")
    parser.add_argument("target")
    # argparse would take a part of this word for it.
    given = parser.parse_args([word for word in words if word != "-avz"])
    if "-avz" not in words:
        parser.error("without -avz")
    host, colon, target = given.target.partition(":")
    if not colon or "@" not in host or not target:
        parser.error(f"{given.target!r} is not USER@HOST:TARGET")
    if any("/" in name for name in given.exclude):
        parser.error("--exclude: this stand-in knows names, not paths")
    is_folder = given.source.endswith("/")
    if os.path.isdir(given.source) != is_folder:
        parser.error(f"{given.source!r}: a folder ends with a slash, and a file does not")
    if target.endswith("/") != is_folder:
        parser.error(f"{given.source!r} and {given.target!r} are not of one kind")
    return _send(given.rsh, host, given.source, target, given.exclude)


def _send(rsh: str, host: str, source: str, target: str, exclude: Sequence[str]) -> int:
    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = posixpath.basename(member.name)
        return None if any(fnmatch.fnmatchcase(name, each) for each in exclude) else member

    folder, name = posixpath.split(target)  # of a folder, the name is empty
    there = _quoted(folder or ".")
    # As rsync does: of the target's folders the last one alone is made.
    command = f"{{ test -d {there} || mkdir {there}; }} && tar -C {there} -xpz"
    with subprocess.Popen([*shlex.split(rsh), host, command], stdin=subprocess.PIPE) as remote:
        assert remote.stdin is not None
        with tarfile.open(fileobj=remote.stdin, mode="w|gz") as tar:
            tar.add(source, arcname=name or ".", filter=kept)
        remote.stdin.close()
        return remote.wait()


def _quoted(path: str) -> str:
    """A path for the shell over there, which puts its own home for a `~`."""
    home, slash, rest = path.partition("/")
    return f"{home}{slash}{rest and shlex.quote(rest)}" if home == "~" else shlex.quote(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

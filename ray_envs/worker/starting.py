"""Imports what a Ray worker imports when it starts, and prints what that was, as JSON.

`node.worker_start` runs this text with the interpreter of an environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


class _Nowhere:
    """Notes which modules were looked for and are nowhere. Stands last in `sys.meta_path`."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name: str, path: object = None, _target: object = None) -> None:
        if path is None:
            self.names.add(name)


def main(site_packages: str, worker: str) -> None:
    """Import Ray's module `worker`.

    Print which files of `site_packages` that read, and which modules it missed.
    """
    nowhere = _Nowhere()
    sys.meta_path.append(nowhere)
    importlib.import_module(worker)
    below = site_packages + os.sep
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    told = {
        "files": sorted(file[len(below) :] for file in files if file.startswith(below)),
        "nowhere": sorted(nowhere.names),
    }
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])

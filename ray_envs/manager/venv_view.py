"""The `.venv` beside a definition: shows people the packages of the current generation.

It has its own folder, so that a stray `uv sync` there never changes the store, which programs use.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ray_envs.disk.files import storage_errors, write_atomically
from ray_envs.errors import StorageFailed
from ray_envs.manager.registry import Registry
from ray_envs.models import VariantRecord
from ray_envs.node.interpreter import base_python
from ray_envs.node.store import Store


def show(registry: Registry, store: Store, record: VariantRecord) -> None:
    """Make the `.venv` of a variant show its current generation, if the disk allows it."""
    current = record.current
    site = store.site_packages(current.key, current.target.python_minor)
    with suppress(StorageFailed):
        write(registry.folder(record.env_id), Path(base_python()), current.target.python, site)


def write(folder: Path, base_python: Path, python: str, site: Path) -> None:
    """Write `folder/.venv`, whose packages are those in `site`."""
    venv = folder / ".venv"
    minor = ".".join(python.split(".")[:2])
    packages = venv / "lib" / f"python{minor}" / "site-packages"
    with storage_errors(f"write {venv}"):
        packages.mkdir(parents=True, exist_ok=True)
        (venv / "bin").mkdir(exist_ok=True)
        write_atomically(
            venv / "pyvenv.cfg",
            f"home = {base_python.parent}\nversion_info = {python}\n"
            "include-system-site-packages = false\n",
            is_durable=False,
        )
        link = venv / "bin" / "python"
        if not link.is_symlink():
            link.symlink_to(base_python)
        write_atomically(
            packages / "ray_envs_store.pth",
            f"import site; site.addsitedir({str(site)!r})\n",
            is_durable=False,
        )

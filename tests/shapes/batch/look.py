"""The payload: the versions of the packages that a variant has."""

from importlib.metadata import PackageNotFoundError, version


def versions(names):
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found

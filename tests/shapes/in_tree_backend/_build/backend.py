"""Writes a module, then lets setuptools build."""

from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def build_wheel(directory, config_settings=None, metadata_directory=None):
    Path("foundry", "cast.py").write_text('metal = "iron"\n')
    return build_meta.build_wheel(directory, config_settings, metadata_directory)

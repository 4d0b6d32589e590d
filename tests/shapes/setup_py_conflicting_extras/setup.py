import re
from pathlib import Path

from setuptools import find_packages, setup

text = Path(__file__).with_name("pylon").joinpath("__init__.py").read_text()

setup(
    name="pylon",
    version=re.search(r'__version__ = "(.+)"', text).group(1),
    packages=find_packages(),
    install_requires=["tabulate==0.9.0"],
    extras_require={
        "old": ["six==1.15.0"],
        "new": ["six==1.17.0"],
        "moon": ["nothing-of-this-name"],
    },
)

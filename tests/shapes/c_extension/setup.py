from setuptools import Extension, setup

setup(packages=["abacus"], ext_modules=[Extension("abacus._beads", ["src/beads.c"])])

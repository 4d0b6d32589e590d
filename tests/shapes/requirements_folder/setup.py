from setuptools import find_packages, setup

setup(
    name="gazette",
    version="3.2",
    packages=find_packages(),
    install_requires=["six"],
    extras_require={"web": ["iniconfig>=1.1"]},
)

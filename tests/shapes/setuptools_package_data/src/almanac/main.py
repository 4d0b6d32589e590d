from importlib.resources import files


def moon() -> str:
    return files("almanac").joinpath("tables", "moons.txt").read_text().strip()


def main() -> None:
    print(moon())

from pathlib import Path

import toml
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    def initialize(self, version, build_data):
        given = toml.load(Path(self.root, "shapes.toml"))
        text = "".join(f"{name} = {value!r}\n" for name, value in given.items())
        Path(self.root, "stencil", "generated.py").write_text(text)

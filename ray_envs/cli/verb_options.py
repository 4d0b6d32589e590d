"""The options of commands that are fields of a verb's request.

Not in `arguments`: a command that only reads the disk does not import the verbs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ray_envs.verbs import CreateEnv, Request

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def verb_option(request: type[Request], field: str, **more: Any) -> Callable[[CommandT], CommandT]:
    """The option for a field of a request, with the field's description and default."""
    info = request.model_fields[field]
    name, is_flag = f"--{field.replace('_', '-')}", isinstance(info.default, bool)
    return click.option(name, is_flag=is_flag, help=info.description, **more)


replace_option = verb_option(CreateEnv, "replace")
dry_run_option = verb_option(CreateEnv, "dry_run")

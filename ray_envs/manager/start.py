"""The program of the helper driver that creates the EnvManager of a running cluster."""

from __future__ import annotations

import json
import sys

from ray_envs.cluster.actors import create_manager
from ray_envs.cluster.connecting import NAMESPACE
from ray_envs.errors import RayEnvsError
from ray_envs.manager.manager import EnvManager
from ray_envs.settings import Settings


def start(address: str) -> None:
    """Create the detached EnvManager of the cluster at `address`: the helper driver's only job.

    Settings come from `RAY_ENVS_*`. An error of ours is printed as plain data, as the last line.
    """
    import ray

    try:
        settings = Settings.from_environment().to_environment()
        ray.init(address=address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
        ray.get(create_manager(EnvManager, settings).describe.remote())
    except RayEnvsError as exc:
        print(json.dumps(exc.to_dict()))
        sys.exit(exc.exit_code)

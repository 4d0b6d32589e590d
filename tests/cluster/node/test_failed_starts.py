"""A plain task whose worker ends before it has registered with Ray ends, too, with the reason.

Ray would start such workers for ever. The Ray belongs to a driver that the test starts: it notices
after 6 s that a worker has not registered; the default is 60 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from ray_envs import Settings
from ray_envs.plugin.gate import PLUGINS_VARIABLE, with_plugin
from tests.cluster.conftest import is_running

DRIVER = """
import json, os, pathlib, time
import ray
from ray_envs import EnvSpec, RayEnvironmentProvider
from ray_envs.errors import RayEnvsError

envs = RayEnvironmentProvider.connect("local")
for name, six in (("at-times", "1.16.0"), ("always", "1.17.0")):
    envs.create(name, EnvSpec(packages=("six==" + six,)))
ready = envs.prepare("at-times", "always")
told = {}

def spoil(name, text):
    (site,) = pathlib.Path(ready[name]["venv_path"]).glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(text)

spoil("at-times", '''
import os, sys
if "BREAK" in os.environ and any(w.endswith("default_worker.py") for w in sys.orig_argv):
    os._exit(1)
''')
spoil("always", "raise SystemExit('broken on purpose')")

@ray.remote(num_cpus=0, max_retries=0)
def prefix():
    import sys
    return sys.prefix

def ended(task, timeout_s=120):
    try:
        return ray.get(task, timeout=timeout_s)
    except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.RaySystemError) as exc:
        return str(exc)

def started(name, **variables):
    return prefix.options(**envs.options(name, runtime_env={"env_vars": variables})).remote()

doomed, broken = started("at-times", BREAK="1"), started("always")
told["good"] = ended(started("at-times"))
told["doomed"], told["broken"] = ended(doomed), ended(broken)
told["good again"] = ended(started("at-times", OTHER="1"))
try:
    envs.options("always")
except RayEnvsError as exc:
    told["options"] = exc.to_dict()
told["venv"] = ready["at-times"]["venv_path"]
root = pathlib.Path(os.environ["RAY_ENVS_ROOT"])
deadline = time.monotonic() + 20
while (left := os.listdir(root / "starts")) and time.monotonic() < deadline:
    time.sleep(0.1)
told["starts"] = left
told["refused"] = {p.name.partition("-")[0]: json.loads(p.read_text())["reason"]
                   for p in (root / "wanted").glob("*-*.refused")}
told["keys"] = {name: pathlib.Path(each["venv_path"]).parent.name for name, each in ready.items()}
envs.close()
print("TOLD " + json.dumps(told))
"""


@pytest.mark.timeout(240)
def test_a_task_whose_worker_never_registers_ends_and_hinders_no_other(
    other_root: Callable[[str], Settings], tmp_path: Path
) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "UV_"))}
    environ = {
        **inherited,
        "RAY_ENVS_ROOT": str(other_root("starts").root),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_register_timeout_seconds": "6",
        PLUGINS_VARIABLE: with_plugin(None),
    }
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ours = psutil.Process(driver.pid)
    try:
        out, err = driver.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        left = [*ours.children(recursive=True), ours]
        for process in left:
            process.kill()
        pytest.fail(f"still running: {driver.communicate()}")
    assert driver.returncode == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("TOLD "))
    told = json.loads(line.removeprefix("TOLD "))
    assert told["good"] == told["good again"] == told["venv"]
    reasons = {name: told["refused"][key] for name, key in told["keys"].items()}
    assert "3 workers in a row have ended before they had registered" in reasons["at-times"]
    assert "broken on purpose" in reasons["always"]
    # Ray may keep the plugin's first answer; then it gives up by itself, after five starts.
    for task, name in (("doomed", "at-times"), ("broken", "always")):
        assert reasons[name] in told[task] or "after retrying 5 times" in told[task]
    assert told["options"]["type"] == "WorkerCannotStart"
    assert told["starts"] == []
    assert not is_running(ours)

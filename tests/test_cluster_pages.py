"""The files of studies/cluster/ are what Ray, Kubernetes and bash take, and name one version of Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER = REPOSITORY / "studies" / "cluster"
FILES = ("README.md", "ray-cluster.yaml", "kuberay.yaml", "autoprune.sbatch", "Dockerfile")
RESOURCE = {"latency:cpu": 1}


def documents(name: str) -> list[Any]:
    return list(YAML(typ="safe").load_all((CLUSTER / name).read_text(encoding="utf-8")))


def manifest() -> dict[str, Any]:
    (found,) = [each for each in documents("kuberay.yaml") if each["kind"] == "RayCluster"]
    return dict(found)


def start_commands(text: str) -> Iterator[str]:
    """Yield every ``ray start`` with its options."""
    joined = re.sub(r"\\\n\s*|\n\s+(?=--)", " ", text)
    for found in re.finditer(r"\bray start ([^`\n&]*)", joined):
        yield found.group(1)


def test_the_page_leads_to_every_file() -> None:
    page = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (CLUSTER / link).is_file(), link
    assert set(FILES) - {"README.md"} <= set(re.findall(r"\]\(([^)#]+)\)", page))
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", page, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_one_version_of_ray_within_the_bounds_of_the_package() -> None:
    named = set()
    for name in FILES:
        text = (CLUSTER / name).read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:rayVersion: \"|rayproject/ray:|ray\[default\]==)(\d+\.\d+\.\d+)", text))
    assert len(named) == 1
    version = tuple(int(part) for part in named.pop().split("."))
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (bounds,) = [d for d in settings["project"]["dependencies"] if d.startswith("ray[")]
    low, high = re.fullmatch(r"ray\[tune\]>=([\d.]+),<([\d.]+)", bounds).groups()  # type: ignore[union-attr]
    assert tuple(map(int, low.split("."))) <= version < tuple(map(int, high.split(".")))


def test_what_is_installed_on_nodes_is_an_extra_of_the_package() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for name in FILES:
        for extras in re.findall(r"autoprune\[([a-z0-9,]+)\]", (CLUSTER / name).read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= set(settings["project"]["optional-dependencies"]), name


def test_the_file_of_ray_up_is_what_ray_takes() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    (config,) = documents("ray-cluster.yaml")
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "dashboard": True}, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["measuring"]["resources"] == {"CPU": 0, **RESOURCE}
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]


def test_every_node_of_ray_up_has_the_token() -> None:
    (config,) = documents("ray-cluster.yaml")
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    starts = [
        c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_the_manifest_has_what_kuberay_requires() -> None:
    cluster = manifest()
    assert (cluster["apiVersion"], cluster["metadata"]["name"]) == ("ray.io/v1", "autoprune")
    head, groups = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert [group["groupName"] for group in groups] == ["training", "measuring"]
    for group in (head, *groups):
        # Every value is an option's text, also a number.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        environment = {each["name"]: each for each in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "value" not in environment["RAY_AUTH_TOKEN"]
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"
        assert ("PGPASSWORD" in environment) == (group is head)
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_measuring_pod_is_alone_and_guaranteed() -> None:
    measuring = manifest()["spec"]["workerGroupSpecs"][1]
    # The operator writes the value into a shell command, hence the quotes in it.
    assert json.loads(json.loads(measuring["rayStartParams"]["resources"].strip("'"))) == RESOURCE
    assert measuring["rayStartParams"]["num-cpus"] == "0"
    assert measuring["maxReplicas"] == 1
    pod = measuring["template"]["spec"]
    for container in pod["containers"]:
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests
        assert int(limits["cpu"]) >= 1  # whole CPUs
    (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    training = manifest()["spec"]["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert rule["labelSelector"]["matchLabels"].items() <= training.items()


def test_rays_ports_are_for_the_studys_pods_alone() -> None:
    (policy,) = [each for each in documents("kuberay.yaml") if each["kind"] == "NetworkPolicy"]
    label = policy["spec"]["podSelector"]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": label}]}]
    spec = manifest()["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert label["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "autoprune.sbatch")], check=True, timeout=60)
    text = (CLUSTER / "autoprune.sbatch").read_text(encoding="utf-8")
    lines = text.splitlines()
    # Slurm reads no directive below the first command.
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])


def test_options_of_ray_start_exist() -> None:
    program = Path(sys.executable).with_name("ray")
    if not program.is_file():
        pytest.skip("no ray program beside this Python")
    shown = subprocess.run(
        [str(program), "start", "--help"], capture_output=True, text=True, timeout=240, check=True
    )
    known = set(re.findall(r"--[a-z][a-z-]+", shown.stdout))
    used = set()
    for name in ("README.md", "ray-cluster.yaml", "autoprune.sbatch"):
        for command in start_commands((CLUSTER / name).read_text(encoding="utf-8")):
            used |= set(re.findall(r"--[a-z][a-z-]+", command))
    script = (CLUSTER / "autoprune.sbatch").read_text(encoding="utf-8")
    used |= set(re.findall(r"\"(--[a-z-]+)=", script))
    assert {"--head", "--resources", "--num-cpus", "--min-worker-port"} <= used
    assert used <= known
    parameters = [g["rayStartParams"] for g in manifest()["spec"]["workerGroupSpecs"]]
    parameters.append(manifest()["spec"]["headGroupSpec"]["rayStartParams"])
    assert {f"--{name}" for each in parameters for name in each} <= known


# -- the Slurm script, whole, on one machine -------------------------------------------------

SRUN = '''#!{python}
"""Run a node's command here: every node is this machine, with ports of its own."""
import os, re, sys, time
words, node = sys.argv[1:], ""
while words and words[0].startswith("-"):
    word = words.pop(0)
    if word == "-w":
        node = words.pop(0)
shift = 210 * int(node.removeprefix("node"))
if words[0] == "hostname":
    print("127.0.0.1 10.0.0.9")
    sys.exit()
if words[:2] == ["ray", "start"]:
    for place, word in enumerate(words):
        found = re.fullmatch(r"(--(?!port)[a-z-]+-port)=(\\d+)", word)
        if found:
            words[place] = f"{{found[1]}}={{int(found[2]) + shift}}"
    words.append("--object-store-memory=80000000")
    if "--head" not in words:
        # A temporary folder belongs to one cluster on a machine.
        words = [word for word in words if not word.startswith("--temp-dir")]
        # Of two that start in the same moment on one machine, one may not find itself among the nodes.
        time.sleep(8 * int(node.removeprefix("node")))
os.execvp(words[0], words)
'''
DRIVER = '''#!{python}
"""Stands in for autoprune: says who ran what, and what it was called with."""
import json, os, sys, time
import ray
words = sys.argv[1:]
ray.init(words[words.index("--address") + 1], log_to_driver=False)
for _ in range(120):
    if sum(node["Alive"] for node in ray.nodes()) == 3 and "latency:cpu" in ray.cluster_resources():
        break
    time.sleep(1)

def where():
    return ray.get_runtime_context().get_node_id()

train = ray.remote(num_cpus=1)(where)
measure = ray.remote(num_cpus=0, resources={{"latency:cpu": 1}})(where)
trained = set(ray.get([train.remote() for _ in range(4)]))
measured = set(ray.get([measure.remote() for _ in range(2)]))
mode = oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777)
result = dict(words=words, nodes=len(ray.nodes()), trained=len(trained), measured=len(measured),
              apart=not trained & measured, driver_trains=where() in trained, mode=mode)
print("RESULT", json.dumps(result), flush=True)
sys.exit(int(os.environ.get("DRIVER_EXIT", "0")))
'''


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.cluster
def test_the_slurm_script_drives_trains_and_measures_on_nodes_of_their_own(tmp_path: Path) -> None:
    here = tmp_path / "bin"
    here.mkdir()
    program(here / "srun", SRUN.format(python=sys.executable))
    program(here / "autoprune", DRIVER.format(python=sys.executable))
    program(here / "scontrol", "#!/bin/bash\nprintf 'node0\\nnode1\\nnode2\\n'\n")
    job = str(1000 + os.getpid() % 90)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{here}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[0-2]", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path), "DRIVER_EXIT": "3",
    }  # fmt: skip
    script = str(CLUSTER / "autoprune.sbatch")
    run = subprocess.Popen(
        ["bash", script, "--model", "a b", "--budget", "1h"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = run.communicate(timeout=280)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 3, stdout + stderr
    (line,) = [each for each in stdout.splitlines() if each.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result.pop("words")[:2] == ["search", "--engine"]
    assert result == {
        "nodes": 3, "trained": 1, "measured": 1, "apart": True, "driver_trains": False, "mode": "0o600",
    }  # fmt: skip
    assert "a b" in line
    # The token is gone, and so is Ray.
    assert not list(tmp_path.glob(".ray-token-*"))
    running = subprocess.run(["pgrep", "-f", f"/tmp/ray-{job}/"], capture_output=True, text=True, check=False)
    assert running.stdout == ""


STEP = '''#!{python}
"""Stands in for srun, ray and autoprune: says when it is told to end."""
import os, signal, sys, time
words = sys.argv[1:]
while words and words[0].startswith("-"):
    word = words.pop(0)
    if word == "-w":
        words.pop(0)
if words[0] == "hostname":
    print("127.0.0.1")
    sys.exit()
if words[:2] == ["ray", "status"]:
    sys.exit()
name = "-".join([words[0], *sorted(w for w in words if w == "--head" or w.startswith("--resources"))])
def end(*_):
    open(f"ended {{name}}", "w").close()
    sys.exit(4 if words[0] == "autoprune" else 0)
signal.signal(signal.SIGTERM, end)
open(f"began {{name}}", "w").close()
while True:
    time.sleep(0.1)
'''


def test_slurms_notice_reaches_the_driver_and_its_end_every_step(tmp_path: Path) -> None:
    here = tmp_path / "bin"
    here.mkdir()
    program(here / "srun", STEP.format(python=sys.executable))
    program(here / "scontrol", "#!/bin/bash\nprintf 'node0\\nnode1\\nnode2\\n'\n")
    environment = {
        **os.environ,
        "PATH": f"{here}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-2]", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            ["bash", str(CLUSTER / "autoprune.sbatch")],
            stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        until_s = time.monotonic() + 60
        while len(list(tmp_path.glob("began *"))) < 4 and time.monotonic() < until_s:
            time.sleep(0.1)
        assert list(tmp_path.glob(".ray-token-*"))
        run.send_signal(signal.SIGTERM)
        code = run.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    began = {path.name.removeprefix("began ") for path in tmp_path.glob("began *")}
    assert len(began) == 4, (tmp_path / "log").read_text()
    # The driver ends by itself, and what it says is what the job says.
    assert {path.name.removeprefix("ended ") for path in tmp_path.glob("ended *")} == began
    assert code == 4
    assert not list(tmp_path.glob(".ray-token-*"))

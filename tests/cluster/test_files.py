"""Tests that the files of `cluster/` suit their tools, start what exists, expose nothing, and hold no secret."""

import re
import shlex
import signal
import subprocess
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from msae_sweep.cli import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text(encoding="utf-8")
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.name != ".env")
RAY_UP = ["ray-cluster-aws.yaml", "ray-cluster-onprem.yaml"]


def text(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def load(name: str) -> Any:
    return yaml.safe_load(text(name))


def pins() -> dict[str, str]:
    """Return the version of each package in cluster/constraints.txt."""
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def dependencies() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {(requirement := Requirement(line)).name: requirement for line in project["dependencies"]}


# The command lines are checked by the parsers of their own tools.


def check_ray(command: str) -> dict[str, Any]:
    """Return the options of a `ray …` command line, as Ray's own parser reads them."""
    from ray.scripts.scripts import cli

    name, *arguments = shlex.split(command)[1:]
    return cli.commands[name].make_context(name, arguments).params


def check_sweep(command: str, here: Path = ROOT) -> dict[str, Any]:
    """Return the options of a `python -m msae_sweep …` command line, and assert that its search space exists."""
    python, dash_m, module, name, *arguments = shlex.split(command)
    assert (python, dash_m, module) == ("python", "-m", "msae_sweep")
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    params = group.commands[name].make_context(name, arguments).params
    assert (here / params["space"]).is_file()
    return params


def test_a_command_line_that_is_wrong_does_not_pass():
    with pytest.raises(Exception, match="no-such-option"):
        check_ray("ray start --head --no-such-option")
    with pytest.raises(Exception, match="no-such-option"):
        check_sweep("python -m msae_sweep run search_spaces/leela_zero.yaml --no-such-option")
    with pytest.raises(AssertionError):
        check_sweep("python -m msae_sweep run search_spaces/nowhere.yaml")


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_a_yaml_file_parses(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_readme_names_every_file_and_begins_with_which_one_to_take():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    assert headings[1] == "Which one do I need"
    hidden = {"README.md", "Dockerfile.dockerignore", ".gitignore"}
    for path in FILES:
        assert path.name in hidden or path.relative_to(CLUSTER).as_posix() in README


def readme_commands() -> list[str]:
    """Return the command lines of the README's code blocks, with continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def test_the_readmes_submission_names_files_and_options_that_exist():
    (submission,) = (line for line in readme_commands() if line.startswith("ray job submit"))
    ray_part, sweep_part = submission.split(" -- ")
    from ray.dashboard.modules.job.cli import job_cli_group

    options = job_cli_group.commands["submit"].make_context("submit", [*shlex.split(ray_part)[3:], "--", "x"]).params
    assert (ROOT / options["runtime_env"]).is_file()
    assert check_sweep(sweep_part)["resume"]
    for line in readme_commands():
        for name in re.findall(r"cluster/[\w./-]+", line):
            assert (ROOT / name).exists(), line


# Tests of the runtime environments.


@pytest.mark.parametrize("name", ["runtime_env.yaml", "runtime_env-pip.yaml"])
def test_a_runtime_environment_is_one_to_ray(name):
    from ray.runtime_env import RuntimeEnv

    assert RuntimeEnv(**load(name)).to_dict().keys() >= {"env_vars", "excludes"}


def test_ray_refuses_a_runtime_environment_with_a_wrong_type():
    from ray.runtime_env import RuntimeEnv

    with pytest.raises(TypeError):
        RuntimeEnv(**load("runtime_env.yaml") | {"env_vars": {"A": 1}})


def test_the_two_runtime_environments_differ_in_what_is_installed_only():
    plain, pip = load("runtime_env.yaml"), load("runtime_env-pip.yaml")
    assert {key: pip[key] for key in plain} == plain
    assert pip.keys() - plain.keys() == {"pip", "config"}


def test_the_runtime_environment_installs_the_packages_dependencies_without_ray():
    wanted = {str(requirement) for name, requirement in dependencies().items() if name != "ray"}
    assert {str(Requirement(line)) for line in load("runtime_env-pip.yaml")["pip"]} == wanted


def test_a_submitted_checkout_has_the_package_and_neither_data_nor_secrets(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    travels = {"msae_sweep/cli.py", "msae_sweep/data/shards.py", "msae_sweep/go/boards.html.j2", "pyproject.toml"}
    travels |= {"search_spaces/leela_zero.yaml", "cluster/runtime_env.yaml"}
    stays = {
        "activations/block5/chunk_0000.npy",
        "activations.h5",
        "sweeps/a/summary.json",
        "mlflow.db",
        "cluster/.env",
    }
    stays |= {
        "tests/test_cli.py",
        "weights/msae_block5.pt",
        "games.tar.gz",
        "all.sgf.xz",
        "storage.env",
        "mlruns/0/meta.yaml",
    }
    checkout = tmp_path / "checkout"
    for name in travels | stays:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    package = tmp_path / "package.zip"
    create_package(
        str(checkout), package, include_gitignore=True, include_parent_dir=False,
        excludes=load("runtime_env.yaml")["excludes"],
    )  # fmt: skip
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert names == travels


# Tests of the files for `ray up`.


@pytest.mark.parametrize("name", RAY_UP)
def test_a_cluster_file_passes_rays_own_validation(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    assert config["max_workers"] > 0


def test_rays_validation_refuses_a_misspelt_key():
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(load(RAY_UP[0]) | {"idle_timeout": 1}))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_starts_ray_with_a_token_and_its_dashboard_on_loopback(name):
    config = load(name)
    head = [line for line in config["head_start_ray_commands"] if "start" in line]
    workers = [line for line in config["worker_start_ray_commands"] if "start" in line]
    (options,) = (check_ray(line) for line in head)
    assert options["head"]
    assert options["dashboard_host"] == "127.0.0.1"
    for line in workers:
        assert check_ray(line)["address"] == f"$RAY_HEAD_IP:{options['port']}"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_on_aws_a_gpu_worker_stays_and_the_head_is_no_spot_instance():
    types = load("ray-cluster-aws.yaml")["available_node_types"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"gpu-spot"}
    assert types["gpu"]["min_workers"] >= 1
    # Ray's own default image is too old, and one that fits differs from region to region.
    assert all(kind["node_config"]["ImageId"] for kind in types.values())
    assert text("ray-cluster-aws.yaml").count("ImageId: ami-00000000000000000") == 2
    assert load("ray-cluster-aws.yaml")["provider"]["use_internal_ips"] is True


# Tests of the Kubernetes manifests.


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all groups by name, including the head's."""
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_a_kuberay_manifest_is_of_its_kind(name, kind):
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])


def test_a_rayjobs_cluster_is_the_raycluster():
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"] == load("raycluster.yaml")["spec"]


def test_every_pod_has_resources_no_root_and_string_parameters():
    spec = load("raycluster.yaml")["spec"]
    for name, group in groups(spec).items():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        options = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
        check_ray(f"ray start {options}")
        resources = container(group)["resources"]
        assert resources["requests"].keys() == resources["limits"].keys() >= {"cpu", "memory"}
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert ("nvidia.com/gpu" in resources["limits"]) == (name != "head")
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        security = container(group)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_cluster_scales_between_bounds_and_keeps_a_gpu_worker():
    spec = load("raycluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert groups(spec)["gpu"]["minReplicas"] >= 1


def test_only_spot_workers_go_to_spot_nodes():
    for name, group in groups(load("raycluster.yaml")["spec"]).items():
        tolerated = {toleration["key"] for toleration in group["template"]["spec"].get("tolerations", [])}
        assert ("cloud.google.com/gke-spot" in tolerated) == (name == "gpu-spot")
        assert ("affinity" in group["template"]["spec"]) == (name == "gpu-spot")


def test_a_worker_drains_before_it_ends_and_has_the_time_for_it():
    for name, group in groups(load("raycluster.yaml")["spec"]).items():
        if name == "head":
            continue
        *shell, line = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["/bin/bash", "-c"]
        drain, wait = line.split("; ")
        assert check_ray(drain)["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        seconds = int(wait.removeprefix("sleep "))
        assert seconds >= 30
        assert seconds + 30 <= group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_rayjobs_entrypoint_names_a_search_space_of_the_image_and_resumes():
    spec = load("rayjob.yaml")["spec"]
    workdir = re.findall(r"^WORKDIR (\S+)$", text("Dockerfile"), flags=re.MULTILINE)[-1]
    options = check_sweep(spec["entrypoint"].replace(f"{workdir}/", ""))
    assert options["resume"]
    assert spec["backoffLimit"] > 0
    assert "/" in workdir
    assert f"{workdir}/" in spec["entrypoint"]


def test_the_rayjobs_runtime_environment_is_the_files():
    inline = yaml.safe_load(load("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert inline == {"env_vars": load("runtime_env.yaml")["env_vars"]}


def test_the_network_policy_covers_every_pod_and_opens_the_dashboard_to_named_ones_only():
    policy = load("networkpolicy.yaml")["spec"]
    label = policy["podSelector"]["matchLabels"]
    for group in groups(load("raycluster.yaml")["spec"]).values():
        assert group["template"]["metadata"]["labels"].items() >= label.items()
    inside, dashboard = policy["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    assert all(peer.keys() <= {"podSelector", "namespaceSelector"} for peer in dashboard["from"])


# Tests of the Compose file.

VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")


def services() -> dict[str, Any]:
    return load("compose.yaml")["services"]


def resolved(line: str) -> str:
    """Return a line with its variables replaced by their defaults, as Compose does, where they have one."""
    return VARIABLE.sub(lambda match: match[2].removeprefix(":-"), line)


def test_compose_has_head_workers_tracking_database_and_store():
    assert services().keys() == {"head", "worker", "worker-gpu", "mlflow", "postgres", "s3"}
    assert services()["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_compose_publishes_on_loopback_only():
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service for service in services().values())
    assert load("compose.yaml")["networks"]["database"]["internal"] is True
    assert services()["postgres"]["networks"] == ["database"]


def test_composes_variables_are_documented_and_its_secrets_must_be_given():
    variables = VARIABLE.findall(text("compose.yaml"))
    assert {name for name, _ in variables} >= {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "S3_SECRET_KEY"}
    for name, rest in variables:
        assert f"`{name}`" in README, name
        assert rest.startswith(":?" if SECRET_NAME.search(name) or name == "S3_ACCESS_KEY" else ":-")
    for name, service in services().items():
        for key, value in service["environment"].items():
            if SECRET_NAME.search(key) or key == "PGPASSWORD":
                assert VARIABLE.fullmatch(value), f"{name}: {key}"


def test_composes_ray_commands_are_rays():
    head = check_ray(services()["head"]["command"])
    assert head["head"]
    assert head["block"]
    assert head["num_cpus"] == 0
    for name in ("worker", "worker-gpu"):
        worker = check_ray(resolved(services()[name]["command"]))
        assert worker["num_cpus"] > 0
        assert worker["address"] == f"head:{head['port']}"
        assert worker["block"]
    check_ray(shlex.join(services()["head"]["healthcheck"]["test"][1:]))
    for name in ("head", "worker", "worker-gpu"):
        assert services()[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_composes_tracking_server_answers_to_the_name_that_the_cluster_calls_it_by():
    from mlflow.cli import cli

    mlflow, server, *arguments = shlex.split(resolved(services()["mlflow"]["command"]))
    assert (mlflow, server) == ("mlflow", "server")
    options = cli.commands["server"].make_context("server", arguments).params
    called = services()["head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert called == f"mlflow:{options['port']}"
    assert called in options["allowed_hosts"].split(",")
    assert "*" not in options["allowed_hosts"]
    assert options["artifacts_destination"] == f"s3://{services()['s3']['environment']['S3_BUCKET']}/mlflow"
    assert ":" not in options["backend_store_uri"].split("://")[1].split("@")[0]  # it holds no password


def test_the_tracking_servers_image_has_the_database_driver_that_its_uri_names():
    # Without a driver name, SQLAlchemy 2.1 takes psycopg, whereas 2.0 took psycopg2.
    driver = re.search(r"postgresql\+(\w+)://", services()["mlflow"]["command"])[1]
    installed = [line for line in stages()["mlflow"] if "pip install" in line]
    assert f" {driver}-binary " in installed[0]
    assert f"{driver}-binary" in pins()


def test_composes_images_are_pinned_or_built_here():
    for name, service in services().items():
        if "build" in service:
            build = service["build"]
            assert (CLUSTER / build["context"] / build["dockerfile"]).is_file()
            assert re.search(rf"^FROM \S+ AS {build['target']}$", text("Dockerfile"), flags=re.MULTILINE)
        else:
            assert re.search(r":\d+\.\d+", service["image"]), f"{name}: {service['image']}"


# Tests of the images.


def stages() -> dict[str, list[str]]:
    """Return the lines of every stage, preceded by those of the stages that it is built from."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"(?=^FROM )", text("Dockerfile"), flags=re.MULTILINE)[1:]:
        first, *lines = part.splitlines()
        _, parent, _, name = first.split()
        found[name] = [*found.get(parent, [f"FROM {parent}"]), *lines]
    return found


def test_images_start_from_a_pinned_release_and_do_not_run_as_root():
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", text("Dockerfile"), flags=re.MULTILINE)
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", python)
    assert stages().keys() == {"base", "mlflow", "sweep"}
    for name, lines in stages().items():
        assert lines[0] == "FROM python:${PYTHON}"
        users = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
        assert name == "base" or users == ["1000"]
        installs = [line for line in lines if "pip install" in line]
        assert all("-c " in line for line in installs), installs


def test_images_take_what_they_copy_from_the_checkout_and_the_context_lets_it_through():
    allowed = {line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    copied = {
        name
        for line in text("Dockerfile").splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    }  # fmt: skip
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_pins_satisfy_the_package_and_name_the_clusters_ray():
    pinned = pins()
    for name, requirement in dependencies().items():
        assert Version(pinned[name.lower()]) in requirement.specifier, name
    assert load("raycluster.yaml")["spec"]["rayVersion"] == pinned["ray"]
    assert f"({pinned['ray']})" in README


# Tests of the Slurm script, in which every tool is replaced by a stub that records how it was called.

STUBS = {
    "scontrol": r"""
if [[ $1 == show ]]; then printf '%s\n' n1 n2 n3; else echo "scontrol $*" >> "$LOG"; fi""",
    "hostname": "echo 10.0.0.1 fe80::1",
    "srun": r"""
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@" """,
    "ray": r"""
echo "ray $*" >> "$LOG"
if [[ $1 == health-check ]]; then grep -q '^head is up' "$LOG"; exit; fi
if [[ $* == *--head* ]]; then [[ -z "${HEAD_FAILS:-}" ]] || exit 1; echo "head is up" >> "$LOG"; fi
trap 'echo "ray ended" >> "$LOG"; exit 0' TERM
while :; do sleep 0.05; done""",
    # The wait for the nodes ends when all have joined. The sweep ends by itself or, if SWEEP is `endless`, by SIGINT.
    "python": r"""
if [[ $1 == - ]]; then
  cat > /dev/null
  until (($(grep -c '^ray start' "$LOG") == $2)); do sleep 0.05; done
  exit 0
fi
echo "python $* at $RAY_ADDRESS token ${#RAY_AUTH_TOKEN}" >> "$LOG"
trap 'echo "sweep stopped" >> "$LOG"; exit 130' INT
while [[ $SWEEP == endless ]]; do sleep 0.05; done
exit "$SWEEP" """,
}
SPACE = "search_spaces/leela_zero.yaml"


class Slurm:
    """Runner of `sweep.sbatch`, which acts as Slurm would on three nodes and replaces the tools by stubs."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        bin = folder / "bin"
        bin.mkdir()
        for name, body in STUBS.items():
            (bin / name).write_text(f"#!/bin/bash\n{body}\n")
            (bin / name).chmod(0o755)
        self.environment = {
            "PATH": f"{bin}:/usr/bin:/bin",
            "LOG": str(self.log),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_GPUS_ON_NODE": "2",
            "MSAE_POLL_SECONDS": "0.05",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        script = str(CLUSTER / "slurm" / "sweep.sbatch")
        return subprocess.Popen(
            ["bash", script, *arguments],
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # slurmd starts the script like this. Tests in the background ignore SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> int:
        job = self.start(*arguments, **environment)
        job.communicate(timeout=60)
        return job.returncode

    def lines(self, start: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]

    def wait_for(self, start: str) -> None:
        deadline = time.monotonic() + 30
        while not self.lines(start):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_the_batch_script_is_bash():
    subprocess.run(["bash", "-n", CLUSTER / "slurm" / "sweep.sbatch"], check=True)
    directives = re.findall(r"^#SBATCH (\S+)", text("slurm/sweep.sbatch"), flags=re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300", "--no-kill"} <= set(directives)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_starts_head_workers_and_sweep_in_this_order_and_ends_with_the_sweeps_code(slurm, code):
    assert slurm.run(SPACE, "--storage", "/shared/a b", SWEEP=str(code)) == code
    started = slurm.lines("ray start") + slurm.lines("python")
    text = slurm.log.read_text()
    assert [text.index(line) for line in started] == sorted(text.index(line) for line in started)
    head, *workers, sweep = started
    assert head.startswith("ray start --head")
    assert len(workers) == 2
    assert sweep.startswith(f"python -m msae_sweep run {SPACE} --storage /shared/a b --resume at ")
    # The nodes are distinct, the head's node comes first, and every node is ended with the job.
    nodes = [re.search(r"--nodelist=(\S+)", line)[1] for line in slurm.lines("srun") if " ray start" in line]
    assert nodes[0] == "n1"
    assert sorted(nodes) == ["n1", "n2", "n3"]
    assert len(slurm.lines("ray ended")) == 3
    assert not slurm.lines("scontrol requeue")


def test_slurms_ray_commands_are_rays_and_meet_at_one_address(slurm):
    slurm.run(SPACE, SWEEP="0")
    head, *workers = (check_ray(line) for line in slurm.lines("ray start"))
    assert head["dashboard_host"] == "127.0.0.1"
    address = f"{head['node_ip_address']}:{head['port']}"
    assert address == "10.0.0.1:20077"
    for node in workers:
        assert (node["address"], node["num_cpus"], node["num_gpus"]) == (address, 4, 2)
    (sweep,) = slurm.lines("python")
    # The token is 32 random bytes in hexadecimal, and appears in no command line.
    assert sweep.endswith(f"at {address} token 64")


def test_slurm_near_its_time_limit_stops_the_sweep_and_requeues(slurm):
    job = slurm.start(SPACE, SWEEP="endless")
    slurm.wait_for("python")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 130
    assert slurm.lines("sweep stopped")
    assert slurm.lines("scontrol") == ["scontrol requeue 77"]
    assert len(slurm.lines("ray ended")) == 3


def test_slurm_preempting_stops_the_sweep_and_leaves_the_requeueing_to_slurm(slurm):
    job = slurm.start(SPACE, SWEEP="endless")
    slurm.wait_for("python")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 130
    assert slurm.lines("sweep stopped")
    assert not slurm.lines("scontrol")


def test_slurm_without_a_head_or_without_a_search_space_starts_no_sweep(slurm):
    assert slurm.run(SPACE, SWEEP="0", HEAD_FAILS="yes", MSAE_POLL_SECONDS="1") == 1
    assert slurm.run() == 2
    assert not slurm.lines("python")


def test_the_commands_that_submit_the_batch_script_give_it_what_the_sweep_takes():
    readme = [line for line in readme_commands() if line.startswith("sbatch ")]
    header = re.sub(r" \\\n#\s*", " ", text("slurm/sweep.sbatch"))
    commented = re.findall(r"^#\s+(sbatch .*)$", header, flags=re.MULTILINE)
    assert readme == commented
    for line in readme:
        _, script, *arguments = shlex.split(line)
        assert (ROOT / script).is_file()
        check_sweep(shlex.join(["python", "-m", "msae_sweep", "run", *arguments, "--resume"]))


# Tests that no file holds a secret.

SECRETS = [
    re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"://[^/\s:@]+:[^/\s@$]+@"),
    re.compile(r"\b(hf|ghp|gho|xox[bp])_?[0-9A-Za-z-]{20,}"),
    # This finds a value that is given to something named like a secret, except a variable, a command or a blank.
    re.compile(
        r"(?i)\w*(password|passwd|secret(_access)?_key|token|secret)[\"']?\s*[:=]\s*[\"']?(?![$<>\s{*&])[\w/+=-]{6,}"
    ),
]


def literal_secrets(source: str) -> list[str]:
    return [match[0] for pattern in SECRETS for match in pattern.finditer(source)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path):
    assert literal_secrets(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "POSTGRES_PASSWORD: hunter22",
        "export RAY_AUTH_TOKEN=0123456789abcdef",
        "AWS_ACCESS_KEY_ID: AKIAABCDEFGHIJKLMNOP",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCY",
        "postgresql://mlflow:hunter22@postgres/mlflow",
        "password = 'hunter22'",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_the_search_for_secrets_can_find_one(line):
    assert literal_secrets(line)

"""Real Ray clusters of several nodes on one Linux machine, for tests that damage them.

Every node is a separate process tree, as a container would be. It has:

- a network namespace with its own address, joined to the others by a bridge (the bridge has a namespace of its own);
- a PID namespace whose first process is `ray start --block`: killing that process kills the whole node at once;
- private mounts of `/dev/shm` (object store) and `/tmp/ray` (session folder, spilled objects). Without them, one node's
  agent deletes another node's packages of working folders.

Nothing outlives the test process, even if it is killed: namespaces, addresses and mounts live as long as their
processes, and these die with their parent. All other folders are shared between the nodes, like a network file system.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
from servers import wait_for

ROOT = Path(__file__).parents[2]
RAY = Path(sysconfig.get_path("scripts")) / "ray"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")

MB = 1 << 20
HEAD_PORT, DASHBOARD_PORT = 6379, 8265

NODE_SCRIPT = """
set -e
mount -t tmpfs -o size={shm_bytes} tmpfs /dev/shm
mkdir -p /tmp/ray
{mount_disk}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec "$@"
"""


def why_not() -> str | None:
    """Return the reason why no such cluster can run here, or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "clusters of several nodes need network namespaces: Linux, as root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"clusters of several nodes need {', '.join(missing)} (iproute2, util-linux)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


class Node:
    """Node of a cluster: its address, and methods that inspect it or damage it."""

    def __init__(self, cluster: "Cluster", number: int, outer: subprocess.Popen[bytes]) -> None:
        self.number, self.address = number, cluster.address(number)
        self._cluster, self._outer = cluster, outer

    @property
    def log(self) -> str:
        """Output of `ray start`."""
        return self._cluster.log_file(self.number).read_text()

    @property
    def running(self) -> bool:
        """True if the node's first process is alive."""
        return self._outer.poll() is None

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the node's processes whose command line or title contains one of `words`, or all without words."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._outer.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    line = " ".join(process.cmdline())
                    if not words or any(word in line for word in words):
                        found.append(process)
        return found

    def kill(self) -> None:
        """Kill the node with everything on it, as a power failure would."""
        # With `unshare --kill-child`, the namespace's first process dies with `unshare`, and all others die with it.
        self._outer.kill()
        self._outer.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the node's first process, as Kubernetes does to a pod that has to go, without waiting."""
        (first,) = psutil.Process(self._outer.pid).children()
        first.terminate()

    def wait(self, seconds: float) -> None:
        """Wait until the node has ended by itself."""
        self._outer.wait(seconds)

    def run(self, *command: str, **environment: str) -> None:
        """Run a command on the node, as `kubectl exec` does."""
        (first,) = psutil.Process(self._outer.pid).children()
        enter = ["nsenter", "--net", "--mount", "--pid", "--target", str(first.pid)]
        _run(*enter, *command, env={**self._cluster.environment, **environment})

    def fill_disk(self) -> None:
        """Fill the node's disk completely. The disk must be one of limited size (`disk_bytes`)."""
        (first,) = psutil.Process(self._outer.pid).children()
        disk = Path(f"/proc/{first.pid}/root/tmp/ray")
        assert os.statvfs(disk).f_blocks < os.statvfs("/tmp").f_blocks, "that is the machine's own disk"
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while file.write(bytes(MB)):
                pass

    def disconnect(self) -> None:
        """Disconnect the node from the network."""
        self._cluster.in_switch("ip", "link", "set", f"port{self.number}", "down")

    def connect(self) -> None:
        """Connect the node to the network again."""
        self._cluster.in_switch("ip", "link", "set", f"port{self.number}", "up")


class Cluster:
    """Switch, head node and worker nodes, as a context manager that leaves nothing behind.

    Args:
        folder: folder for logs and the nodes' disks.
        environment: variables for the processes of every node, in addition to this process's environment.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        """Head and then workers. Nodes that have ended remain in the list until `discard_dead`."""
        self._n_started = 0
        # Each cluster has one end in the machine's own namespace, so the addresses of two test sessions must differ.
        self._net = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Jobs bring the package in their working folder, so `ray start` itself must not depend on its location.
            "PYTHONPATH": "",
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "no_proxy": f"localhost,127.0.0.1,{','.join(self.address(i) for i in range(1, 255))}",
            **(environment or {}),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        # `sleep` replaces `unshare` in its process, and so keeps the namespace alive.
        self._switch = self._spawn(["unshare", "--net", "sleep", "infinity"], self.folder / "switch.log")
        self._await_namespace(self._switch)
        self._outer_end = f"msae{os.getpid()}"
        _run("ip", "link", "add", self._outer_end, "type", "veth", "peer", "name", "uplink", "netns", self._switch_pid)
        try:
            self.in_switch("ip", "link", "add", "bridge", "type", "bridge")
            for device in ("bridge", "lo"):
                self.in_switch("ip", "link", "set", device, "up")
            self.in_switch("ip", "link", "set", "uplink", "master", "bridge", "up")
            _run("ip", "address", "add", f"{self.address(254)}/24", "dev", self._outer_end)
            _run("ip", "link", "set", self._outer_end, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all nodes and the switch."""
        for node in self.nodes:
            node.kill()
        self._switch.kill()
        self._switch.wait()
        wait_for(lambda: not Path(f"/sys/class/net/{self._outer_end}").exists(), 30, "the switch goes")

    def address(self, number: int) -> str:
        """Return the address of node `number`. 254 is this process's own."""
        return f"{self._net}.{number}"

    def log_file(self, number: int) -> Path:
        """Return the path of the log of node `number`."""
        return self.folder / f"node{number}.log"

    @property
    def head(self) -> Node:
        """Head node of the cluster."""
        return self.nodes[0]

    def start_head(self, **options: Any) -> Node:
        """Start a head with one CPU and no GPU, so that trials run elsewhere. `options` are those of `start_worker`."""
        ray = ["--head", f"--port={HEAD_PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        node = self._start(ray, **{"gpus": 0, **options})
        self._until(lambda: self._get("/api/version"), node, "the head answers")
        self._until(lambda: self.alive() == {node.address}, node, "the head is a node of its cluster")
        return node

    @property
    def workers(self) -> list[Node]:
        """All nodes except the head."""
        return self.nodes[1:]

    def start_worker(self, *, wait: bool = True, **options: Any) -> Node:
        """Start a node with one CPU and one fake GPU.

        Args:
            wait: whether to wait until the node belongs to the cluster; otherwise call `settle` later.
            options: `cpus`, `gpus`, `store_bytes` (object store), `disk_bytes` (a `/tmp/ray` of that size).
        """
        node = self._start([f"--address={self.head.address}:{HEAD_PORT}"], **options)
        if wait:
            self.settle()
        return node

    def discard_dead(self) -> None:
        """Remove the nodes that have ended from `nodes`."""
        self.nodes = [node for node in self.nodes if node.running]

    def settle(self) -> None:
        """Wait until the cluster has exactly the nodes that run."""
        running = {node.address for node in self.nodes if node.running}

        def settled() -> bool:
            for node in self.nodes:
                assert node.running or node.address not in running, f"{node.address} ended\n{node.log[-3000:]}"
            return self.alive() == running

        wait_for(settled, 240, f"a cluster of {', '.join(sorted(running))}")

    def alive(self) -> set[str]:
        """Return the addresses of the nodes that the cluster considers alive."""
        answer = self._get("/api/v0/nodes?limit=100&detail=true")
        rows = answer["data"]["result"]["result"] if answer else []
        return {row["node_ip"] for row in rows if row["state"] == "ALIVE"}

    # The following methods handle jobs through the command line, as a user does.

    @property
    def dashboard(self) -> str:
        """Address that `ray job … --address` takes."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def job(self, verb: str, *arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `ray job VERB --address …` in the folder `cwd` and wait for its end."""
        command = [str(RAY), "job", verb, "--address", self.dashboard, *arguments]
        return subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def submit(
        self, entrypoint: Sequence[str], *, job_id: str, cwd: Path, working_dir: Path, runtime_env: Path
    ) -> "Job":
        """Start `ray job submit` in the background."""
        command = [str(RAY), "job", "submit", "--address", self.dashboard, "--submission-id", job_id]
        command += ["--working-dir", str(working_dir), "--runtime-env", str(runtime_env), "--", *entrypoint]
        return Job(self, job_id, self._spawn(command, self.folder / f"{job_id}.log", cwd=cwd))

    def status(self, job_id: str) -> str:
        """Return PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED, or an empty string before the job is known."""
        answer = self._get(f"/api/jobs/{job_id}")
        return answer["status"] if answer else ""

    # The following methods are helpers.

    def in_switch(self, *command: str) -> None:
        """Run a command in the network namespace of the bridge."""
        _run("nsenter", "--net", "--target", self._switch_pid, *command)

    @property
    def _switch_pid(self) -> str:
        return str(self._switch.pid)

    def _start(
        self,
        ray: list[str],
        *,
        cpus: int = 1,
        gpus: int = 1,
        store_bytes: int = 100 * MB,
        disk_bytes: int | None = None,
    ) -> Node:
        self._n_started += 1
        number = self._n_started
        disk = self.folder / f"disk{number}"
        disk.mkdir()
        mount_disk = f"mount -t tmpfs -o size={disk_bytes} tmpfs" if disk_bytes else f"mount --bind '{disk}'"
        script = NODE_SCRIPT.format(
            shm_bytes=store_bytes + 32 * MB, mount_disk=f"{mount_disk} /tmp/ray", address=self.address(number)
        )
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script]
        command += ["node", str(RAY), "start", *ray, f"--node-ip-address={self.address(number)}", "--block"]
        command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={store_bytes}"]
        outer = self._spawn(command, self.log_file(number))
        node = Node(self, number, outer)
        self.nodes.append(node)
        self._await_namespace(outer)
        self.in_switch(
            "ip",
            "link",
            "add",
            f"port{number}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            f"/proc/{outer.pid}/ns/net",
        )
        self.in_switch("ip", "link", "set", f"port{number}", "master", "bridge", "up")
        return node

    def _spawn(self, command: list[str], log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a process that dies with this one."""
        with open(log, "ab") as out:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment, cwd=cwd or self.folder,
            )  # fmt: skip

    def _await_namespace(self, process: subprocess.Popen[bytes]) -> None:
        own = os.readlink("/proc/self/ns/net")
        wait_for(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != own, 10, "the network namespace")

    def _until(self, condition: Callable[[], Any], node: Node, what: str) -> None:
        def met() -> Any:
            assert node.running, f"{what}: the node ended\n{node.log[-3000:]}"
            return condition()

        wait_for(met, 240, what)

    def _get(self, path: str) -> Any:
        """Return an answer of the dashboard, or None if there is none."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError, json.JSONDecodeError), opener.open(self.dashboard + path, timeout=10) as answer:
            return json.load(answer)
        return None


class Job:
    """A `ray job submit` command that runs or has ended."""

    def __init__(self, cluster: Cluster, job_id: str, process: subprocess.Popen[bytes]) -> None:
        self.id, self._cluster, self._process = job_id, cluster, process
        self._submitted = time.monotonic()
        self.seconds = 0.0
        """Seconds from `ray job submit` to its end. `wait` sets them."""

    @property
    def output(self) -> str:
        """Output of `ray job submit`, which includes the driver's output."""
        return (self._cluster.folder / f"{self.id}.log").read_text()

    @property
    def ended(self) -> bool:
        """True if `ray job submit` has ended."""
        return self._process.poll() is not None

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end of `ray job submit` and return its exit code."""
        code = self._process.wait(seconds)
        self.seconds = time.monotonic() - self._submitted
        return code

    def stop(self) -> None:
        """Run `ray job stop`, which waits until the job has stopped."""
        self._cluster.job("stop", self.id, cwd=self._cluster.folder)

    def driver(self) -> psutil.Process:
        """Return the process of the job's entry point on the head."""
        (driver,) = [p for p in self._cluster.head.processes(" -m msae_sweep ") if "python" in p.cmdline()[0]]
        return driver


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


if __name__ == "__main__":
    # This starts a cluster for manual use: PYTHONPATH=tests python tests/cluster/nodes.py FOLDER [WORKERS]
    if reason := why_not():
        sys.exit(reason)
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        cluster.start_head()
        for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
            cluster.start_worker(wait=False)
        cluster.settle()
        print(f"ray job submit --address {cluster.dashboard} …; ends with this process", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()

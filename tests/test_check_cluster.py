"""launch/check_cluster.sh: what is wrong with a node, or between two of them, is named in one line each, and nothing hangs.

Ranks of the pool are the nodes: most of the time of this host, and once of two network namespaces joined by a cable.
"""

import contextlib
import ctypes
import io
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from forked import Forked
from test_launch import ENV, ROOT

from nanogpt import cluster
from nanogpt.errors import UserError, report

QUICK = ["--timeout=20", "--min-bandwidth=1e-5"]  # no machine is too busy for that


def check(argv, changes=()) -> tuple[int, str, str]:
    """(status, stdout, stderr) of this node. changes: {rank: how it differs from the others, a function}."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        stack.enter_context(mock.patch.multiple(cluster, DISK_BYTES_PER_S=1.0, SLOW=0.0))  # the machine may be busy
        stack.enter_context(mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}))
        for rank, change in changes:
            if rank == int(os.environ.get("RANK", 0)):
                stack.enter_context(change())
        try:
            cluster.main(argv)
            status = 0
        except UserError as error:
            report(error)
            status = 1
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("nodes, local", [(2, 1), (2, 2), (3, 1)])
def test_all_is_well(ranks, tmp_path, nodes, local):
    found = ranks(nodes * local, check, [f"--folder={tmp_path}", *QUICK], local_world_size=local)
    assert [status for status, _, _ in found] == [0] * (nodes * local) and not any(err for _, _, err in found), found
    assert not any(out for _, out, _ in found[1:])  # the first speaks for all
    lines = found[0][1].splitlines()
    assert lines[0].startswith(f"nodes        {nodes} x {local} rank") and lines[-1] == "all is well"
    speed = next(line for line in lines if line.startswith("all-reduce"))
    assert "between the slowest two nodes" in speed
    assert not list(tmp_path.iterdir())  # nothing is left


@contextlib.contextmanager
def other_versions():
    real = cluster.versions()
    with mock.patch.object(cluster, "versions", lambda: real | dict(torch="2.11.0")):
        yield


def clock():
    import time
    ahead = SimpleNamespace(time=lambda: time.time() + 100, monotonic=time.monotonic, sleep=time.sleep)
    return mock.patch.object(cluster, "time", ahead)


def little_memory():
    return mock.patch.object(cluster.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=4096))


def few_files():
    return mock.patch.object(cluster.resource, "getrlimit", lambda kind: (256, 256))


def no_interface():
    return mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "nosuch0"})


def a_setting():
    return mock.patch.dict(os.environ, {"NCCL_IB_DISABLE": "0"})


def slow_disk():
    return mock.patch.object(cluster, "DISK_BYTES_PER_S", 1e15)


@contextlib.contextmanager
def elsewhere():
    before = os.getcwd()
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
    yield
    os.chdir(before)


def wrong(found, node=0) -> list[str]:
    """The lines of stderr, without the name of this host."""
    assert all(status == 1 for status, _, _ in found), found
    assert all(line.startswith("error: ") for line in found[node][2].splitlines()), found
    lines = found[node][2].replace(cluster.socket.gethostname(), "HOST").splitlines()
    return [line.removeprefix("error: ") for line in lines]


def test_what_is_wrong_with_one_of_two_nodes_is_named(ranks, tmp_path):
    changes = [(1, change) for change in (other_versions, clock, little_memory, few_files, a_setting, slow_disk)]
    found = ranks(2, check, [f"--folder={tmp_path}", *QUICK], changes, local_world_size=1)
    torch = cluster.versions()["torch"]
    expected = [
        "node 1 (HOST): /dev/shm: 4 MiB are free, and 64 wanted",
        "node 1 (HOST): ulimit -n is 256, and 528 is wanted",
        f"node 1 (HOST): {tmp_path}: writes ",
        f"torch: {torch} on node 0 (HOST), 2.11.0 on node 1 (HOST): install the same on all",
        "NCCL_IB_DISABLE: not set on node 0 (HOST), 0 on node 1 (HOST): set it the same on all",
        "node 1 (HOST): its clock is 100.0 s ahead of that of node 0 (HOST): start chrony or ntpd"]
    lines = wrong(found)
    assert len(lines) == len(expected) and all(map(str.startswith, lines, expected)), lines
    assert not found[1][1] and not found[1][2]                        # the first speaks for all
    assert "all-reduce" in found[0][1] and "all is well" not in found[0][1]


def test_a_folder_that_is_not_shared_an_interface_that_is_not_there_other_ranks(ranks, tmp_path):
    os.chdir(ROOT)
    relative = os.path.relpath(tmp_path)
    lines = wrong(ranks(2, check, [f"--folder={relative}/x", *QUICK, "--timeout=8"], [(1, elsewhere), (1, no_interface)],
                        local_world_size=1))
    assert len(lines) == 3, lines
    assert lines[0].startswith("node 1 (HOST): GLOO_SOCKET_IFNAME=nosuch0: no such interface here, or it has no address; "
                               "there are lo 127.0.0.1")
    assert lines[1].startswith(f"node 1 (HOST): {relative}/x (/") and "is not the folder that node 0 sees" in lines[1]
    assert lines[2].startswith("all-reduce was not tried")


GPUS = """#!/bin/sh
case "$1" in
    --query-gpu=driver_version) echo 550.1 ;;
    --query-gpu=index*) echo "0, NVIDIA H100, 0, No, No, Not Active, 3"; echo "1, NVIDIA H100, 2, 1, 0, Active, 70000";
                        echo "2, NVIDIA T4, [N/A], [N/A], [N/A], [N/A], 0" ;;
esac
"""


@contextlib.contextmanager
def ill_gpus():
    folder = Path(os.environ["ILL_GPUS"])
    with mock.patch.dict(os.environ, {"PATH": f"{folder}:{os.environ['PATH']}"}):
        yield


def test_ill_gpus(tmp_path, monkeypatch):
    """What nvidia-smi would say of them; a real one needs a GPU."""
    (tmp_path / "nvidia-smi").write_text(GPUS)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("ILL_GPUS", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, out, err = check([f"--folder={tmp_path}", *QUICK], [(0, ill_gpus)])
    lines = wrong([(status, out, err)])
    assert [line.split(": ")[1:3] for line in lines[:4]] == [
        ["GPU 1", "2 uncorrected memory errors"], ["GPU 1", "memory rows wait to be remapped, or could not be"],
        ["GPU 1", "slowed down by its hardware (heat or power)"],
        ["GPU 1", "70000 MiB of its memory are taken by others"]]
    assert len(lines) == 5 and "3 GPUs are there and torch" in lines[4] and "finds 0" in lines[4]


def test_a_slow_pair_and_a_failed_one(monkeypatch):
    one = SimpleNamespace(nodes=4, args=SimpleNamespace(min_bandwidth=0.1))
    nodes = [dict(name=f"n{i}") for i in range(4)]
    speeds = {"all": 5e9, "0 1": 10e9, "0 2": 11e9, "0 3": 12e9, "1 2": 4e9, "1 3": 10e9, "2 3": "RuntimeError: lost"}
    lines = cluster.Check.slow(one, speeds, nodes)
    assert len(lines) == 2
    assert lines[0].startswith("all-reduce between n1 and n2: 4 GB/s, and 10 between others: a cable")
    assert lines[1].startswith("all-reduce between n2 and n3 failed (RuntimeError: lost)")
    one.args.min_bandwidth = 11.5
    assert len(cluster.Check.slow(one, speeds, nodes)) == 5  # all but that of 0 and 3


@pytest.mark.parametrize("nodes", range(1, 10))
def test_each_two_nodes_once_and_each_node_once_a_turn(nodes):
    turns = list(cluster.turns(nodes))
    pairs = [pair for turn in turns for pair in turn]
    assert sorted(pairs) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    assert all(len({node for pair in turn for node in pair}) == 2 * len(turn) for turn in turns)
    assert len(turns) == nodes - 1 + nodes % 2


@pytest.mark.parametrize("pattern, found", [
    ("eth", ["eth0", "eth1"]), ("=eth1,ib0", ["eth1", "ib0"]), ("^docker,lo", ["eth0", "eth1", "ib0"]), ("en", []),
    ("^=eth0", ["lo", "eth1", "ib0", "docker0"])])
def test_interfaces_as_nccl_chooses_them(pattern, found):
    assert cluster.chosen(pattern, ["lo", "eth0", "eth1", "ib0", "docker0"]) == found


def test_help_and_wrong_use(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "launch" / "check_cluster.sh"), "--help"], cwd=tmp_path, env=ENV, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "NCCL_SOCKET_IFNAME" in done.stdout and "srun --nodes 4" in done.stdout
    with mock.patch.dict(os.environ, {"SLURM_NNODES": "2"}):
        status, _, err = check([])
    assert status == 1 and err.startswith("error: a job of 2 nodes, and this runs on one: srun --ntasks-per-node 1")


# ---- two hosts ------------------------------------------------------------------------------------------------------

NAME = f"c{secrets.token_hex(3)}"
ADDRESS = ["10.213.9.1", "10.213.9.2"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True).returncode == 0


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces, joined by a cable. Needs root and iproute2."""
    names = [f"{NAME}{i}" for i in range(2)]
    try:
        if not shutil.which("ip") or not all(ip("netns", "add", name) for name in names):
            pytest.skip("needs network namespaces of its own: root, and ip of iproute2")
        assert ip("link", "add", f"{names[0]}v", "netns", names[0], "type", "veth", "peer", "name", f"{names[1]}v",
                  "netns", names[1])
        for name, address in zip(names, ADDRESS):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}v")
            assert ip("-n", name, "link", "set", f"{name}v", "up") and ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def check_on(names, argv, changes=(), wrong_interface=False):
    """check(), in the network of a host of one's own: threads that are started here are there too."""
    rank, setns = int(os.environ["RANK"]), ctypes.CDLL(None).setns
    interface = "lo" if wrong_interface and rank else f"{names[rank]}v"
    with open("/proc/self/ns/net") as here, open(f"/run/netns/{names[rank]}") as there:
        assert setns(there.fileno(), 0) == 0
        try:
            return check(argv, [*changes, (rank, lambda: mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": interface}))])
        finally:
            assert setns(here.fileno(), 0) == 0


def at_the_first():
    return mock.patch.dict(os.environ, {"MASTER_ADDR": ADDRESS[0]})


AT_THE_FIRST = [(rank, at_the_first) for rank in range(2)]


def test_two_hosts_well_and_with_the_wrong_interface(ranks, hosts, tmp_path):
    found = ranks(2, check_on, hosts, [f"--folder={tmp_path}", *QUICK], AT_THE_FIRST, local_world_size=1)
    assert [status for status, _, _ in found] == [0, 0], found
    assert f"gloo {ADDRESS[0]} on the first" in found[0][1]
    found = ranks(2, check_on, hosts, [f"--folder={tmp_path}", *QUICK], AT_THE_FIRST, True, local_world_size=1)
    lines = wrong(found)
    assert len(lines) == 2 and lines[1].startswith("all-reduce was not tried"), lines
    assert lines[0].startswith("node 0 (HOST): cannot reach node 1 (HOST) at 127.0.0.1, where its gloo listens (") and \
        "GLOO_SOCKET_IFNAME" in lines[0]


def test_a_slow_link(ranks, hosts, tmp_path):
    limited = ["tc", "-n", hosts[0], "qdisc", "add", "dev", f"{hosts[0]}v", "root", "tbf", "rate", "80mbit", "burst", "64kb",
               "latency", "500ms"]
    if not shutil.which("tc") or subprocess.run(limited, capture_output=True).returncode:
        pytest.skip("needs tc of iproute2, and its tbf")
    try:
        found = ranks(2, check_on, hosts, [f"--folder={tmp_path}", "--timeout=20", "--min-bandwidth=0.02"], AT_THE_FIRST,
                      local_world_size=1)
    finally:
        subprocess.run([*limited[:4], "del", *limited[5:8]])
    lines = wrong(found)
    assert len(lines) == 1, lines
    assert lines[0].startswith("all-reduce between node 0 (HOST) and node 1 (HOST): 0.0") and "0.02 is the least" in lines[0]


CUT = """
import ctypes, os, runpy, subprocess, sys
sys.path.insert(0, ".")
from nanogpt import cluster
name, when = os.environ["NETWORK"], sys.argv.pop(1)
with open(f"/run/netns/{name}") as there:
    assert ctypes.CDLL(None).setns(there.fileno(), 0) == 0
real = cluster.bus_bandwidth
def cut(*args):
    subprocess.run(["ip", "link", "set", f"{name}v", "down"], check=True)
    return real(*args)
if when == "during all-reduce":
    cluster.bus_bandwidth = cut
runpy.run_path("launch/check_cluster.sh", run_name="__main__")
"""


def test_a_link_that_is_cut(hosts, tmp_path):
    """Here each host has the whole command, to its end: what hangs in a library must not keep it from ending."""
    (tmp_path / "cut.py").write_text(CUT)

    def both(when):
        command = [tmp_path / "cut.py", "never", "--timeout=2", "--folder", tmp_path]
        env = ENV | dict(MASTER_ADDR=ADDRESS[0], MASTER_PORT="29617", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        started = [Forked(words, ROOT, env | dict(NETWORK=name, GLOO_SOCKET_IFNAME=f"{name}v", RANK=str(node)))
                   for node, (name, words) in enumerate(zip(hosts, (command, [command[0], when, *command[2:]])))]
        try:
            found = [process.communicate(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
        errors = ["\n".join(line for line in err.splitlines() if line.startswith("error: ") and "MB/s" not in line)
                  for _, err in found]  # not what torch's C++ has to say, nor of a busy disk
        return [wrong([(process.returncode, "", err)]) for process, err in zip(started, errors)]

    try:
        (first,), (second,) = both("during all-reduce")
        assert first.startswith("all-reduce between node 0 (HOST) and node 1 (HOST) failed (")
        assert second.startswith("node 1 (HOST): hearing from node 0, to which the link may be cut, did not end in 6 s")
        (first,), (second,) = both("never")  # it still is
        assert first.startswith("node 0 (HOST): nothing was heard of node 1 for 4 s: not started, not able to reach")
        assert second.startswith(f"node 1 (HOST): cannot reach the first node at {ADDRESS[0]}:29617 (")
    finally:
        assert ip("-n", hosts[1], "link", "set", f"{hosts[1]}v", "up")

"""Two hosts, each in a network namespace of its own, with two ranks each: the link between them is cut in mid-run.

The hosts are real to the network: addresses of their own, a virtual cable, torchrun's c10d rendezvous across it.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_launch import ENV, ROOT
from test_train import SMALL, STEPS, plain_loop, small_run  # noqa: F401

NAME = f"n{secrets.token_hex(3)}"
ADDRESS = {"a": "10.213.7.1", "b": "10.213.7.2"}


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True).returncode == 0


@pytest.fixture
def hosts():
    """{a, b}: names of two namespaces, joined by a cable. Needs root and iproute2."""
    names = {host: f"{NAME}{host}" for host in ADDRESS}
    try:
        if not shutil.which("ip") or not all(ip("netns", "add", name) for name in names.values()):
            pytest.skip("needs network namespaces of its own: root, and ip of iproute2")
        assert ip("link", "add", f"{NAME}va", "netns", names["a"], "type", "veth", "peer", "name", f"{NAME}vb",
                  "netns", names["b"])
        for host, name in names.items():
            assert ip("-n", name, "addr", "add", f"{ADDRESS[host]}/24", "dev", f"{NAME}v{host}")
            assert ip("-n", name, "link", "set", f"{NAME}v{host}", "up") and ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name)


class Host:
    """One of the two: starts its torchrun, again and again if need be, always with the same command."""

    def __init__(self, host, name, small_run, folder):  # noqa: F811
        self.name, self.starts, self.folder, self.host = name, 0, folder, host
        is_host = "true" if host == "a" else "false"
        self.command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
            "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESS['a']}:29517",
            f"--rdzv-conf=is_host={is_host}", f"--local-addr={ADDRESS[host]}", "launch/train.sh", str(small_run.config),
            *SMALL, f"--run.dir={small_run.folder / 'hosts'}", f"--train.max_steps={STEPS}", "--train.micro_batch_size=1",
            "--eval.interval=1", "--eval.sequences=64", "--checkpoint.interval=2", "--run.timeout_s=6"]
        self.environment = ENV | {"GLOO_SOCKET_IFNAME": f"{NAME}v{host}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
        self.start()

    def start(self):
        self.starts += 1
        with open(self.folder / f"{self.host}.txt", "a") as out:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                                            stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def link(self, state: str):
        assert ip("-n", self.name, "link", "set", f"{NAME}v{self.host}", state)

    def said(self) -> str:
        return (self.folder / f"{self.host}.txt").read_text()

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_a_link_is_cut_in_mid_run(hosts, small_run, plain_loop, tmp_path):  # noqa: F811
    metrics = small_run.folder / "hosts" / "metrics.jsonl"

    def steps():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def until(condition, seconds):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, a.said()[-3000:] + "\n======== b\n" + b.said()[-3000:]
            time.sleep(0.02)

    a, b = (Host(host, name, small_run, tmp_path) for host, name in hosts.items())
    try:
        until(lambda: steps() >= 6, 300)
        b.link("down")
        until(lambda: "error: " in a.said(), 300)  # nobody tells TCP: our own watch must
        at = steps()
        b.link("up")
        limit = time.monotonic() + 400
        while a.process.poll() != 0 or b.process.poll() != 0:
            for host in (a, b):  # what a cluster's manager would do: the same command again, where it ended
                if host.process.poll() not in (None, 0):
                    host.start()
            assert time.monotonic() < limit and a.starts + b.starts < 6, a.said()[-3000:] + "\n======== b\n" + b.said()[-3000:]
            time.sleep(0.1)
    finally:
        a.kill()
        b.kill()
    assert at < STEPS
    told = [line for line in (a.said() + b.said()).splitlines() if line.startswith("error: ")]
    assert any("nothing is heard of rank 2" in line and "hung, or its link is cut" in line for line in told), told
    assert "4 ranks" in a.said() + b.said()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [m["step"] for m in lines] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in lines] == pytest.approx(plain_loop[0], rel=1e-4)
    print(f"started: a {a.starts}, b {b.starts} times", *told, sep="\n")

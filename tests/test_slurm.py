"""launch/slurm.sbatch under a real SLURM: a controller and four node daemons of its own, on this machine and in one folder.

One job is asked to stop, requeued, loses a node, is cancelled, and goes on on one node; beside it two jobs want the same
run folder, and the one that gets it reaches its time limit. Each start costs seconds, so all of it is one story.
"""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import xxhash
from test_launch import ENV, ROOT
from test_train import SMALL, small_run  # noqa: F401

os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian has the daemons
NEEDED = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
NODES = ["n1", "n2", "n3", "n4"]
LONG = 40  # steps: enough for four starts to be ended within


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """munged, slurmctld and a slurmd for each node; key, sockets, configuration and state in `folder`, nothing elsewhere."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.env = ENV | {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
        user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
        controller, *ports = free_ports(1 + len(NODES))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text("\n".join([
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={controller}",
            "AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={folder}/munge.socket",
            f"SlurmUser={user}", f"SlurmdUser={user}", f"StateSaveLocation={folder}/state",
            f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdSpoolDir={folder}/%n", f"SlurmdPidFile={folder}/%n.pid", f"SlurmdLogFile={folder}/%n.log",
            "ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "MpiDefault=none", "SelectType=select/cons_tres",
            "SlurmdParameters=config_overrides", "SlurmdTimeout=5", "SchedulerParameters=sched_interval=1,bf_interval=1",
            *(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000"
              for node, port in zip(NODES, ports)),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE", ""]))
        for name in ("state", *NODES):
            (folder / name).mkdir()

    def start(self):
        munge = [f"--{name}={self.folder}/munge.{kind}" for name, kind in (
            ("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self.daemon("munged", "munged", "--foreground", "--force", *munge)  # --force: a folder of ours alone
        self.until((self.folder / "munge.socket").exists)
        self.daemon("slurmctld", "slurmctld", "-D", "-i")
        cores = sorted(os.sched_getaffinity(0))
        for i, node in enumerate(NODES):  # one core each, so that a rank has as many threads as the undisturbed run's
            self.daemon(node, "slurmd", "-D", "-N", node, core=cores[i % len(cores)])
        self.until(lambda: self("sinfo", "-h", "-N", "-o", "%t", check=False).count("idle") == len(NODES))

    def daemon(self, name, *words, core=None):
        with open(self.folder / f"{name}.out", "w") as out:
            self.daemons[name] = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}))

    def __call__(self, *words, check=True) -> str:
        """What a command of SLURM says."""
        done = subprocess.run(words, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{words}\n{done.stderr}"
        return done.stdout.strip()

    def until(self, condition, seconds=300):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "\n".join(
                f"======== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.rglob("*.out"))
            time.sleep(0.05)

    def state(self, job: str) -> str:
        said = self("scontrol", "show", "job", "--oneliner", job)
        return said.split(" JobState=")[1].split()[0]

    def again(self, job: str):
        """Starts a requeued job, for which SLURM would take two minutes; in the second of its end, a node refuses it."""
        self.until(lambda: self.state(job) == "PENDING")
        self("scontrol", "update", f"job={job}", "StartTime=now+2")
        self.until(lambda: self.state(job) == "RUNNING")

    def processes(self, node: str) -> list[int]:
        """Those that run for jobs on a node, and the daemons that started them."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_text(errors="replace").split("\0")
                ours = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder}/slurm.conf"} <= set(environment)
                if ours or path.joinpath("comm").read_text().startswith("slurmstepd") and any(
                        os.readlink(file) == f"{self.folder}/{node}.log" for file in path.glob("fd/*")):
                    found.add(int(path.name))
            except OSError:  # it has ended meanwhile
                pass
        return sorted(found)

    def lose(self, node: str):
        """As if somebody had pulled the plug: no daemon says goodbye, no job is told."""
        self.daemons[node].kill()
        for pid in self.processes(node):
            kill(pid)
        self("scontrol", "update", f"node={node}", "state=down", "reason=plug")  # as SLURM itself would find, in time

    def stop(self):
        if "slurmctld" in self.daemons:
            self("scancel", "--user", str(os.getuid()), check=False)
        for node in NODES:
            for pid in self.processes(node):
                kill(pid)
        for process in self.daemons.values():
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def kill(pid: int):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


RECORDER = """
import os
if "RANK" in os.environ:  # not in torchrun itself
    import xxhash
    import nanogpt.train as training
    learning_rate, inputs_and_targets, step = training.learning_rate, training.inputs_and_targets, None
    seen = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def begins(now, config):
        global step
        step = now
        return learning_rate(now, config)
    def record(tokens, block):
        x, y = inputs_and_targets(tokens, block)
        rows = [xxhash.xxh64(a.numpy().astype("<i8").tobytes() + b[-1:].numpy().astype("<i8").tobytes()).hexdigest()
                for a, b in zip(x, y)]
        start = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        os.write(seen, "".join(f"{start} {step} {row}\\n" for row in rows).encode())
        return x, y
    training.learning_rate, training.inputs_and_targets = begins, record
"""


@pytest.fixture(scope="module")
def cluster():
    if NEEDED:
        pytest.skip(f"needs SLURM's daemons (Debian: slurm-wlm, munge): there is no {', '.join(NEEDED)}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a short path: that of a socket has 107 bytes
        one = Cluster(Path(folder))
        try:
            one.start()
            yield one
        finally:
            one.stop()


def test_preempted_requeued_a_node_lost_cancelled(cluster, small_run, text_dataset, tmp_path):  # noqa: F811
    """Its curve is that of the undisturbed run, and every sequence is the one that belongs there."""
    folder = small_run.folder
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    cluster.env |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SEEN": str(tmp_path / "seen")}
    slowly = ["--train.micro_batch_size=1", "--eval.interval=1", "--eval.sequences=64"]  # enough time to be hit

    def submit(run, *words, steps=LONG):
        out = f"--output={cluster.folder}/{'array-%a' if run == 'array' else '%j'}.out"
        return cluster("sbatch", "--parsable", out, *words, "launch/slurm.sbatch", str(small_run.config), *SMALL, *slowly,
                       "--checkpoint.interval=2", f"--run.dir={folder / run}", f"--train.max_steps={steps}")

    def steps(run="job"):
        path = folder / run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def said(job):
        number = job.partition("_")[2]
        return (cluster.folder / (f"array-{number}.out" if number else f"{job}.out")).read_text()

    def trains(run="job"):
        before = steps(run)
        cluster.until(lambda: steps(run) >= before + 3)

    job = submit("job", "--nodes=2")
    cluster.until(lambda: cluster.state(job) == "RUNNING")
    array = submit("array", "--nodes=1", "--array=0-1", steps=10**6)
    trains()
    cluster("scancel", "--signal=USR1", job)  # preempted, with a warning
    cluster.until(lambda: cluster.state(job) == "PENDING")
    assert f"stopped by SIGUSR1 after step {steps()} of {LONG}, and saved" in said(job)
    assert said(job).count("\nsaved: requeued\n") == 1

    # Meanwhile, of two jobs in one folder: one is refused, the other comes to its time limit.
    tasks = [f"{array}_{number}" for number in range(2)]
    cluster.until(lambda: sorted(map(cluster.state, tasks)) == ["FAILED", "RUNNING"] and steps("array"))
    limited, refused = sorted(tasks, key=cluster.state, reverse=True)
    assert "array: another run trains there (process " in said(refused) and "requeued" not in said(refused)
    minutes = int(cluster("squeue", "-h", "-j", limited, "-o", "%M").split(":")[-2])
    cluster("scontrol", "update", f"job={limited}", f"TimeLimit={minutes + 2}")  # SLURM looks every half minute

    cluster.again(job)
    trains()
    cluster("scontrol", "requeue", job)       # without one, but for SIGTERM
    cluster.again(job)
    trains()
    cluster.lose("n2")                        # without any
    cluster.until(lambda: cluster.state(job) != "RUNNING")
    at = steps()

    cluster.until(lambda: "\nsaved: requeued\n" in said(limited))
    cluster("scancel", array)
    assert re.search(r"\nstopped by SIGUSR1 after step \d+ of 1000000, and saved;", said(limited)), said(limited)

    cluster.again(job)                        # on other nodes
    trains()
    cluster("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED" and not cluster("squeue", "-h", "-j", job))
    assert f"\nstopped by SIGTERM after step {steps()} of {LONG}, and saved;" in said(job), said(job)
    assert said(job).count(f"job {job}, start ") == 4 and said(job).count("\nresuming ") == 3
    assert at <= steps() < LONG
    last = submit("job", "--nodes=1")         # by the same command, on one node
    cluster.until(lambda: cluster.state(last) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert cluster.state(last) == "COMPLETED" and "on 2 -> 1 ranks" in said(last), said(last)

    lines = [json.loads(line) for line in (folder / "job" / "metrics.jsonl").read_text().splitlines()]
    undisturbed = small_run("undisturbed", 2, *slowly, local_world_size=1, steps=LONG)
    assert [m["step"] for m in lines] == [m["step"] for m in undisturbed] == list(range(1, LONG + 1))
    for key in ("loss", "val_loss"):
        assert [m[key] for m in lines] == pytest.approx([m[key] for m in undisturbed], rel=1e-6)
    differ = [m["step"] for m, n in zip(lines, undisturbed) if m["loss"] != n["loss"]]
    print(f"other bits in the losses of steps {differ}")

    seen = defaultdict(lambda: defaultdict(Counter))
    for line in (tmp_path / "seen").read_text().splitlines():
        start, step, row = line.split()
        if start.split(".")[0] in (job, last):
            seen[start][int(step)][row] += 1
    assert len(seen) == 5
    assert set().union(*seen.values()) == set(range(LONG))
    expected = rows_of_each_step(small_run, text_dataset)
    for start, of_step in seen.items():
        for step, rows in of_step.items():  # of the last before a node is lost, perhaps not all
            cut = start == f"{job}.2" and step == max(of_step)
            assert rows == expected[step] or cut and rows <= expected[step], (start, step)


def rows_of_each_step(small_run, text_dataset) -> list[Counter]:  # noqa: F811
    """Hashes of the sequences that belong to each step, read from the shards by themselves."""
    from nanogpt.config import load_config
    from nanogpt.shards import import_streaming
    from nanogpt.stream import TrainStream
    options = [*SMALL, f"--train.max_steps={LONG}", "--train.micro_batch_size=1"]
    stream = TrainStream(load_config([str(small_run.config), *options]))
    samples = import_streaming().LocalDataset(local=str(text_dataset / "train"))
    return [Counter(xxhash.xxh64(samples[sample]["tokens"][part * 32:part * 32 + 33].astype("<i8").tobytes()).hexdigest()
                    for sample, part in stream.sequences(step).tolist()) for step in range(LONG)]


def test_check_cluster_as_a_step(cluster, tmp_path):
    done = subprocess.run(["srun", "--nodes=2", "--ntasks-per-node=1", "launch/check_cluster.sh", "--min-bandwidth=1e-5",
                           "--folder", tmp_path], env=cluster.env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert re.match(r"nodes        2 x 1 rank: node 0 \(n\d\), node 1 \(n\d\)\n", done.stdout), done.stderr
    assert "GB/s between the slowest two nodes" in done.stdout
    wrong = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(" MB/s; below 50 checkpoints take long" in line for line in wrong), wrong  # tests may have a slow disk
    assert done.returncode == bool(wrong) and ("all is well" in done.stdout) == (not wrong)


def test_help_and_wrong_use(tmp_path):
    """Without SLURM: what it is for."""
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch")]
    env = {name: value for name, value in ENV.items() if not name.startswith("SLURM")}
    done = subprocess.run([*script, "--help"], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and "sbatch launch/slurm.sbatch CONFIG" in done.stdout and "#SBATCH" not in done.stdout
    for where, variables, said in (
            (ROOT, {}, "this is for SLURM: sbatch launch/slurm.sbatch CONFIG; without SLURM: bash launch/train.sh CONFIG"),
            (tmp_path, dict(SLURM_JOB_ID="7"), f"{tmp_path}: has no launch/train.sh; go to the repository's folder first"),
            (ROOT, dict(SLURM_JOB_ID="7"), "a config is needed, as in: sbatch launch/slurm.sbatch configs/gpt2_124m.yaml")):
        done = subprocess.run(script, cwd=where, env=env | variables, text=True, capture_output=True)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1

"""Are these nodes fit to train on? What launch/check_cluster.sh runs, once on each node.

In order, each with a time limit: every node looks at itself -> all meet at the first -> what they have is compared ->
each reaches each other, over the interfaces that gloo and NCCL will take -> all-reduce over all, and between each two.
What is wrong is one line, with its remedy, and the status is 1.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import secrets
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

from nanogpt.errors import Parser, UserError, one_line, report

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "NCCL_SOCKET_IFNAME": "interface over which NCCL's ranks meet, and send what InfiniBand does not: ib0, or ^docker,lo",
    "GLOO_SOCKET_IFNAME": "the same for gloo, whose CPU messages are few and small; without it: that of the host's name",
    "NCCL_IB_HCA": "InfiniBand or RoCE adapters that NCCL takes: mlx5, or =mlx5_0:1; without it: all",
    "NCCL_IB_DISABLE": "1: no InfiniBand, all goes over sockets: many times slower",
    "NCCL_IB_GID_INDEX": "RoCE: which address of the adapter; 3 on many clusters",
    "NCCL_P2P_DISABLE": "1: GPUs of a node exchange through memory: slower, for machines whose peer access is broken",
    "NCCL_DEBUG": "WARN or INFO: what NCCL chose, and why it failed",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "what a failed collective does: leave it, or a failure of a rank hangs the others",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000: remember so many collectives, and write them down when one hangs",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL: checks that all ranks call the same collective: slow",
}
SHM_BYTES = 64 << 20        # streaming: 8 bytes a sample, so 8 million samples
SHM_BYTES_GPUS = 1 << 30    # and NCCL, between GPUs without peer access: what NVIDIA's containers are given
DISK_BYTES_PER_S = 50e6     # a checkpoint of 1 GB in 20 s
CLOCK_S = 1.0               # object stores refuse at 15 minutes, SLURM's munge at 5; logs are hard to read long before
SLOW = 0.5                  # a pair of nodes below this share of the median of all pairs is named
MiB, GiB = 1 << 20, 1 << 30


def main(argv: list[str] | None = None):
    """Parses the command line, runs all checks, prints what was found. Raises UserError, one line a problem."""
    parser = Parser(prog="launch/check_cluster.sh", description=__doc__.split("\n")[0] + f"""

    srun --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 launch/check_cluster.sh    under SLURM: one task a node
    torchrun --nnodes 4 … launch/check_cluster.sh                                   elsewhere: as training is started
    bash launch/check_cluster.sh                                                    this machine alone

{__doc__.split(chr(10), 2)[2]}
Settings of the network, in the environment of every node alike:

""" + "\n".join(f"    {name:32}{meaning}" for name, meaning in SETTINGS.items()))
    parser.add_argument("--folder", nargs="+", metavar="DIR", default=["runs"], help="where runs will be: the speed of its "
                        "disk, and whether all nodes see the same")
    parser.add_argument("--local-folder", nargs="+", metavar="DIR", default=[], help="the speed of those that each node has "
                        "for itself: caches of shards")
    parser.add_argument("--min-bandwidth", type=float, default=0.1, metavar="GB/S", help="of all-reduce between two nodes")
    parser.add_argument("--ranks", type=int, metavar="N", default=0, help="processes a node; 0: one for each GPU, else one")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="of each step of the check, in seconds")
    args = parser.parse_args(argv)
    Check(args).run()


class Check:
    """One process of the check. The first of each node, local 0, stands for it; more of them, one a GPU, only all-reduce."""

    def __init__(self, args):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost connection means is told here
        import torch
        self.args, self.problems, self.gpus = args, [], torch.cuda.device_count()
        self.node, self.nodes, self.local, self.local_size, self.address, self.port, self.serves = self.place()
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.name = f"node {self.node} ({host})"

    def place(self) -> tuple:
        """(node, nodes, local rank, local ranks, the first node's address, port, whether this process keeps the store)"""
        env = os.environ
        if "RANK" in env:  # torchrun's, or a sibling of ours
            try:
                rank, world, local, size = (int(env[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
                return (rank // size, world // size, local, size, env["MASTER_ADDR"], int(env["MASTER_PORT"]),
                        rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
            except KeyError as missing:
                raise UserError(f"RANK is set and {missing.args[0]} is not: start with torchrun, or unset RANK") from None
        size = self.args.ranks or max(1, self.gpus)
        if "SLURM_STEP_ID" in env:
            nodes, tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
            if tasks != nodes:
                raise UserError(f"{tasks} tasks on {nodes} nodes: one a node is needed: srun --ntasks-per-node 1")
            port = 10000 + int(env["SLURM_JOB_ID"]) % 10000
            node = int(env["SLURM_NODEID"])
            return node, nodes, 0, size, first_node(env["SLURM_STEP_NODELIST"]), port, node == 0
        if int(env.get("SLURM_NNODES", 1)) > 1:
            raise UserError(f"a job of {env['SLURM_NNODES']} nodes, and this runs on one: srun --ntasks-per-node 1 "
                            "launch/check_cluster.sh")
        with socket.create_server(("127.0.0.1", 0)) as free:
            return 0, 1, 0, size, "127.0.0.1", free.getsockname()[1], True

    def run(self):
        """All of it. The first of node 0 prints. Raises UserError, exits with 1 on the other nodes."""
        if self.local:
            return self.follow()
        if "RANK" not in os.environ and self.local_size > 1:
            self.start_siblings()
        # ---- alone --------------------------------------------------------------------------------------------------
        mine = dict(name=self.name, ranks=self.local_size)
        with self.limit("looking at versions, GPUs and limits"):
            mine |= dict(versions=versions(), settings={n: os.environ[n] for n in SETTINGS if n in os.environ},
                         gpus=self.look_at_gpus(), apart=self.gpus_apart(), shm=self.look_at_shared_memory(),
                         limits=self.look_at_limits(), addresses=self.look_at_interfaces())
        mine["disk"] = [self.look_at_disk(folder) for folder in (*self.args.folder, *self.args.local_folder)]
        # ---- together -----------------------------------------------------------------------------------------------
        try:
            self.meet()
            mine["ports"] = answer(self.node, set(mine["addresses"].values()))
            everyone = self.exchange("facts", mine, steps=1 + len(mine["disk"]))  # which they may still be at
            self.look_at_shared_folders()
            reached = self.reach(everyone)
            told = self.exchange("told", dict(problems=self.problems, reached=reached))
        except UserError as error:
            raise UserError("\n".join([*self.problems, str(error)])) from None
        problems = [line for one in told for line in one["problems"]]
        problems += differences(everyone) + self.clocks(everyone, told)
        meets = all(len(one["reached"]) == self.nodes - 1 for one in told)
        meets = meets and len({one["ranks"] for one in everyone}) == 1
        if self.node == 0:
            self.store.set("go", "yes" if meets else "no")
        results = {}
        if meets and self.nodes * self.local_size > 1:
            results = self.bandwidths()
        if self.node:
            if self.verdict() != "well":
                sys.exit(1)
            return
        if not meets:
            problems.append("all-reduce was not tried, since not all nodes reach each other with the same count of ranks: "
                            "mend that first")
        problems += self.slow(results, everyone)
        for line in table(everyone, told, results, self.local_size):
            print(line, flush=True)
        self.store.set("verdict", "well" if not problems else "ill")
        deadline = time.monotonic() + min(10, self.args.timeout)  # the store ends with this process
        while self.nodes > 1 and self.store.add("left", 0) < self.nodes - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        if problems:
            raise UserError("\n".join(problems))
        print("all is well", flush=True)

    def follow(self):
        """What the other processes of a node do: they wait, and take part in all-reduce."""
        with self.limit("waiting for its first process", 20 * self.args.timeout):
            try:
                self.meet()
                self.store.set_timeout(timedelta(seconds=20 * self.args.timeout))
                if self.store.get("go") == b"yes":
                    self.bandwidths()
            except (UserError, RuntimeError):  # which the first process tells
                sys.exit(1)

    def verdict(self) -> str:
        """What node 0 makes of it all; it prints."""
        seconds = (self.nodes + 1) * self.args.timeout
        with self.limit("hearing from node 0, to which the link may be cut,", seconds):  # the store's own limits may hang
            try:
                self.store.set_timeout(timedelta(seconds=seconds + 60))
                found = self.store.get("verdict").decode()
                self.store.add("left", 1)
                return found
            except RuntimeError as error:
                raise UserError(f"{self.name}: node 0 has ended ({one_line(error)})") from None

    # ---- time limits ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def limit(self, what: str, seconds: float | None = None):
        """Whatever hangs within, be it in C++ or in a dead file system, ends the process, which says what it was."""
        seconds = seconds or self.args.timeout

        def expire():
            report("\n".join([*self.problems, f"{self.name}: {what} did not end in {seconds:g} s (--timeout)"]))
            os._exit(1)

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # ---- each node by itself ----------------------------------------------------------------------------------------

    def problem(self, line: str):
        self.problems.append(f"{self.name}: {line}")

    def look_at_gpus(self) -> list[str]:
        """Their names. ECC errors, remapped rows, throttling and strange users of their memory are problems."""
        import torch
        fields = ("index", "name", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure",
                  "clocks_throttle_reasons.hw_slowdown", "memory.used")
        asked = said("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        found = [[word.strip() for word in line.split(",")] for line in asked.splitlines()]
        names = []
        for words in found:
            if len(words) != len(fields):
                continue
            index, name, ecc, pending, failure, slowdown, used = words
            names.append(name)
            if ecc.isdigit() and int(ecc):
                self.problem(f"GPU {index}: {ecc} uncorrected memory errors: drain the node, and reset or replace the GPU")
            if pending in ("1", "Yes") or failure in ("1", "Yes"):
                self.problem(f"GPU {index}: memory rows wait to be remapped, or could not be: reset or replace the GPU")
            if slowdown == "Active":
                self.problem(f"GPU {index}: slowed down by its hardware (heat or power): look at its cooling")
            if used.isdigit() and int(used) > 2048:
                self.problem(f"GPU {index}: {used} MiB of its memory are taken by others: end them (nvidia-smi shows whom)")
        if len(names) > self.gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
            self.problem(f"{len(names)} GPUs are there and torch {torch.__version__} finds {self.gpus}: install a torch "
                         "built for CUDA, or a driver that is new enough for it")
        return names

    def gpus_apart(self) -> int:
        """Pairs of GPUs of this node that cannot read each other's memory: NCCL then goes through the host."""
        import torch
        return sum(not torch.cuda.can_device_access_peer(a, b) for a in range(self.gpus) for b in range(a))

    def look_at_shared_memory(self) -> int:
        """Bytes free in /dev/shm."""
        room = os.statvfs("/dev/shm")
        free, needed = room.f_bavail * room.f_frsize, SHM_BYTES_GPUS if self.gpus else SHM_BYTES
        if free < needed:
            self.problem(f"/dev/shm: {free / MiB:.0f} MiB are free, and {needed / MiB:.0f} wanted (streaming: 8 bytes a "
                         "sample; NCCL): mount -o remount,size=8g /dev/shm, docker run --shm-size 8g, or remove what dead "
                         "runs left there")
        return free

    def look_at_limits(self) -> list:
        """[open files, locked memory in bytes or -1]"""
        files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
        needed = 512 + 8 * self.nodes * self.local_size  # a connection to each rank, in each of a few groups
        if files != -1 and files < needed:
            self.problem(f"ulimit -n is {files}, and {needed} is wanted for so many ranks: ulimit -n 65536, or LimitNOFILE "
                         "of the service that starts them (slurmd)")
        if list(Path("/sys/class/infiniband").glob("*")) and locked != -1 and locked < GiB:
            self.problem(f"ulimit -l is {locked >> 10} KiB, and InfiniBand locks its buffers: ulimit -l unlimited, "
                         "LimitMEMLOCK=infinity of slurmd, or docker run --ulimit memlock=-1")
        return [files, locked]

    def look_at_interfaces(self) -> dict[str, str]:
        """{gloo, nccl: IPv4 address} of the interfaces that they will take. What is named and not there is a problem."""
        there, found = interfaces(), {}
        listed = ", ".join(f"{name} {address}" for name, address in there.items())
        wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        if wanted and wanted not in there:
            self.problem(f"GLOO_SOCKET_IFNAME={wanted}: no such interface here, or it has no address; there are {listed}")
        elif wanted:
            found["gloo"] = there[wanted]
        else:  # as gloo does: that of the host's own name, if it is one of this host
            try:
                own = socket.gethostbyname(socket.gethostname())
            except OSError:
                own = None
            found["gloo"] = own if own in there.values() else "127.0.0.1"
        if self.gpus:
            wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
            names = chosen(wanted, list(there)) if wanted else (
                chosen("ib", list(there)) or chosen("^docker,lo", list(there)) or list(there))
            if not names:
                self.problem(f"NCCL_SOCKET_IFNAME={wanted}: fits no interface that has an address; there are {listed}")
            else:
                found["nccl"] = there[names[0]]
        adapters = {path.name for path in Path("/sys/class/infiniband").glob("*")}
        ports = [path.read_text() for path in Path("/sys/class/infiniband").glob("*/ports/*/state")]
        wanted = re.split("[,:]", os.environ.get("NCCL_IB_HCA", "").lstrip("^="))[0]
        if wanted and not any(adapter.startswith(wanted) for adapter in adapters):
            self.problem(f"NCCL_IB_HCA={os.environ['NCCL_IB_HCA']}: no such adapter here; there "
                         + (f"are {', '.join(sorted(adapters))}" if adapters else "is none at all"))
        if adapters and os.environ.get("NCCL_IB_DISABLE") == "1":
            self.problem(f"NCCL_IB_DISABLE=1, and {', '.join(sorted(adapters))} are there: unset it, or all takes sockets")
        if adapters and not any("ACTIVE" in port for port in ports):
            self.problem(f"no port of {', '.join(sorted(adapters))} is active (ibstat): a cable, or the subnet manager")
        if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
            self.problem("TORCH_NCCL_ASYNC_ERROR_HANDLING=0: a rank that fails would leave the others hanging: unset it")
        return found

    def look_at_disk(self, folder: str) -> dict:
        """{folder, write, read: bytes/s} of 64 MiB, on all nodes at the same time, as checkpoints are written."""
        with self.limit(f"writing and reading 64 MiB in {folder}"):
            block, times = os.urandom(MiB), [time.monotonic()]
            try:
                os.makedirs(folder, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-cluster-") as file:
                    for _ in range(64):
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                    times.append(time.monotonic())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
                    file.seek(0)
                    while file.read(MiB):
                        pass
                    times.append(time.monotonic())
            except OSError as error:
                self.problem(f"{folder}: {error.strerror.lower()}: it must be there, writable, with room, on every node")
                return dict(folder=folder, write=None, read=None)
        write, read = (64 * MiB / max(1e-6, b - a) for a, b in zip(times, times[1:]))
        if write < DISK_BYTES_PER_S or read < DISK_BYTES_PER_S:
            self.problem(f"{folder}: writes {write / 1e6:.0f} and reads {read / 1e6:.0f} MB/s; below "
                         f"{DISK_BYTES_PER_S / 1e6:.0f} checkpoints take long: choose another run.dir or data.cache_dir")
        return dict(folder=folder, write=write, read=read)

    # ---- all nodes together -----------------------------------------------------------------------------------------

    def meet(self):
        """Sets self.store, kept by the first node, or by torchrun. Raises UserError where it is out of reach."""
        from torch.distributed import PrefixStore, TCPStore
        limit, began = self.args.timeout, time.monotonic()
        where = f"{self.address}:{self.port}"
        if not self.serves:
            while True:  # with sockets of our own, which say what is wrong
                try:
                    socket.create_connection((self.address, self.port), timeout=max(1, limit / 6)).close()
                    break
                except OSError as error:
                    if time.monotonic() - began > limit:
                        why = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
                        raise UserError(f"{self.name}: cannot reach the first node at {where} ({why}): the link or a "
                                        "firewall, its name leads elsewhere, or nothing was started there") from None
                    time.sleep(0.2)
        try:
            with self.limit(f"meeting at {where}", limit + 30):
                store = TCPStore(self.address, self.port, is_master=self.serves, wait_for_workers=False,
                                 timeout=timedelta(seconds=limit))
        except Exception as error:
            raise UserError(f"{self.name}: no meeting at {where}: {one_line(error)}") from None
        self.store = PrefixStore("check cluster", store)

    def exchange(self, what: str, mine: dict, steps: int = 1) -> list[dict]:
        """What each node says. Raises UserError that names those that say nothing in the time that `steps` may take."""
        seconds = steps * self.args.timeout
        with self.limit(f"exchanging {what}", seconds + 30):
            try:
                self.store.set(f"{what} {self.node}", json.dumps(mine))
                limit = time.monotonic() + seconds
                keys = {node: f"{what} {node}" for node in range(self.nodes)}
                while missing := [node for node, key in keys.items() if not self.store.check([key])]:
                    if time.monotonic() > limit:
                        raise UserError(f"{self.name}: nothing was heard of node {', '.join(map(str, missing))} for "
                                        f"{seconds:g} s: not started, not able to reach {self.address}, or hung")
                    time.sleep(0.05)
                return [json.loads(self.store.get(key)) for key in keys.values()]
            except RuntimeError as error:
                raise UserError(f"{self.name}: lost the first node while exchanging {what} ({one_line(error)}): the link to "
                                f"{self.address} was cut, or it has ended") from None

    def look_at_shared_folders(self):
        """What node 0 writes in the folder of the runs, all must see: a checkpoint is written by all of them."""
        for number, folder in enumerate(self.args.folder):
            with self.limit(f"looking for another node's file in {folder}", 2 * self.args.timeout):
                if self.node == 0:
                    mark = Path(folder, f".check-cluster-{secrets.token_hex(6)}")
                    with contextlib.suppress(OSError):
                        mark.touch()
                    self.store.set(f"mark {number}", mark.name)
                name = self.store.get(f"mark {number}").decode()
                limit = time.monotonic() + min(10, self.args.timeout / 2)
                while not (seen := Path(folder, name).exists()) and time.monotonic() < limit:
                    with contextlib.suppress(OSError):
                        os.listdir(folder)  # NFS looks again
                    time.sleep(0.1)
                if not seen:
                    self.problem(f"{folder} ({os.path.abspath(folder)}) is not the folder that node 0 sees: runs need a "
                                 "file system that all nodes share; if this is a cache, give it as --local-folder")
                self.exchange(f"seen {number}", {})
                if self.node == 0:
                    mark.unlink(missing_ok=True)

    def reach(self, everyone: list[dict]) -> dict[int, list[float]]:
        """{node: [seconds there and back, its clock minus ours]} of those that answer. The others are problems."""
        answers, seconds = {}, min(5, self.args.timeout)
        for node, other in enumerate(everyone):
            for kind, address in other["addresses"].items() if node != self.node else ():
                try:
                    found = ask(node, address, other["ports"][address], seconds)
                    answers[node] = min(found, answers.get(node, found))
                except OSError as error:
                    why = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
                    self.problem(f"cannot reach {other['name']} at {address}, where its {kind} listens ({why}): a firewall, "
                                 f"a cut link, or the wrong interface: set {kind.upper()}_SOCKET_IFNAME there to one that "
                                 "leads to the other nodes")
                    answers.pop(node, None)
                    break
        return answers

    def clocks(self, everyone: list[dict], told: list[dict]) -> list[str]:
        """Problems of clocks, as node 0 sees them."""
        return [f"{everyone[int(node)]['name']}: its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that "
                f"of {everyone[0]['name']}: start chrony or ntpd on both"
                for node, (round_trip, skew) in told[0]["reached"].items() if abs(skew) - round_trip > CLOCK_S]

    def start_siblings(self):
        """The other processes of this node, one a GPU."""
        for local in range(1, self.local_size):
            rank, world = self.node * self.local_size + local, self.nodes * self.local_size
            env = os.environ | dict(
                RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(self.local_size),
                MASTER_ADDR=self.address, MASTER_PORT=str(self.port), TORCHELASTIC_RUN_ID="check")  # they end with this one
            subprocess.Popen([sys.executable, *sys.argv], env=env, stdin=subprocess.DEVNULL)

    def bandwidths(self) -> dict:
        """All-reduce over all ranks, and those of each two nodes. Rank 0 gets {"all" or "a b": bytes/s, or an error}."""
        import torch
        import torch.distributed as dist
        rank, world = self.node * self.local_size + self.local, self.nodes * self.local_size
        device, limit = torch.device("cpu"), timedelta(seconds=self.args.timeout)
        if self.gpus:
            device = torch.device("cuda", self.local)
            torch.cuda.set_device(device)

        def measured(key: str, first: int, size: int, group=None):
            try:
                found = bus_bandwidth(size, device, group)
            except RuntimeError as error:
                found = one_line(error)
            if rank == first:
                self.store.set(key, json.dumps(found))

        with self.limit("connecting all ranks, and all-reduce over them", 3 * self.args.timeout + 30):
            try:
                dist.init_process_group("nccl" if self.gpus else "gloo", rank=rank, world_size=world, timeout=limit,
                                        store=dist.PrefixStore("group", self.store))
            except RuntimeError as error:
                self.store.set("all", json.dumps(one_line(error)))
                return self.results(["all"]) if rank == 0 else {}
            measured("all", 0, world)
        pairs = [pair for turn in turns(self.nodes) for pair in turn]
        for a, b in [pair for pair in pairs if self.node in pair] if self.nodes > 2 else []:
            with self.limit(f"all-reduce with node {a if b == self.node else b}", 3 * self.args.timeout + 30):
                members = [node * self.local_size + local for node in (a, b) for local in range(self.local_size)]
                try:
                    group = dist.new_group(members, timeout=limit, use_local_synchronization=True)
                except RuntimeError as error:
                    self.store.set(f"{a} {b}", json.dumps(one_line(error)))
                    continue
                measured(f"{a} {b}", members[0], len(members), group)
                dist.destroy_process_group(group)
        found = self.results(["all", *(f"{a} {b}" for a, b in pairs if self.nodes > 2)]) if rank == 0 else {}
        if all(isinstance(speed, float) for speed in found.values()):  # else that might wait for ever
            dist.destroy_process_group()
        return found

    def results(self, keys: list[str]) -> dict:
        limit = time.monotonic() + 2 * self.args.timeout
        while time.monotonic() < limit and not all(self.store.check([key]) for key in keys):
            time.sleep(0.02)
        found = {key: json.loads(self.store.get(key)) if self.store.check([key]) else
                 f"did not end in {2 * self.args.timeout:g} s" for key in keys}
        if self.nodes == 2:
            found["0 1"] = found["all"]  # the same ranks
        return found

    def slow(self, results: dict, everyone: list[dict]) -> list[str]:
        """Problems of all-reduce."""
        speeds = [value for key, value in results.items() if key != "all" and not isinstance(value, str)]
        usual, problems = statistics.median(speeds) if speeds else 0.0, []
        for key, value in results.items():
            if key == "all" and (self.nodes == 2 or not isinstance(value, str)):
                continue
            who = "all ranks" if key == "all" else " and ".join(everyone[int(node)]["name"] for node in key.split())
            if isinstance(value, str):
                problems.append(f"all-reduce between {who} failed ({value}): NCCL_DEBUG=INFO tells more")
            elif value < self.args.min_bandwidth * 1e9 or value < SLOW * usual:
                problems.append(f"all-reduce between {who}: {value / 1e9:.3g} GB/s, and "
                                + (f"{usual / 1e9:.3g} between others" if value < SLOW * usual else
                                   f"{self.args.min_bandwidth:g} is the least that --min-bandwidth allows")
                                + ": a cable, a switch port, or the wrong interface (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)")
        return problems


# ---- what the checks are made of ------------------------------------------------------------------------------------

def said(*command: str) -> str:
    """Output of a program; nothing if it is not there, fails, or takes its time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def first_node(nodes: str) -> str:
    """Address of the first of SLURM's list of nodes."""
    first = said("scontrol", "show", "hostnames", nodes).split("\n")[0]
    found = re.search(r" NodeAddr=(\S+)", said("scontrol", "show", "node", "--oneliner", first)) if first else None
    return found[1] if found else first or "127.0.0.1"


def versions() -> dict[str, str]:
    """Of everything that must be the same on all nodes."""
    from importlib.metadata import version

    import torch
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "nanogpt").glob("*.py"))))
    found = dict(python=sys.version.split()[0], torch=torch.__version__, streaming=version("mosaicml-streaming"),
                 commit=said("git", "rev-parse", "--short", "HEAD") or "none", code=code.hexdigest()[:8])
    if torch.cuda.device_count():
        found |= dict(CUDA=str(torch.version.cuda), NCCL=".".join(map(str, torch.cuda.nccl.version())),
                      driver=said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0])
    return found


def interfaces() -> dict[str, str]:
    """{name: IPv4 address} of this host's interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                asked = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                found[name] = socket.inet_ntoa(asked[20:24])
    return found


def chosen(pattern: str, names: list[str]) -> list[str]:
    """Interfaces that fit a NCCL_SOCKET_IFNAME: prefixes; =: whole names; ^: all but these."""
    without, pattern = pattern.startswith("^"), pattern.lstrip("^")
    exact, pattern = pattern.startswith("="), pattern.lstrip("=")
    fits = {name for name in names for word in pattern.split(",") if (name == word if exact else name.startswith(word))}
    return [name for name in names if (name in fits) != without]


def answer(node: int, addresses: set[str]) -> dict[str, int]:
    """From here on whoever asks at these addresses is told who this is, and its time. Returns {address: port}."""
    sockets = {address: socket.create_server((address, 0)) for address in addresses}

    def serve(listening):
        while True:
            with contextlib.suppress(OSError):
                other, _ = listening.accept()
                other.settimeout(5)
                while other.recv(1):
                    other.sendall(struct.pack("<id", node, time.time()))

    for listening in sockets.values():
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
    return {address: s.getsockname()[1] for address, s in sockets.items()}


def ask(node: int, address: str, port: int, seconds: float) -> list[float]:
    """[seconds there and back, the other's clock minus ours], of the quickest of five. Raises OSError if it is not there."""
    found = []
    with socket.create_connection((address, port), timeout=seconds) as s:
        for _ in range(5):
            began, mono = time.time(), time.monotonic()
            s.sendall(b"?")
            said_by, theirs = struct.unpack("<id", s.recv(12, socket.MSG_WAITALL).ljust(12, b"\xff"))
            round_trip = time.monotonic() - mono
            if said_by != node:
                raise OSError(0, "another one answers there")
            found.append([round_trip, theirs - began - round_trip / 2])
    return min(found)


def turns(nodes: int):
    """Each two nodes once, in turns in which a node has one partner at most (the circle method of tournaments)."""
    ring = [*range(nodes), *[None] * (nodes % 2)]
    for _ in range(len(ring) - 1):
        yield [tuple(sorted(pair)) for pair in zip(ring[:len(ring) // 2], ring[::-1]) if None not in pair]
        ring.insert(1, ring.pop())


def bus_bandwidth(ranks: int, device, group=None) -> float:
    """Bytes/s of all-reduce, times 2 (n - 1) / n: what each rank sends, as nccl-tests count. Raises RuntimeError.

    The size is what takes about a fifth of a second, from 256 KiB to 64 MiB on a CPU, 1 GiB on GPUs.
    """
    import torch
    import torch.distributed as dist

    def seconds(size: int) -> float:
        x = torch.ones(size // 4, device=device)
        began = time.monotonic()
        dist.all_reduce(x, group=group)
        first, last = x[0].item(), x[-1].item()  # waits for the device
        took = torch.tensor(time.monotonic() - began, device=device)
        if (first, last) != (ranks, ranks):
            raise RuntimeError(f"a wrong sum: {first:g}, {last:g} in the place of {ranks}")
        dist.all_reduce(took, dist.ReduceOp.MAX, group=group)
        return took.item()

    seconds(MiB // 4)  # connections
    size = MiB // 4
    while (took := seconds(size)) < 0.1 and size < (GiB if device.type == "cuda" else 64 * MiB):
        size *= 4
    best = min(took, seconds(size)) if took < 1 else took
    return size / best * 2 * (ranks - 1) / ranks


def differences(everyone: list[dict]) -> list[str]:
    """Problems: what is not the same on all nodes."""
    problems = []
    for what, remedy in (("versions", "install the same on all, or share one environment"),
                         ("settings", "set it the same on all: in the batch script, or in /etc/nccl.conf")):
        for key in sorted({key for one in everyone for key in one[what]}):
            if "IFNAME" in key:  # interfaces may well have other names
                continue
            problems += unequal(key, [one[what].get(key, "not set") for one in everyone], everyone, remedy)
    problems += unequal("GPUs", [f"{len(one['gpus'])} x {one['gpus'][0]}" if one["gpus"] else "none" for one in everyone],
                        everyone, "take nodes of one kind, or mend the one with fewer")
    problems += unequal("ranks", [str(one["ranks"]) for one in everyone], everyone, "give all the same --ranks")
    return problems


def unequal(what: str, values: list[str], everyone: list[dict], remedy: str) -> list[str]:
    """[] or one line that says who has what: first what most have."""
    by_value = defaultdict(list)
    for value, one in zip(values, everyone):
        by_value[value].append(one["name"])
    if len(by_value) < 2:
        return []
    groups = sorted(by_value.items(), key=lambda item: -len(item[1]))
    said_of = [f"{value} on {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
               for value, names in groups]
    return [f"{what}: {', '.join(said_of)}: {remedy}"]


def table(everyone: list[dict], told: list[dict], results: dict, ranks: int):
    """Lines for node 0 to print."""
    first, answers = everyone[0], [values for one in told for values in one["reached"].values()]
    names = ", ".join(one["name"] for one in everyone[:4]) + (", …" if len(everyone) > 4 else "")
    yield f"nodes        {len(everyone)} x {ranks} rank{'s' * (ranks > 1)}: {names}"
    apart = max(one["apart"] for one in everyone)
    yield f"GPUs         {', '.join(first['gpus']) or 'none: CPU, gloo'}" + (
        f"; {apart} pairs without peer access" if apart else "")
    yield "versions     " + ", ".join(f"{key} {value}" for key, value in first["versions"].items())
    for name, value in first["settings"].items():
        yield f"setting      {name}={value}: {SETTINGS[name]}"
    least = min(everyone, key=lambda one: one["shm"])
    yield f"/dev/shm     {least['shm'] / GiB:.1f} GiB free at the least, on {least['name']}"
    limits = zip(("nofile", "memlock"), first["limits"])
    yield "ulimits      " + ", ".join(f"{name} {'unlimited' if value == -1 else value}" for name, value in limits)
    for number, disk in enumerate(first["disk"]):
        if known := [one["disk"][number] for one in everyone if one["disk"][number]["write"]]:
            write, read = (min(one[way] for one in known) / 1e6 for way in ("write", "read"))
            yield f"disk         {disk['folder']}: writes {write:,.0f}, reads {read:,.0f} MB/s at the least, all at once"
    if answers:
        way = ", ".join(f"{kind} {address}" for kind, address in first["addresses"].items())
        there_and_back, skew = (max(abs(answer[i]) for answer in answers) * 1e3 for i in range(2))
        yield (f"network      {way} on the first node; there and back in {there_and_back:.2f} ms at the most, clocks within "
               f"{skew:.1f} ms")
    speeds = {key: value for key, value in results.items() if not isinstance(value, str)}
    if "all" in speeds:
        slowest = min((value for key, value in speeds.items() if key != "all"), default=None)
        yield f"all-reduce   {speeds['all'] / 1e9:.3g} GB/s over all ranks" + (
            f", {slowest / 1e9:.3g} GB/s between the slowest two nodes" if slowest else "")

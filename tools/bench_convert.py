"""How much of the tokenizer's own speed a conversion keeps, and how much memory it takes: measured side by side.

    python tools/bench_convert.py --input big.txt --tokenizer gpt2 --workers 2

Bare: so many processes call tiktoken's encode_ordinary (for byte and char: this project's encode) on the text's documents
and do nothing else. Then the converter, as a command, on a text file of documents with a separator. They take turns.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run

SEPARATOR = "\n<|document|>\n"
DOCUMENT = 5000  # characters: the mean of OpenWebText


def bare(path: Path, name: str, workers: int) -> float:
    """Tokens a second of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_bare, args=(path, name, i, workers, ready, results)) for i in range(workers)]
    for process in processes:
        process.start()
    return sum(results.get() for _ in processes)


def _bare(path, name, i, workers, ready, results):
    import tiktoken

    from nanogpt.tokenizer import from_name
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size * i // workers)
        documents = file.read(size // workers).decode(errors="replace").split(SEPARATOR)
    tokenizer = from_name(name, documents)
    encode = tiktoken.get_encoding(name).encode_ordinary if name in tiktoken.list_encoding_names() else tokenizer.encode
    encode(documents[0])
    ready.wait()
    began, tokens = time.perf_counter(), 0
    for document in documents:
        tokens += len(encode(document))
    results.put(tokens / (time.perf_counter() - began))


def converted(path: Path, name: str, workers: int, out: Path, every_s: float = 0.05) -> tuple[float, float]:
    """(tokens a second of the whole command, its largest memory in MiB, all processes together, looked at every_s)."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what was written before is not this command's to wait for
    command = [sys.executable, str(Path(__file__).with_name("convert_text_to_mds.py")), "--input", str(path), "--out", str(out),
               "--tokenizer", name, "--workers", str(workers), "--document-separator", SEPARATOR.replace("\n", "\\n")]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak, every_s), daemon=True)
    watch.start()
    if process.wait():
        raise UserError("the converter failed; see above")
    seconds = time.perf_counter() - began
    watch.join()
    card = json.loads((out / "dataset.json").read_text())
    return sum(split["tokens"] for split in card["splits"].values()) / seconds, peak[0] / 2**20


def _watch(process, peak, every_s):
    """The resident memory of a process and its children."""
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        total = 0
        for pid in [process.pid, *_children(process.pid)]:
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            except (OSError, IndexError):
                pass
        peak[0] = max(peak[0], total)
        time.sleep(every_s)


def _children(pid: int) -> list[int]:
    try:
        direct = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return direct + [below for child in direct for below in _children(child)]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="a text; it is repeated, and cut into documents")
    parser.add_argument("--tokenizer", default="gpt2", help="as in convert_text_to_mds.py")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of both")
    parser.add_argument("--megabytes", type=int, default=1000, help="of text for the speed")
    parser.add_argument("--rounds", type=int, default=3, help="turns")
    parser.add_argument("--memory", type=int, nargs=2, metavar="MB", default=[10, 1000], help="sizes at which memory is compared")
    args = parser.parse_args()

    def write(path: Path, megabytes: int) -> Path:
        text, written, at = args.input.read_text(errors="replace"), 0, 0
        with open(path, "w") as file:
            while written < megabytes * 1_000_000:
                piece = text[at:at + DOCUMENT]
                written += file.write(f"{written:x} {piece}{SEPARATOR}")  # no two documents are the same
                at = (at + DOCUMENT) % max(1, len(text) - DOCUMENT)
        return path

    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        folder = Path(folder)
        text = write(folder / "text.txt", args.megabytes)
        ratios = []
        for i in range(args.rounds):
            alone = bare(text, args.tokenizer, args.workers)
            speed, _ = converted(text, args.tokenizer, args.workers, folder / "out", every_s=1)
            ratios.append(speed / alone)
            print(f"round {i + 1}: bare {alone:,.0f} tokens/s, converted {speed:,.0f} tokens/s, ratio {ratios[-1]:.3f}", flush=True)
        print(f"{args.tokenizer}, {args.workers} workers, {args.megabytes} MB: the conversion keeps "
              f"{statistics.median(ratios):.1%} of the bare tokenizer's speed, startup included")
        text.unlink()
        peaks = []
        for megabytes in args.memory:
            peaks.append(converted(write(folder / "text.txt", megabytes), args.tokenizer, args.workers, folder / "out")[1])
            print(f"memory at {megabytes} MB: {peaks[-1]:,.0f} MiB", flush=True)
        print(f"ratio {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    run(main)

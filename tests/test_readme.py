"""The README's commands, typed as they stand; those that need GPUs are checked as far as they go without."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanogpt.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return [text for word, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if word == kind]


def test_commands(tmp_path, transformers, monkeypatch, capsys):
    """In a folder of its own, with the environment that runs the tests in the place of .venv, and a smaller model."""
    for name in ("nanogpt", "tools", "launch", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "shakespeare_char_cpu.yaml"
    for was, now in (("n_layer: 4", "n_layer: 2"), ("n_embd: 128", "n_embd: 64"), ("sequences: 2000", "sequences: 90")):
        assert was in config.read_text()
        config.write_text(config.read_text().replace(was, now))
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "the tests' own"}
    commands = [line for block in blocks("bash") for line in block.splitlines() if line != ". .venv/bin/activate"]
    assert len(commands) >= 7
    for line in commands:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    run = tmp_path / "runs" / "readme"
    assert {p.name for p in run.iterdir()} == {".lock", ".started", "checkpoints", "config.yaml", "log.txt", "loss.png", "metrics.jsonl",
                                               "report.html", "samples.jsonl"}
    assert '"step": 200' in (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert (tmp_path / "runs" / "tuned" / "checkpoints" / "step-00000020" / "manifest.json").exists()
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):  # ours, loaded by transformers
        exec(block, {})
    assert capsys.readouterr().out.startswith("The ")


def test_commands_that_need_gpus():
    lines = [line for block in blocks("") for line in block.splitlines() if "launch/train.sh configs/" in line]
    assert lines
    for line in lines:
        words = shlex.split(line)
        options = words[words.index("launch/train.sh") + 1:]
        nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        load_config([str(ROOT / options[0]), *options[1:]], 8 * nodes, 8)


def test_every_file_of_the_tree_is_there_and_named():
    named = set(re.findall(r"\b(\w+\.(?:py|sh))\b", blocks("")[-1]))
    there = {p.name for folder in ("nanogpt", "tools", "launch") for p in (ROOT / folder).iterdir()
             if p.suffix in (".py", ".sh") and p.name != "__init__.py"}
    assert named == there


def test_each_fault_is_made_by_a_test_that_is_there():
    table = README[README.index("| fault | outcome | made by |"):].split("\n\n")[0].splitlines()[2:]
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(table) >= 20
    for row in table:
        made_by = re.findall(r"`([^`]+)`", row.rstrip("|").rsplit("|", 1)[1])
        assert made_by, row
        for name in made_by:
            assert name.startswith("FUZZ_") or name.startswith("tests/") or name == "prove_resume.py" or f"def {name}(" in code, name


def templates(expression) -> list[str]:
    """A string expression as a pattern: what is literal, as it is; what is computed, anything."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return [re.escape(expression.value)]
    if isinstance(expression, ast.JoinedStr):
        return ["".join(part for value in expression.values for part in templates(value))]
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        return [a + b for a in templates(expression.left) for b in templates(expression.right)]
    return [".*"]


def messages() -> list[re.Pattern]:
    """What the code can say, with 20 literal characters or more; and transformers, of what it cannot import."""
    theirs = Path(find_spec("transformers").submodule_search_locations[0]) / "utils" / "import_utils.py"
    found = []
    for path in [*(ROOT / "nanogpt").glob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "launch" / "train.sh", theirs]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                found += [t for t in templates(node) if len(re.sub(r"\.\*|\\", "", t)) >= 20]
    return [re.compile(r"(.*: )?" + t, re.S) for t in found]


def test_each_error_of_troubleshooting_is_one_that_the_code_tells():
    table = README[README.index("| what it says | what to do |"):].split("\n\n")[0].splitlines()[2:]
    known = messages()

    def told(text: str) -> bool:
        return any(pattern.fullmatch(text) for pattern in known)

    assert len(table) >= 12
    for row in table:
        text = re.match(r"\| `(?:error: )?(.+?)` \| .+ \|$", row)[1]
        assert told(text), text
        words = text.split()
        assert not told(" ".join(sorted(words))), text  # the test can fail: these words in another order are nobody's


def test_links_to_files_are_good():
    for path in re.findall(r"`((?:configs|tools|tests|launch|nanogpt)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("word", ["TODO", "_TABLE"])
def test_nothing_is_left_open(word):
    assert word not in README

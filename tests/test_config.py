"""Settings: defaults, inheritance, overrides, and every problem told at once, by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt.config import Config, check_shape, help_text, load_config
from nanogpt.errors import UserError

ROOT = Path(__file__).parents[1]
GOOD = "data: {path: d}\ntrain: {max_steps: 100}\n"


def problems(tmp_path, text, *options, ranks=1, local_ranks=None) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    try:
        load_config([str(file), *options], ranks, local_ranks or ranks)
    except UserError as error:
        return str(error).replace(f"{tmp_path}/", "").splitlines()
    return []


def test_a_file_its_base_and_options_in_this_order(tmp_path):
    (tmp_path / "top.yaml").write_text("base: middle.yaml\noptim: {learning_rate: 3e-4, beta2: 0.9}")
    (tmp_path / "middle.yaml").write_text("base: bottom.yaml\noptim: {beta1: 0.8, beta2: 0.8}\nrun: {seed: 5}")
    (tmp_path / "bottom.yaml").write_text(GOOD + "optim: {beta1: 0.7, weight_decay: 0.2}\nmodel: {bias: false}")
    c = load_config([str(tmp_path / "top.yaml"), "--optim.beta2", "0.7", "--train.compile=False", "--train.max_tokens", "null"])
    assert (c.optim.learning_rate, c.optim.beta1, c.optim.beta2, c.optim.weight_decay) == (3e-4, 0.8, 0.7, 0.2)
    assert (c.run.seed, c.run.name, c.model.bias, c.train.compile, c.train.max_tokens) == (5, "top", False, False, None)
    assert c.model == Config().model.model_copy(update=dict(bias=False))


def test_options_may_come_before_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(GOOD)
    assert load_config(["--run.seed", "3", "--run.name=x", str(tmp_path / "c.yaml")]).run.seed == 3


def test_all_problems_at_once_one_line_each(tmp_path):
    said = problems(tmp_path, "optim: {learning_rate: -1, warmup: 3}\nmodel: {n_embd: 100, n_head: 3}\n"
                    "train: {max_steps: ten, global_batch_size: 10, micro_batch_size: 4}\nevaluation: {interval: 3}",
                    "--model.dropout", "1", "--learning_rate=3", "--optim.beta1", ranks=2)
    assert len(said) == 10
    for expected in ("--optim.beta1: a value is needed", "--model.dropout: input should be less than 1 (found '1')",
                     "c.yaml: optim.learning_rate: input should be greater than 0 (found -1)",
                     "c.yaml: optim.warmup: no such setting; did you mean optim.warmup_steps?",
                     "--learning_rate: no such setting; did you mean optim.learning_rate?",
                     "c.yaml: train.max_steps: input should be a valid integer",
                     "c.yaml: evaluation: no such setting", "data.path: a dataset folder is needed",
                     "c.yaml: model.n_embd: 100 is not a multiple of n_head 3",
                     "c.yaml: train.global_batch_size: 10 is not a multiple of 2 ranks"):
        assert sum(line.startswith(expected) for line in said) == 1, (expected, said)


@pytest.mark.parametrize("text, options, ranks, expected", [
    (GOOD, ["--train.global_batch_size=10", "--train.micro_batch_size=4"], 2,
     "--train.global_batch_size: 10 is not a multiple of 2 ranks x micro_batch_size 4 = 8; take 8 or 16"),
    (GOOD, ["--train.global_batch_size=10"], 1, "--train.global_batch_size: 10 is not a multiple of 1 rank x micro_batch_size 12 = 12; take 12"),
    (GOOD, ["--optim.warmup_steps=100"], 1, "--optim.warmup_steps: 100 is not below the 100 steps of the run"),
    (GOOD, ["--train.max_tokens=1", "--optim.warmup_steps=1"], 1, "--optim.warmup_steps: 1 is not below the 1 steps of the run"),
    (GOOD, ["--train.max_steps=none"], 1, "--train.max_steps: max_steps or max_tokens is needed, so that the run has an end"),
    (GOOD, ["--sharding.strategy=hybrid", "--train.micro_batch_size=1", "--sharding.shard_size=3"], 4,
     "--sharding.shard_size: 3 does not divide 4 ranks"),
    (GOOD, ["--sharding.shard_size=2", "--train.micro_batch_size=1"], 4, "--sharding.shard_size: only strategy hybrid has it"),
    (GOOD, ["--optim.min_learning_rate=1"], 1, "--optim.min_learning_rate: is above learning_rate 0.0006"),
    (GOOD, ["--optim.learning_rate=nan"], 1, "--optim.learning_rate: input should be a finite number (found 'nan')"),
    (GOOD, ["--optim.learning_rate=inf"], 1, "--optim.learning_rate: input should be a finite number (found 'inf')"),
    (GOOD, ["--sharding.strategy=fsdp"], 1, "--sharding.strategy: input should be 'full', 'grad', 'hybrid' or 'replicate' (found 'fsdp')"),
    (GOOD, ["--run.name=../x"], 1, "--run.name: string should match pattern '^[\\w.-]*\\w[\\w.-]*$' (found '../x')"),
    ("data: {train: [{path: a, repeat: 2}, b]}\ntrain: {max_steps: 9}", [], 1,
     "c.yaml: data.train: its datasets have proportion and repeat; give all of them the same one (default: proportion 1)"),
    (GOOD, ["--data.path=null", "--data.train=[{path: a, repeat: 2, samples: 9}]"], 1,
     "--data.train: its datasets have repeat and samples; give all of them the same one"),
    (GOOD, ["--data.train={path: a, split: ../val}"], 1, "--data.train.0.split: string should match pattern"),
    (GOOD, ["--data.train=[a, {path: b, repeats: 2}]"], 1, "--data.train.1.repeats: no such setting; take path, proportion, "
     "repeat, samples, split, val_split"),
    (GOOD, ["--train.batch_schedule={kind: linear}"], 1, "--train.batch_schedule.points: field required"),
    (GOOD + "model: {rope_scaling: {kind: linear, faktor: 2}}", [], 1,
     "c.yaml: model.rope_scaling.faktor: no such setting; take kind, factor, "),
    (GOOD, ["--data.tokenizer="], 1, "--data.tokenizer: string should have at least 1 character"),
    (GOOD, ["--data.train=[{path: a"], 1, "--data.train: not valid YAML: while parsing a flow"),
    ("data: {path: d, path: e}", [], 1, "c.yaml: not valid YAML: 'path' stands twice, the second time on line 1 or below"),
    ("data: [", [], 1, "c.yaml: not valid YAML: while parsing"),
    ("- a", [], 1, "c.yaml: expected sections like `train:`, found list"),
    ("data: 3", [], 1, "c.yaml: data: input should be a valid dictionary or instance of Data (found 3)"),
    ("base: c.yaml", [], 1, "c.yaml: its base leads back to itself"),
    ("base: absent.yaml", [], 1, "absent.yaml: no such file or directory"),
    ("base: [1]", [], 1, "c.yaml: base must be the name of a file beside it, found [1]"),
    (GOOD + "x: !!python/object/apply:os.mkdir [/tmp/nanogpt-config-ran]", [], 1,
     "c.yaml: not valid YAML: could not determine a constructor for the tag"),
], ids=str)
def test_what_is_refused(tmp_path, text, options, ranks, expected):
    said = problems(tmp_path, text, *options, ranks=ranks)
    assert any(line.startswith(expected) for line in said), said
    assert not Path("/tmp/nanogpt-config-ran").exists()


def test_files(tmp_path):
    (tmp_path / "gpt.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"did you mean .*gpt.yaml\?"):
        load_config([str(tmp_path / "gtp.yaml")])
    for argv in ([], ["a.yaml", "b.yaml"]):
        with pytest.raises(UserError, match="one config file is needed"):
            load_config(argv)


def test_steps_and_accumulation(tmp_path):
    (tmp_path / "c.yaml").write_text(GOOD)
    c = load_config([str(tmp_path / "c.yaml"), "--train.max_tokens=1000000", "--train.global_batch_size=48",
                     "--train.micro_batch_size=3"], 4)
    assert c.tokens_per_step == 48 * 1024 and c.max_steps == 21 and c.accumulation(4) == 4  # 20.3 steps, rounded up


def test_one_dataset_or_a_list(tmp_path):
    """Checkpoints hold of a dataset what was given, and no more."""
    (tmp_path / "c.yaml").write_text("train: {max_steps: 9}")
    for given, held in (("a/b", [dict(path="a/b")]), ("[{path: a, proportion: 1}]", [dict(path="a", proportion=1)]),
                        ("{path: a, split: train_small}", [dict(path="a", split="train_small")]),
                        ("[{path: a, repeat: 2}, {path: b, repeat: 1}]",
                         [dict(path="a", repeat=2), dict(path="b", repeat=1)])):
        data = load_config([str(tmp_path / "c.yaml"), f"--data.train={given}"]).data
        assert data.model_dump()["train"] == held and type(data).model_validate(data.model_dump()) == data


def test_help_names_every_setting_and_imports_nothing_heavy():
    code = ("import sys; sys.argv = ['train.sh', '--help']; import runpy\n"
            "runpy.run_path('launch/train.sh', run_name='__main__')\n"
            "assert not {'torch', 'numpy', 'streaming'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip() == help_text().rstrip()
    for section, field in Config.model_fields.items():
        for name in field.annotation.model_fields:
            assert f"--{section}.{name} " in done.stdout


def test_what_comes_with_weights_is_not_checked_against_defaults(tmp_path):
    """run.init_from: the shape of the model is known later."""
    (tmp_path / "a.yaml").write_text("{data: {path: d}, model: {rope_scaling: {kind: linear, factor: 4}, n_head: 25}, "
                                     "train: {max_tokens: 3000000, global_batch_size: 12}, optim: {warmup_steps: 300}}")
    with pytest.raises(UserError) as error:
        load_config([str(tmp_path / "a.yaml")])
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(f"{key}: " in line for key, line in zip(
        ("model.n_embd", "model.rope_scaling", "optim.warmup_steps"), lines))
    config = load_config([str(tmp_path / "a.yaml"), "--run.init_from", "hf:x"])
    config.model = config.model.model_copy(update=dict(position="rope", n_embd=1600, block_size=64))
    check_shape(config)  # 3906 steps of 12 x 64
    config.model.n_head = 24
    with pytest.raises(UserError, match="1600 is not a multiple of n_head 24"):
        check_shape(config)


def test_what_the_command_line_has_changed(tmp_path):
    (tmp_path / "c.yaml").write_text(GOOD + "optim: {learning_rate: 3e-4, beta2: 0.9}\nmodel: {bias: false}")
    load = lambda *options: load_config([str(tmp_path / "c.yaml"), *options]).overridden  # noqa: E731
    assert load() == {} and load("--run.name=x", "--run.dir=y") == {}
    assert load("--optim.learning_rate", "0.0003", "--model.bias=false") == {}  # said again
    assert load("--optim.beta2=0.95", "--train.max_steps", "7", "--optim.beta1=0.8", "--train.max_tokens=9", "--data.shuffle=off") == {
        "optim.beta2": (0.9, 0.95), "train.max_steps": (100, 7), "optim.beta1": (0.9, 0.8), "train.max_tokens": (None, 9),
        "data.shuffle": (True, False)}
    (tmp_path / "c.yaml").write_text(GOOD + "optim: {beta2: 9}")  # an option mends it
    assert load("--optim.beta2=0.95", "--run.seed=3") == {"optim.beta2": (9, 0.95), "run.seed": (None, 3)}

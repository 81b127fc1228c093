"""Every setting: its type, its bounds, its default and its meaning. A config is data and is never executed.

    bash launch/train.sh configs/gpt2_124m.yaml --optim.learning_rate 3e-4 --train.micro_batch_size 16

A YAML file states what differs from the defaults below, or from the file that its `base:` names. Options of the
command line come last. All problems are found together, before a process group, a dataset or a model exists.
"""

import collections
import copy
import difflib
import os
import re
from bisect import bisect_left
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError,
                      model_serializer, model_validator)
from pydantic_core import ErrorDetails

from nanogpt.errors import UserError

NoSwitch = BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)  # YAML's `yes` is no 1
Positive = Annotated[int, Field(gt=0, lt=1 << 63), NoSwitch]
Count = Annotated[int, Field(ge=0, lt=1 << 63), NoSwitch]
Size = Annotated[int, Field(gt=0, le=1 << 20), NoSwitch]  # of what is made: beyond, a slip of the pen fills the memory
Few = Annotated[int, Field(ge=0, le=1 << 20), NoSwitch]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), NoSwitch]
Fraction = Annotated[float, Field(ge=0, lt=1), NoSwitch]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), NoSwitch]
Seconds = Annotated[float, Field(gt=0, le=1e9), NoSwitch]
Weight = Annotated[float, Field(gt=0, le=1e18), NoSwitch]
Folder = Annotated[str, Field(pattern=r"^[\w.-]*\w[\w.-]*$")]  # a name, not a path
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what no name or path of a run should hold


def _rising(points: list[list[int]]) -> list[list[int]]:
    steps, sizes = zip(*points)
    if steps[0] or any(a >= b for a, b in pairwise(steps)):
        raise ValueError("its points are [step, size], and their steps must begin with 0 and rise")
    if not sizes[0] or any(a > b for a, b in pairwise(sizes)):
        raise ValueError("its points are [step, size], and their sizes must be above 0 and not fall")
    return points


def _dividing(points: list[list[int]]) -> list[list[int]]:
    for (_, a), (_, b) in pairwise(points):
        if b % a:
            raise ValueError(f"each of its blocks must divide the next, and {a} does not divide {b}")
    return points


def _span(steps: list[int]) -> list[int]:
    if steps[0] > steps[1]:
        raise ValueError("its first step comes after its last")
    return steps


Point = Annotated[list[Few], Field(min_length=2, max_length=2)]
Points = Annotated[list[Point], Field(min_length=1, max_length=50), AfterValidator(_rising)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Run(Section):
    """Who this run is, and where it starts from."""
    name: Folder = Field("gpt", description="name of the run (default: that of its config file)")
    dir: str | None = Field(None, description="run folder (default: runs/NAME)")
    seed: Seed = Field(1337, description="seed of the initial weights and of dropout")
    resume: str = Field("auto", description="auto: go on from the newest complete checkpoint, if there is one; "
                        "never: start anew, in an empty folder; PATH: go on from this checkpoint")
    init_from: str | None = Field(None, description="take the weights alone, and the model's shape, for finetuning: from a "
                                  "run or one of its checkpoints, a folder of Hugging Face, or hf:NAME[@REVISION] of its hub")
    allow_data_change: bool = Field(False, description="resume although the data or its order has changed: the new data "
                                    "is read from its beginning")
    grace_s: Amount = Field(30, description="seconds between SIGTERM or SIGUSR1 and SIGKILL: torchrun's 30, or those of "
                            "your cluster; a save that would not fit is told beforehand")
    timeout_s: Seconds = Field(
        120, description="seconds without progress after which a run is ended: a rank hangs, or a link is cut")
    first_timeout_s: Seconds = Field(
        1800, description="the same until the end of the first step, which compiles, and while a checkpoint is saved")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one, else the CPU")


class Source(Section):
    """One dataset of a mixture. All of a mixture have the same one of proportion, repeat and samples."""
    path: str = Field(description="dataset folder or URL")
    proportion: Weight | None = Field(None, description="its share of the samples (default: 1)")
    repeat: Weight | None = Field(None, description="how often it is gone through while another, of repeat 1, is once")
    samples: Weight | None = Field(None, description="how many of its samples come in a round of all datasets")
    split: Folder = Field("train", description="its folder that is trained on, by whatever name in MDS from elsewhere")
    val_split: Folder = Field("val", description="its folder for validation")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value):
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_given(self, dump):  # what checkpoints hold of a mixture stays as it was before there was more to give
        return {key: value for key, value in dump(self).items() if value != Source.model_fields[key].default}


class Data(Section):
    """What is read, and in which order. Nothing here may change when a run is resumed, but the cache."""
    path: str | None = Field(None, description="dataset folder, or its URL (s3://…, gs://…), as the converters write it")
    train: Annotated[list[Source], BeforeValidator(lambda x: [x] if isinstance(x, (str, dict)) else x)] | None = Field(
        None, min_length=1, description="in place of path: one dataset, or several, mixed, as [{path: data/owt, proportion: "
        "0.7}, {path: data/code, proportion: 0.3}]; in place of proportion, all may have repeat, how often each is gone "
        "through, or samples, how many of each come in a round")
    tokenizer: str | None = Field(None, min_length=1, description="of MDS without a dataset.json, as llm-foundry writes it: "
                                  "gpt2, a ranks file or a tokenizer.json")
    mixture: Literal["random", "stratified"] = Field("random", description="random: each sample's dataset is drawn; "
                                                     "stratified: every step holds them in proportion")
    cache_dir: str | None = Field(None, description="where shards of a URL are kept (default: RUN_DIR/cache)")
    cache_limit: str | None = Field(None, description="room for the cached shards of a split, as 200gb (default: no limit)")
    num_canonical_nodes: Size = Field(8, description="parts of the order, dealt to nodes: keep it ≥ nodes")
    shuffle: bool = Field(True, description="a new order each epoch; off: the order of the dataset")
    shuffle_algo: Literal["py1e", "py1br", "py1b", "py1s", "py2s", "naive"] = Field("py1e", description="as in streaming")
    shuffle_seed: Seed = Field(9176, description="seed of the order")
    shuffle_block_size: Positive = Field(1 << 18, description="samples among which the order is random")

    @property
    def sources(self) -> list[Source]:
        """The datasets, one or several."""
        return self.train or [Source(path=path) for path in (self.path,) if path is not None]


class RopeScaling(Section):
    """Rotary frequencies for a context longer than the first one (Chen et al., 2023; Llama 3.1)."""
    kind: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1, le=1e6), NoSwitch] = Field(description="how much longer")
    low_freq_factor: Annotated[float, Field(gt=0, le=1e6), NoSwitch] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0, le=1e6), NoSwitch] = 4.0
    original_block_size: Size = 8192


class Model(Section):
    """The GPT. The defaults are those of GPT-2 124M; with run.init_from, what is not stated comes with the weights.

    A Llama is position rope, norm rmsnorm, mlp swiglu, bias false, tied false; a Qwen3 is that and qk_norm.
    """
    n_layer: Size = Field(12, description="blocks")
    n_head: Size = Field(12, description="attention heads")
    n_kv_head: Size | None = Field(None, description="heads of keys and values, each shared by n_head / n_kv_head of "
                                   "queries (default: n_head)")
    head_dim: Size | None = Field(None, description="width of a head (default: n_embd / n_head)")
    n_embd: Size = Field(768, description="width; a multiple of n_head unless head_dim is given")
    block_size: Size = Field(1024, description="context in tokens; that of the dataset, or a divisor of it")
    vocab_size: Positive | None = Field(None, description="ids (default: from the dataset's tokenizer)")
    dropout: Fraction = Field(0.0, description="on embeddings, attention and residual branches")
    mask_documents: bool = Field(False, description="in training, no token sees another document of its sample, and "
                                 "positions begin anew with each")
    bias: bool = Field(True, description="biases in Linear and LayerNorm, as in GPT-2; off is a little better and faster")
    attention_bias: bool | None = Field(None, description="biases in the Linears of attention (default: as bias)")
    position: Literal["learned", "rope"] = Field("learned", description="a learned vector for each position, or rotary")
    rope_base: Annotated[float, Field(gt=1, allow_inf_nan=False), NoSwitch] = Field(
        10000.0, description="rotary base (theta); a larger one for a longer context")
    rope_scaling: RopeScaling | None = Field(None, description="rotary frequencies of a stretched context, as in Llama 3.1: "
                                             "{kind: linear, factor: 8}, or {kind: llama3, …}")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="before attention, MLP and head")
    norm_eps: Annotated[float, Field(gt=0, le=1), NoSwitch] = Field(1e-5, description="what keeps the norms from dividing by 0")
    qk_norm: bool = Field(False, description="rmsnorm on the queries and keys of each head: calmer at high learning rates")
    mlp: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = Field(
        "gelu", description="gelu_tanh: OpenAI's approximation; swiglu: with a gate; relu2: square of ReLU, cheaper, not "
        "to be exported")
    mlp_dim: Size | None = Field(None, description="its inner width (default: 4 n_embd; swiglu: 8/3 n_embd, rounded up to 64)")
    tied: bool = Field(True, description="one matrix for the token embedding and the head")
    zero_init: bool = Field(False, description="what writes into the residual stream, and a head of its own, begin at zero")
    logit_softcap: Amount = Field(0.0, description="c: logits become c tanh(logits / c), which keeps them from drifting; 0: "
                                  "off; not to be exported")

    @property
    def heads(self) -> tuple[int, int, int]:
        """(heads of queries, heads of keys and values, width of a head)"""
        return self.n_head, self.n_kv_head or self.n_head, self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        return self.mlp_dim or (-(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.n_embd)

    def filled(self) -> dict:
        """All settings, defaults that depend on others filled in."""
        H, K, D = self.heads
        bias = self.bias if self.attention_bias is None else self.attention_bias
        return self.model_dump() | dict(n_kv_head=K, head_dim=D, mlp_dim=self.mlp_width, attention_bias=bias)

    def contradictions(self):
        """Yields ([keys], message) for settings that make no model together."""
        H, K, D = self.heads
        if self.n_embd % H and not self.head_dim:
            yield ["model.n_embd", "model.n_head"], f"{self.n_embd} is not a multiple of n_head {H}"
        if H % K:
            yield ["model.n_kv_head", "model.n_head"], f"{K} does not divide n_head {H}"
        if self.position == "rope" and D % 2:
            yield ["model.head_dim", "model.n_embd", "model.n_head"], f"heads of width {D} cannot be rotated; take an even one"
        for key in {"rope_scaling", "rope_base"} & self.model_fields_set:
            if self.position != "rope" and getattr(self, key) != Model.model_fields[key].default:
                yield [f"model.{key}", "model.position"], "only position rope has it"
        if self.rope_scaling and self.rope_scaling.low_freq_factor >= self.rope_scaling.high_freq_factor:
            yield ["model.rope_scaling"], "low_freq_factor is not below high_freq_factor"


class Optim(Section):
    """AdamW or Muon, clipping, and the learning rate as a function of the step."""
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: for the matrices of the blocks, and AdamW for the rest")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False), NoSwitch] = Field(6e-4, description="its peak")
    adamw_learning_rate: Weight | None = Field(None, description="with muon: the peak for what AdamW trains, embeddings, head "
                                               "and vectors (default: learning_rate)")
    min_learning_rate: Amount | None = Field(None, description="its end (default: a tenth of the peak; wsd: 0)")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warmup: cosine decay; constant then a linear decay over decay_steps; constant")
    warmup_steps: Count = Field(0, description="steps of linear increase; the first step is not zero")
    decay_steps: Positive | None = Field(
        None, description="cosine: the step at which the end is reached (default: the last); "
        "wsd: length of the final decay (default: a fifth of the run)")
    weight_decay: Amount = Field(0.1, description="on matrices and embeddings; never on vectors")
    beta1: Fraction = Field(0.9, description="of AdamW")
    beta2: Fraction = Field(0.95, description="of AdamW")
    grad_clip: Amount = Field(1.0, description="largest norm of the whole gradient; 0: no clipping")


class BatchSchedule(Section):
    """A global batch that grows: [step, size] points, the last of train.global_batch_size."""
    kind: Literal["linear", "stepped"]  # linear: between its points, rounded down to multiples of the first size
    points: Points

    @model_validator(mode="after")
    def _whole(self):
        if wrong := [size for _, size in self.points if self.kind == "linear" and size % self.points[0][1]]:
            raise ValueError(f"size {wrong[0]} of its points is not a multiple of the first, {self.points[0][1]}")
        return self

    @cached_property
    def sums(self) -> list[int]:
        """Sequences in the first 0, 1, … steps, up to the step of the last point."""
        unit, sizes = self.points[0][1], []
        for (step, size), (end, last) in pairwise(self.points):
            n, more = end - step, (last - size) * (self.kind == "linear")
            sizes += [(size * n + more * i) // n // unit * unit for i in range(n)] if more else [size] * n
        return list(accumulate(sizes, initial=0))

    def __str__(self):
        return f"{self.kind} {self.points}"


class Train(Section):
    """How much, in which pieces, in which precision."""
    max_steps: Positive | None = Field(None, description="optimizer steps of the whole run")
    max_tokens: Positive | None = Field(None, description="tokens of the whole run, rounded up to whole steps; "
                                        "with max_steps: whichever comes first")
    global_batch_size: Positive = Field(480, description="sequences an optimizer step, over all ranks")
    batch_schedule: BatchSchedule | None = Field(
        None, description="a global batch that grows with the step until it is global_batch_size, as {kind: linear, points: "
        "[[0, 96], [2000, 480]]}, or of kind stepped")
    block_schedule: Annotated[Points, AfterValidator(_dividing)] | None = Field(
        None, description="the same samples in shorter blocks at first, as [[0, 64], [1000, 1024]]: 64 until step 1000")
    micro_batch_size: Positive = Field(12, description="sequences a rank puts through the model at once")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="of parameters and activations in the model; weights, reductions and AdamW are float32. auto: "
        "bfloat16 on a GPU that has it; on a CPU the one whose matmuls are quicker, as measured at the start")
    compile: bool | None = Field(None, description="torch.compile, block by block (default: on a GPU; on a CPU it gains "
                                 "nothing)")
    freeze_blocks: Few = Field(0, description="the first n blocks and the embeddings (with them a tied head) keep their "
                               "weights: finetuning")
    max_skipped_steps: Few = Field(0, description="steps of the whole run that may be left out because their loss or "
                                   "gradient is not finite; one more stops it")

    def compiles(self, cuda: bool) -> bool:
        return cuda if self.compile is None else self.compile

    @property
    def _ramp(self) -> list[int]:
        return self.batch_schedule.sums if self.batch_schedule else [0]

    def sequences(self, steps: int) -> int:
        """In the first `steps` steps: where in the endless order of the data the next begins."""
        ramp = self._ramp
        return ramp[min(steps, len(ramp) - 1)] + max(0, steps - len(ramp) + 1) * self.global_batch_size

    def batch(self, step: int) -> int:
        """Sequences of step `step`, from 0."""
        return self.sequences(step + 1) - self.sequences(step)

    def steps(self, sequences: int) -> int:
        """The fewest steps that take at least so many sequences."""
        return bisect_left(range(1 << 62), sequences, key=self.sequences)

    def uneven(self, unit: int) -> tuple[str, str, str] | None:
        """Of the first batch that is no multiple of unit: (its setting, its size and step, sizes near it). None: all are."""
        for step, (a, b) in enumerate(pairwise([*self._ramp, self._ramp[-1] + self.global_batch_size])):
            if (size := b - a) % unit:
                near = " or ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n)
                return ("train.batch_schedule", f"{size}, from step {step} on,", near) if self.batch_schedule else \
                    ("train.global_batch_size", f"{size}", near)
        return None


class Eval(Section):
    """Loss on the same sequences each time, of train and of val."""
    interval: Count = Field(1000, description="steps between evaluations; 0: only at the end")
    sequences: Positive = Field(1600, description="sequences of each split (fewer where the split has fewer)")
    patience: Count = Field(0, description="end the run after so many evaluations in a row without a new lowest validation "
                            "loss; 0: never")
    only: bool = Field(False, description="evaluate the weights that there are, and end")


class Sharding(Section):
    """How weights, gradients and optimizer state are laid over the ranks. Free to change when a run is resumed."""
    strategy: Literal["full", "grad", "hybrid", "replicate"] = Field(
        "full", description="full: all sharded; grad: weights kept whole between forward and backward; "
        "hybrid: full within a group of shard_size ranks, replicas across groups; replicate: everything on every rank")
    shard_size: Size | None = Field(None, description="ranks of a hybrid group (default: those of one node)")
    gradient_sync: Literal["each", "last"] | None = Field(
        None, description="when gradients of accumulated micro-batches are summed over the ranks: after each; or all after the "
        "last, with less to send, but 4 bytes a parameter on every rank until then (default: each with full and hybrid, whose "
        "replicas meet after the last in any case; last with grad and replicate)")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in backward: full: all of a block; selective: all but its matmuls")
    cpu_offload: bool = Field(False, description="keep weights and optimizer state in host memory")

    @property
    def syncs_each(self) -> bool:
        return (self.gradient_sync or ("each" if self.strategy in ("full", "hybrid") else "last")) == "each"


class Checkpoint(Section):
    """What is saved, and what is kept. The last step is always saved."""
    interval: Count = Field(1000, description="steps between checkpoints; 0: only at the end")
    keep_last: Positive = Field(2, description="how many of the newest are kept")
    keep_every: Count = Field(0, description="also keep each whose step is a multiple of this; 0: none")
    keep_best: bool = Field(False, description="also save and keep the step with the lowest validation loss, as "
                            "checkpoints/best")
    async_save: bool = Field(True, description="write in the background while training goes on")


class Log(Section):
    """What is told, and to whom. metrics.jsonl and log.txt in the run folder are always written."""
    interval: Size = Field(10, description="steps between log lines; only then does the host wait for the device")
    wandb: Literal["off", "online", "offline"] = Field("off", description="Weights & Biases; the key comes from its login")
    wandb_project: str = Field("nanogpt", description="where its runs are put")
    tensorboard: bool = Field(False, description="event files in RUN/tensorboard, for tensorboard --logdir runs")
    health: Literal["basic", "full"] = Field(
        "basic", description="basic: gradient norm, share of clipped steps, spikes of the loss; full: also, at steps that are "
        "multiples of interval, of each block: norms of weights and update, activations, largest attention logit, dead units")
    profile: Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_span)] | None = Field(
        None, description="[100, 103]: of these steps a trace, and on CUDA a memory snapshot, is written to RUN/profile")


class Config(Section):
    """One run."""
    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    sharding: Sharding = Field(default_factory=Sharding)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    log: Log = Field(default_factory=Log)
    _overridden: dict[str, tuple] = PrivateAttr({})
    _before: tuple[int, int] = PrivateAttr((0, 0))  # steps and tokens until the data last changed: train.py knows

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.run.name}")

    @property
    def overridden(self) -> dict[str, tuple]:
        """{section.key: (value of the config file or by default, value now)} of what the command line has changed."""
        return self._overridden

    @property
    def tokens_per_step(self) -> int:
        """Once the batch is train.global_batch_size."""
        return self.train.global_batch_size * self.model.block_size

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run: the smaller of max_steps, and those that max_tokens takes, rounded up."""
        steps, tokens = self._before
        by_tokens = self.train.max_tokens and self.train.steps(
            self.train.sequences(steps) - (tokens - self.train.max_tokens) // self.model.block_size)
        return min((n for n in (self.train.max_steps, by_tokens) if n is not None), default=0)  # 0: eval.only

    def accumulation(self, world_size: int, step: int | None = None) -> int:
        """Micro-batches a rank puts through the model for optimizer step `step` (None: the last)."""
        batch = self.train.global_batch_size if step is None else self.train.batch(step)
        return batch // (self.train.micro_batch_size * world_size)

    def block(self, step: int) -> int:
        """Tokens of a sequence of step `step`, from 0."""
        return max((block for first, block in self.train.block_schedule or () if first <= step),
                   default=self.model.block_size)


def load_config(argv: list[str], world_size: int = 1, local_world_size: int = 1) -> Config:
    """CONFIG.yaml and `--section.key value` options, merged and checked.

    Raises UserError with one line for each problem, naming the file or the option.
    """
    try:
        return _load(argv, world_size, local_world_size)
    except UserError as error:
        raise UserError(_hidden(str(error))) from None


def _load(argv: list[str], world_size: int, local_world_size: int) -> Config:
    for arg in argv:
        if len(arg) > 2000 or ODD.search(arg):
            raise UserError(f"{_shown(arg)}: is longer than 2000 characters, or holds control characters")
    files = [a for i, a in enumerate(argv) if not a.startswith("--") and (i == 0 or not _takes_value(argv[i - 1]))]
    if len(files) != 1:
        found = f"found {', '.join(files)}" if files else "found none; configs/ has some"
        raise UserError(f"one config file is needed, as in: configs/quickstart.yaml --train.max_steps 100 ({found})")
    values, origin = read_yaml(Path(files[0]))
    stated = copy.deepcopy(values)
    problems = _apply_options(argv, values, origin)
    values.setdefault("run", {})
    if isinstance(values["run"], dict):
        values["run"].setdefault("name", Path(files[0]).stem)

    try:
        config = Config.model_validate(values)
        wrong = set()
    except ValidationError as error:
        wrong = set()
        for e in error.errors():
            key = ".".join(str(part) for part in e["loc"])
            wrong.add(key)
            problems.append(f"{_where(key, origin)}: {_explain(e, key)}")
        # The rest is checked with defaults in the place of what is wrong, so that everything is told at once.
        try:
            config = Config.model_validate(_without(values, wrong))
        except ValidationError:  # what is wrong stands in a list
            raise UserError("\n".join(problems)) from None
    for keys, message in _contradictions(config, world_size, local_world_size):
        if not any(k == w or k.startswith(w + ".") for k in keys for w in wrong):
            problems.append(f"{_where(keys[0], origin)}: {message}")
    if problems:
        raise UserError("\n".join(problems))
    config._overridden = _overridden(config, stated, [key for key, place in origin.items() if place.startswith("--")])
    return config


def _overridden(config: Config, stated: dict, options: list[str]) -> dict[str, tuple]:
    """Of the settings that were options: {key: (as stated in the file, or by default; now)} where these differ."""
    try:
        before = Config.model_validate(stated).model_dump()
    except ValidationError:  # an option has mended it
        before = {}
    now, found = config.model_dump(), {}
    for key in options:
        section, name = key.split(".")
        was = before[section][name] if before else stated.get(section, {}).get(name)
        if was != now[section][name] and key not in ("run.name", "run.dir"):  # these are shown anyway
            found[key] = was, now[section][name]
    return found


def _contradictions(c: Config, world_size: int, local_world_size: int):
    """Yields ([keys], message) for settings that are fine alone and wrong together. The first key gets the blame."""
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    if c.data.path is None and c.data.train is None:
        yield ["data.path", "data.train"], "a dataset folder is needed; tools/convert_text_to_mds.py makes one"
    if c.data.path is not None and c.data.train is not None:
        yield ["data.path", "data.train"], "path is for one dataset, train for several: take out one of the two"
    for source in c.data.sources:
        if re.search("://[^/]*(@|:(?!\\d+(/|$)))", source.path):  # user@host, user:secret with a slash, but not host:9000
            yield ["data.path", "data.train"], "a URL with a password would be copied into logs and checkpoints; " \
                  "credentials come from the environment"
    kinds = [{"proportion", "repeat", "samples"} & source.model_dump().keys() or {"proportion"} for source in c.data.sources]
    if len(kinds := sorted(set().union(*kinds))) > 1:
        yield (["data.train"],
               f"its datasets have {' and '.join(kinds)}; give all of them the same one (default: proportion 1)")
    if not c.run.init_from:  # else the shape is not known yet
        yield from _of_shape(c)
    if c.train.max_steps is None and c.train.max_tokens is None and not c.eval.only:
        yield ["train.max_steps", "train.max_tokens"], "max_steps or max_tokens is needed, so that the run has an end"
    if c.optim.schedule == "cosine" and c.optim.decay_steps and c.optim.decay_steps <= c.optim.warmup_steps:
        yield ["optim.decay_steps", "optim.warmup_steps"], f"must be above warmup_steps {c.optim.warmup_steps}"
    if c.optim.adamw_learning_rate and c.optim.name != "muon":
        yield ["optim.adamw_learning_rate", "optim.name"], "only name muon has it; AdamW alone takes learning_rate"
    if c.optim.min_learning_rate is not None and c.optim.min_learning_rate > c.optim.learning_rate:
        yield ["optim.min_learning_rate"], f"is above learning_rate {c.optim.learning_rate:g}"
    if c.train.batch_schedule and (last := c.train.batch_schedule.points[-1][1]) != c.train.global_batch_size:
        yield (["train.batch_schedule", "train.global_batch_size"],
               f"ends with {last}, and train.global_batch_size is {c.train.global_batch_size}; make these the same")
    each = c.train.micro_batch_size * world_size
    if not c.eval.only and (uneven := c.train.uneven(each)):
        key, size, near = uneven
        yield ([key, "train.micro_batch_size"],
               f"{size} is not a multiple of {ranks} x micro_batch_size {c.train.micro_batch_size} = {each}; take {near}")
    if c.sharding.strategy == "hybrid" and world_size % (c.sharding.shard_size or local_world_size):
        yield (["sharding.shard_size", "sharding.strategy"],
               f"{c.sharding.shard_size or local_world_size} does not divide {ranks}")
    if c.sharding.shard_size and c.sharding.strategy != "hybrid":
        yield ["sharding.shard_size", "sharding.strategy"], "only strategy hybrid has it"
    if c.eval.patience and not c.eval.interval:
        yield ["eval.patience", "eval.interval"], "needs evaluations: give an interval"
    if c.run.init_from and c.run.resume not in ("auto", "never"):
        yield ["run.init_from", "run.resume"], "init_from and resume: PATH exclude each other"


def _of_shape(c: Config):
    """Those contradictions in which the model's shape has a part: known later where it comes with weights."""
    yield from c.model.contradictions()
    if c.max_steps and c.optim.warmup_steps >= c.max_steps:
        yield (["optim.warmup_steps", "train.max_steps", "train.max_tokens"],
               f"{c.optim.warmup_steps} is not below the {c.max_steps} steps of the run; take {c.max_steps // 10}, or more steps")
    if c.train.block_schedule and (last := c.train.block_schedule[-1][1]) != c.model.block_size:
        yield (["train.block_schedule", "model.block_size"],
               f"ends with {last}, and model.block_size is {c.model.block_size}; make these the same")


def check_shape(c: Config):
    """Raises UserError where a model's shape, known at last, contradicts other settings."""
    if problems := [f"{keys[0]}: {message}" for keys, message in _of_shape(c)]:
        raise UserError("\n".join(problems))


# ---- reading --------------------------------------------------------------------------------------------------------

def read_yaml(path: Path, seen: tuple = ()) -> tuple[dict, dict]:
    """(nested values, {key: file that set it}) of a config and of those it is based on."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.resolve() in seen:
            raise UserError(f"{path}: its base leads back to itself")
        values = yaml.load(text, Loader=_Loader) or {}
    except UserError:
        raise
    except OSError as error:
        others = os.listdir(path.parent) if isinstance(error, FileNotFoundError) and os.access(path.parent, os.R_OK) else []
        near = difflib.get_close_matches(path.name, others, 1)
        raise UserError(f"{path}: {error.strerror.lower()}"
                        + (f"; did you mean {path.parent / near[0]}?" if near else "")) from None
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold half of a password
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{path}: not valid YAML: {said} (line {error.problem_mark.line + 1})") from None
    except Exception as error:  # `!!int ''` is an IndexError, `2001-99-99` a ValueError …
        kind = "" if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: "
        raise UserError(f"{path}: not valid YAML: {kind}{' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections like `train:`, found {type(values).__name__}")
    base = values.pop("base", None)
    origin = {".".join(key): str(path) for key in _keys(values)}
    if base is None:
        return values, origin
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the name of a file beside it, found {_shown(base)}")
    below, below_origin = read_yaml(path.parent / base, (*seen, path.resolve()))
    return _merge(below, values), below_origin | origin


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once, without aliases: a few of them can be a file of any size."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: write it out, or use base:")
        return super().compose_node(parent, index)

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        if isinstance(value, str) and (len(value) > 2000 or ODD.search(value)):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {_shown(value)} is longer than 2000 characters, or "
                                 "holds control characters")
        return value

    def construct_mapping(self, node, deep=False):
        keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in keys:
            if keys[key] > 1:
                raise yaml.YAMLError(f"{key!r} stands twice, the second time on line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


def _apply_options(argv: list[str], values: dict, origin: dict) -> list[str]:
    """Writes `--section.key value` and `--section.key=value` into values; returns the problems found."""
    problems = []
    for i, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        option, equals, value = arg.partition("=")
        key = option[2:]
        if not equals:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                problems.append(f"{option}: a value is needed, as in {option} VALUE")
                continue
            value = argv[i + 1]
        section, _, name = key.partition(".")
        origin[key] = option
        if not name:  # an unknown key at the top: validation tells it, with a suggestion
            values[key] = value
        elif isinstance(values.setdefault(section, {}), dict):
            try:
                listed = name in NESTED and value[:1] in ("[", "{")
                empty = value in ("null", "None") or value == "none" and name != "activation_checkpointing"  # a mode there
                values[section][name] = yaml.load(value, _Loader) if listed else None if empty else value
            except Exception as error:  # as above
                problems.append(f"{option}: not valid YAML: {' '.join(str(error).split())[:200]}")
    return problems


# Settings that are no single value, and what has names in them.
NESTED: dict[str, type[BaseModel] | None] = {"train": Source, "rope_scaling": RopeScaling, "batch_schedule": BatchSchedule,
                                            "block_schedule": None, "profile": None}


def _takes_value(arg: str) -> bool:
    return arg.startswith("--") and "=" not in arg


def _keys(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, str(key))
        if isinstance(value, dict):
            yield from _keys(value, (*prefix, str(key)))


def _merge(below: dict, above: dict) -> dict:
    both = [k for k in above if isinstance(above[k], dict) and isinstance(below.get(k), dict)]
    return below | above | {k: _merge(below[k], above[k]) for k in both}


def _without(values: dict, wrong: set, prefix: str = "") -> dict:
    return {k: _without(v, wrong, f"{prefix}{k}.") if isinstance(v, dict) else v
            for k, v in values.items() if f"{prefix}{k}" not in wrong}


# ---- telling what is wrong ------------------------------------------------------------------------------------------

def _where(key: str, origin: dict) -> str:
    """`configs/x.yaml: optim.learning_rate`, `--optim.learning_rate`, or the bare key where only its default stands."""
    above = key
    while above not in origin and above.count(".") > 1:  # data.train.0.path stands in data.train
        above = above.rpartition(".")[0]
    place = origin.get(above)
    return key if place is None else place + key[len(above):] if place.startswith("--") else f"{place}: {key}"


def _hidden(text: str) -> str:
    """Without the passwords of URLs."""
    return re.sub(r":/\S*@", "://…@", text)  # a Path has one slash


def _shown(value) -> str:
    shown = _hidden(repr(value))
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _explain(error: ErrorDetails, key: str) -> str:
    if error["type"] != "extra_forbidden":
        given, said = error["input"], error["msg"].removeprefix("Value error, ")
        return said[0].lower() + said[1:] + ("" if isinstance(given, dict) else f" (found {_shown(given)})")
    if nested := key.count(".") > 1 and NESTED.get(key.split(".")[1]):
        return f"no such setting; take {', '.join(nested.model_fields)}"
    known = [".".join(k) for k in _keys(Config().model_dump())]
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    near = near or [k for k in known if k.endswith("." + key.split(".")[-1])]  # nanoGPT's flat names
    return "no such setting" + (f"; did you mean {near[0]}?" if near else "; --help lists them")


USAGE = """
usage: bash launch/train.sh CONFIG.yaml [--section.key VALUE …]

Trains a GPT, on every GPU of this machine, else on its CPU. The same command starts a run and resumes it.

    bash launch/train.sh configs/quickstart.yaml
    bash launch/train.sh configs/shakespeare_char_cpu.yaml --train.max_steps 200 --run.name short
    bash launch/train.sh configs/gpt2_124m.yaml --optim.learning_rate 3e-4 --log.wandb online
    bash launch/train.sh --nproc_per_node=4 configs/gpt2_124m.yaml                torchrun's options come before CONFIG
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 launch/train.sh configs/gpt2_1558m.yaml
"""


def help_text() -> str:
    """How to start training, and every setting with its type, default and meaning."""
    lines = [USAGE.strip(), "", __doc__.partition("\n\n")[2].partition("\n\n")[2].strip(), ""]
    for section_name, section in Config.model_fields.items():
        section = section.annotation
        lines += [f"{section_name}: {section.__doc__}"]
        for name, field in section.model_fields.items():
            schema = section.model_json_schema()["properties"][name]
            kinds = [k for k in schema.get("anyOf", [schema]) if k.get("type") != "null"]
            kind = "|".join(kinds[0]["enum"]) if "enum" in kinds[0] else kinds[0].get("type", "section")
            default = "" if field.default is None else f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
            lines += [f"  --{section_name}.{name} {kind.upper() if '|' not in kind else kind}{default}"]
            lines += [f"      {field.description}"] if field.description else []
        lines += [""]
    return "\n".join(lines)


def reference() -> str:
    """A config of all settings with their defaults, and with what each means, its type and its limits in comments."""
    from textwrap import wrap

    def comment(text: str, indent: str = "  # ") -> list[str]:
        return wrap(text, 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)

    lines = ["# Every setting with its default, its meaning, and what it may be: made by the command",
             "#   python -m nanogpt.config > configs/reference.yaml",
             "# from nanogpt/config.py, so do not edit it. A config of your own states only what differs from this."]
    for section_name, field in Config.model_fields.items():
        section = field.annotation
        schema = section.model_json_schema()
        lines += ["", "", *comment(" ".join(section.__doc__.split()), "# "), f"{section_name}:"]
        for name, of in section.model_fields.items():
            default = yaml.safe_dump(of.default, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            lines += ["", *comment(of.description or ""), f"  {name}: {default}  # {_kind(schema['properties'][name])}"]
            if nested := NESTED.get(name):
                inner = nested.model_json_schema()["properties"]
                for key, value in nested.model_fields.items():
                    lines += comment(f"{key}: {_kind(inner[key])}" + (f"; {value.description}" * bool(value.description)),
                                     "  #     ")
    return "\n".join(lines) + "\n"


def _kind(schema: dict) -> str:
    """What a JSON schema allows, in words: `integer > 0, or null`."""
    if "anyOf" in schema:
        return ", or ".join(_kind(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return "what is below"
    if "enum" in schema:
        return " | ".join(schema["enum"])
    limits = [f"{sign} {schema[key]:.16g}" for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), (
        "exclusiveMaximum", "<"), ("maximum", "<=")) if schema.get(key, 1 << 63) < 1 << 63]  # beyond: no limit that one meets
    kind = " ".join([schema["type"], " and ".join(limits)]).strip()
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        return f"list of {'' if not most else f'{most} x ' if least == most else f'{least} to {most} x '}({_kind(schema['items'])})"
    return kind + (f" of the pattern {schema['pattern']}" if "pattern" in schema else "")


if __name__ == "__main__":
    print(reference(), end="")

"""Weights from and to Hugging Face: GPT-2, Llama and Qwen3, in safetensors alone, never a pickle.

    hub or folder -> config.json -> config.Model
                     *.safetensors -> one tensor at a time -> each rank's part of a sharded model     Source, fill
    a model of ours -> config.json, *.safetensors, tokenizer files, README.md                         export

One table (`theirs`) says which of their tensors our parameters hold, and is read in both directions. What our model
does not compute is refused by name, and so is any tensor that is missing, too many or of another shape.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from nanogpt.config import Model, NoSwitch, Size
from nanogpt.errors import UserError
from nanogpt.hf_tokenizer import as_json, of_vocab_and_merges, read_object, short, tokenizer_files
from nanogpt.hub import refusals
from nanogpt.model import GPT, padded
from nanogpt.sharding import DTYPES, place_like
from nanogpt.tokenizer import read_tokenizer_json

CONNECT_S = 10  # seconds for the hub's first answer; its downloads have limits of their own
NEEDED = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
          "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


# ---- config.json ----------------------------------------------------------------------------------------------------

GELUS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
         "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh"}
Epsilon = Annotated[float, Field(gt=0, le=1), NoSwitch]
Base = Annotated[float, Field(gt=1, allow_inf_nan=False), NoSwitch]
Whole = Annotated[float, Field(ge=1, le=1), NoSwitch]  # 1 and nothing else: pydantic's Literal takes no float


class _Theirs(BaseModel):
    """Keys of config.json that decide what is computed, with transformers' defaults; Literal: what our model can do."""
    model_config = ConfigDict(extra="ignore")
    quantization_config: None = None


class _GPT2(_Theirs):
    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Size = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: Literal[tuple(GELUS)] = "gelu_new"  # type: ignore[valid-type]
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: StrictBool = True

    def ours(self) -> dict:
        return dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, block_size=self.n_positions,
                    vocab_size=self.vocab_size, norm_eps=self.layer_norm_epsilon, mlp=GELUS[self.activation_function],
                    mlp_dim=self.n_inner, tied=self.tie_word_embeddings)


class _Rope(BaseModel):
    """rope_scaling, and transformers 5's rope_parameters."""
    model_config = ConfigDict(extra="forbid")
    type: Literal["default", "linear", "llama3", None] = None  # an older name, which wins
    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: Base | None = None
    partial_rotary_factor: Whole = 1.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: Size | None = None

    def ours(self) -> dict | None:
        kind = self.type or self.rope_type
        if kind == "default":
            return None
        keys = dict(factor="factor") | (dict(
            low_freq_factor="low_freq_factor", high_freq_factor="high_freq_factor",
            original_max_position_embeddings="original_block_size") if kind == "llama3" else {})
        for key in keys:
            if getattr(self, key) is None:
                raise ValueError(f"rope_scaling of kind {kind} has no {key}")
        if kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("rope_scaling: low_freq_factor is not below high_freq_factor")
        return dict(kind=kind) | {ours: getattr(self, key) for key, ours in keys.items()}


class _Llama(_Theirs):
    vocab_size: Size = 32000
    max_position_embeddings: Size = 2048
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Base = 10000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Whole = 1.0
    attention_bias: StrictBool = False
    mlp_bias: StrictBool = False
    tie_word_embeddings: StrictBool = False

    def ours(self) -> dict:
        rope = self.rope_parameters or self.rope_scaling or _Rope()
        return dict(n_layer=self.num_hidden_layers, n_head=self.num_attention_heads, n_kv_head=self.num_key_value_heads,
                    head_dim=self.head_dim, n_embd=self.hidden_size, block_size=self.max_position_embeddings,
                    vocab_size=self.vocab_size, bias=self.mlp_bias, attention_bias=self.attention_bias, position="rope",
                    rope_base=rope.rope_theta or self.rope_theta, rope_scaling=rope.ours(), norm="rmsnorm",
                    norm_eps=self.rms_norm_eps, mlp="swiglu", mlp_dim=self.intermediate_size,
                    tied=self.tie_word_embeddings)


class _Qwen3(_Llama):
    vocab_size: Size = 151936
    max_position_embeddings: Size = 32768
    intermediate_size: Size = 22016
    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None

    def ours(self) -> dict:
        return super().ours() | dict(qk_norm=True)


KINDS: dict[str, type[_GPT2] | type[_Llama]] = {"gpt2": _GPT2, "llama": _Llama, "qwen3": _Qwen3}


def read_config(file: Path) -> Model:
    """config.json -> our settings. Raises UserError: damaged, or a model that ours does not compute."""
    given = read_object(file)
    kind = given.get("model_type")
    if str(kind) not in KINDS:
        raise UserError(f"{file}: its model_type is {kind!r:.60}; {', '.join(KINDS)} can be read")
    try:
        config = Model.model_validate(KINDS[kind].model_validate(given).ours())
        for keys, message in config.contradictions():
            raise ValueError(f"{keys[0].removeprefix('model.')}: {message}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, said = ".".join(map(str, first["loc"])), first["msg"]
        raise UserError(f"{file}: {key}: {said[0].lower()}{said[1:]} (found {first['input']!r:.60}); our model does not "
                        "compute it otherwise" if first["type"] in ("literal_error", "none_required") else
                        f"{file}: {key}: {said[0].lower()}{said[1:]} (found {first['input']!r:.60})") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return config


# ---- the table of names ---------------------------------------------------------------------------------------------

LLAMA = {
    "transformer.wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],  # row upon row
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "transformer.ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D keeps (in, out)


def theirs(c: Model, name: str, shape) -> list[tuple[str, tuple[int, ...]]]:
    """Our parameter -> their tensors and shapes. A Llama has in several what we stack; GPT-2 has it under our name."""
    shape = (c.vocab_size, *shape[1:]) if name in ("transformer.wte.weight", "lm_head.weight") else tuple(shape)
    if c.position == "learned":
        return [(name, shape[::-1] if name.endswith(TRANSPOSED) else shape)]
    stem, _, end = name.rpartition(".")
    layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    names = [f"model.layers.{layer[1]}.{part}.{end}" for part in LLAMA[layer[2]]] if layer else \
        [f"{part}.{end}" for part in LLAMA[stem]]
    (H, K, D), W = c.heads, c.mlp_width
    rows = {3: [H * D, K * D, K * D], 2: [W, W], 1: [shape[0]]}[len(names)]
    return [(part, (n, *shape[1:])) for part, n in zip(names, rows)]


def parameters(c: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our model's parameters."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(c).named_parameters()}


# ---- import ---------------------------------------------------------------------------------------------------------

def is_hf(path) -> bool:
    """hf:NAME[@REVISION], or a folder with config.json that is no run."""
    path = str(path)
    return path.startswith("hf:") or (os.path.isfile(os.path.join(path, "config.json"))
                                      and not os.path.isdir(os.path.join(path, "checkpoints")))


class Source:
    """Weights of Hugging Face: found and checked, and then read one tensor at a time.

    config      our settings for them
    path        the folder they lie in
    """

    def __init__(self, path):
        """path: hf:NAME[@REVISION], or a folder. Raises UserError, on all ranks alike where it is the hub that fails."""
        self.given = str(path)
        self.path = _download(self.given[3:]) if self.given.startswith("hf:") else Path(path)
        if not is_hf(self.path):
            raise UserError(f"{self.given}: no folder of a model, with config.json and model.safetensors; one of the hub is "
                            "given as hf:NAME")
        self.config = read_config(self.path / "config.json")
        self._open()
        self._check()

    def _open(self):
        """stored: name of each tensor -> (file, its name there), with the prefix that some files lack."""
        from safetensors import SafetensorError, safe_open
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        listed = None
        if not single.exists():
            if not index.exists():
                raise UserError(f"{self.given}: has no model.safetensors; a pickle like pytorch_model.bin is never read: "
                                "load it with transformers, and write it with save_pretrained(FOLDER)")
            listed = read_object(index).get("weight_map")
            if not isinstance(listed, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file))
                                                       for file in listed.values()):
                raise UserError(f"{index}: its weight_map does not name files of this folder")
        self.files, self.stored = {}, {}
        prefix = "transformer." if self.config.position == "learned" else "model."
        for name in sorted(set(listed.values())) if listed is not None else [single.name]:
            try:
                file = self.files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.path / name}: cannot be read ({short(error)})") from None
            for key in file.keys():
                full = key if key.startswith((prefix, "lm_head.")) else prefix + key
                if full in self.stored or listed is not None and listed.get(key) != name:
                    raise UserError(f"{self.path / name}: {key!r:.100} stands here and elsewhere, or not in the index")
                self.stored[full] = name, key
        if listed is not None and len(listed) != sum(len(file.keys()) for file in self.files.values()):
            raise UserError(f"{index}: lists tensors that its files do not have")

    def _check(self):
        """Every tensor that our model needs is there, with its shape, and no other."""
        if self.config.n_layer > len(self.stored):
            raise UserError(f"{self.path}/config.json: says {self.config.n_layer} blocks, and there are only "
                            f"{len(self.stored)} tensors")
        try:
            ours = parameters(self.config)
        except RuntimeError:  # more elements than a tensor can count
            raise UserError(f"{self.path}/config.json: its sizes are no model's") from None
        needed = dict(part for name, shape in ours.items() for part in theirs(self.config, name, shape))
        for name in sorted(needed.keys() | self.stored.keys()):
            if name not in self.stored:
                raise UserError(f"{self.given}: has no tensor {name}, which its config.json asks for")
            piece = self._slice(name)
            if name not in needed:
                if re.search(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$", name):
                    continue  # causal masks and rotary speeds that older files carry along
                if name == "lm_head.weight" and self._is_embedding(name):
                    continue  # tied, and written twice
                raise UserError(f"{self.given}: has a tensor {self.stored[name][1]!r:.100} which its config.json does not "
                                "ask for, and which would be lost")
            if tuple(piece.get_shape()) != needed[name]:
                raise UserError(f"{self.given}: {name} is {tuple(piece.get_shape())}, and by its config.json {needed[name]}")
            if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{self.given}: {name} is of type {piece.get_dtype()}; quantized weights cannot be read")

    def _is_embedding(self, name: str) -> bool:
        embedding = theirs(self.config, "transformer.wte.weight", (self.config.vocab_size, self.config.n_embd))[0][0]
        return embedding in self.stored and torch.equal(self._read(name).float(), self._read(embedding).float())

    def _slice(self, name: str):
        file, key = self.stored[name]
        return self.files[file].get_slice(key)

    def _read(self, name: str) -> torch.Tensor:
        file, key = self.stored[name]
        return self.files[file].get_tensor(key)

    def tensor(self, name: str, shape) -> torch.Tensor:
        """Our parameter `name`, float32, on the CPU: its vocabulary padded with rows of zeros, or its positions cut."""
        parts = [self._read(part).float() for part, _ in theirs(self.config, name, shape)]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.config.position == "learned" and name.endswith(TRANSPOSED):
            whole = whole.t().contiguous()
        if name == "transformer.wpe.weight":
            whole = whole[:shape[0]]
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            whole = F.pad(whole, (0, 0, 0, padded(self.config.vocab_size) - len(whole)))
        if whole.shape != torch.Size(shape):
            raise UserError(f"{self.given}: {name} is {tuple(whole.shape)} there, and {tuple(shape)} in this model")
        return whole

    def tokenizer(self):
        """The tokenizer beside the weights. Raises UserError where there is none that can be used."""
        name = self.given[3:] if self.given.startswith("hf:") else self.path.resolve().name
        if (self.path / "tokenizer.json").exists():
            tokenizer = read_tokenizer_json(self.path / "tokenizer.json", name)
        elif (self.path / "merges.txt").exists() and self.config.position == "learned":  # GPT-2's own: one way to cut text
            tokenizer = of_vocab_and_merges(self.path, name)
        else:
            raise UserError(f"{self.given}: has no tokenizer.json, and sentencepiece's tokenizer.model is not read; save "
                            "its tokenizer there with transformers (use_fast=True)")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(f"{self.given}: its tokenizer has {tokenizer.vocab_size} ids, and the model only "
                            f"{self.config.vocab_size}")
        return tokenizer


@torch.no_grad()
def fill(model: GPT, source: Source):
    """Copies the weights into a model, sharded or not; its context may be shorter than theirs. One tensor at a time."""
    for name, weight in model.named_parameters():
        weight.copy_(place_like(source.tensor(name, weight.shape).to(weight.device), weight))


def _download(name: str) -> Path:
    """NAME[@REVISION] of the hub -> its folder in the cache. One rank of each machine downloads.

    Raises the same UserError on all ranks.
    """
    alone = not dist.is_initialized()
    local_rank = 0 if alone else int(os.environ["LOCAL_RANK"])
    found = None, None
    if local_rank == 0:
        try:
            found = _snapshot(*name.partition("@")[::2]), None
        except UserError as error:
            found = None, str(error)
    if not alone:
        of_rank: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
        dist.all_gather_object(of_rank, found)
        problem = next((problem for _, problem in of_rank if problem), None)
        found = of_rank[dist.get_rank() - local_rank][0], problem
    if found[1]:
        raise UserError(found[1])
    return Path(found[0])


def _snapshot(name: str, revision: str) -> str:
    from huggingface_hub import HfApi, errors, snapshot_download
    where = f"hf:{name}{revision and '@'}{revision}"
    wanted: dict[str, Any] = dict(repo_id=name, revision=revision or None)
    try:
        with refusals(where, "model"):
            try:
                HfApi().model_info(**wanted, timeout=CONNECT_S)  # snapshot_download would wait for an answer for ever
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
                raise
            except Exception as error:  # of whichever HTTP library: without a network, what was downloaded before will do
                try:
                    return snapshot_download(**wanted, local_files_only=True)
                except errors.LocalEntryNotFoundError:
                    raise error from None
            return snapshot_download(**wanted, allow_patterns=NEEDED)
    except UserError:
        raise
    except errors.HFValidationError:
        raise UserError(f"{where}: is not the name of a model on the hub, like hf:openai-community/gpt2") from None
    except Exception as error:
        reason = short(str(error).split("Caused by ")[-1])[:120]
        raise UserError(f"{where}: cannot be downloaded ({type(error).__name__}: {reason}); copy its files from elsewhere "
                        "and give their folder, or set HF_HOME to a cache that has them") from None


# ---- export ---------------------------------------------------------------------------------------------------------

def their_config(c: Model, eot: int | None, precision: str) -> dict:
    """config.json for a model of ours. Raises UserError that names the settings which no model of theirs has."""
    H, K, D = c.heads
    filled = c.filled()
    wanted: dict[str, list]
    if c.position == "learned":
        kind, wanted = "GPT2LMHeadModel", dict(
            norm=["layernorm"], mlp=["gelu", "gelu_tanh"], qk_norm=[False], n_kv_head=[H], n_embd=[H * D])
    else:
        kind, wanted = ("Qwen3ForCausalLM", dict(bias=[False])) if c.qk_norm else ("LlamaForCausalLM", {})
        wanted |= dict(norm=["rmsnorm"], mlp=["swiglu"])
    wrong = [f"{key} {filled[key]} ({kind} has {' or '.join(map(str, values))})"
             for key, values in (wanted | dict(logit_softcap=[0])).items() if filled[key] not in values]
    if wrong:
        raise UserError(f"no model of transformers has this shape: with position {c.position}, what stands in the way is "
                        + ", ".join(wrong))
    common = dict(architectures=[kind], vocab_size=c.vocab_size, tie_word_embeddings=c.tied, bos_token_id=eot,
                  eos_token_id=eot, torch_dtype=precision)
    if c.position == "learned":
        return dict(model_type="gpt2", n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=H,
                    n_inner=c.mlp_width, activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.mlp],
                    layer_norm_epsilon=c.norm_eps, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                    attn_pdrop=c.dropout) | common
    scaling = c.rope_scaling and dict(rope_type=c.rope_scaling.kind, factor=c.rope_scaling.factor)
    if scaling and c.rope_scaling.kind == "llama3":
        scaling |= dict(low_freq_factor=c.rope_scaling.low_freq_factor, high_freq_factor=c.rope_scaling.high_freq_factor,
                        original_max_position_embeddings=c.rope_scaling.original_block_size)
    return dict(model_type="qwen3" if c.qk_norm else "llama", max_position_embeddings=c.block_size, hidden_size=c.n_embd,
                intermediate_size=c.mlp_width, num_hidden_layers=c.n_layer, num_attention_heads=H, num_key_value_heads=K,
                head_dim=D, hidden_act="silu", rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, rope_scaling=scaling,
                attention_bias=filled["attention_bias"], attention_dropout=0.0) | (
                    {} if c.qk_norm else dict(mlp_bias=c.bias)) | common


def export(c: Model, get_tensor, tokenizer, out, card: str, precision="float32", max_shard_size="5GB") -> str | None:
    """Writes a folder that transformers, vLLM and llama.cpp's converter load. Returns why it has no tokenizer, or None.

    get_tensor: name of a parameter of ours -> the whole tensor; card: README.md, which is told about the tokenizer.
    Raises UserError: a shape that they do not have, a shard size that is none, or a folder that cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    config = their_config(c, tokenizer.eot, precision)
    tensors = {}  # their name -> (shape, our parameter, the first row there)
    for name, shape in parameters(c).items():
        row = 0
        for part, part_shape in theirs(c, name, shape):
            tensors[part] = part_shape, name, row
            row += part_shape[0]
        bias = name.replace(".weight", ".bias")
        if c.position == "learned" and bias != name and re.search(r"\.ln_|\.c_", name):
            tensors.setdefault(bias, ((shape[0],), None, 0))  # theirs always has biases; our own follow, where there are any

    def value(shape, name, row):
        if name is None:
            return torch.zeros(shape, dtype=DTYPES[precision])
        whole = get_tensor(name).detach()
        part = whole.t() if c.position == "learned" and name.endswith(TRANSPOSED) else whole[row:row + shape[0]]
        return part.to("cpu", DTYPES[precision]).clone(memory_format=torch.contiguous_format)

    shapes = {name: torch.empty(shape, dtype=DTYPES[precision], device="meta") for name, (shape, *_) in tensors.items()}
    try:
        plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size,
                                                  filename_pattern="model{suffix}.safetensors")
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--max-shard-size {max_shard_size}: {error}; as in 5GB") from None
    try:
        files, why = tokenizer_files(tokenizer, c.block_size), None
    except ValueError as error:
        files, why = {}, str(error)
        card += f"\n## Tokenizer\n\nNone is here: {why}\n"
    ends = {} if tokenizer.eot is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    if tokenizer.bos is not None:
        config["bos_token_id"] = ends["bos_token_id"] = tokenizer.bos
    files |= {"config.json": as_json(config), "generation_config.json": as_json(ends), "README.md": card}
    if plan.is_sharded:
        files["model.safetensors.index.json"] = as_json(dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename))
    try:
        with _new_folder(Path(out).resolve()) as folder:
            for file, names in plan.filename_to_tensors.items():
                save_file({name: value(*tensors[name]) for name in names}, folder / file, metadata={"format": "pt"})
            for file, text in files.items():
                (folder / file).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({short(error)})") from None
    return why


@contextlib.contextmanager
def _new_folder(out: Path):
    """A folder beside `out`, which becomes it at the end, or goes away."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; give another --out, or remove it")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

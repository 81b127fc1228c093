"""A trained model as a folder of Hugging Face, for transformers, vLLM and llama.cpp: GPT-2, Llama or Qwen3 by its shape.

    python tools/export_hf.py --run runs/quickstart --out exported
    python tools/export_hf.py --run runs/gpt2_124m/checkpoints/step-00100000 --out exported --precision bfloat16
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must be new or empty")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="larger weights go into several files")
    args = parser.parse_args()
    export_run(args.run, args.out, args.precision, args.max_shard_size)


def export_run(path: str, out: str, precision: str = "float32", max_shard_size: str = "5GB"):
    """Writes the folder `out` and says so. Raises UserError."""
    from nanogpt import checkpoint, huggingface
    from nanogpt.generate import load_run
    found = checkpoint.find(path)
    model, tok, state = load_run(found)
    why = huggingface.export(model.config, dict(model.named_parameters()).__getitem__, tok, out,
                             model_card(found, model, tok, state), precision, max_shard_size)
    if why:
        print(f"warning: no tokenizer files written: {why}")
    print(f"{out}: {found} as a {huggingface.their_config(model.config, tok.eot, precision)['architectures'][0]}, "
          f"{n_params(model.config):,} parameters, {precision}")


def n_params(c) -> int:
    """Without the rows that pad the vocabulary."""
    import math
    from nanogpt.huggingface import parameters, theirs
    return sum(math.prod(shape) for name, ours in parameters(c).items() for _, shape in theirs(c, name, ours))


def model_card(path: Path, model, tok, state: dict) -> str:
    """README.md: what the weights are, from where, and how to load them."""
    import yaml
    from nanogpt.config import Data
    data = []
    for era in state["data_history"]:
        try:
            data += [f"- from step {era['from_step']:,}: `{source.path}`{described(source.path)}"
                     for source in Data.model_validate(era["data"]).sources]
        except ValueError as error:
            raise UserError(f"{path}/state.json: its data: {' '.join(str(error).split())[:200]}") from None
    loss = validation_loss(path.parent.parent / "metrics.jsonl", state)
    remark = ""
    if model.config.position == "learned" and model.config.mlp == "gelu":
        remark = ("\nIts GELU is the exact one. llama.cpp computes a GPT-2 with the tanh approximation always, so its "
                  "numbers differ a little.\n")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {path.resolve().parent.parent.name}

A language model of {n_params(model.config):,} parameters, trained for {state['step']:,} steps on {state['tokens']:,} tokens.
Context: {model.config.block_size:,} tokens; tokenizer: {tok.name}, {tok.vocab_size:,} ids.

Validation loss: {loss}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```

Documents were joined in training with {'end-of-text after each' if tok.eot is not None else 'nothing between them'}, and
nothing before them.
{remark}
## Data

{chr(10).join(data)}

## Settings

```yaml
{yaml.safe_dump(state['config'], sort_keys=False, allow_unicode=True).strip()}
```
"""


def described(path) -> str:
    """What dataset.json says of a dataset, if it is still there."""
    from nanogpt.shards import load_dataset_card
    try:
        card = load_dataset_card(path)
    except (UserError, TypeError):  # gone, elsewhere, or not known
        return ""
    source = ", ".join(f"{key} {card['source'][key]!r}" for key in ("kind", "paths", "dataset") if card["source"].get(key))
    return f", {card['splits']['train']['tokens']:,} tokens ({source})"


def validation_loss(file: Path, state: dict) -> str:
    """The last one measured until the checkpoint's step, in words; without metrics.jsonl, the lowest one."""
    found, held_out, step = None, state["held_out"], state["step"]
    if held_out["best"] is not None:
        found = f"{held_out['best']:.4f} nats a token, the lowest of its training"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                found = f"{record['val_loss']:.4f} nats a token, at step {record['step']:,}"
        except (ValueError, KeyError, TypeError):
            pass  # a step without an evaluation, or a damaged line
    return found or "not measured"


if __name__ == "__main__":
    run(main)

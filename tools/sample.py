"""Text from a trained model.

    python tools/sample.py --run runs/quickstart --prompt "def main(" --num-samples 3
    python tools/sample.py --run runs/gpt2_124m --prompt "Once upon a time" --temperature 0.8 --top-k 200
    python tools/sample.py --hf gpt2 --prompt FILE:chapter.txt --max-new-tokens 500 --top-p 0.95 --stop "The End"

One text is printed as it is generated, several when all are done. Tokens a second are told on stderr.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run
from nanogpt.sampling import Sampling


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", metavar="RUN", help="run folder, or one of its checkpoints")
    model.add_argument("--hf", metavar="DIR_OR_NAME", help="a Hugging Face model: a folder, or NAME[@REVISION] on the hub")
    add("--prompt", action="append", metavar="TEXT", help="text to go on from; FILE:PATH reads a file, - standard input; "
        "nothing: a new document; may be repeated")
    add("--max-new-tokens", type=int, default=200, help="tokens of each sample, at most")
    add("--num-samples", type=int, default=1, help="how many of each prompt")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token; 1: as trained")
    add("--top-k", type=int, default=200, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the fewest tokens whose probabilities add up to p")
    add("--min-p", type=float, help="leave out tokens less than p times as probable as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: tokens that stand in the text become less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--ignore-eot", action="store_true", help="go on after the end of a document")
    add("--seed", type=int, default=1337, help="of the drawing")
    add("--tokenizer", metavar="DATASET", help="refuse to sample unless this dataset's is the run's")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of weights and activations")
    args = parser.parse_args()
    filters = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise UserError("--max-new-tokens, --num-samples: at least 1 is needed")
    if args.num_samples > 10000:
        raise UserError(f"--num-samples: {args.num_samples} at once are too many; take up to 10000, then another --seed")
    try:
        Sampling(**filters)  # told before torch is imported
    except UserError as error:
        raise UserError(f"--{error}".replace("_", "-")) from None
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed: {args.seed} is out of range; take 0 to 2**63 - 1")
    if "" in args.stop:
        raise UserError("--stop: give a text of at least one character")
    prompts = [prompt for prompt in map(read, args.prompt or [""]) for _ in range(args.num_samples)]
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks

    from nanogpt.generate import load
    there = args.run or (args.hf if args.hf.startswith("hf:") or Path(args.hf).exists() else f"hf:{args.hf}")
    text = load(there, args.device, args.precision)
    if args.tokenizer:
        from nanogpt.shards import load_dataset_card
        other = load_dataset_card(args.tokenizer)["tokenizer"]
        if other["fingerprint"] != text.tokenizer.fingerprint:
            raise UserError(f"{args.tokenizer}: its tokenizer ({other['name']}) is not the one of {args.run or args.hf} "
                            f"({text.tokenizer.name}); the same text has other ids there")
    alone, shown, times = len(prompts) == 1, 0, [time.perf_counter()]
    for rows in text.stream(prompts, args.max_new_tokens, stop=args.stop, ignore_eot=args.ignore_eot, seed=args.seed,
                            **filters):
        if alone:
            whole = prompts[0] + rows[0].text
            print(whole[shown:], end="", flush=True)
            shown = len(whole)
        times.append(time.perf_counter())
    if alone:
        print("\n" + "-" * 20)
    else:
        for prompt, row in zip(prompts, rows):
            print(prompt + row.text)
            print("-" * 20)
    new = sum(row.tokens for row in rows)
    rate = f", then {(new - len(rows)) / (times[-1] - times[1]):,.1f} tokens/s" if len(times) > 2 else ""
    print(f"{new:,} tokens: the first after {times[1] - times[0]:.2f} s{rate}", file=sys.stderr)


def read(prompt: str) -> str:
    """The text that a --prompt names. Raises UserError where it cannot be read."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return prompt
    where = "standard input" if prompt == "-" else prompt[5:]
    try:
        return (sys.stdin.buffer.read() if prompt == "-" else Path(where).read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt: {where} cannot be read ({getattr(error, 'strerror', None) or error}); "
                        "give a text file in UTF-8") from None


if __name__ == "__main__":
    run(main)

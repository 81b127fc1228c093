"""Text from a trained model.

    python tools/sample.py --run runs/quickstart --prompt "def main(" --num-samples 3
    python tools/sample.py --run runs/gpt2_124m --prompt "Once upon a time" --temperature 0.8 --top-k 200
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import Parser, UserError, run  # noqa: E402


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="text to go on from; nothing: a new document")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens of each sample")
    parser.add_argument("--num-samples", type=int, default=1, help="how many")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token; 1: as trained")
    parser.add_argument("--top-k", type=int, default=200, help="draw from the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=1337, help="of the drawing")
    parser.add_argument("--tokenizer", metavar="DATASET", help="refuse to sample unless this dataset's is the run's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise UserError("--max-new-tokens, --num-samples: at least 1 is needed")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature: {args.temperature:g} is not a number from 0 on; 0 takes the likeliest token")
    if args.top_k < 1:
        raise UserError(f"--top-k: {args.top_k} is below 1; leave it out for 200")
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed: {args.seed} is out of range; take 0 to 2**63 - 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks

    import torch
    from nanogpt.generate import generate, load_run
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UserError("--device: cuda is asked for, and PyTorch finds none here")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    model, tok, state = load_run(args.run, device)
    if args.tokenizer:
        from nanogpt.shards import load_dataset_card
        other = load_dataset_card(args.tokenizer)["tokenizer"]
        if other["fingerprint"] != tok.fingerprint:
            raise UserError(f"{args.tokenizer}: its tokenizer ({other['name']}) is not the one of {args.run} "
                            f"({tok.name}); the same text has other ids there")
    prompt = list(tok.encode(args.prompt)) or [tok.eot]
    idx = torch.tensor([prompt], dtype=torch.int64, device=device).repeat(args.num_samples, 1)
    generator = torch.Generator(device).manual_seed(args.seed)
    for text in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, generator).tolist():
        print(args.prompt + tok.decode(text[len(prompt):]))
        print("-" * 20)


if __name__ == "__main__":
    run(main)

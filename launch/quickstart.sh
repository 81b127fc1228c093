#!/usr/bin/env bash
# From nothing but Python 3.10 to 3.12 to a trained GPT:
# set-up -> text -> MDS shards -> training, killed -> the same training, resumed -> loss curve -> samples.
#
#     bash launch/quickstart.sh                          trains on the source code of Python's standard library
#     bash launch/quickstart.sh --text PATH…             trains on your files and folders of text
#     bash launch/quickstart.sh --text PATH… --name N    calls dataset and run N: data/N, runs/N
#     bash launch/quickstart.sh -- --train.max_steps 9000 --optim.learning_rate 1e-3       any setting of training
#     PYTHON=/path/to/python bash launch/quickstart.sh   takes that Python and its packages, and makes no .venv
#
# Every GPU of the machine takes part, else the CPU: under 5 minutes on two cores, once everything is installed. Run
# again, it goes on from where it was, and finds done what is done.
set -euo pipefail

here=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

text=() settings=() name=
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,/^set/ { /^set/!s/^# \{0,1\}//p; }' "launch/quickstart.sh"; exit ;;
        --name) name=${2:-}; shift $(($# > 1 ? 2 : 1)); [ -n "$name" ] || die "--name: a name is needed" ;;
        --text)
            shift
            while (($#)) && [[ $1 != --* ]]; do
                case $1 in /*) path=$1 ;; *) path=$here/$1 ;; esac
                [ -e "$path" ] || die "--text: $1: is not there"
                text+=("$path")
                shift
            done
            ((${#text[@]})) || die "--text: files or folders of text are needed" ;;
        --) shift; settings=("$@"); break ;;
        *) die "$1: no such option (see bash launch/quickstart.sh --help); settings of training come after --" ;;
    esac
done
[[ $name =~ ^[A-Za-z0-9_.-]*$ ]] || die "--name: $name: only letters, digits, _, . and - are possible"
if [ -z "$name" ]; then
    name=quickstart
    if ((${#text[@]})); then  # other texts are other runs
        name=$(basename "${text[0]}" | tr -c 'A-Za-z0-9\n' -)-$(printf '%s\n' "${text[@]}" | cksum | cut -d ' ' -f 1)
    fi
fi
data=data/$name run=runs/$name

heading() { printf '\n\033[1m[%s/6] %s\033[0m\n' "$1" "$2"; }
[ -t 1 ] || heading() { printf '\n[%s/6] %s\n' "$1" "$2"; }

# ---------------------------------------------------------------------------------------------------------------------
heading 1 "Python and packages"
set_up

# ---------------------------------------------------------------------------------------------------------------------
heading 2 "text -> MDS shards"
convert=("$python" tools/convert_text_to_mds.py --out "$data" --tokenizer byte --block-size 256 --val-fraction 0.05)
if ((${#text[@]})); then
    await "${convert[@]}" --errors skip --input "${text[@]}" ||  # skip: a folder of texts may hold pictures too
        die "no shards were made of the text; if it has changed since the last time, give this one another --name"
elif [ -e "$data/dataset.json" ]; then
    echo "$data is there already"
else
    sources=()
    while IFS= read -r line; do sources+=("$line"); done < <("$python" - <<'EOF'
import os, sysconfig
other = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",  # tests and applications,
         "encodings", "pydoc_data",                                                       # tables,
         "site-packages", "dist-packages"}                                                # and what was installed
for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
    folders[:] = sorted(set(folders) - other)
    if any(name.endswith(".py") for name in files):
        print(f"{folder}/*.py")
EOF
    )
    ((${#sources[@]})) || die "this Python comes without its library's source code; --text PATH takes your own text"
    await "${convert[@]}" --errors skip --input "${sources[@]}" ||
        die "no shards were made of Python's standard library; see above"
fi

# ---------------------------------------------------------------------------------------------------------------------
# With several GPUs each takes its share of the configured batch.
share=$("$python" - <<'EOF'
import runpy, yaml
gpus = runpy.run_path("launch/train.sh")["local_gpus"]()
micro = max(1, yaml.safe_load(open("configs/quickstart.yaml"))["train"]["global_batch_size"] // max(1, gpus))
if gpus > 1:
    print(f"--train.micro_batch_size {micro} --train.global_batch_size {micro * gpus}")
EOF
)
train=(launch/train.sh configs/quickstart.yaml --data.path "$data" --run.name "$name" $share)
train+=(${settings[@]+"${settings[@]}"})
checkpoint() { compgen -G "$run/checkpoints/step-*/manifest.json" >/dev/null; }  # the manifest comes last
logged() { cat "$run/metrics.jsonl" 2>/dev/null | wc -l; }

heading 3 "training, until it is killed"
echo "bash ${train[*]}"
if checkpoint; then
    echo "$run has checkpoints already: on to 4"
else
    start "$python" "${train[@]}"
    while running && ! checkpoint; do sleep 0.1; done
    lines=$(logged)
    while running && (($(logged) < lines + 2)); do sleep 0.1; done  # some steps that will be lost, and done again
    if running; then
        kill_child
        [ ! -t 1 ] || [ "${TERM:-dumb}" = dumb ] || printf '\r\033[J'  # its last line, which was alive
        echo "killed with SIGKILL, which nothing can prepare for; its checkpoints: $(ls -d "$run"/checkpoints/step-*)"
    else
        finish || die "training failed; see above"
    fi
fi

heading 4 "the same command again: it goes on from the newest checkpoint; the steps since come again, with their losses"
echo "bash ${train[*]}"
await "$python" "${train[@]}" || die "training failed; see above"

# ---------------------------------------------------------------------------------------------------------------------
heading 5 "loss curve, and how well xz does"
await "$python" tools/plot.py "$run" || die "no loss curve; see above"
summary=$("$python" - "$data" "$run" <<'EOF'
import json, lzma, statistics, sys
from pathlib import Path
import numpy as np
import yaml
sys.path[:0] = [".", "tools"]
from inspect_mds import read_index, read_shard
from nanogpt.shards import load_dataset_card
from nanogpt.tokenizer import from_json

data, run = map(Path, sys.argv[1:])
records = [json.loads(line) for line in open(run / "metrics.jsonl")]
last = [r for r in records if "val_loss" in r][-1]
card, config = load_dataset_card(data), yaml.safe_load(open(run / "config.yaml"))
samples = np.concatenate([read_shard(data / "val", shard, card) for shard in read_index(data / "val", card)])
targets = samples[:, 1:].flatten()[:config["eval"]["sequences"] * config["model"]["block_size"]]
text = from_json(card["tokenizer"]).decode_bytes(targets)
print(f"validation   {last['val_loss']:.4f} nats a byte = {last['val_bits_per_byte']:.4f} bits/byte")
xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
print(f"xz -9        {xz:.4f} bits/byte on the same {len(text):,} bytes")
print(f"speed        {statistics.median(r['tokens_per_s'] for r in records):,.0f} tokens/s")
EOF
) || die "the run could not be summed up; see above"

heading 6 "three samples"
prompt='def '
((${#text[@]} == 0)) || prompt=$'\n'
await "$python" tools/sample.py --run "$run" --prompt "$prompt" --num-samples 3 --max-new-tokens 300 ||
    die "no samples; see above"

cat <<EOF

$summary
run          $run
loss curve   $run/loss.png

more         bash launch/train.sh configs/quickstart.yaml --help      every setting
             bash launch/quickstart.sh --text YOUR_FILES              your own text
             python tools/sample.py --run $run --prompt "class "
EOF

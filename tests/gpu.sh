#!/usr/bin/env bash
# Everything that only a GPU shows, in one command; each output stays as a file in RESULTS.
#
#     bash tests/gpu.sh RESULTS [CHECKPOINTS]
#
# CHECKPOINTS (default: RESULTS/checkpoints) gets random weights at full size, 48 GB, and keeps
# them for the next run. The tests and the benchmark need pip install -e ".[test,parity]".
set -uo pipefail # no -e: one failure must not cost the results that follow
if [ $# -lt 1 ]; then
    echo "usage: bash tests/gpu.sh RESULTS [CHECKPOINTS]" >&2
    exit 2
fi
mkdir -p "$1"
results=$(realpath "$1")
checkpoints=$(realpath -m "${2:-$results/checkpoints}")
cd "$(dirname "$0")/.." || exit 2
if ! card=$(python -c 'import torch; print(torch.cuda.get_device_name())'); then
    echo "gpu.sh: torch finds no CUDA device; the last line above says why" >&2
    exit 2
fi
card=${card//[^A-Za-z0-9]/-}
failed=()

# keep NAME COMMAND...: all that COMMAND says goes to a file, the last lines to the terminal too.
keep() {
    local file="$results/$card-$1.txt"
    echo "== $1"
    { date -u; echo "${@:2}"; } > "$file"
    if "${@:2}" >> "$file" 2>&1; then echo "exit code 0" >> "$file"
    else
        echo "exit code $?" >> "$file"
        failed+=("$1")
    fi
    tail -n 12 "$file"
}

benchmark() {
    keep "$1" python tests/benchmark.py "${@:2}" --device cuda --json "$results/$card-$1.json"
}

full_size() { # name, size of the DiT, and what goes to edit.py
    keep "$1" python tests/full_size.py "$checkpoints/$2" weights/shapes/example.png --dit "$2" \
        --stored bfloat16 --dtype bfloat16 --device cuda -o "$results/$card-$1.png" "${@:3}"
}

keep card nvidia-smi
keep packages python -m pip list
keep tests python -m pytest tests/test_device.py -m slow -v

# In float32 the two sides must agree closely; bfloat16 is what people run.
benchmark float32 dit dit-256 vae-image vae-clip mllm edit train --rounds 5
benchmark bfloat16 --dtype bfloat16 --rounds 5
benchmark compiled dit dit-256 edit --dtype bfloat16 --compile --rounds 5

# The first run of each size also writes its checkpoint; the times are those of edit.py alone.
full_size 1.3B 1.3B --size 1024x1024
full_size 1.3B-offload 1.3B --size 1024x1024 --offload
full_size 14B 14B --size 1024x1024
full_size 14B-compiled 14B --size 1024x1024 --compile
full_size 14B-int8 14B --size 1024x1024 --quantize int8
full_size 14B-offload 14B --size 1024x1024 --offload

# Offloading must give the same bytes.
for size in 1.3B 14B; do
    keep "$size-same" cmp "$results/$card-$size.png" "$results/$card-$size-offload.png"
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

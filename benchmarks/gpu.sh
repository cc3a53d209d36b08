#!/usr/bin/env bash
# Everything worth doing on a fresh GPU machine, in about ten minutes: the tests on the device,
# updates on the GPU against those on the CPU, the speed table with peak memory, stacked seeds,
# and then real runs until the time is over.
#
#     benchmarks/gpu.sh OUT [CORL]
#
# OUT   folder for logs, results and run folders. The same command goes on where it was stopped:
#       a step that has ended leaves OUT/STEP.done, a run is resumed.
# CORL  a checkout of upstream CORL, for the ratios to it.
# PYTHON (python3) has the packages of requirements-dev.txt. MINUTES (10) is the time for all.
set -u
cd "$(dirname "$0")/.."
OUT=${1:?folder for the results}
CORL=${2:-}
PYTHON=${PYTHON:-python3}
END=$(($(date +%s) + 60 * ${MINUTES:-10} - 15))
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export CORL_DARE_CACHE=${CORL_DARE_CACHE:-$OUT/cache}

# step NAME SECONDS COMMAND...: runs it with a log, unless it has ended before.
step() {
    local name=$1 limit=$2 left=$((END - $(date +%s)))
    shift 2
    [ -e "$OUT/$name.done" ] && return
    [ "$left" -lt 20 ] && echo "$name: no time left" && return
    [ "$limit" -lt "$left" ] && left=$limit
    echo "== $name"
    timeout "$left" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    tail -n "${TAIL:-25}" "$OUT/$name.log"
    if [ $status = 0 ]; then touch "$OUT/$name.done"; else echo "$name: status $status"; fi
}

upstream=()
[ -n "$CORL" ] && upstream=(--corl "$CORL")
step parity 120 "$PYTHON" benchmarks/device_parity.py --device cuda --out "$OUT/parity.json"
step tests 240 "$PYTHON" -m pytest tests/test_gpu.py -n 4 -q
step speed 240 "$PYTHON" benchmarks/update_speed.py --device cuda --seconds 0.5 --rounds 5 \
    "${upstream[@]}" --out "$OUT/update_speed.json"
step stacked 150 "$PYTHON" benchmarks/stacked_seeds.py --device cuda --out "$OUT/stacked.json"
# Run folders are named after the algorithm, task and seed; a folder that is there goes on.
for seed in 0 1 2 3 4 5 6 7; do
    for algorithm in iql dare_iql; do
        runs=$OUT/runs/$algorithm-$seed
        preset=()
        [ "$algorithm" = dare_iql ] && preset=(--preset cpu)
        if compgen -G "$runs/*/checkpoint.pt" >/dev/null; then
            TAIL=4 step "run-$algorithm-$seed" 300 "$PYTHON" "algorithms/$algorithm.py" \
                --resume "$(echo "$runs"/*)"
        else
            TAIL=4 step "run-$algorithm-$seed" 300 "$PYTHON" "algorithms/$algorithm.py" \
                --config configs/iql/hopper_medium.yaml "${preset[@]}" --seed $seed \
                --device cuda --threads 1 --compile true --dataset_source self-collected \
                --offline_iterations 100000 --online_iterations 20000 --eval_freq 20000 \
                --runs_dir "$runs"
        fi
    done
done

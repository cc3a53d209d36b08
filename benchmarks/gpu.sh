#!/usr/bin/env bash
# Everything worth doing on a fresh GPU machine, in about ten minutes: the tests that need a GPU,
# updates on it against those on the CPU, stacked seeds, the speed table with peak memory, and then
# real runs until the time is over.
#
#     benchmarks/gpu.sh OUT [CORL]
#
# OUT   folder for logs, results and run folders. The same command goes on where it was stopped:
#       a step that has ended leaves OUT/STEP.done, a run is resumed.
# CORL  a checkout of upstream CORL, for the ratios to it.
# PYTHON (python3) has the packages of requirements-dev.txt; MINUTES (10) is the time for all;
# STEPS names the steps to make, in their order. Building fused kernels takes most of the time, so a
# second call with the same OUT may be needed for the later ones.
set -u
cd "$(dirname "$0")/.."
OUT=${1:?folder for the results}
CORL=${2:-}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-tests stacked speed parity runs}
END=$(($(date +%s) + 60 * ${MINUTES:-10} - 15))
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export CORL_DARE_CACHE=${CORL_DARE_CACHE:-$OUT/cache}
# Fused kernels are built once for all steps.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUT/cache/kernels}
JOBS=$(($(nproc) / 2 + 1))

# step NAME SECONDS COMMAND...: runs it with a log, unless it has ended before.
step() {
    local name=$1 limit=$2 left=$((END - $(date +%s))) status
    shift 2
    [ -e "$OUT/$name.done" ] && return
    [ "$left" -lt 20 ] && echo "== $name: no time left" && return
    [ "$limit" -lt "$left" ] && left=$limit
    local start=$SECONDS
    timeout "$left" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    echo "== $name: status $status, $((SECONDS - start)) s"
    tail -n "${TAIL:-40}" "$OUT/$name.log"
    [ $status = 0 ] && touch "$OUT/$name.done"
}

upstream=()
[ -n "$CORL" ] && upstream=(--corl "$CORL")
for part in $STEPS; do
    case $part in
    tests)
        step tests 240 "$PYTHON" -m pytest tests/test_gpu.py -n "$JOBS" -q --tb=short
        ;;
    parity)
        step parity 150 "$PYTHON" benchmarks/device_parity.py --out "$OUT/parity.json"
        ;;
    stacked)
        step stacked 120 "$PYTHON" benchmarks/stacked_seeds.py --device cuda --seconds 1 \
            --rounds 4 --out "$OUT/stacked.json"
        ;;
    speed)
        # One step each: a step that runs out of time keeps nothing.
        for algorithm in iql cal_ql td3_bc awac spot rebrac cql; do
            step "speed-$algorithm" 240 "$PYTHON" benchmarks/update_speed.py --device cuda \
                --algorithms "$algorithm" --seconds 0.4 --rounds 4 "${upstream[@]}" \
                --out "$OUT/speed-$algorithm.json"
        done
        ;;
    runs)
        # 8 seeds in one process, a tenth of the paper's lengths.
        for algorithm in iql dare_iql; do
            preset=()
            [ "$algorithm" = dare_iql ] && preset=(--preset cpu)
            TAIL=12 step "run-$algorithm" 600 "$PYTHON" "algorithms/$algorithm.py" \
                --config configs/iql/hopper_medium.yaml "${preset[@]}" --seeds 0-7 \
                --device cuda --threads 1 --compile true --dataset_source self-collected \
                --offline_iterations "${OFFLINE:-100000}" \
                --online_iterations "${ONLINE:-20000}" --runs_dir "$OUT/runs-$algorithm"
        done
        ;;
    esac
done

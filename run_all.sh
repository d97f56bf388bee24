#!/usr/bin/env bash
# Compute everything from a fresh checkout. Every target can be interrupted and started again;
# finished runs are not repeated.
#
#   ./run_all.sh demo     set up the environment; train a teacher on handwritten digits, then small
#                         students on 100 of them, alone, with KD and with MHKD; print a table:
#                         minutes on a laptop, no download of data
#   ./run_all.sh small    the second study of docs/measurements.md, on small images of CIFAR-100:
#                         about 42 core-hours; METHODS="ce kd mhkd" SEEDS="0 1 2"
#                         PAIRS=wrn_16_2:resnet8: 10 runs
#   ./run_all.sh views    the study of stored teacher outputs: 66 runs after those of small
#   ./run_all.sh table1   all runs of the paper's Table 1 (or table2, table3, all), then the report
#   ./run_all.sh records  copy the records of finished runs to results/
#   ./run_all.sh gpu      the first run on a GPU: kernel, its tests, benchmarks, two epochs; eight
#                         minutes at most, no network; the report is OUT/report.md (default: runs/gpu)
#   ./run_all.sh test     set up the environment and run the tests
#   ./run_all.sh setup    set up the environment: dependencies and the compiled loss
#
# small, views and the tables with --dry-run: print the commands, and how many runs are done.
#
# The Python interpreter is PYTHON (default: python3). If it lacks dependencies, they are installed
# into a virtual environment, VENV (default: .venv).
#
# Variables for studies and tables: SEEDS="0 1 2"; EPOCHS; PAIRS="wrn_40_2:wrn_16_2 vgg13:vgg8";
# METHODS="ce kd mhkd", rows of that target; OPTIONS="--subset 1000" (any options of mhkd.py);
# DATA, the folder of the data (default: data); JOBS, the number of runs at a time (default: 1;
# studies: one per core). OUT is the folder of the runs (default: runs; demo: runs/demo).
set -euo pipefail
cd "$(dirname "$0")"

PACKAGES=(torch torchvision numpy ninja pybind11 'setuptools>=70.1' pytest hypothesis tqdm
    scikit-learn scipy matplotlib)
MODULES=(torch torchvision numpy ninja pybind11 setuptools pytest hypothesis tqdm sklearn scipy
    matplotlib)
VENV=${VENV:-.venv}

run() { # print a command, then run it
    printf '+ %s\n' "$*"
    "$@"
}

has_dependencies() {
    "$1" - "${MODULES[@]}" <<'EOP'
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
EOP
}

# No part may be a condition (`setup && demo`): bash ignores `set -e` in what it runs for one.
setup() {
    dependencies
    kernel
}

dependencies() { # sets `python`
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "run_all.sh: Python 3.10 or newer is needed: set PYTHON to one" >&2
        exit 1
    fi
    if ! has_dependencies "$python"; then environment; fi
}

environment() { # a virtual environment
    if [ ! -x "$VENV/bin/python" ]; then run "$python" -m venv "$VENV"; fi
    python=$VENV/bin/python
    if has_dependencies "$python"; then return; fi
    run "$python" -m pip install --quiet --disable-pip-version-check "${PACKAGES[@]}"
}

kernel() { # compile the fused loss, beside mhkd.py; everything also works without it
    local library=_mhkd_fused.so log=build/kernel.log version
    if [ -e "$library" ] && [ -z "$(find csrc setup.py -newer "$library")" ]; then
        version=$("$python" mhkd.py --version) # with `| grep -q` pipefail would see a closed pipe
        if [[ $version == *'loss: fused'* ]]; then return; fi
    fi
    mkdir -p build
    echo "+ $python setup.py build_ext --inplace  (some minutes; its output is written to $log)"
    if "$python" setup.py build_ext --inplace >"$log" 2>&1 && ! grep -q 'is left out' "$log"; then
        touch -c "$library" # setup.py does not write it again if only the time was old
    else
        echo "run_all.sh: the fused loss could not be compiled, see $log: it is not used" >&2
    fi
    grep '^mhkd: ' "$log" || true
    "$python" mhkd.py --version
}

demo() { # KD and MHKD have the same weights on the final outputs, so that only the heads differ
    local OUT=${OUT:-runs/demo} seed
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads do not help networks of this size
    local digits=("$python" mhkd.py --dataset digits --out "$OUT")
    local student=("${digits[@]}" --student resnet8 --subset 100 --epochs 80)
    local teacher=$OUT/digits-resnet20-ce-seed0-epochs=8/student.pt
    local taught=(--teacher resnet20 --teacher-weights "$teacher" --gamma 1 --kd-weight 1)
    run "${digits[@]}" --student resnet20 --method ce --epochs 8
    for seed in 0 1 2; do
        run "${student[@]}" --seed $seed --method ce
        run "${student[@]}" --seed $seed --method kd "${taught[@]}"
        run "${student[@]}" --seed $seed --method mhkd "${taught[@]}"
    done
    run "$python" mhkd_tables.py report "$OUT"
    cat <<'EOT'

The teacher is trained on all 1,437 digits, the students on 100. Both distilled students (kd, mhkd)
are about three points above the student alone, with wide intervals for three seeds. This small task
shows no difference between kd and mhkd: docs/measurements.md has a study that compares them.
EOT
}

option() { # add an option to `arguments` if its value is not empty
    if [ -n "$2" ]; then arguments+=("$1" "$2"); fi
}

tables() { # compute the runs of tables, which mhkd_tables.py lists, and their report
    if [ "${2:---dry-run}" != --dry-run ]; then
        echo "run_all.sh: there is --dry-run, not $2" >&2
        exit 2
    fi
    # shellcheck disable=SC2206 # OPTIONS is split into words
    local arguments=(run "$1" "${@:2}" ${OPTIONS:-})
    option --seeds "$(commas "${SEEDS:-}")"
    option --epochs "${EPOCHS:-}"
    option --pairs "$(commas "${PAIRS:-}")"
    option --methods "$(commas "${METHODS:-}")"
    option --data "${DATA:-}"
    option --out "${OUT:-}"
    option --jobs "${JOBS:-}"
    if [ $# = 1 ]; then kernel; fi
    exec "$python" mhkd_tables.py "${arguments[@]}" # exec: it gets the signals
}

records() { # copy the small files of finished runs to the repository, paths reduced to names
    "$python" - "${OUT:-runs}" <<'EOF'
import shutil, sys
from pathlib import Path
import mhkd_runs
for path in sorted(Path(sys.argv[1]).glob("*/result.json")):
    record, folder = mhkd_runs.read_json(path), Path("results") / path.parent.name
    record.pop("sha256", None)  # in older records: of the file before this change
    for here in record["environments"]:
        keys = ("data", "out", "teacher_weights", "unlabelled")
        here |= {key: Path(here[key]).name for key in keys if here.get(key)}
    folder.mkdir(parents=True, exist_ok=True)
    mhkd_runs.write_json(folder / "result.json", record)
    shutil.copy(path.with_name("log.jsonl"), folder)
    print(folder.name)
EOF
}

commas() { # "a b c" as a,b,c
    # shellcheck disable=SC2086
    set -- $1
    local IFS=,
    echo "$*"
}

# Without setup, which may need the network. Every part has a time limit, so that none stops another.
gpu() {
    python=${PYTHON:-python3} OUT=${OUT:-runs/gpu} DATA=${DATA:-data} failed=0
    if [ -z "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then python=$VENV/bin/python; fi
    mkdir -p "$OUT"
    report=$OUT/report.md
    available=$("$python" -c 'import torch; print(torch.cuda.is_available())' || true)
    {
        printf '# Run on a GPU\n\n%s, commit %s\n\n```text\n' "$(date -u '+%F %R UTC')" \
            "$(git describe --always --dirty 2>/dev/null || echo unknown)"
        uname -srm
        grep -m 1 'model name' /proc/cpuinfo || true
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
        nvcc --version | tail -n 1 || true
        "$python" -V
        "$python" -c 'import torch; print("PyTorch", torch.__version__, "CUDA", torch.version.cuda)'
        printf '```\n'
    } >"$report" 2>&1 || true

    local small='import torch, mhkd, mhkd_fused
problem = mhkd_fused.check("cuda", mhkd._reference_loss)
assert not problem, problem'
    local step=("$python" bench.py step --methods mhkd --rounds 10 --pairs)
    local main=resnet32x4:shufflenetv2
    local pairs=wrn_40_2:wrn_16_2,resnet110:resnet20,vgg13:vgg8,vgg13:mobilenetv2,$main
    local job=("$python" mhkd.py --epochs 2 --overwrite --out "$OUT" --teacher resnet32x4)
    job+=(--student shufflenetv2)
    # Without CIFAR-100 on this machine the digits of scikit-learn, which need no download.
    if [ -d "$DATA/cifar-100-python" ]; then job+=(--data "$DATA"); else job+=(--dataset digits); fi
    part build 90 "$python" setup.py build_ext --inplace --force
    part tests 70 "$python" -m pytest -q -rs tests/test_fused_loss.py tests/test_linear_loss.py -k cuda
    part memcheck 30 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -c "$small"
    part racecheck 30 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -c "$small"
    part loss 90 "$python" -c 'import bench; bench.SECONDS = 1.0; bench.main()' loss \
        --json "$OUT/loss.json"
    part step-float32 35 "${step[@]}" "$pairs" --precision float32 --json "$OUT/float32.json"
    part step-bfloat16 35 "${step[@]}" "$pairs" --precision bfloat16 --json "$OUT/bfloat16.json"
    part step-compile 45 "${step[@]}" "$main" --precision bfloat16 --compile
    part main-job 50 "${job[@]}"
    echo "run_all.sh: the report is $report"
    return $failed
}

part() { # name, seconds, command: run it and append the result to the report of gpu
    local name=$1 limit=$2 log=$OUT/$1.log status=0 start=$SECONDS state
    shift 2
    rm -f "$log" # of an earlier run
    if [ "$available" != True ]; then
        state='no GPU'
    elif ! command -v "$1" >/dev/null; then
        state="there is no $1"
    else
        printf '+ %s\n' "$*"
        timeout --kill-after=2 "$limit" "$@" >"$log" 2>&1 || status=$?
        case $status in
            0) state=passed ;;
            124 | 137) state='stopped at its limit' ;;
            *) state="failed, exit status $status" ;;
        esac
        if [ "$status" != 0 ]; then failed=1; fi
    fi
    echo "$name: $state"
    {
        printf '\n## %s: %s\n\n%d s, limit %d s\n' "$name" "$state" $((SECONDS - start)) "$limit"
        if [ -e "$log" ]; then printf '\n```text\n%s\n```\n' "$(tail -n 60 "$log")"; fi
    } >>"$report"
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; } # the comment at the top

case "${1:-help}" in
    setup) setup ;;
    demo) setup; demo ;;
    gpu) gpu ;;
    test) setup; run "$python" -m pytest -q "${@:2}" ;;
    small | views | table1 | table2 | table3) dependencies; tables "$@" ;;
    all) dependencies; tables table1,table2,table3 "${@:2}" ;;
    records) dependencies; records ;;
    help | -h | --help) usage ;;
    *)
        echo "run_all.sh: there is no target '$1'; the targets are demo, small, table1, table2," \
            "table3, all, views, records, gpu, test, setup" >&2
        usage >&2
        exit 2
        ;;
esac

#!/usr/bin/env bash
# Everything from a fresh checkout. Each part can be stopped and run again; nothing is done twice.
#
#   ./run_all.sh demo     environment, then teacher, plain, KD and MHKD student on handwritten
#                         digits, a table and a picture: minutes on a laptop, no download of data
#   ./run_all.sh small    the study of docs/measurements.md on small images of CIFAR-100: about
#                         18 core-hours; METHODS="ce kd mhkd" SEEDS="0 1 2" takes about one
#   ./run_all.sh table1   all runs of the paper's Table 1 (or table2, table3, all), then the report
#   ./run_all.sh records  copies the records of what has run to results/
#   ./run_all.sh test     environment, then the tests
#   ./run_all.sh setup    the environment alone
#
# With --dry-run, small and the tables print their commands, and how many are done.
# An environment that has the dependencies is used as it is (PYTHON names its interpreter, by default
# python3); otherwise they are installed into .venv here (or into VENV).
#
# The study and the tables can be narrowed or shortened: SEEDS="0 1 2", EPOCHS,
# PAIRS="wrn_40_2:wrn_16_2 vgg13:vgg8", METHODS="ce kd mhkd mhkd:1" (mhkd:1 is one head, of unit 1),
# OPTIONS="--subset 1000" (any of mhkd.py's). DATA is the folder of the data, OUT that of the runs,
# JOBS how many runs go side by side: by default 1, for the study one a core.
set -euo pipefail
cd "$(dirname "$0")"

PACKAGES=(torch torchvision numpy ninja pybind11 setuptools pytest hypothesis tqdm scikit-learn scipy
    matplotlib)
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
setup() { # sets `python`
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "run_all.sh: Python 3.10 or newer is needed: set PYTHON to one" >&2
        exit 1
    fi
    if ! has_dependencies "$python"; then environment; fi
    kernel
}

environment() { # one of our own
    if [ ! -x "$VENV/bin/python" ]; then run "$python" -m venv "$VENV"; fi
    python=$VENV/bin/python
    if has_dependencies "$python"; then return; fi
    run "$python" -m pip install --quiet --disable-pip-version-check "${PACKAGES[@]}"
}

kernel() { # the fused loss, built here beside mhkd.py; where it cannot be, all works without it
    local built=mhkd_fused.so log=build/kernel.log
    if [ -e "$built" ] && [ -z "$(find csrc setup.py -newer "$built")" ] && fused; then return; fi
    mkdir -p build
    echo "+ $python setup.py build_ext --inplace  (some minutes; its output goes to $log)"
    if "$python" setup.py build_ext --inplace >"$log" 2>&1 && ! grep -q 'is left out' "$log"; then
        touch -c "$built" # what was up to date is not written anew
    else
        echo "run_all.sh: the fused loss could not be built, see $log: it goes on without" >&2
    fi
    grep '^mhkd: ' "$log" || true
    "$python" mhkd.py --version
}

fused() { "$python" mhkd.py --version | grep -q 'loss: fused'; }

demo() {
    local OUT=${OUT:-runs/demo}
    local common=(--dataset digits --epochs 8 --out "$OUT")
    run "$python" mhkd.py --student resnet20 --method ce "${common[@]}" # the teacher
    run "$python" mhkd.py --student resnet8 --method ce "${common[@]}"
    run "$python" mhkd.py --teacher resnet20 --student resnet8 --method kd "${common[@]}"
    run "$python" mhkd.py --teacher resnet20 --student resnet8 --method mhkd "${common[@]}"
    run "$python" mhkd_tables.py report "$OUT"
}

small() {
    export OMP_NUM_THREADS=1 # of the protocol: results depend on it in the last bits
    JOBS=${JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
    tables small "$@"
}

tables() { # the runs of these tables, side by side as JOBS says, and their report
    if [ -n "${2:-}" ] && [ "$2" != --dry-run ]; then
        echo "run_all.sh: there is --dry-run, not $2" >&2
        exit 2
    fi
    local plan done_runs todo state phase command
    export python OUT=${OUT:-runs} JOBS=${JOBS:-1}
    export logs=$OUT/logs
    local arguments=(plan "$1" --out "$OUT")
    if [ -n "${SEEDS:-}" ]; then arguments+=(--seeds "$(commas "$SEEDS")"); fi
    if [ -n "${EPOCHS:-}" ]; then arguments+=(--epochs "$EPOCHS"); fi
    if [ -n "${DATA:-}" ]; then arguments+=(--data "$DATA"); fi
    if [ -n "${PAIRS:-}" ]; then arguments+=(--pairs "$(commas "$PAIRS")"); fi
    if [ -n "${METHODS:-}" ]; then arguments+=(--methods "$(commas "$METHODS")"); fi
    # shellcheck disable=SC2206 # OPTIONS is meant to be split into words
    arguments+=(${OPTIONS:-})
    # lines of: done or todo, teacher or student, arguments
    plan=$("$python" mhkd_tables.py "${arguments[@]}")
    done_runs=$(grep -c '^done' <<<"$plan" || true)
    local all_runs=$(($(wc -l <<<"$plan")))
    if [ "$1" = small ]; then
        local minutes=$(((all_runs - done_runs) * 6 / JOBS))
        echo "$((all_runs - done_runs)) runs, $JOBS at a time: about $((minutes / 60)) h" \
            "$((minutes % 60)) min, at the protocol's length and 6 minutes a run"
    fi
    if [ "${2:-}" = --dry-run ]; then
        while IFS=$'\t' read -r state phase command; do
            echo "$state  python mhkd.py $command"
        done <<<"$plan"
        echo "$done_runs of $all_runs runs are done"
        return
    fi
    mkdir -p "$logs"
    : >"$logs/failed"
    # Runs on the CPU that are all given every core stand in each other's way.
    if [ "$JOBS" -gt 1 ]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + JOBS - 1) / JOBS))}
    fi
    echo "$done_runs of $all_runs runs are done; what the others print goes to $logs, too"
    export -f one_run
    for phase in teacher student; do # a teacher is trained once, before those that it teaches
        todo=$(grep -n "^todo.$phase" <<<"$plan" | sed 's/:todo.[a-z]*//' || true)
        if [ -z "$todo" ]; then continue; fi # xargs would run once on nothing
        tr '\n' '\0' <<<"$todo" | xargs -0 -P "$JOBS" -n 1 bash -c 'one_run "$0"'
    done
    run "$python" mhkd_tables.py report "$OUT" || true # nothing to report where all have failed
    if [ -s "$logs/failed" ]; then
        echo "failed:" >&2
        cat "$logs/failed" >&2
        return 1
    fi
}

one_run() { # "number<tab>arguments": a failure is noted and does not stop the others
    local number=${1%%$'\t'*} arguments=${1#*$'\t'}
    local log=$logs/$number.log status
    echo "+ python mhkd.py $arguments"
    eval "set -- $arguments"
    "$python" mhkd.py "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]} # of mhkd.py, not of tee
    if [ "$status" -eq 130 ]; then exit 255; fi # interrupted: xargs starts no further one
    if [ "$status" -ne 0 ]; then
        local last
        last=$(grep -v '^ *$' "$log" | tail -n 1)
        echo "  python mhkd.py $arguments: $last" >>"$logs/failed"
    fi
}

records() { # the small files of what has run, to be kept in the repository, without its folders
    "$python" - "${OUT:-runs}" <<'EOF'
import shutil, sys
from pathlib import Path
import mhkd
for path in sorted(Path(sys.argv[1]).glob("*/result.json")):
    record, folder = mhkd.read_json(path), Path("results") / path.parent.name
    for here in record["environments"]:
        here |= {key: Path(here[key]).name for key in ("data", "out", "teacher_weights") if here[key]}
    folder.mkdir(parents=True, exist_ok=True)
    mhkd.write_json(folder / "result.json", record)
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

usage() { sed -n '2,23s/^# \{0,1\}//p' "$0"; }

case "${1:-help}" in
    setup) setup ;;
    demo) setup; demo ;;
    test) setup; run "$python" -m pytest -q "${@:2}" ;;
    small) setup; small "${@:2}" ;;
    table1 | table2 | table3) setup; tables "$1" "${2:-}" ;;
    all) setup; tables table1,table2,table3 "${2:-}" ;;
    records)
        setup
        records
        ;;
    help | -h | --help) usage ;;
    *)
        echo "run_all.sh: there is no '$1': there are demo, small, table1, table2, table3, all," \
            "records, test, setup" >&2
        usage >&2
        exit 2
        ;;
esac

#!/usr/bin/env bash
# Everything from a fresh checkout. Each part can be stopped and run again; nothing is done twice.
#
#   ./run_all.sh demo     environment, then teacher, plain, KD and MHKD student on handwritten digits,
#                         a table of them and a picture of the curves: minutes on a laptop, no download of data
#   ./run_all.sh test     environment, then the tests
#   ./run_all.sh setup    the environment alone
#
# An environment that has the dependencies is used as it is (PYTHON names its interpreter, by default python3);
# otherwise they are installed into .venv here (or into VENV).
set -euo pipefail
cd "$(dirname "$0")"

PACKAGES=(torch torchvision numpy ninja pybind11 setuptools pytest hypothesis tqdm scikit-learn scipy matplotlib)
MODULES="torch torchvision numpy ninja pybind11 setuptools pytest hypothesis tqdm sklearn scipy matplotlib"
OUT=${OUT:-runs/demo}
VENV=${VENV:-.venv}

run() { # print a command, then run it
    printf '+ %s\n' "$*"
    "$@"
}

has_dependencies() {
    "$1" - $MODULES <<'EOF'
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
EOF
}

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

kernel() { # the fused loss, built here beside mhkd.py; where it cannot be built everything works without it
    local built=mhkd_fused.so log=build/kernel.log
    if [ -e "$built" ] && [ -z "$(find csrc setup.py -newer "$built")" ] && fused; then return; fi
    mkdir -p build
    echo "+ $python setup.py build_ext --inplace  (some minutes; its output goes to $log)"
    "$python" setup.py build_ext --inplace >"$log" 2>&1 || true
    grep '^mhkd: ' "$log" || true
    touch -c "$built"
    "$python" mhkd.py --version
}

fused() { "$python" mhkd.py --version | grep -q 'loss: fused'; }

demo() {
    local common=(--dataset digits --epochs 12 --out "$OUT")
    run "$python" mhkd.py --student resnet20 --method ce "${common[@]}" # the teacher
    run "$python" mhkd.py --student resnet8 --method ce "${common[@]}"
    run "$python" mhkd.py --teacher resnet20 --student resnet8 --method kd "${common[@]}"
    run "$python" mhkd.py --teacher resnet20 --student resnet8 --method mhkd "${common[@]}"
    run "$python" mhkd.py --report "$OUT"
}

case "${1:-help}" in
    setup) setup ;;
    demo) setup && demo ;;
    test) setup && run "$python" -m pytest -q "${@:2}" ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" ;;
esac

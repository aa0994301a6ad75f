#!/usr/bin/env bash
# `bash tools/test.sh` checks format, lint and types and runs the suite; `slow` runs the long tests, `gpu` those for a
# CUDA device. More arguments go to pytest.
set -eu
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case "${1:-}" in
slow | gpu)
    mark=$1
    shift
    exec python -m pytest -m "$mark" --timeout 3600 "$@"
    ;;
*)
    ruff format --check --quiet zoo pretrain tools tests || {
        echo "run ruff format zoo pretrain tools tests" >&2
        exit 1
    }
    ruff check --quiet zoo pretrain tools tests
    pyrefly check --output-format min-text
    # a test file may start two processes of its own: more workers than this only make tests wait for each other; a file
    # stays with one worker, so that what its tests share is made once, in the order of tests/conftest.py
    exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
    ;;
esac

#!/usr/bin/env bash
# Makes .venv from constraints.txt, once, and activates it for the script that sources this file.
# An environment that is active already is used instead. Alone: bash tools/setup.sh
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
# uv leaves it to the first import to compile a module; where nothing may be kept, each process would do it again
export PYTHONDONTWRITEBYTECODE=

if [ -z "${VIRTUAL_ENV:-}" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

stamp="$VIRTUAL_ENV/.early-fusion-zoo"
wanted="$root $(cat setup.cfg pyproject.toml constraints.txt | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $VIRTUAL_ENV (a minute or a few, once)"
    pip="python -m pip --disable-pip-version-check"
    # uv is several times quicker than pip; it does not read pip's settings, so the one that matters is handed on
    $pip install --quiet --constraint constraints.txt uv &&
        UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" python -m uv pip install --quiet \
            --constraint constraints.txt torch --editable ".[dev]" || {
        echo "note: uv could not install; going on with pip, which takes minutes" >&2
        # torch first and by its exact version: a range would take the newest build with all of CUDA
        $pip install --quiet --constraint constraints.txt torch &&
            $pip install --quiet --constraint constraints.txt --editable ".[dev]" || exit 1
    }
    # the Python files of mamba-ssm and causal-conv1d, which tests and benchmarks compare with; unpacked, not installed:
    # they need CUDA
    rm -rf .peers && mkdir .peers &&
        MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE $pip download --quiet \
            --constraint constraints.txt --no-deps --no-build-isolation --no-binary mamba-ssm,causal-conv1d \
            --dest .peers mamba-ssm causal-conv1d &&
        tar -xzf .peers/mamba_ssm-*.tar.gz -C .peers --strip-components 1 &&
        tar -xzf .peers/causal_conv1d-*.tar.gz -C .peers --strip-components 1 ||
        echo "note: mamba-ssm's or causal-conv1d's source could not be fetched; comparisons are skipped" >&2
    echo "$wanted" >"$stamp"
fi

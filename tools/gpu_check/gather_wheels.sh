#!/usr/bin/env bash
# Gathers what a GPU machine without a package registry lacks to run this project: wheels for Python 3.12 on x86-64,
# DeepSpeed without its compiled operations, and the source of the two CUDA extensions. About 6 MB; torch with CUDA must
# be there already. Where the registry is, from the project's root:
#   bash tools/gpu_check/gather_wheels.sh FOLDER
# FOLDER then travels. There:
#   python3 -m pip install --no-index --no-deps --no-compile --upgrade --target SITE FOLDER/*.whl
#   export PYTHONPATH=SITE
set -eu
out=$1
mkdir -p "$out"
pin() { grep -iE "^$1==" constraints.txt || echo "$1"; }
pip="python3 -m pip --disable-pip-version-check"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 17)
for name in pydantic pydantic_core typing_inspection typing_extensions annotated-types webdataset braceexpand einops \
    hjson; do
    # shellcheck disable=SC2086
    $pip download --quiet --no-deps --dest "$out" --only-binary=:all: --python-version 3.12 --implementation cp \
        $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$(pin $name)"
done
ls "$out"/deepspeed-*.whl >/dev/null 2>&1 ||
    DS_BUILD_OPS=0 $pip wheel --quiet --no-deps --wheel-dir "$out" "$(pin deepspeed)"
# no build isolation: asking for their version would otherwise fetch all of CUDA; setuptools and wheel must be there
MAMBA_SKIP_CUDA_BUILD=TRUE $pip download --quiet --no-deps --dest "$out" --no-build-isolation \
    --no-binary mamba-ssm "$(pin mamba-ssm)"
CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE $pip download --quiet --no-deps --dest "$out" --no-build-isolation \
    --no-binary causal-conv1d "$(pin causal-conv1d)"
ls -la "$out"

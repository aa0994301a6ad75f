#!/usr/bin/env bash
# Builds causal-conv1d and mamba-ssm from source for one architecture and installs them for this interpreter.
#   bash tools/gpu_check/build_extensions.sh WHEELS 90 [FOLDER]    (90: compute capability 9.0; FOLDER: pip's --target)
# Their own build files name nine architectures whatever TORCH_CUDA_ARCH_LIST says: twenty minutes instead of two.
set -eu
wheels=$(cd "$1" && pwd)
architecture=$2
target=${3:-${GPU_CHECK_SITE:-}}
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" NVCC_THREADS=1 CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
work=$(mktemp -d)
build() {
    mkdir "$work/$1" && tar -xzf "$wheels"/"$1"-*.tar.gz -C "$work/$1" --strip-components 1
    sed -i "s/+ cc_flag/+ ['-gencode', 'arch=compute_$architecture,code=sm_$architecture']/" "$work/$1/setup.py"
    python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --no-cache-dir \
        ${target:+--target "$target"} "$work/$1"
}
build causal_conv1d &
first=$!
build mamba_ssm
wait $first
python3 -c "import causal_conv1d, mamba_ssm.ops.selective_scan_interface; print('both load')"

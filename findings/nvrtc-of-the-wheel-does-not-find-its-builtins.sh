#!/usr/bin/env bash
# The PyPI wheel of NVRTC puts libnvrtc.so.13 and libnvrtc-builtins.so.13.0 into one folder, but the first has no run path
# and opens the second by its bare name: loaded by absolute path, as a program without PyTorch has to, it compiles nothing.
# `nvrtcCreateProgram` succeeds; `nvrtcCompileProgram` of any kernel fails. Opening the builtins by absolute path first is
# enough (the loader then finds them by their soname); no environment variable is needed.
#
# Seen with nvidia-cuda-nvrtc 13.0.88 (PyPI), Linux x86-64, 2026-11-28:
#   nvrtc alone:    NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
#   builtins first: NVRTC_SUCCESS
# Needs Python 3; no GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q nvidia-cuda-nvrtc==13.0.88
folder=$(echo "$PWD"/venv/lib/python3*/site-packages/nvidia/cu13/lib)
cat > compile.py <<'PYTHON'
import ctypes
import sys

folder, order = sys.argv[1:]
if order == "builtins first":
    ctypes.CDLL(f"{folder}/libnvrtc-builtins.so.13.0")
nvrtc = ctypes.CDLL(f"{folder}/libnvrtc.so.13")
nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
program = ctypes.c_void_p()
source = b'extern "C" __global__ void one(float *x) { x[0] = 1.0f; }'
created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"one.cu", 0, None, None)
assert created == 0, created
options = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_90a")
compiled = nvrtc.nvrtcCompileProgram(program, 1, options)
print(f"{order}: {nvrtc.nvrtcGetErrorString(compiled).decode()}")
PYTHON
# A library path of the caller's could hide it.
unset LD_LIBRARY_PATH
{
    venv/bin/python compile.py "$folder" "nvrtc alone"
    venv/bin/python compile.py "$folder" "builtins first"
} | tee seen
diff - seen <<'WANTED'
nvrtc alone: NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
builtins first: NVRTC_SUCCESS
WANTED

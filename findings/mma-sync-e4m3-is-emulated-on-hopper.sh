#!/usr/bin/env bash
# The PTX instruction `mma.sync` with e4m3 operands is one FP8 tensor-core instruction on Ada (sm_89) and on consumer
# Blackwell (sm_120a), but on Hopper (sm_90a) and data-centre Blackwell (sm_100a) ptxas takes it apart: every operand is
# unpacked to FP16 and two FP16 products are issued. No warning says so, in spite of both chips having faster FP8 units.
#
# Seen with nvidia-cuda-nvcc 13.0.88 and nvidia-cuda-nvdisasm 13.2.51 (PyPI), 2026-11-28:
#   sm_89    1 QMMA    0 HMMA    0 unpack
#   sm_90a   0 QMMA    2 HMMA   12 unpack
#   sm_100a  0 QMMA    2 HMMA   12 unpack
#   sm_120a  1 QMMA    0 HMMA    0 unpack
# What it means: a kernel for an H100 or H200 that uses `mma.sync` for FP8 runs at FP16 rate, and its sums are not those of
# `wgmma` (FP16 products are exact here and accumulate in F32; the FP8 units keep fewer bits), so the two never mix in one
# numerics class. Needs Linux x86-64 and Python 3; no GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvdisasm==13.2.51
bin=$(echo venv/lib/python3*/site-packages/nvidia/cu13/bin)
cat > product.cu <<'CU'
extern "C" __global__ void product(const unsigned *a, const unsigned *b, float *d) {
  float c[4] = {0, 0, 0, 0};
  unsigned t = threadIdx.x;
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[t]), "r"(a[t + 32]), "r"(a[t + 64]), "r"(a[t + 96]), "r"(b[t]), "r"(b[t + 32]));
  for (int i = 0; i < 4; i++) d[4 * t + i] = c[i];
}
CU
count() { grep -cE "\b$1" listing || true; }
changed=0
while read -r arch qmma hmma unpack; do
    "$bin/nvcc" -gencode="arch=compute_$arch,code=sm_$arch" -cubin -o product.cubin product.cu
    "$bin/nvdisasm" product.cubin > listing
    seen="$(count QMMA) $(count HMMA) $(count 'F2FP\.F16\.E4M3\.UNPACK')"
    echo "sm_$arch: QMMA, HMMA, unpack = $seen"
    [ "$seen" = "$qmma $hmma $unpack" ] || { echo "  changed: $qmma $hmma $unpack was seen before"; changed=1; }
done <<'TABLE'
89 1 0 0
90a 0 2 12
100a 0 2 12
120a 1 0 0
TABLE
exit "$changed"

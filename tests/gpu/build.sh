#!/usr/bin/env bash
# Puts everything that tests/gpu/run.sh runs into a folder (default: gpu in cargo's target folder): executables, machine
# code and the checkpoint. Needs cargo and, once, the network; run.sh needs neither. PROFILE names another profile than dev,
# CARGO another cargo.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${PROFILE:-dev}
cargo=${CARGO:-cargo}
target=$("$cargo" metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
out=${1:-$target/gpu}
"$cargo" run -q -p xtask --locked -- kernels --tests
executables() {
    "$@" --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}
rm -rf "$out"
mkdir -p "$out/kernels" "$out/models"
executables "$cargo" test --profile "$profile" -p cadre-ops-cuda --test device --no-run |
    while read -r name path; do if [ "$name" = device ]; then cp "$path" "$out/device"; fi; done
executables "$cargo" build --profile "$profile" -p cadre --bin cadre |
    while read -r name path; do if [ "$name" = cadre ]; then cp "$path" "$out/cadre"; fi; done
# A shard's thread is lost in a shared process: a test of the worker's crate that can be told a device.
executables "$cargo" test --profile "$profile" -p cadre-worker --test worker --no-run |
    while read -r name path; do if [ "$name" = worker ]; then cp "$path" "$out/worker"; fi; done
executables "$cargo" build --profile "$profile" -p cadre-model --example distances --example memory |
    while read -r name path; do case $name in distances | memory) cp "$path" "$out/$name" ;; esac; done
strip "$out/device" "$out/worker" "$out/cadre" "$out/distances" "$out/memory"
cp -r "$target/kernels/sm_90a" "$target/kernels/tests" "$out/kernels/"
rm -f "$out"/kernels/sm_90a/*.log
cp -r models/pocket "$out/models/"
mkdir -p "$out/tests/golden"
cp tests/golden/*.safetensors "$out/tests/golden/"
cp tests/gpu/run.sh tests/gpu/processes.sh tests/gpu/v3.sh "$out/"
tests/gpu/v3.py "$out/models/v3"
du -sh "$out"

#!/usr/bin/env bash
# Puts everything that tests/gpu/run.sh runs into a folder (default: gpu in cargo's target folder): executables, machine
# code and the checkpoint. Needs cargo and, once, the network; run.sh needs neither.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${PROFILE:-dev}
target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
out=${1:-$target/gpu}
cargo xtask kernels --tests
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
executables cargo test --profile "$profile" -p cadre-ops-cuda --test device --no-run |
    while read -r name path; do [ "$name" = device ] && cp "$path" "$out/device"; done
executables cargo build --profile "$profile" -p cadre --bin cadre |
    while read -r name path; do [ "$name" = cadre ] && cp "$path" "$out/cadre"; done
executables cargo build --profile "$profile" -p cadre-model --example distances |
    while read -r name path; do [ "$name" = distances ] && cp "$path" "$out/distances"; done
strip "$out/device" "$out/cadre" "$out/distances"
cp -r "$target/kernels/sm_90a" "$target/kernels/tests" "$out/kernels/"
rm -f "$out"/kernels/sm_90a/*.log
cp -r models/pocket "$out/models/"
mkdir -p "$out/tests/golden"
cp tests/golden/*.safetensors "$out/tests/golden/"
cp tests/gpu/run.sh tests/gpu/processes.sh "$out/"
du -sh "$out"

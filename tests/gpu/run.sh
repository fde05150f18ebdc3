#!/usr/bin/env bash
# Everything that needs the card, from the folder that tests/gpu/build.sh made: no cargo, no network. Ends with
# `N passed, N failed`, and with that as its exit status. `--sanitize` adds compute-sanitizer over the conformance suite.
set -uo pipefail
cd "$(dirname "$0")"
logs=${LOGS:-logs}
mkdir -p "$logs"
passed=0
failed=0

# held NAME COMMAND: one check, its output in a log.
held() {
    local name=$1
    shift
    if "$@" >"$logs/$name.log" 2>&1; then
        echo "ok      $name"
        passed=$((passed + 1))
    else
        echo "FAILED  $name (exit $?)"
        tail -n 5 "$logs/$name.log" | sed 's/^/        /'
        failed=$((failed + 1))
    fi
}

# counted NAME COMMAND: a program that counts itself and says `N passed, N failed` last.
counted() {
    local name=$1 counts
    shift
    "$@" >"$logs/$name.log" 2>&1
    local status=$?
    counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$logs/$name.log" | tail -n 1)
    if [ -z "$counts" ]; then
        echo "FAILED  $name (exit $status, no count)"
        tail -n 5 "$logs/$name.log" | sed 's/^/        /'
        failed=$((failed + 1))
        return
    fi
    echo "$name: $counts"
    grep -E 'FAILED|^BAD|^bad' "$logs/$name.log" | sed 's/^/        /'
    read -r good _ bad _ <<<"$counts"
    passed=$((passed + good))
    failed=$((failed + bad))
}

# answer DEVICE CLASS SHARDS [FLAG...]: the text of one prompt through a whole cluster, on stdout.
answer() {
    local device=$1 class=$2 shards=$3
    shift 3
    timeout 120 ./cadre up --model models/pocket --device "$device" --numerics "$class" --experts "$shards" "$@" \
        --grpc 127.0.0.1:0 --http 127.0.0.1:0 --exit-after "What is a Pod?" 2>>"$logs/up-$device-$class-$shards.log"
}

# same_text DEVICE CLASS SHARDS DEVICE CLASS SHARDS [FLAG...]: the flags are the second's.
same_text() {
    local one two
    one=$(answer "$1" "$2" "$3") && two=$(answer "${@:4}") || return 1
    printf '%s\n---\n%s\n' "$one" "$two"
    [ -n "$one" ] && [ "$one" = "$two" ]
}

says() {
    local text
    text=$(answer "$1" "$2" "$3") || return 1
    echo "$text"
    grep -qi "pod" <<<"$text"
}

# refused WORDS COMMAND: fails, and says so with the words.
refused() {
    local words=$1 text
    shift
    text=$(timeout 60 "$@" 2>&1) && return 1
    echo "$text"
    grep -qF -- "$words" <<<"$text"
}

if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
    echo "NOTICE: no nvidia-smi here"
fi

counted conformance timeout 300 ./device --require-device
for program in kernels/tests/*; do
    counted "kernels-$(basename "$program")" timeout 120 "$program" check
done
counted distances timeout 300 ./distances --cuda --root .
for class in f32 bf16 fp8; do
    held "text-of-$class-is-the-processors" same_text cuda:0 "$class" 2 cpu "$class" 2
done
held answer-in-cuda-fp8 says cuda:0 cuda-fp8 2
for shards in 1 4; do
    held "cuda-fp8-$shards-shards-same-text" same_text cuda:0 cuda-fp8 2 cuda:0 cuda-fp8 "$shards"
done
held cuda-fp8-copies-same-text same_text cuda:0 cuda-fp8 2 cuda:0 cuda-fp8 4 --redundant-slots 8
for class in cuda-fp8 bf16; do
    CLASS=$class LOGS=$logs/$class counted "processes-$class" timeout 200 ./processes.sh
done
for class in cuda-fp8 bf16; do
    held "shard-thread-lost-$class" env CADRE_TEST_DEVICE=cuda:0 CADRE_TEST_NUMERICS="$class" CADRE_TEST_MODEL=models/pocket \
        timeout 120 ./worker shared::a_lost
done
source ./v3.sh
held no-such-device refused "no device cuda:63" ./cadre up --model models/pocket --device cuda:63 --exit-after "x"
held class-of-gpus-on-cpu refused "cuda-fp8" ./cadre up --model models/pocket --device cpu --numerics cuda-fp8 --exit-after "x"

if [ "${1:-}" = --sanitize ]; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck initcheck racecheck; do
            # Asking a kernel for an argument that it does not have is how the loader counts them: no error of ours.
            held "$tool" timeout 240 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
                ./device --require-device --cases 0 --skip alone,published
        done
    else
        echo "NOTICE: no compute-sanitizer here: memcheck, initcheck and racecheck not run"
        failed=$((failed + 1))
    fi
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

#!/usr/bin/env bash
# Workers and shards on the card as processes: in one, in several, lost, mixed with what does not fit, and without room.
# From the folder that build.sh made; ends with `N passed, N failed`. CLASS says which numerics (default: cuda-fp8).
set -uo pipefail
cd "$(dirname "$0")"
class=${CLASS:-cuda-fp8}
device=${DEVICE:-cuda:0}
model=${MODEL:-models/pocket}
logs=${LOGS:-logs}/processes
question="What is a Pod?"
mkdir -p "$logs"
passed=0
failed=0
secret=$logs/secret
head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$secret"

# holds NAME COMMAND: one check, its output in a log.
holds() {
    local name=$1
    shift
    if "$@" >"$logs/$name.log" 2>&1; then
        echo "ok      $name"
        passed=$((passed + 1))
    else
        echo "FAILED  $name"
        tail -n 6 "$logs/$name.log" | sed 's/^/        /'
        failed=$((failed + 1))
    fi
}

# shape FLAG...: on a GPU sharing a process is the default; elsewhere it is asked for.
shape() {
    [ "$device" = cpu ] && [[ " $* " != *" --processes "* ]] && echo "--processes shared"
}

# answer [FLAG...]: the text of the question through a whole cluster on the card.
answer() {
    timeout 120 ./cadre up --model "$model" --device "$device" --numerics "$class" --grpc 127.0.0.1:0 --http 127.0.0.1:0 \
        --exit-after "$question" $(shape "$@") "$@" 2>>"$logs/answer.err"
}

same() {
    printf '%s\n---\n%s\n' "$1" "$2"
    [ -n "$1" ] && [ "$1" = "$2" ]
}

gives() {
    same "$(answer "$@")" "$alone"
}

right() {
    echo "$alone"
    [[ $alone == *"smallest thing that Kubernetes runs"* ]]
}

# serving NAME [FLAG...]: a cluster that stays; its router's gRPC address in $router, its coordinator's in $coordinator.
serving() {
    local name=$1
    shift
    exec {life}> >(exec ./cadre up --model "$model" --device "$device" --numerics "$class" --grpc 127.0.0.1:0 \
        --http 127.0.0.1:0 --output json --exit-on-stdin-close --cluster-secret-file "$secret" $(shape "$@") "$@" \
        >"$logs/$name.events" 2>"$logs/$name.err")
    up=$!
    local begun=$SECONDS
    until grep -q '"event":"ready"' "$logs/$name.events" 2>/dev/null; do
        if [ $((SECONDS - begun)) -ge 120 ]; then
            tail -n 5 "$logs/$name.err"
            return 1
        fi
        sleep 0.2
    done
    router=$(event "$name" ready grpc)
    coordinator=$(event "$name" ready coordinator)
}

# event NAME EVENT FIELD [PROCESS]: a field of the last such event.
event() {
    grep "\"event\":\"$2\"" "$logs/$1.events" | grep -F "${4:-}" | tail -n 1 |
        sed -E "s/.*\"$3\":\"?([^\",}]*)\"?[,}].*/\1/"
}

# The end of its standard input stops it.
stopped() {
    local begun=$SECONDS
    exec {life}>&-
    while kill -0 "$up" 2>/dev/null; do
        [ $((SECONDS - begun)) -lt 40 ] || return 1
        sleep 0.1
    done
}

# said WORDS: an answer of the cluster that serves.
said() {
    timeout 120 ./cadre chat --grpc "$router" --max-tokens 120 --temperature 0 "$1" 2>>"$logs/chat.err"
}

among_31() {
    local before after other others=()
    serving among "$@" || return 1
    before=$(said "$question")
    for other in $(seq 31); do
        said "Tell me about node number $other of the cluster, and what a Pod does there" >"$logs/among.$other" &
        others+=($!)
    done
    after=$(said "$question")
    wait "${others[@]}"
    stopped
    [ "$(find "$logs" -name 'among.[0-9]*' -size +0 | wc -l)" -eq 31 ] && same "$before" "$after"
}

# A shard's process is killed while answers are on their way; every expert has another copy.
lost_process() {
    local whole pid answers=() nth asking
    serving lost --processes separate --experts 2 --redundant-slots 32 --prefill 0 || return 1
    whole=$(said "$question")
    pid=$(event lost listening pid '"process":"expert 1"')
    (for nth in $(seq 12); do said "$question" >"$logs/lost.$nth"; done) &
    asking=$!
    until [ -s "$logs/lost.3" ]; do sleep 0.02; done
    kill -9 "$pid"
    wait "$asking"
    stopped
    grep -q '"event":"ended"' "$logs/lost.events" || return 1
    for nth in $(seq 12); do
        same "$whole" "$(cat "$logs/lost.$nth")" || return 1
    done
}

refused_by_name() {
    local text
    serving mixed --experts 1 || return 1
    text=$(timeout 60 ./cadre expert --model "$model" --device cpu --numerics f32 --shard 0 --coordinator "$coordinator" \
        --cluster-secret-file "$secret" 2>&1 </dev/null)
    stopped
    echo "$text"
    grep -q "f32" <<<"$text" && grep -q "$class" <<<"$text"
}

no_room() {
    local text
    text=$(answer --worker-arg=--kv-bytes=900000000000 2>&1; cat "$logs/answer.err")
    tail -n 5 <<<"$text"
    grep -Eqi "needs .* free|asked, .* free|cannot allocate [0-9]+ bytes on the device" <<<"$text" && ! grep -qi panicked <<<"$text"
}

one_process() {
    serving one --experts 4 || return 1
    cat "$logs/one.events"
    stopped || return 1
    [ "$(grep -c '"event":"listening"' "$logs/one.events")" -eq 2 ] &&
        grep -q '"process":"decode 0 with expert 0, 1, 2, 3"' "$logs/one.events"
}

alone=$(answer --experts 1)
holds answer-is-right right
holds one-process-for-worker-and-shards one_process
for shards in 2 4; do
    holds "$shards-shards" gives --experts "$shards"
done
holds 4-shards-with-copies gives --experts 4 --redundant-slots 32
holds separate-processes gives --processes separate --experts 2
holds separate-processes-with-hand-off gives --processes separate --experts 2 --prefill 1
holds two-shared-processes gives --decode 2 --experts 4 --redundant-slots 32
holds alone-and-among-31 among_31 --experts 2
holds shards-process-lost lost_process
if [ "$class" != f32 ]; then
    holds mixed-classes-refused-by-name refused_by_name
fi
if [ "$device" != cpu ]; then
    holds no-room-is-typed no_room
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

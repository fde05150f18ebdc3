# DeepSeek-V3's shapes with 16 experts a layer and random weights: read by run.sh, whose functions it uses.
# models/v3 has a configuration and a tokenizer and no weights (tests/gpu/v3.py).

# v3 FLAG...: the text of one prompt through a cluster of V3's shapes.
v3() {
    timeout 300 ./cadre up --model models/v3 --weights random:1 --override n_routed_experts=16 --device cuda:0 \
        --numerics cuda-fp8 --prefill 0 --experts 1 --log info --worker-arg=--max-step-tokens=256 --worker-arg=--kv-bytes=4294967296 \
        --grpc 127.0.0.1:0 --http 127.0.0.1:0 --exit-after "What is a Pod?" --max-tokens 32 "$@" 2>>"$logs/v3-up.log"
}

v3_twice() {
    local one two
    one=$(v3) && two=$(v3) || return 1
    printf '%s\n---\n%s\n' "$one" "$two"
    grep -hE 'memory planned|weights loaded|experts loaded' "$logs/v3-up.log" || return 1
    # Random weights choose among all ids: most are not words of the tokenizer's own.
    [ -n "$one" ] && [ "$one" = "$two" ] && grep -q '<[0-9]' <<<"$one"
}

# Sized before anything is loaded, by the functions that plan.
v3_sized() {
    ./cadre inspect models/v3 --weights random:1 --override n_routed_experts=16 --shards 1 --device cuda:0 --numerics cuda-fp8 |
        tee "$logs/v3-size.log" && grep -q '^memory  .*worker .* GiB (weights' "$logs/v3-size.log"
}

if [ -d models/v3 ]; then
    held v3-sized v3_sized
    # A whole V3 is too much for one card, and is refused in seconds.
    held v3-whole-refused refused "cuda:0 needs" timeout 50 ./cadre up --model models/v3 --weights random:1 --device cuda:0 \
        --numerics cuda-fp8 --prefill 0 --experts 1 --ready-timeout 30 --grpc 127.0.0.1:0 --http 127.0.0.1:0 --exit-after x
    # Prints the seconds of each phase: weights, experts, prompt, steps.
    counted v3-five-layers timeout 60 ./memory models/v3 cuda:0 cuda-fp8 1 n_routed_experts=16 num_hidden_layers=5
    cat "$logs/v3-five-layers.log"
    if [ -n "${V3:-}" ]; then
        counted v3-memory timeout 400 ./memory models/v3 cuda:0 cuda-fp8 1 n_routed_experts=16
        held v3-twice v3_twice
    else
        echo "NOTICE: V3's 61 layers are run with V3=1 only: minutes"
    fi
else
    echo "NOTICE: no models/v3 here: V3's shapes are not tested"
fi
counted pocket-memory timeout 120 ./memory models/pocket cuda:0 bf16 1
counted pocket-memory-fp8 timeout 120 ./memory models/pocket cuda:0 cuda-fp8 2 num_hidden_layers=9

#!/usr/bin/env bash
# The demo, as one would type it: compile a pretrained network, personalise it on ten kinds of
# photos, evaluate it, ask it about one photo. `make demo` runs this in its own environment.
set -euo pipefail
cd "$(dirname "$0")/.."

photos=examples/photos
out=build/demo
rm -rf "$out"
mkdir -p "$out"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }

# On the workstation: MobileNetV3-Large and cheaper proxies of its frozen part, for this machine.
run pbc compile mobilenet_v3_large --weights examples/weights/mobilenet_v3_large.safetensors \
    --input 3x128x128 --strategy linear-probe --data $photos/train \
    --calibration examples/calibration --levels 3 --align-time 60 \
    --target host -o $out/model.pbc
run pbc inspect $out/model.pbc

# On the device: train what is trainable, in three ways.
train() { # NAME OPTIONS...
    local name=$1 start=$SECONDS
    shift
    run pbc train $out/model.pbc $photos/train --val $photos/test -o "$out/$name" "$@"
    seconds[$name]=$((SECONDS - start))
}
accuracy() {
    pbc eval "$out/$1" $photos/test --json |
        python -c 'import json, sys; print("{:.1%}".format(json.load(sys.stdin)["accuracy"]))'
}
declare -A seconds
train frozen --no-routing --no-skip --cache off
train cached --no-routing --no-skip --cache ram
train routed

run pbc eval $out/routed $photos/test
run pbc predict $out/routed $photos/test/elephant/image_0001.jpg --top 3

printf '\n%-46s %10s %10s\n' "trained for 12 epochs on 400 photos" accuracy seconds
row() { printf '%-46s %10s %10s\n' "$2" "$(accuracy "$1")" "${seconds[$1]}"; }
row frozen "the frozen network, run every time"
row cached "its features kept (--cache ram)"
row routed "proxies by difficulty (the default)"
printf '\nThe personal model is in %s/routed; the bundle is %s/model.pbc.\n' $out $out

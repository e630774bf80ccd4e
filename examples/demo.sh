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
# Two minutes of alignment on 300 photos are little; give a ladder of your own more of both.
run pbc compile mobilenet_v3_large --weights examples/weights/mobilenet_v3_large.safetensors \
    --input 3x128x128 --strategy linear-probe --data $photos/train \
    --calibration examples/calibration --levels 3 --min-cost 0.4 --align-time 2 \
    --target host -o $out/model.pbc
run pbc inspect $out/model.pbc

# On the device: train a new head, measure it, ask it.
run pbc train $out/model.pbc $photos/train --val $photos/test -o $out/mine
run pbc eval $out/mine $photos/test
run pbc predict $out/mine $photos/test/elephant/image_0001.jpg --top 3

# What it is worth: against PyTorch, with and without a feature cache, epoch by epoch in turn.
run pbc bench $out/model.pbc $photos --quick --html $out/bench.html

printf '\nThe personal model is in %s/mine, the bundle is %s/model.pbc, the report %s/bench.html.\n' \
    $out $out $out

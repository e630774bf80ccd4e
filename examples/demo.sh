#!/usr/bin/env bash
# The demo, as one would type it: compile a pretrained network, personalise it on ten kinds of
# photos, see what it gets wrong, ask it about one photo. `make demo` runs this in its environment.
set -euo pipefail
cd "$(dirname "$0")/.."

photos=examples/photos
out=build/demo
rm -rf "$out"
mkdir -p "$out"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }

# On the workstation: MobileNetV3-Large for this machine's ONNX Runtime. With a few hundred photos
# the network alone is the fastest; proxies of it (--levels, --calibration) are for more photos.
run pbc compile mobilenet_v3_large --weights examples/weights/mobilenet_v3_large.safetensors \
    --input 3x128x128 --data $photos/train --engine onnxruntime --levels 0 -o $out/model.pbc
run pbc inspect $out/model.pbc

# On the device: train a new head, see what it gets wrong, ask it.
run pbc train $out/model.pbc $photos/train --val $photos/test -o $out/mine
run pbc eval $out/mine $photos/test
run pbc report $out/mine -o $out/mine.html
run pbc predict $out/mine $photos/test/elephant/image_0001.jpg --top 3

# What it is worth: against fine-tuning in PyTorch, with and without a feature cache, in turn.
# (Two epochs of fine-tuning without a cache tell how long its twelve take.)
run pbc bench $out/model.pbc $photos --rivals pet,pet-cache,pbc --seeds 1 --epochs-of pet=2 \
    --no-torch-compile --html $out/bench.html

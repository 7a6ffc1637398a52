#!/usr/bin/env bash
# All results that docs/energy.md quotes: checkpoints, design points, energies, areas.
#
#     runs/energy.sh MODEL TEXT LIBERTY WORK
#
# MODEL is wiki5m's folder, TEXT wiki.txt, LIBERTY the folder of asap7_rvt_tt.lib.gz and gt2n.lib.gz,
# WORK keeps the checkpoints. About an hour and a half of one core; results that are there are made again.
set -euo pipefail
model=$1 text=$2 liberty=$3 work=$4
results=$(cd "$(dirname "$0")/.." && pwd)/docs/results
asap7=$liberty/asap7_rvt_tt.lib.gz gt2n=$liberty/gt2n.lib.gz

mkdir -p "$work"
printf 'labels: text\nrule: difference\nscales: max\ncompensate: false\n' > "$work/paper.yaml"
checkpoint() { # name, options
    [ -d "$work/$1" ] || fgmp quantize "$model" -o "$work/$1" --recipe "$work/paper.yaml" \
        --calib "$text" --samples 64 --calibration "$work/calibration" "${@:2}"
}
checkpoint wiki5m-70 --fp4 0.7
checkpoint wiki5m-80 --fp4 0.8
checkpoint wiki5m-90 --fp4 0.9
checkpoint wiki5m-70-of-pairs --fp4 0.7 --fp4-activations 0.815

python "$(dirname "$0")/design_points.py" \
    "$work"/wiki5m-{70,80,90,70-of-pairs} --data "$text" --liberty "$asap7" \
    -o "$results/design_points_asap7.json"

energy() { # checkpoint, result, options
    fgmp hw energy "$work/$1" --data "$text" --json "${@:3}" > "$results/energy_$2.json"
}
for share in 70 80 90; do energy wiki5m-$share asap7_$share --liberty "$asap7"; done
energy wiki5m-70 gt2n_70 --liberty "$gt2n"
energy wiki5m-70 embedded_70

fgmp hw synth --json > "$results/synth_embedded.json"
fgmp hw synth --liberty "$asap7" --json > "$results/synth_asap7.json"
fgmp hw synth --liberty "$gt2n" --json > "$results/synth_gt2n.json"

lane=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["lanes"]["fgmp"]["inertial"])' \
    "$results/energy_asap7_70.json")
python "$(dirname "$0")/quantizer_points.py" "$work/wiki5m-70" --data "$text" --liberty "$asap7" \
    --lane "$lane" -o "$results/quantizer_points_asap7.json"

if command -v sta > /dev/null; then
    python "$(dirname "$0")/opensta.py" --liberty "$asap7" --lane mixed \
        --json "$results/opensta_asap7.json"
fi

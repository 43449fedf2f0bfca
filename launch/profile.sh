#!/usr/bin/env bash
# Profiles a script of this folder on every rank: one report a rank, warm-up left out.
#
#   launch/profile.sh [OPTIONS] [torchrun's options] -- launch/scale.py ARGUMENTS
#   launch/profile.sh --nproc-per-node 8 -- launch/scale.py --tp-sizes 8 --heads flashhead
#   launch/profile.sh --counters -- launch/scale.py --tp-sizes 1 --heads flashhead --iters 3
#   launch/profile.sh --torch --nproc-per-node 2 -- launch/generate.py --head flashhead
#
# Several nodes: the same line on each, with torchrun's --nnodes, --node-rank and --master-addr (or
# --rdzv-endpoint). Reports bear the global rank; copy them into one folder to read them together.
#
# OPTIONS
#   --output DIR    where reports go (default: profile)
#   --captures N    captures traced on each rank (default: 4); see launch/trace.py
#   --counters      Nsight Compute instead of Systems: DRAM bytes, L2 hits and bandwidth by kernel
#   --torch         torch.profiler instead: the same ranges as a Chrome trace, with or without a GPU
#   --help
#
# At the end launch/profile_table.py prints what was found. docs/guides/profiling.md says how to read it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
tool=nsys output=profile captures=4 ranks=()

refuse() {
    echo "error: $1" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --output) output=${2:?--output needs a folder}; shift ;;
        --captures) captures=${2:?--captures needs a number}; shift ;;
        --counters) tool=ncu ;;
        --torch) tool=torch ;;
        --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --) shift; break ;;
        *) ranks+=("$1") ;;
    esac
    shift
done
(($#)) || refuse "no script was given: end with -- launch/scale.py or -- launch/generate.py"
[[ $captures =~ ^[1-9][0-9]*$ ]] || refuse "--captures is $captures: give 1 or more"
script=$1
[[ -f $script ]] || refuse "there is no script $script: give launch/scale.py or launch/generate.py"
mkdir -p "$output" || refuse "cannot write $output: name another --output"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun=("$python" -m torch.distributed.run)

case $tool in
    torch)
        "${torchrun[@]}" "${ranks[@]}" -- \
            "$here/trace.py" --traces "$output" --captures "$captures" "$@"
        ;;
    nsys)
        command -v nsys >/dev/null || refuse "nsys is not on the PATH (Nsight Systems, \
https://developer.nvidia.com/nsight-systems). The same ranges without it, as a Chrome trace: \
launch/profile.sh --torch ${ranks[*]} -- $*"
        # A graph's kernels one by one: a replayed step is one node otherwise. The capture range is
        # ours (flashhead_profiles.ranges.CAPTURE); each capture makes a report of its own.
        "${torchrun[@]}" --no-python "${ranks[@]}" -- \
            nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none \
            --cuda-graph-trace=node --capture-range=nvtx --nvtx-capture=capture@flashhead \
            --capture-range-end="repeat:$captures" --kill=none --force-overwrite=true \
            --output="$output/rank%q{RANK}" "$python" "$@"
        for report in "$output"/rank*.nsys-rep; do
            [[ -f $report ]] || refuse "nsys wrote no report: nothing was captured"
            nsys export --type=sqlite --force-overwrite=true \
                --output="${report%.nsys-rep}.sqlite" "$report"
        done
        ;;
    ncu)
        command -v ncu >/dev/null || refuse "ncu is not on the PATH (Nsight Compute, \
https://developer.nvidia.com/nsight-compute), and counters of DRAM and L2 come from nowhere else. \
Times without it: launch/profile.sh --torch ${ranks[*]} -- $*"
        # Kernels that talk to other GPUs are left out: ncu runs each kernel alone, several times,
        # and they would wait for a peer that does not come.
        "${torchrun[@]}" --no-python "${ranks[@]}" -- \
            ncu --nvtx --nvtx-include "flashhead@capture/" --launch-count 200 \
            --kernel-name 'regex:one_launch|dots_kernel|candidates_kernel|dense_kernel|gemm|gemv|cutlass|nvjet' \
            --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct \
            --force-overwrite --export "$output/counters_rank%q{RANK}" "$python" "$@"
        for report in "$output"/counters_rank*.ncu-rep; do
            [[ -f $report ]] || refuse "ncu wrote no report: no kernel of a head ran on a GPU"
            ncu --import "$report" --csv --page raw --print-units base >"${report%.ncu-rep}.csv"
        done
        ;;
esac
exec "$python" "$here/profile_table.py" "$output"

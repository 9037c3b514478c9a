#!/bin/sh
# Every recipe on RTE, MRPC, CoLA, SST-2 and QNLI with three seeds, in calls of a few minutes each: a sweep goes on where
# the last call left it, so call this until it says that all is done. Results: OUT/sweep.md, sweep.json and Pareto plots.
#
#   DATA=./GLUE MODEL=./all-MiniLM-L6-v2 OUT=runs/glue MINUTES=9 sh benchmarks/glue.sh
#   SPARSITIES=0.9,0.95 sh benchmarks/glue.sh                           # what is done already is kept
#   sh benchmarks/glue.sh --set precision=bf16 --set device=cuda        # anything that spdtool sweep takes
set -eu

DATA=${DATA:-GLUE}
MODEL=${MODEL:-google-bert/bert-base-uncased}
OUT=${OUT:-runs/glue}
MINUTES=${MINUTES:-9}
TASKS=${TASKS:-rte,mrpc,cola,sst2,qnli}
RECIPES=${RECIPES:-default,gmp,no-distillation,obert,reference}
SPARSITIES=${SPARSITIES:-0.9}
SEEDS=${SEEDS:-0,1,2}
SPDTOOL=${SPDTOOL:-spdtool}

code=0
# An interrupt lets the stage in progress keep its last snapshot; the next call resumes from it.
timeout --signal=INT --kill-after=30 "${MINUTES}m" "$SPDTOOL" sweep --tasks "$TASKS" --recipes "$RECIPES" \
    --sparsities "$SPARSITIES" --seeds "$SEEDS" --data "$DATA" --model "$MODEL" --out "$OUT" --set save_minutes=1 "$@" || code=$?
case $code in
0) echo "all is done: $OUT/sweep.md" ;;
124 | 130 | 137) echo "time is up: call again to go on" ;;
*) exit "$code" ;;
esac

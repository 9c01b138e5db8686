#!/usr/bin/env bash
# A Cloud TPU slice: the same command on every host; the hosts find each other through the
# slice's metadata.
#
#   TPU=my-v5p-128 ZONE=us-east5-a docs/launch/tpu_pod.sh \
#       tnl-7b --mesh.fsdp 16 --mesh.seq 4 --out /mnt/shared/runs/tnl-7b
#
# longctx must be installed on the hosts (`... ssh "$TPU" --worker=all --command "pip install ..."`)
# and --out lie on storage that all of them mount. Run it again to resume.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"

command="longctx train"
for argument in "$@"; do
  command+=" $(printf '%q' "$argument")"
done
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"

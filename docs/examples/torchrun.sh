#!/bin/sh
# One build on all GPUs of one machine, or of several. Run it on each machine; FIRST is one of them.
#   single machine:  sh torchrun.sh profiles/english-medical-qa.yaml experts/medical-qa
#   four machines:   NODES=4 FIRST=node0:29500 sh torchrun.sh SPEC OUT   (on each of them)
# EXPERTPRUNE_STORE, the spec, its corpora and OUT lie in folders that all machines see.
set -eu
export EXPERTPRUNE_STORE="${EXPERTPRUNE_STORE:-$PWD/store}"
if [ "${NODES:-1}" = 1 ]; then
  set -- --standalone "$@"
else
  set -- --nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$FIRST" --rdzv-id expertprune "$@"
fi
# The last two arguments are the spec and the output folder.
launcher=
while [ $# -gt 2 ]; do
  launcher="$launcher $1"
  shift
done
# shellcheck disable=SC2086 # one word each
exec torchrun $launcher --nproc-per-node "${PROCESSES:-gpu}" -m expertprune build "$1" --out "$2"

#!/bin/sh
# A sweep on a Ray cluster. Start the cluster first, with the same packages on each machine:
#   ray start --head                        on one machine
#   ray start --address=FIRST:6379          on the others
#   sh ray.sh profiles/english-medical-qa.yaml
# EXPERTPRUNE_STORE, the spec's corpora and the base lie in folders that all machines see.
set -eu
export EXPERTPRUNE_STORE="${EXPERTPRUNE_STORE:-$PWD/store}"
exec expertprune sweep "$1" --budgets "${BUDGETS:-0.1,0.2,0.3,0.4,0.5}" --out sweep \
  --engine ray --address "${RAY_ADDRESS:-auto}"

#!/usr/bin/env bash
# Decides whether the job fails: gate.sh VERDICT EXIT_CODE FAIL_ON (the verdicts that do, such as "FAIL INVALID").
# Ends with EXIT_CODE if it does, else with 0. A run that broke off (ERROR) always fails.
set -euo pipefail
verdict=$1 code=$2
read -ra fail_on <<<"${3//[$',\n']/ }"

failing=ERROR
for name in "${fail_on[@]}"; do
  case $name in
    FAIL | INCONCLUSIVE | INVALID) failing+=" $name" ;;
    *)
      echo "'$name' is no verdict that can fail; known are FAIL, INCONCLUSIVE and INVALID." >&2
      exit 2
      ;;
  esac
done

case $verdict in
  PASS | FAIL | INCONCLUSIVE | INVALID | ERROR) ;;
  *)
    echo "'$verdict' is no verdict." >&2
    exit 2
    ;;
esac
case " $failing " in
  *" $verdict "*)
    echo "gradmap: $verdict (exit code $code) fails the job." >&2
    exit "$code"
    ;;
esac
echo "gradmap: $verdict does not fail the job."

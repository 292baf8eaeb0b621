#!/usr/bin/env bash
# Runs a recipe: run.sh RECIPE OUT SUMMARY. Prints verdict= and exit_code=, and writes the SUMMARY that people read.
# A verdict does not fail it: the reports are published first, then gate.sh decides.
set -euo pipefail
recipe=$1 out=$2 summary=$3

bash "${BASH_SOURCE%/*}/names.sh" "$recipe" "$out" >/dev/null

again=()
if [ -f "$out/recipe.yaml" ]; then # an earlier result, out of a cache
  # Its reports must not pass as this run's if this one breaks off.
  rm -f -- "$out/result.json" "$out/report.md" "$out/report.html"
  # An invalid load test says nothing, so that it is repeated although its inputs are unchanged.
  if grep -qs '"verdict": "INVALID"' -- "$out/loadtest/report.json"; then
    again=(--from loadtest)
  fi
fi

code=0
gradmap run --out "$out" "${again[@]}" -- "$recipe" >&2 || code=$?

case $code in
  0) verdict=PASS ;;
  1) verdict=FAIL ;;
  3) verdict=INCONCLUSIVE ;;
  4) verdict=INVALID ;;
  *) verdict=ERROR ;;
esac
# Whatever else ends with one of these codes, such as a Python that cannot import gradmap, leaves no report.
if [ "$verdict" != ERROR ] && ! [ -f "$out/report.md" ]; then
  verdict=ERROR code=70
fi

if [ "$verdict" = ERROR ]; then
  # A backtick in its name would end the code, and what follows be Markdown.
  echo "gradmap: \`${recipe//\`/}\` broke off with exit code $code, without a report. The job's log says why."
else
  cat -- "$out/report.md"
fi >"$summary"

echo "verdict=$verdict"
echo "exit_code=$code"

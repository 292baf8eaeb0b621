#!/usr/bin/env bash
# Refuses names that could forge a line of an output, or of a list of paths: names.sh RECIPE OUT
# Prints name=, the recipe's name in those of artifacts.
set -euo pipefail
export LC_ALL=C # in which a-z are these letters alone
recipe=$1 out=$2

for given in "$recipe" "$out"; do
  if [[ $given == *[[:cntrl:]]* ]]; then
    printf 'gradmap: no recipe or result directory may have a control character in its name: %q\n' "$given" >&2
    exit 2
  fi
done

name=$(basename -- "$recipe")
name=${name%.*}
echo "name=${name//[!A-Za-z0-9._-]/_}"

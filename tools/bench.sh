#!/usr/bin/env bash
# Run benchmarks: all of them, or the ones that are named. Each writes build/bench/NAME.json and prints it as a table.
set -euo pipefail

cd "$(dirname "$0")/.."
# What a script in benchmarks/ is run for stands behind its __main__; the others are parts of these.
mapfile -t known < <(grep -ls '__main__' benchmarks/*.py | xargs -r -n1 basename -s .py)
names=("$@")
[[ ${#names[@]} -gt 0 ]] || names=("${known[@]}")

for name in "${names[@]}"; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        printf 'bench: no benchmark is called %s; there are: %s\n' "$name" "${known[*]}" >&2
        exit 1
    fi
done
mkdir -p build/bench
for name in "${names[@]}"; do
    printf '== %s\n' "$name"
    .venv/bin/python "benchmarks/$name.py" --output "build/bench/$name.json"
done

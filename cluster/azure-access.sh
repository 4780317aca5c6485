#!/bin/sh
# What azure.yaml needs to be there first: a subnet that only one CIDR reaches by ssh, an identity
# for the nodes, and an NFS share that only this subnet reaches. Each makes what is missing.
#
#   sh cluster/azure-access.sh SUBSCRIPTION ACCOUNT MY.IP.ADD.RESS/32 [LOCATION]
#
# ACCOUNT: a name for the storage account, 3 to 24 small letters and digits, that nobody else has.
set -eu

refuse() { echo "azure-access.sh: $1" >&2; exit 2; }
[ $# -ge 3 ] || refuse "needs SUBSCRIPTION ACCOUNT MY.IP.ADD.RESS/32 [LOCATION]"
account=$2 ssh_from=$3 location=${4:-eastus}
case $ssh_from in
*/[0-7] | */0* | 0.* | *[!0-9./]*) refuse "$ssh_from: not the few who may use ssh" ;;
*/*) ;;
*) refuse "$ssh_from: a CIDR, such as $ssh_from/32" ;;
esac
# In a group of the name that azure.yaml gives; the network has the names that Ray looks for.
create() { az "$@" --subscription "$subscription" --resource-group yuzogpt --output none; }
subscription=$1

az group create --subscription "$subscription" --name yuzogpt --location "$location" --output none
# NFS knows no encryption of its own (hence --https-only false), so it never leaves the subnet.
create storage account create --name "$account" --kind FileStorage --sku Premium_LRS \
    --https-only false --default-action Deny --allow-blob-public-access false
create identity create --name yuzogpt
create network nsg create --name yuzogpt-ssh
create network nsg rule create --nsg-name yuzogpt-ssh --name ssh --priority 1000 --protocol Tcp \
    --direction Inbound --access Allow --destination-port-ranges 22 \
    --source-address-prefixes "$ssh_from"
create network vnet create --name ray-yuzogpt-yuzo-vnet --address-prefixes 10.77.0.0/16
create network vnet subnet create --vnet-name ray-yuzogpt-yuzo-vnet --name ray-yuzogpt-yuzo-subnet \
    --address-prefixes 10.77.0.0/16 --network-security-group yuzogpt-ssh \
    --service-endpoints Microsoft.Storage
create storage account network-rule add --account-name "$account" \
    --vnet-name ray-yuzogpt-yuzo-vnet --subnet ray-yuzogpt-yuzo-subnet
create storage share-rm create --storage-account "$account" --name yuzogpt \
    --enabled-protocols NFS --root-squash NoRootSquash --quota 1024

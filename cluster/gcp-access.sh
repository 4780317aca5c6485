#!/bin/sh
# What gcp.yaml needs to be there first: a network that only one CIDR reaches by ssh, a bucket, and
# an account that lets workers use that bucket. Once a project.
#
#   sh cluster/gcp-access.sh PROJECT BUCKET MY.IP.ADD.RESS/32 [REGION]
set -eu

refuse() { echo "gcp-access.sh: $1" >&2; exit 2; }
[ $# -ge 3 ] || refuse "needs PROJECT BUCKET MY.IP.ADD.RESS/32 [REGION]"
project=$1 bucket=$2 ssh_from=$3 region=${4:-us-central1}
case $ssh_from in
*/[0-7] | 0.* | *[!0-9./]*) refuse "$ssh_from: not the few who may use ssh" ;;
*/*) ;;
*) refuse "$ssh_from: a CIDR, such as $ssh_from/32" ;;
esac
compute() { gcloud compute "$@" --project="$project"; }
worker=yuzogpt-worker@$project.iam.gserviceaccount.com

gcloud services enable compute.googleapis.com iam.googleapis.com \
    cloudresourcemanager.googleapis.com --project="$project"
gcloud storage buckets create "gs://$bucket" --project="$project" --location="$region" \
    --uniform-bucket-level-access --public-access-prevention
compute networks create yuzogpt --subnet-mode=custom
compute networks subnets create yuzogpt --network=yuzogpt --region="$region" --range=10.77.0.0/16
compute firewall-rules create yuzogpt-ssh --network=yuzogpt --allow=tcp:22 \
    --source-ranges="$ssh_from"
# Ray's ports, NCCL's and gloo's.
compute firewall-rules create yuzogpt-inside --network=yuzogpt --allow=tcp,udp,icmp \
    --source-ranges=10.77.0.0/16
gcloud iam service-accounts create yuzogpt-worker --project="$project"
gcloud storage buckets add-iam-policy-binding "gs://$bucket" \
    --member="serviceAccount:$worker" --role=roles/storage.objectAdmin

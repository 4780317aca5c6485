#!/bin/sh
# What gcp.yaml needs to be there first: a network that only one CIDR reaches by ssh, a bucket, and
# an account that lets workers use that bucket. Each makes what is missing.
#
#   sh cluster/gcp-access.sh PROJECT BUCKET MY.IP.ADD.RESS/32 [REGION]
set -eu

refuse() { echo "gcp-access.sh: $1" >&2; exit 2; }
[ $# -ge 3 ] || refuse "needs PROJECT BUCKET MY.IP.ADD.RESS/32 [REGION]"
project=$1 bucket=$2 ssh_from=$3 region=${4:-us-central1}
case $ssh_from in
*/[0-7] | */0* | 0.* | *[!0-9./]*) refuse "$ssh_from: not the few who may use ssh" ;;
*/*) ;;
*) refuse "$ssh_from: a CIDR, such as $ssh_from/32" ;;
esac
compute() { gcloud compute "$@" --project="$project"; }
worker=yuzogpt-worker@$project.iam.gserviceaccount.com

gcloud services enable compute.googleapis.com iam.googleapis.com \
    cloudresourcemanager.googleapis.com --project="$project"
there() { "$@" >/dev/null 2>&1; }
there gcloud storage buckets describe "gs://$bucket" --project="$project" ||
    gcloud storage buckets create "gs://$bucket" --project="$project" --location="$region" \
        --uniform-bucket-level-access --public-access-prevention
there compute networks describe yuzogpt || compute networks create yuzogpt --subnet-mode=custom
there compute networks subnets describe yuzogpt --region="$region" ||
    compute networks subnets create yuzogpt --network=yuzogpt --region="$region" \
        --range=10.77.0.0/16
# The CIDR may have changed since.
if there compute firewall-rules describe yuzogpt-ssh; then
    compute firewall-rules update yuzogpt-ssh --source-ranges="$ssh_from"
else
    compute firewall-rules create yuzogpt-ssh --network=yuzogpt --allow=tcp:22 \
        --source-ranges="$ssh_from"
fi
# Ray's ports, NCCL's and gloo's.
there compute firewall-rules describe yuzogpt-inside ||
    compute firewall-rules create yuzogpt-inside --network=yuzogpt --allow=tcp,udp,icmp \
        --source-ranges=10.77.0.0/16
there gcloud iam service-accounts describe "$worker" --project="$project" ||
    gcloud iam service-accounts create yuzogpt-worker --project="$project"
gcloud storage buckets add-iam-policy-binding "gs://$bucket" \
    --member="serviceAccount:$worker" --role=roles/storage.objectAdmin

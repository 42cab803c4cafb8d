#!/bin/bash
# Installs what tests/cluster needs from Debian, where it is missing.
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
    echo "error: tests/cluster makes network hosts and a Slurm of its own: run it as root" >&2
    exit 1
fi
missing=() extra=()
for program in slurmctld slurmd sbatch munged pdsh sshd ssh ip ps nsenter shellcheck; do
    command -v "$program" > /dev/null || missing+=("$program")
done
# Without these one test is skipped, that of a run on exFAT.
for program in mkfs.exfat mount.exfat-fuse; do
    command -v "$program" > /dev/null || extra+=("$program")
done
if [ ${#missing[@]} = 0 ] && [ ${#extra[@]} = 0 ]; then exit 0; fi
echo "installing, for want of ${missing[*]} ${extra[*]}"
apt-get update -qq || [ ${#missing[@]} = 0 ]
if [ ${#extra[@]} != 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends exfatprogs exfat-fuse > /dev/null ||
        echo "exFAT cannot be tried here"
fi
if [ ${#missing[@]} = 0 ]; then exit 0; fi
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client \
    slurm-wlm-basic-plugins munge pdsh openssh-server openssh-client iproute2 procps util-linux shellcheck \
    > /dev/null

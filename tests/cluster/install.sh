#!/bin/bash
# Installs what tests/cluster needs from Debian, where it is missing.
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
    echo "error: tests/cluster makes network hosts and a Slurm of its own: run it as root" >&2
    exit 1
fi
missing=()
for program in slurmctld slurmd sbatch munged pdsh sshd ssh ip ps nsenter shellcheck mkfs.exfat mount.exfat-fuse; do
    command -v "$program" > /dev/null || missing+=("$program")
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
echo "installing, for want of ${missing[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client \
    slurm-wlm-basic-plugins munge pdsh openssh-server openssh-client iproute2 procps util-linux shellcheck \
    exfatprogs exfat-fuse > /dev/null

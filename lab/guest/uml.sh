#!/bin/bash
# The first program of a user-mode Linux guest, whose root is the host's, read-only (lab/uml.py). From the kernel's command
# line: lab_machine, lab_modules, lab_shared (folders, with colons between).
# What it keeps true: what the guest writes is in memory, but for the shared folders; and it reaps every orphan, as the
# first process has to.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t tmpfs -o mode=755,size=75% layers /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sys sys
mount -t securityfs security sys/kernel/security
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm dev/disk/by-id
mount -t devpts -o gid=5,ptmxmode=0666 pts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=755 run run
[ ! -b dev/ubda ] || ln -s ../../ubda dev/disk/by-id/scsi-0lab_disk_scratch
# shellcheck source=/dev/null
. "$lab_machine/guest.conf"    # checkout
mount --bind ".$checkout" ".$checkout"
IFS=:
for folder in $lab_shared; do
    mkdir -p ".$folder"
    mount -t hostfs -o "$folder" none ".$folder"
done
unset IFS
release=$(uname -r)
mkdir -p "usr/lib/modules/$release"
mount --bind "$lab_modules/$release" "usr/lib/modules/$release"
pivot_root . mnt
cd /
umount -l /mnt
exec >/dev/tty1 2>&1 <&-
"$checkout/lab/guest/init.sh" "$lab_machine" &
while :; do wait || true; done

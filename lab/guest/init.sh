#!/bin/bash
# The guest's start-up script, run by virtme-ng's init once the host's file systems are in place.
# Argument: the machine's folder, which holds `guest.conf`, the SSH server's key and the client's public key.
# What it keeps true: when "lab: ready" is printed, every file system, the network and the SSH server are there.
set -eu
machine=$1
# shellcheck source=/dev/null
. "$machine/guest.conf"   # checkout, scratch_bytes, ssh_card

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/lab /run/sshd
chmod 755 /run/sshd

# virtme-ng mounts devpts for its own console only: anybody may need a terminal.
mount -o remount,ptmxmode=0666 /dev/pts
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    [ -e "/dev/${link%%:*}" ] || ln -s "${link#*:}" "/dev/${link%%:*}"
done

case "$machine:$checkout:" in
    */tmp/*) ;;                     # something that we need lies there: /tmp is an overlay already
    *) mount -t tmpfs -o mode=1777 tmpfs /tmp ;;
esac
mkdir -p /mnt/scratch
mount -t tmpfs -o "mode=755,size=$scratch_bytes" scratch /mnt/scratch

# Tests run as root and break things on purpose: the host's checkout must not be among them.
mount -o remount,bind,ro "$checkout"

modprobe -q virtio_net || true   # user-mode Linux has another card
for _ in {1..300}; do
    card=$(grep -lx "$ssh_card" /sys/class/net/*/address 2>/dev/null | cut -d/ -f5)
    [ -z "$card" ] || break
    sleep 0.1
done
ip link set lo up
ip link set "$card" up
ip address add 10.0.2.15/24 dev "$card"
ip route add default via 10.0.2.2

install -m 600 "$machine/host_key" /run/lab/host_key
install -m 600 "$machine/id.pub" /run/lab/authorized_keys
cat >/run/lab/sshd_config <<EOF
HostKey /run/lab/host_key
AuthorizedKeysFile /run/lab/authorized_keys
PidFile /run/lab/sshd.pid
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
MaxSessions 1000
MaxStartups 100
ClientAliveInterval 0
EOF
# Commands come with their own environment: a login shell that reads start-up files would only cost time.
sed -e '/^root:/s,[^:]*$,/bin/sh,' /etc/passwd >/run/lab/passwd
mount --bind /run/lab/passwd /etc/passwd
# Without PAM the server refuses accounts whose password field says "locked", as virtme-ng's shadow file does.
sed -e 's/^root:[^:]*:/root:*:/' /etc/shadow >/run/lab/shadow
mount --bind /run/lab/shadow /etc/shadow
mkdir -p /sys/fs/cgroup/lab
"$(command -v sshd)" -f /run/lab/sshd_config
echo "lab: ready"
exec sleep infinity

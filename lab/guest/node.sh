#!/bin/bash
# Makes the guest a node of the cluster lab, and starts and ends its services. Arguments: the node's configuration
# (shell assignments, written by lab/cluster/node.py), then one of
#   up                    network, disk, modules, containerd and kubelet
#   start|kill SERVICE    containerd or kubelet; kill is SIGKILL
#   import FILE...        image archives into containerd
# What it keeps true: what a node must not lose with its power (images, kubelet's and the driver's state, the logs) is
# on its disk; all the rest is in memory and starts anew. Each service has a cgroup of its own, outside of the one of
# the command that started it.
set -eu
# shellcheck source=/dev/null
. "$1"    # name card address pods peers gateway services disk kube pause folder logs
shift
socket=/run/containerd/containerd.sock

# The kernel changes its own code when the first control groups with these controllers, and with a quota, come to be.
# An emulator whose other processor is just in that code ends the guest (int3 panic): kubelet and containers did that in
# the midst of everything. So it is done now, and the groups stay, while the guest has a single processor.
account() {
    others=$(compgen -G '/sys/devices/system/cpu/cpu[1-9]*/online') || true
    for online in $others; do echo 0 >"$online"; done
    for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do    # user-mode Linux has no cpuset
        echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
    done
    mkdir -p /sys/fs/cgroup/node /sys/fs/cgroup/first
    echo "100000 100000" >/sys/fs/cgroup/first/cpu.max
    for online in $others; do echo 1 >"$online"; done
    # user-mode Linux does not know how fast its processor is, without which kubelet does not start
    if ! grep -q MHz /proc/cpuinfo; then
        { cat /proc/cpuinfo && echo "cpu MHz : 1000.000"; } >/run/cpuinfo
        mount --bind /run/cpuinfo /proc/cpuinfo
    fi
}

network() {
    for _ in {1..300}; do
        device=$(grep -lx "$card" /sys/class/net/*/address | cut -d/ -f5)
        [ -z "$device" ] || break
        sleep 0.1
    done
    ip link set "$device" up
    ip address replace "$address/24" dev "$device"
    ip route replace "$services" via "$gateway"
    for peer in $peers; do ip route replace "${peer%=*}" via "${peer#*=}"; done
    sysctl -q -w net.ipv4.ip_forward=1
}

disk() {
    mkdir -p /mnt/node
    blkid "$disk" >/dev/null || mkfs.ext4 -q -E nodiscard "$disk"
    mount "$disk" /mnt/node
    for path in /var/lib/containerd /var/lib/kubelet /var/lib/csi-vduse /var/log/pods; do
        mkdir -p "/mnt/node$path" "$path"
        mount --bind "/mnt/node$path" "$path"
    done
    mount --make-rshared /    # mounts of the driver's container are to be seen by kubelet, and back
}

configure() {
    mkdir -p /run/node/cni
    cat >/run/node/cni/10-lab.conflist <<CNI
{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "bridge", "bridge": "pods", "isGateway": true, "ipam": {
  "type": "host-local", "dataDir": "/run/node/addresses", "ranges": [[{"subnet": "$pods"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
CNI
    cat >/run/node/containerd.toml <<TOML
version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$pause"
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "/run/node/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
TOML
    cat >/run/node/kubelet.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $folder/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix://$socket
enforceNodeAllocatable: []
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: ""
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 50Mi}
volumeStatsAggPeriod: 10s
runtimeRequestTimeout: 15m    # an emulated node that is busy unpacks the driver's image for longer than the default of 2m
YAML
}

start() {
    case $1 in
        containerd) set -- "$1" containerd --config /run/node/containerd.toml ;;
        kubelet) set -- "$1" "$kube" kubelet --config=/run/node/kubelet.yaml --kubeconfig="$folder/$name.kubeconfig" \
            --hostname-override="$name" --node-ip="$address" ;;
    esac
    service=$1
    shift
    mkdir -p "/sys/fs/cgroup/node/$service"
    (
        echo "$BASHPID" >"/sys/fs/cgroup/node/$service/cgroup.procs"
        exec setsid -- "$@" </dev/null >>"$logs/$name-$service.log" 2>&1
    ) &
    if [ "$service" = containerd ]; then
        for _ in {1..1200}; do
            ! ctr --address "$socket" version >/dev/null 2>&1 || return 0
            sleep 0.1
        done
        echo "containerd does not answer; see $logs/$name-$service.log" >&2
        exit 1
    fi
}

kill_service() {
    # Not the whole cgroup: containerd's shims are in it, and they hold the containers.
    for pid in $(cat "/sys/fs/cgroup/node/$1/cgroup.procs"); do
        program=$(basename "$(readlink "/proc/$pid/exe")") || continue
        case $1/$program in containerd/containerd | kubelet/kube) kill -KILL "$pid" ;; esac
    done
}

case $1 in
    up)
        account
        network
        disk
        modprobe -a overlay loop vduse virtio_vdpa vhost_vdpa    # as /etc/modules-load.d does on a real node; loop: for kubelet
        configure
        start containerd
        start kubelet
        ;;
    start) start "$2" ;;
    kill) kill_service "$2" ;;
    import)
        shift
        # Unpacked now: an emulated node needs longer for it than kubelet waits for a container to be created.
        for archive; do ctr --address "$socket" --namespace k8s.io images import "$archive"; done
        ;;
esac

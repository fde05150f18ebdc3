# One real node: a network, mount, PID, UTS and IPC namespace of its own with
# containerd, kubelet and kube-proxy in it. Sourced by up.
# shellcheck shell=bash
#
# The PID namespace makes the end simple: its process 1 killed, the kernel kills
# every shim and container in it, and with the last process the mount namespace
# goes and every mount of kubelet, containerd and CNI with it.

node_dir() { echo "$STATE/n$1"; }

up_node_network() {
	local i=$1 ns j
	ns=$(ns_node "$i")
	ip netns add "$ns"
	in_cp ip link add "v$i" type veth peer name eth0 netns "/run/netns/$ns"
	in_cp ip link set "v$i" master kbr0 up
	nsenter --net="/run/netns/$ns" bash -euc '
		ip link set lo up
		ip addr add '"$(node_ip "$i")"'/24 dev eth0
		ip link set eth0 up
		ip route add default via '"$CP_IP"'   # Service addresses need some route before DNAT
		sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0
		# Pod -> Service -> Pod on one bridge: replies must pass conntrack
		sysctl -qw net.bridge.bridge-nf-call-iptables=1'
	for ((j = 1; j <= MAX_NODES; j++)); do
		((j == i)) || nsenter --net="/run/netns/$ns" ip route add "$(pod_cidr "$j")" via "$(node_ip "$j")"
	done
	in_cp ip route add "$(pod_cidr "$i")" via "$(node_ip "$i")"
}

# kubelet wants its cgroup root made beforehand, in every hierarchy.
up_node_cgroup() {
	local c d
	if [ -e "$CG/cgroup.controllers" ]; then # one hierarchy (cgroup v2)
		for d in "$CG" "$CG$CGROUP" "$CG$CGROUP/n$1"; do
			mkdir -p "$d"
			for c in cpu cpuset memory pids hugetlb io; do
				echo "+$c" >"$d/cgroup.subtree_control" 2>/dev/null || true # kubelet names the one it misses
			done
		done
		return
	fi
	for c in "$CG"/*/; do
		[ -e "$c/cgroup.controllers" ] && continue # the cgroup2 mount of the hybrid layout
		[ -e "$c/cgroup.procs" ] || continue
		for d in "$c$CGROUP" "$c$CGROUP/n$1"; do
			mkdir -p "$d"
			if [ -e "$d/cpuset.cpus" ]; then
				cat "$(dirname "$d")/cpuset.cpus" >"$d/cpuset.cpus"
				cat "$(dirname "$d")/cpuset.mems" >"$d/cpuset.mems"
			fi
		done
	done
}

# Runs inside the node's namespaces: process 1.
node_init() {
	local D=$1 name=$2 f
	hostname "$name"
	# /sys of this network namespace, with the cgroup hierarchies kept
	mkdir -p "$D/cg"
	mount --rbind /sys/fs/cgroup "$D/cg"
	mount -t sysfs sysfs /sys
	mount --rbind "$D/cg" /sys/fs/cgroup
	umount -R "$D/cg"
	mount --make-rshared / # only now: in a shared tree the umount would take both
	# paths that are fixed in kubelet (device plugins) and libcni (results)
	mount --bind "$D/kubelet" /var/lib/kubelet
	mount --bind "$D/cni-cache" /var/lib/cni
	mount --bind "$D/log" /var/log
	mount -t tmpfs -o mode=755 tmpfs /run
	mkdir -p /run/netns /run/containerd /run/lock
	# kubelet sets these for the whole machine: let it write to copies
	mkdir -p "$D/sysctl"
	for f in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
		kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
		cat "/proc/sys/$f" >"$D/sysctl/${f//\//.}"
		mount --bind "$D/sysctl/${f//\//.}" "/proc/sys/$f"
	done
	: >"$D/init.ready"
	trap 'exit 0' TERM
	while :; do # bash reaps what is left to process 1
		sleep 1000 &
		wait $! || true
	done
}

write_node_config() {
	local i=$1 D name
	D=$(node_dir "$i") name=$(node_name "$i")
	mkdir -p "$D"/{kubelet,containerd,cni,cni-cache,cni-ipam,log,volume-plugins} /var/lib/kubelet /var/lib/cni
	(
		umask 077
		cert "$name" "/O=system:nodes/CN=system:node:$name" "DNS:$name,IP:$(node_ip "$i")"
		kubeconfig "$name" "https://$CP_IP:6443" "$D/kubelet.kubeconfig"
	)
	cat >"$D/containerd.toml" <<TOML
version = 2
root = "$D/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.internal.v1.opt"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "cluster.cadre.test/pause:1"
  disable_apparmor = true
  # root here lacks CAP_SYS_RESOURCE: oom_score_adj cannot be lowered, and runc
  # then dies with "can't get final child's PID from pipe: EOF"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  max_container_log_line_size = 16384
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$D/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
TOML
	cat >"$D/cni/10-cadre.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "cadre", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": 1500,
   "ipam": {"type": "host-local", "dataDir": "$D/cni-ipam", "ranges": [[{"subnet": "$(pod_cidr "$i")"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
	cat >"$D/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: $CGROUP/n$i
failCgroupV1: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/$name.crt
tlsPrivateKeyFile: $PKI/$name.key
clusterDomain: cluster.local
clusterDNS: [$DNS_IP]
resolvConf: ""
volumePluginDir: $D/volume-plugins
staticPodPath: ""
# the nodes share one disk and its size is not theirs: no pressure from it
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%, imagefs.inodesFree: 0%}
nodeStatusUpdateFrequency: 4s
nodeLeaseDurationSeconds: 12
shutdownGracePeriod: 0s
serializeImagePulls: false
oomScoreAdj: 0
YAML
	cat >"$D/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $PROXY_MODE
clusterCIDR: $CLUSTER_CIDR
hostnameOverride: $name
clientConnection: {kubeconfig: $STATE/proxy.kubeconfig, qps: 50, burst: 100}
# the machine's conntrack limits are not ours to set, nor settable from here
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
iptables: {minSyncPeriod: 100ms, syncPeriod: 30s}
nftables: {minSyncPeriod: 100ms, syncPeriod: 30s}
metricsBindAddress: 127.0.0.1:10249
oomScoreAdj: 0
YAML
}

# node_start I NAME CMD...: in the background inside node I; log outside, pid
# (as seen inside) kept.
node_start() {
	local i=$1 n=$2
	shift 2
	: >>"$LOGS/n$i-$n.log"
	node_exec "$i" env "$MARK=$STATE" bash -c 'setsid "${@:3}" >>"$1" 2>&1 </dev/null & echo $! >"$2"' - \
		"$LOGS/n$i-$n.log" "$RUN/n$i.$n.pid" "$@"
}

node_stop() { # I NAME [SIGNAL]
	local f=$RUN/n$1.$2.pid
	[ -s "$f" ] || return 0
	node_exec "$1" bash -c 'kill -'"${3:-TERM}"' "$1" && while kill -0 "$1"; do sleep 0.1; done' - "$(cat "$f")" 2>/dev/null || true
	rm -f "$f"
}

start_containerd() {
	node_start "$1" containerd containerd --config "$(node_dir "$1")/containerd.toml"
}

start_kubelet() {
	local i=$1 D
	D=$(node_dir "$i")
	node_start "$i" kubelet "$BIN/kubelet" --config "$D/kubelet.yaml" --kubeconfig "$D/kubelet.kubeconfig" \
		--root-dir /var/lib/kubelet --hostname-override "$(node_name "$i")" --node-ip "$(node_ip "$i")" \
		--node-labels "topology.kubernetes.io/zone=zone$i,topology.kubernetes.io/region=local,cluster.cadre.test/node=real" --v 2
}

up_node() {
	local i=$1 D
	D=$(node_dir "$i")
	write_node_config "$i"
	up_node_network "$i"
	up_node_cgroup "$i"
	rm -f "$D/init.ready"
	start "n$i.unshare" nsenter --net="/run/netns/$(ns_node "$i")" \
		unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc --propagation private \
		bash -euc ". '$KIT/lib.sh'; . '$KIT/node.sh'; node_init '$D' '$(node_name "$i")'"
	wait_for 20 "node $i's namespaces" "n$i.unshare" test -e "$D/init.ready"
	pgrep -P "$(cat "$RUN/n$i.unshare.pid")" >"$RUN/n$i.init.pid"
	start_containerd "$i"
	wait_for 60 "containerd of node $i" "n$i-containerd" node_exec "$i" ctr version
	for f in "$IMAGES"/*.tar; do
		node_exec "$i" ctr -n k8s.io images import "$f" >/dev/null
	done
	start_kubelet "$i"
	node_start "$i" kube-proxy "$BIN/kube-proxy" --config "$D/kube-proxy.yaml" --v 2
	if [ -x "$BIN/netpol" ]; then
		node_start "$i" netpol "$BIN/netpol" --kubeconfig "$STATE/netpol.kubeconfig" --node "$(node_name "$i")"
	fi
}

wait_node() {
	local n
	n=$(node_name "$1")
	wait_for 90 "node $n registered" "n$1-kubelet" kubectl get node "$n"
	kubectl patch node "$n" -p '{"spec":{"podCIDR":"'"$(pod_cidr "$1")"'","podCIDRs":["'"$(pod_cidr "$1")"'"]}}' >/dev/null
	kubectl wait --for=condition=Ready "node/$n" --timeout=90s >/dev/null
}

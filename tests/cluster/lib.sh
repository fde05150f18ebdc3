# What every script here shares: names, paths, addresses, helpers. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# -- versions: they stand here and in src/*/go.mod, nowhere else ---------------
K8S_VERSION=v1.35.4
GO_MINIMUM=1.26      # what src/helm asks for
GO_TOOLCHAIN=1.26.8  # fetched where the machine has no Go, or one that is too old

# -- what a caller may set -----------------------------------------------------
NAME=${CADRE_CLUSTER_NAME:-cadre}                # two names are two clusters; the other one needs its own port
PORT=${CADRE_CLUSTER_PORT:-16443}                # loopback port of the API server, seen from outside
NODE_GRACE=${CADRE_CLUSTER_NODE_GRACE:-20s}      # silence after which a node is NotReady (stock: 50s)
EVICT_AFTER=${CADRE_CLUSTER_EVICT_AFTER:-30}     # seconds that a Pod stays on a NotReady node (stock: 300)
PROXY_MODE=${CADRE_CLUSTER_PROXY_MODE:-nftables} # kube-proxy: nftables or iptables
CACHE=${CADRE_CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cadre/cluster}
STATE_ROOT=${CADRE_CLUSTER_STATE:-/var/lib/cadre-cluster}

STATE=$STATE_ROOT/$NAME
BIN=$CACHE/bin                   # hyperkube and its links, podtool, coredns, netpol, helm, kwok
IMAGES=$CACHE/images             # image tars that every node gets
PKI=$STATE/pki
LOGS=$STATE/logs
RUN=$STATE/run                   # pid files, sockets
KUBECONFIG_OUT=$STATE/kubeconfig # for outside the namespaces, through the forwarder
CGROUP=/cadre-cluster-$NAME      # under every hierarchy's root
CG=/sys/fs/cgroup
MARK=CADRE_CLUSTER_MARK          # in the environment of all that we start, so that `down` finds it

# -- addresses: inside the namespaces only, so two clusters may share them -----
CP_IP=10.77.0.1
node_ip() { echo "10.77.0.$((10 + $1))"; }
pod_cidr() { echo "10.244.$1.0/24"; }
MAX_NODES=20
CLUSTER_CIDR=10.244.0.0/16
SERVICE_CIDR=10.96.0.0/16
SERVICE_IP=10.96.0.1
DNS_IP=10.96.0.10
NS_CP=$NAME-cp
ns_node() { echo "$NAME-n$1"; }
node_name() { echo "node$1"; }

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() {
	say "error: $*"
	exit 1
}
# the comment at a script's top is its help
usage() {
	sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2
	exit 2
}

[[ $NAME =~ ^[a-z][a-z0-9-]{0,15}$ ]] ||
	die "CADRE_CLUSTER_NAME=$NAME: use up to 16 of a-z, 0-9 and -, a letter first (it names namespaces and folders)"
[[ $PORT =~ ^[0-9]+$ ]] || die "CADRE_CLUSTER_PORT=$PORT is not a port number"

need_root() {
	[ "$(uname -s)" = Linux ] || die "a cluster needs Linux (namespaces, cgroups); this is $(uname -s). Set KUBECONFIG to a cluster elsewhere instead"
	[ "$(id -u)" = 0 ] || die "a cluster needs root (it makes namespaces, mounts and cgroups): run it as root, or set KUBECONFIG to a cluster that is there already"
}
need_cluster() { [ -s "$KUBECONFIG_OUT" ] || die "no cluster '$NAME' ($STATE is not there): cargo xtask cluster up"; }
need_node() {
	[[ $1 =~ ^[0-9]+$ ]] || die "a node is meant by its number (1, 2, ...), not by '$1'"
	[ -s "$RUN/n$1.init.pid" ] || die "node $1 does not run; running: $(nodes | tr '\n' ' ')"
}

# nsenter, not `ip netns exec`: that one mounts a fresh /sys, and with it
# /sys/fs/cgroup is gone, which kubelet and runc need.
in_cp() { nsenter --net="/run/netns/$NS_CP" "$@"; }
kubectl() { KUBECONFIG=$KUBECONFIG_OUT "$BIN/kubectl" "$@"; }

# node_exec I CMD...: run in node I's namespaces.
node_exec() {
	local i=$1 pid
	shift
	pid=$(cat "$RUN/n$i.init.pid")
	nsenter -t "$pid" --net --mount --uts --ipc --pid -- "$@"
}

# start NAME CMD...: in the background, in a session of its own; log and pid kept.
start() {
	local n=$1
	shift
	env "$MARK=$STATE" setsid "$@" >>"$LOGS/$n.log" 2>&1 </dev/null &
	echo $! >"$RUN/$n.pid"
}

# A zombie is dead too: process 1 of a machine may be late to reap it.
pid_alive() { [[ $(cat "/proc/$1/stat" 2>/dev/null) =~ \)\ [^ZX] ]]; }
alive() { [ -s "$1" ] && pid_alive "$(cat "$1")"; }

# stop PIDFILE [SIGNAL]: ends that one process, waits up to 10 s, then KILL.
stop() {
	local f=$1 pid i
	[ -s "$f" ] || return 0
	pid=$(cat "$f")
	rm -f "$f"
	kill -"${2:-TERM}" "$pid" 2>/dev/null || true
	for ((i = 0; i < 100; i++)); do
		pid_alive "$pid" || return 0
		sleep 0.1
	done
	kill -KILL "$pid" 2>/dev/null || true
}

# wait_for SECONDS WHAT LOG CMD...: poll until CMD succeeds; LOG is shown if it never does.
wait_for() {
	local s=$1 what=$2 log=$3 t0=$SECONDS
	shift 3
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS - t0 >= s)); then
			[ ! -s "$LOGS/$log.log" ] || { say "the end of $log.log:" && tail -n 15 "$LOGS/$log.log" >&2; }
			die "not within $s s: $what"
		fi
		sleep 0.2
	done
}

# wait_all PID...: waits for every one, fails if one of them failed.
wait_all() {
	local p bad=0
	for p in "$@"; do wait "$p" || bad=1; done
	return $bad
}

nodes() { # the numbers of the nodes that are up
	local f
	for f in "$RUN"/n*.init.pid; do
		[ -e "$f" ] || continue
		f=${f##*/n}
		echo "${f%%.*}"
	done | sort -n
}

# The control plane: keys and certificates, the cluster's network, etcd,
# kube-apiserver, kube-controller-manager, kube-scheduler. Sourced by up.
# shellcheck shell=bash

# cert NAME SUBJECT [SUBJECT-ALT-NAMES]: an EC key and a certificate of the CA
cert() {
	local ca=${CA:-ca} n=$1 subj=$2 san=${3:-}
	openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/$n.key" 2>/dev/null
	openssl req -new -key "$PKI/$n.key" -subj "$subj" -out "$PKI/$n.csr"
	openssl x509 -req -in "$PKI/$n.csr" -CA "$PKI/$ca.crt" -CAkey "$PKI/$ca.key" -days 365 \
		-set_serial "0x$(openssl rand -hex 15)" -out "$PKI/$n.crt" 2>/dev/null \
		-extfile <(
			echo "keyUsage=critical,digitalSignature"
			echo "extendedKeyUsage=serverAuth,clientAuth"
			[ -z "$san" ] || echo "subjectAltName=$san"
		)
	rm "$PKI/$n.csr"
}

make_ca() {
	openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/$1.key" 2>/dev/null
	openssl req -x509 -new -key "$PKI/$1.key" -subj "/CN=cadre-cluster-$1" -days 365 -out "$PKI/$1.crt" \
		-addext "keyUsage=critical,digitalSignature,keyCertSign,cRLSign" 2>/dev/null
}

# kubeconfig NAME SERVER OUT: with the certificate NAME, everything embedded
kubeconfig() {
	cat >"$3" <<YAML
apiVersion: v1
kind: Config
current-context: $NAME
contexts: [{name: $NAME, context: {cluster: $NAME, user: $1}}]
clusters:
- name: $NAME
  cluster:
    server: $2
    certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w0 "$PKI/$1.crt")
    client-key-data: $(base64 -w0 "$PKI/$1.key")
YAML
	chmod 600 "$3"
}

make_pki() {
	umask 077
	make_ca ca
	make_ca front-proxy-ca
	cert apiserver "/CN=kube-apiserver" "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:$CP_IP,IP:$SERVICE_IP"
	cert apiserver-kubelet "/O=system:masters/CN=kube-apiserver-kubelet-client"
	CA=front-proxy-ca cert front-proxy "/CN=front-proxy-client"
	cert admin "/O=system:masters/CN=cadre-cluster-admin"
	cert controller-manager "/CN=system:kube-controller-manager"
	cert scheduler "/CN=system:kube-scheduler"
	cert proxy "/CN=system:kube-proxy"
	cert netpol "/CN=cadre-cluster:netpol"
	openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/sa.key" 2>/dev/null
	openssl ec -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub" 2>/dev/null
	kubeconfig admin "https://127.0.0.1:$PORT" "$KUBECONFIG_OUT"
	kubeconfig admin "https://$CP_IP:6443" "$STATE/admin-inside.kubeconfig"
	for c in controller-manager scheduler; do
		kubeconfig $c https://127.0.0.1:6443 "$STATE/$c.kubeconfig"
	done
	for c in proxy netpol; do
		kubeconfig $c "https://$CP_IP:6443" "$STATE/$c.kubeconfig"
	done
	umask 022
}

# One namespace with a bridge is the wire; the control plane lives on it. No
# interface of it leads anywhere else: there is no route out.
up_network() {
	ip netns add "$NS_CP"
	in_cp ip link set lo up
	in_cp ip link add kbr0 type bridge
	in_cp ip addr add "$CP_IP/24" dev kbr0
	in_cp ip link set kbr0 up
	in_cp sysctl -qw net.ipv4.ip_forward=1
}

start_apiserver() {
	# --enable-aggregator-routing: webhooks and APIServices are dialled at their
	# Pods' addresses, so this namespace needs no kube-proxy.
	# shellcheck disable=SC2086 # flags, one word each
	start kube-apiserver nsenter --net="/run/netns/$NS_CP" "$BIN/kube-apiserver" \
		--etcd-servers http://127.0.0.1:2379 \
		--bind-address 0.0.0.0 --secure-port 6443 --advertise-address "$CP_IP" \
		--tls-cert-file "$PKI/apiserver.crt" --tls-private-key-file "$PKI/apiserver.key" \
		--client-ca-file "$PKI/ca.crt" \
		--kubelet-client-certificate "$PKI/apiserver-kubelet.crt" --kubelet-client-key "$PKI/apiserver-kubelet.key" \
		--kubelet-certificate-authority "$PKI/ca.crt" --kubelet-preferred-address-types InternalIP \
		--service-account-issuer https://kubernetes.default.svc.cluster.local \
		--service-account-key-file "$PKI/sa.pub" --service-account-signing-key-file "$PKI/sa.key" \
		--requestheader-client-ca-file "$PKI/front-proxy-ca.crt" --requestheader-allowed-names front-proxy-client \
		--requestheader-extra-headers-prefix X-Remote-Extra- --requestheader-group-headers X-Remote-Group \
		--requestheader-username-headers X-Remote-User \
		--proxy-client-cert-file "$PKI/front-proxy.crt" --proxy-client-key-file "$PKI/front-proxy.key" \
		--enable-aggregator-routing \
		--service-cluster-ip-range "$SERVICE_CIDR" --allow-privileged \
		--authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
		--default-not-ready-toleration-seconds "$EVICT_AFTER" --default-unreachable-toleration-seconds "$EVICT_AFTER" \
		--max-requests-inflight 800 --max-mutating-requests-inflight 400 \
		--profiling=false ${CADRE_CLUSTER_APISERVER_FLAGS:-}
}

wait_apiserver() { wait_for 90 "/readyz of the API server" kube-apiserver kubectl get --raw /readyz; }

up_control_plane() {
	local t0=${EPOCHREALTIME/./}
	# a test cluster need not survive a power cut: no fsync
	start etcd nsenter --net="/run/netns/$NS_CP" "$BIN/etcd" --name "$NAME" --data-dir "$STATE/etcd" --unsafe-no-fsync \
		--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
		--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
		--initial-cluster "$NAME=http://127.0.0.1:2380" --log-level warn \
		--auto-compaction-mode periodic --auto-compaction-retention 5m
	start_apiserver
	start forward-in nsenter --net="/run/netns/$NS_CP" "$BIN/podtool" forward "unix:$RUN/api.sock" "tcp:$CP_IP:6443"
	start forward-out "$BIN/podtool" forward "tcp:127.0.0.1:$PORT" "unix:$RUN/api.sock"
	wait_apiserver
	say "API server ready after $(((${EPOCHREALTIME/./} - t0) / 1000)) ms"
	start kube-controller-manager nsenter --net="/run/netns/$NS_CP" "$BIN/kube-controller-manager" \
		--kubeconfig "$STATE/controller-manager.kubeconfig" \
		--authentication-kubeconfig "$STATE/controller-manager.kubeconfig" \
		--authorization-kubeconfig "$STATE/controller-manager.kubeconfig" \
		--bind-address 127.0.0.1 --leader-elect=false --use-service-account-credentials \
		--root-ca-file "$PKI/ca.crt" --service-account-private-key-file "$PKI/sa.key" \
		--cluster-signing-cert-file "$PKI/ca.crt" --cluster-signing-key-file "$PKI/ca.key" \
		--enable-hostpath-provisioner \
		--node-monitor-period 2s --node-monitor-grace-period "$NODE_GRACE" \
		--kube-api-qps 500 --kube-api-burst 1000 --profiling=false
	start kube-scheduler nsenter --net="/run/netns/$NS_CP" "$BIN/kube-scheduler" \
		--kubeconfig "$STATE/scheduler.kubeconfig" \
		--authentication-kubeconfig "$STATE/scheduler.kubeconfig" \
		--authorization-kubeconfig "$STATE/scheduler.kubeconfig" \
		--bind-address 127.0.0.1 --leader-elect=false \
		--kube-api-qps 500 --kube-api-burst 1000 --profiling=false
	wait_for 60 "the default service account" kube-controller-manager kubectl -n default get serviceaccount default
	kubectl apply -f "$KIT/manifests/netpol-rbac.yaml" -f "$KIT/manifests/storage.yaml" >/dev/null
	say "control plane up after $(((${EPOCHREALTIME/./} - t0) / 1000)) ms"
}

up_dns() {
	kubectl apply -f "$KIT/manifests/coredns.yaml" >/dev/null
	kubectl -n kube-system rollout status deployment/coredns --timeout 90s >/dev/null ||
		die "CoreDNS did not become available: kubectl --kubeconfig $KUBECONFIG_OUT -n kube-system describe pods"
}
